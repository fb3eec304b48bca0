"""Time: providers in turn, so that drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

# Larger than any last-level cache: what the cold cases write before each call.
FLUSH_BYTES = 1 << 29
# Seconds; a call longer than this is not warmed up by another one.
LONG = 0.5


class Timed(Protocol):
    def prepare(self) -> None: ...
    def __call__(self) -> object: ...


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Flusher:
    """Evicts the caches, the same for every provider, outside the timed region."""

    def __init__(self, device: str):
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1.0)


def once(step: Timed, device: str, before: Callable[[], None]) -> float:
    """Seconds of one call; what must not count happens before it."""
    step.prepare()
    before()
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def round_robin(
    steps: Mapping[str, Timed],
    device: str,
    repeats: int,
    budget: float,
    before: Callable[[], None],
    back_to_back: bool,
    tell: Callable[[str], None] = lambda name: None,
    fail: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call. A provider whose next call would pass its ``budget`` (seconds) stops there, after one
    at least. ``back_to_back``: each turn is a call that warms the caches and a call that counts. One that raises is told
    to ``fail`` and left out from there on."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seen = times.get(name)
            if seen is None or (seen and sum(seen) + seen[-1] > budget):
                continue
            tell(name)
            warms = back_to_back and (not seen or seen[-1] < LONG)
            try:
                seconds = once(step, device, before)
                if warms and seconds < LONG:
                    seconds = once(step, device, before)
            except Exception as error:
                if fail is None:
                    raise
                fail(name, error)
                del times[name]
                continue
            seen.append(seconds)
            step.prepare()
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, least, interquartile range (0 for a single call), number of calls."""
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    else:
        low = high = times[0]
    return {"median": statistics.median(times), "min": min(times), "iqr": high - low, "n": len(times)}
