"""Time, memory and error of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastloss.bench.cases import Case, Data

FLUSH_BYTES = 1 << 29  # larger than any last-level cache


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Flusher:
    """Evicts the caches, the same for every provider, outside the timed region."""

    def __init__(self, device: str):
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1.0)


def time_round_robin(
    steps: dict[str, Callable[[], object]],
    device: str,
    repeats: int,
    budget: float,
    before: Callable[[], None] | None,
) -> dict[str, list[float]]:
    """Seconds of each call, providers in turn so that drift hits all alike; a slow provider gets fewer calls."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    for _ in range(repeats):
        for name, step in steps.items():
            if times[name] and spent[name] + times[name][-1] > budget:
                continue
            if before is not None:
                before()
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
            spent[name] += times[name][-1]
    return times


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "iqr": ordered[-1 - quarter] - ordered[quarter],
        "n": len(ordered),
    }


def peak_extra_bytes(step: Callable[[], object], device: str) -> int:
    """Highest number of bytes allocated during the step over those before it.

    CPU: every allocation and release of PyTorch's allocator, from the profiler; GPU: the allocator's own peak.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def limit(case: Case, data: Data, device: str) -> dict[str, Callable[[], object]]:
    """The physical limit: a copy of the same bytes, or the GEMMs alone (in the faster of the dtype and float32)."""
    if case.kind == "row":
        assert data.logits is not None
        source, copy = data.logits.detach().clone(), torch.empty_like(data.logits)
        return {"limit: copy": lambda: copy.copy_(source)}
    assert data.hidden is not None and data.weight is not None
    out: dict[str, Callable[[], object]] = {}
    for dtype in dict.fromkeys((case.dtype, torch.float32)):
        if dtype != case.dtype and device == "cuda":
            continue
        out[f"limit: GEMMs {str(dtype).removeprefix('torch.')}"] = _gemms(
            data.hidden.detach().to(dtype), data.weight.detach().to(dtype), case.frozen
        )
    return out


def _gemms(hidden: Tensor, weight: Tensor, frozen: bool) -> Callable[[], object]:
    z = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.t(), out=z)
        torch.mm(z, weight, out=d_hidden)
        if not frozen:
            torch.mm(z.t(), hidden, out=d_weight)

    return step


def gradient_bytes(case: Case) -> int:
    """Bytes of the gradients that the step leaves behind."""
    if case.kind == "row":
        return 0 if case.inplace else case.logits_bytes
    size = case.rows * case.dim + (0 if case.frozen else case.vocab * case.dim)
    return size * case.dtype.itemsize


def exact_loss(case: Case, data: Data) -> float:
    """The loss in float64."""
    with torch.no_grad():
        if case.kind == "row":
            assert data.logits is not None
            blocks = zip(data.logits.split(256), data.target.split(256), strict=True)
            total = sum(
                float(torch.nn.functional.cross_entropy(x.double(), t, reduction="sum")) for x, t in blocks
            )
        else:
            assert data.hidden is not None and data.weight is not None
            w = data.weight.double()
            total = sum(
                float(torch.nn.functional.cross_entropy(h.double() @ w.t(), t, reduction="sum"))
                for h, t in zip(data.hidden.split(128), data.target.split(128), strict=True)
            )
        return total / int((data.target != -100).sum())
