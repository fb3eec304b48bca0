"""One case: every provider in turn, the limit among them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss.bench import clock, limits, memory
from fastloss.bench.case import Case, Data, short
from fastloss.bench.cases import data, exact
from fastloss.bench.exact import Exact, errors, scale
from fastloss.bench.providers import Provider, chosen
from fastloss.bench.steps import Step, step

EAGER = "torch eager"


def run_case(
    case: Case,
    device: str = "cpu",
    repeats: int = 15,
    budget: float = 6.0,
    pattern: str = "*",
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """``repeats`` calls of each provider, fewer if they take longer than ``budget`` seconds together."""
    inputs = data(case, device)
    tell("float64")
    truth = exact(case, inputs)
    providers, reasons = chosen(case, device, pattern)
    steps: dict[str, Any] = {**limits.limits(case, inputs, device), **limits.references(case, inputs, device)}
    entries: dict[str, dict[str, Any]] = {name: {"name": name} for name in steps}
    times: dict[str, list[float]] = {}

    def fail(name: str, error: Exception) -> None:
        """A peer that cannot run a case is reported, not hidden."""
        reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        entries.pop(name, None)

    for provider in providers:
        tell(f"{provider.name}: first call")
        try:
            candidate = step(provider.loss(case), case, inputs)
            entry, first = _first_calls(provider, candidate, case, inputs, truth, device, budget)
        except Exception as error:
            fail(provider.name, error)
            continue
        entries[provider.name] = entry
        if first is None:
            steps[provider.name] = candidate
        else:
            times[provider.name] = [first]
    flush = clock.Flusher(device) if case.cold else lambda: None

    def before() -> None:
        inputs.restore()
        flush()

    gc.collect()
    load = os.getloadavg()
    times.update(clock.round_robin(steps, device, repeats, budget, before, not case.cold, tell, fail))
    torch.compiler.reset()
    return {
        "name": case.name,
        "kind": case.kind,
        "shape": [case.rows, case.dim, case.vocab],
        "dtype": short(case.dtype),
        "logits_bytes": case.logits_bytes,
        "calls": case.calls,
        "gradient_scale": scale(truth),
        "load": list(load),
        **_figures(case, entries, times, reasons),
    }


def _first_calls(
    provider: Provider,
    candidate: Step,
    case: Case,
    inputs: Data,
    truth: Exact,
    device: str,
    budget: float,
) -> tuple[dict[str, Any], float | None]:
    """Error and peak memory, and the time of a call so long that it must stand for all (else None)."""
    values: list[Tensor] = []
    seconds: list[float] = []

    def measured() -> None:
        start = clock.time.perf_counter()
        values.append(candidate())
        clock.synchronize(device)
        seconds.append(clock.time.perf_counter() - start)

    def call() -> memory.Peak:
        candidate.prepare()
        inputs.restore()
        return memory.peak(measured, device)

    if provider.compiles or device == "cuda":  # compiles, autotunes: not what a step costs
        inputs.restore()
        candidate()
    peak = call()
    if seconds[0] < budget / 2:  # the first call may have filled caches that stay: the second one counts
        peak = call()
    entry = {
        "name": provider.name,
        "errors": errors(truth, values[-1], {} if case.nograd else candidate.gradients()),
        "extra_bytes": max(0, peak.allocated - inputs.gradient_bytes),
        "resident_bytes": None if peak.resident is None else max(0, peak.resident - inputs.gradient_bytes),
    }
    candidate.prepare()
    inputs.restore()
    return entry, seconds[0] if len(seconds) == 1 else None


def _figures(
    case: Case, entries: dict[str, dict[str, Any]], times: dict[str, list[float]], reasons: dict[str, str]
) -> dict[str, Any]:
    for name, entry in entries.items():
        entry["times"] = [seconds / case.calls for seconds in times[name]]
        entry.update(clock.summary(entry["times"]))
    floors = {n: e["median"] for n, e in entries.items() if n.startswith(limits.PREFIX)}
    if not floors and EAGER in entries:
        floors = {EAGER: entries[EAGER]["median"]}
    floor = min(floors, key=floors.__getitem__, default=None)
    kept = min((e["median"] for n, e in entries.items() if n.startswith(limits.KEPT)), default=None)
    ours = min((e["median"] for n, e in entries.items() if n.startswith("fastloss")), default=None)
    for name, entry in entries.items():
        if floor is not None:
            entry["over_limit"] = entry["median"] / floors[floor]
        if kept is not None:
            entry["over_kept"] = entry["median"] / kept
        if name.startswith((limits.PREFIX, limits.KEPT, limits.CLONE)):
            continue
        if EAGER in entries:
            entry["speedup_over_eager"] = entries[EAGER]["median"] / entry["median"]
        if ours is not None and not name.startswith("fastloss"):
            entry["fastloss_speedup"] = entry["median"] / ours
    missing = [{"name": name, "reason": reason} for name, reason in reasons.items()]
    return {"limit": floor, "providers": [*entries.values(), *missing]}
