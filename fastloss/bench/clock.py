"""Time: providers in turn, so that drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

# Larger than any last-level cache: what the cold cases write before each call.
FLUSH_BYTES = 1 << 29
# Seconds; a call longer than this is not warmed up by another one.
LONG = 0.5
# Seconds after which it is looked again whether the machine is free.
SPAN = 0.1
TRIES = 3
ENOUGH = 3  # calls on a free machine


class Timed(Protocol):
    def prepare(self) -> None: ...
    def __call__(self) -> object: ...


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Flusher:
    """Evicts the caches, the same for every provider, outside the timed region."""

    def __init__(self, device: str):
        self.buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1.0)


def once(step: Timed, device: str, before: Callable[[], None]) -> float:
    """Seconds of one call; what must not count happens before it. On a GPU, of its own clock: from the first kernel that
    the call may launch to the end of its last one."""
    step.prepare()
    before()
    synchronize(device)
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        step()
        events[1].record()
        synchronize(device)
        return events[0].elapsed_time(events[1]) / 1e3
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


@dataclass
class Taken:
    """Seconds of a provider's calls: while the machine was free, and while it was not."""

    clean: list[float] = field(default_factory=list)
    doubtful: list[float] = field(default_factory=list)
    contended: bool = False  # too few calls had the machine for themselves, however often they were repeated

    @property
    def seconds(self) -> list[float]:
        return self.clean + self.doubtful if self.contended else self.clean


def round_robin(
    steps: Mapping[str, Timed],
    device: str,
    repeats: int,
    budget: float,
    before: Callable[[], None],
    back_to_back: bool,
    tell: Callable[[str], None] = lambda name: None,
    fail: Callable[[str, Exception], None] | None = None,
    free: Callable[[], bool] = lambda: True,
) -> dict[str, Taken]:
    """``repeats`` calls of each. A provider whose next call would pass its ``budget`` (seconds) stops there, after one
    at least. ``back_to_back``: each turn is a call that warms the caches and a call that counts. One that raises is told
    to ``fail`` and left out from there on. A call counts if the machine was ``free`` before and after it; one that doesn't
    is repeated, until that has cost TRIES times the calls or the budget."""
    taken = {name: Taken() for name in steps}
    open_calls: list[tuple[str, float]] = []  # since the machine was last looked at
    was_free, looked = free(), time.perf_counter()

    def look() -> None:
        nonlocal was_free, looked
        is_free, looked = free(), time.perf_counter()
        for name, seconds in open_calls:
            (taken[name].clean if was_free and is_free else taken[name].doubtful).append(seconds)
        open_calls.clear()
        was_free = is_free

    def counted(name: str) -> list[float]:
        return taken[name].clean + [seconds for other, seconds in open_calls if other == name]

    def unfinished(name: str) -> bool:
        calls = counted(name)
        return not calls or (len(calls) < repeats and sum(calls) + calls[-1] <= budget)

    def wants(name: str) -> bool:
        tried = counted(name) + taken[name].doubtful
        return unfinished(name) and len(tried) < TRIES * repeats and sum(tried) <= TRIES * budget

    while True:
        turn = [name for name in taken if wants(name)]
        if not turn:
            if not open_calls:
                for name, found in taken.items():
                    found.contended = len(found.clean) < ENOUGH and unfinished(name)
                return taken
            look()
            continue
        for name in turn:
            tell(name)
            step = steps[name]
            seen = counted(name) or taken[name].doubtful
            warms = back_to_back and (not seen or seen[-1] < LONG)
            try:
                seconds = once(step, device, before)
                if warms and seconds < LONG:
                    seconds = once(step, device, before)
            except Exception as error:
                if fail is None:
                    raise
                fail(name, error)
                open_calls[:] = [call for call in open_calls if call[0] != name]
                del taken[name]
                continue
            open_calls.append((name, seconds))
            step.prepare()
            if time.perf_counter() - looked > SPAN:
                look()


def summary(times: list[float]) -> dict[str, float]:
    """Median, least, interquartile range (0 for a single call), number of calls."""
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    else:
        low = high = times[0]
    return {"median": statistics.median(times), "min": min(times), "iqr": high - low, "n": len(times)}
