"""One case: every provider in turn, the limit among them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.bench import clock, contention, limits, memory
from fastloss.bench.case import Case, Data, short
from fastloss.bench.cases import data, exact
from fastloss.bench.exact import Exact, errors, scale
from fastloss.bench.providers import Provider, chosen
from fastloss.bench.ratios import add_ratios
from fastloss.bench.steps import Step, step


def run_case(
    case: Case,
    device: str = "cpu",
    repeats: int = 15,
    budget: float = 6.0,
    patterns: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """``repeats`` calls of each provider, fewer if they take longer than ``budget`` seconds together. Calls that shared the
    machine with somebody else are repeated; where that did not help, the provider's entry says ``contended``."""
    inputs = data(case, device)
    tell("float64")
    truth = exact(case, inputs)
    providers, reasons = chosen(case, device, patterns, skip)
    steps: dict[str, Any] = {**limits.limits(case, inputs, device), **limits.references(case, inputs, device)}
    entries: dict[str, dict[str, Any]] = {name: {"name": name} for name in steps}
    times: dict[str, clock.Taken] = {}
    machine = contention.spins(torch.get_num_threads())
    machine.worst = 1.0

    def fail(name: str, error: Exception) -> None:
        """A peer that cannot run a case is reported, not hidden."""
        reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        entries.pop(name, None)

    for provider in providers:
        tell(f"{provider.name}: first call")
        try:
            candidate = step(provider.loss(case), case, inputs)
            was_free = machine.free()
            entry, first = _first_calls(provider, candidate, case, inputs, truth, device, budget)
        except Exception as error:
            fail(provider.name, error)
            continue
        entries[provider.name] = entry
        if first is not None and was_free and machine.free():
            times[provider.name] = clock.Taken([first])
        else:
            steps[provider.name] = candidate
    flush = clock.Flusher(device) if case.cold else lambda: None

    def before() -> None:
        inputs.restore()
        flush()

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    load = os.getloadavg()
    times.update(
        clock.round_robin(steps, device, repeats, budget, before, not case.cold, tell, fail, machine.free)
    )
    torch.compiler.reset()
    for name, entry in entries.items():
        entry.update(clock.summary([seconds / case.calls for seconds in times[name].seconds]))
        if times[name].contended:
            entry["contended"] = True
    missing = [{"name": name, "reason": reason} for name, reason in reasons.items()]
    result = {
        "name": case.name,
        "kind": case.kind,
        "shape": [case.rows, case.dim, case.vocab],
        "dtype": short(case.dtype),
        "logits_bytes": case.logits_bytes,
        "calls": case.calls,
        "gradient_scale": scale(truth),
        "load": list(load),
        "slowdown": machine.worst,
        "providers": [*entries.values(), *missing],
        "run": 0,
    }
    if "*" not in patterns:
        result["only"] = " or ".join(patterns)
    return add_ratios(result)


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
