"""One case: every provider in turn, the limit among them."""

from __future__ import annotations

from typing import Any

import torch

from fastloss.bench import measure
from fastloss.bench.cases import Case, data
from fastloss.bench.providers import providers


def run_case(case: Case, device: str = "cpu", repeats: int = 9, budget: float = 6.0) -> dict[str, Any]:
    inputs = data(case, device)
    exact = measure.exact_loss(case, inputs)
    found = providers(case, inputs)
    limits = measure.limit(case, inputs, device)
    steps: dict[str, Any] = {**limits, **{n: s for n, s in found.items() if not isinstance(s, str)}}
    reasons = {n: s for n, s in found.items() if isinstance(s, str)}
    source = inputs.logits.detach().clone() if case.inplace and inputs.logits is not None else None

    def restore() -> None:
        """Outside the timed region, for every provider alike: in-place losses ate their logits."""
        if source is not None:
            assert inputs.logits is not None
            inputs.logits.data.copy_(source)

    errors, extra = {}, {}
    for name in list(steps):
        if name.startswith("limit"):
            continue
        try:
            restore()
            errors[name] = abs(float(steps[name]()) - exact)  # also the warm-up
            restore()
            peak = measure.peak_extra_bytes(steps[name], device)
            extra[name] = max(0, peak - measure.gradient_bytes(case))
        except Exception as error:  # a peer that cannot run a case is reported, not hidden
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del steps[name]
    flusher = measure.Flusher(device) if case.cold else None

    def before() -> None:
        restore()
        if flusher is not None:
            flusher()

    if case.name == "tiny":  # too short for one call's clock
        steps = {name: _many(step) for name, step in steps.items()}
    times = measure.time_round_robin(
        steps, device, repeats, budget, before if case.cold or source is not None else None
    )
    figures = {name: measure.summary(t) for name, t in times.items()}
    floor = min(figures[name]["median"] for name in limits)
    ours = min((f["median"] for n, f in figures.items() if n.startswith("fastloss")), default=0.0)
    out: list[dict[str, Any]] = []
    for name, figure in figures.items():
        entry = {"name": name, **figure, "times": times[name], "over_limit": figure["median"] / floor}
        if name in errors:
            entry.update(error=errors[name], extra_bytes=extra[name])
        if ours and not name.startswith(("fastloss", "limit")):
            entry["fastloss_speedup"] = figure["median"] / ours
        out.append(entry)
    out += [{"name": name, "reason": reason} for name, reason in reasons.items()]
    torch.compiler.reset()
    return {"name": case.name, "logits_bytes": case.logits_bytes, "providers": out}


def _many(step: Any, calls: int = 200) -> Any:
    def repeated() -> None:
        for _ in range(calls):
            step()

    return repeated
