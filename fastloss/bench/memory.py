"""Peak memory of a call."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastloss.bench.clock import synchronize

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """Highest level during a call over the level before it, in bytes."""

    allocated: int  # PyTorch's allocator
    resident: (
        int | None
    )  # the process's resident set: also what native code takes from malloc; None: not known


def peak(step: Callable[[], object], device: str) -> Peak:
    """CPU: every allocation and release of PyTorch's allocator, from the profiler, and the kernel's high-water mark of
    the resident set. GPU: the caching allocator's own peak."""
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronize(device)
        return Peak(torch.cuda.max_memory_allocated() - before, None)
    levels: list[int] = []
    resident = _resident_peak(lambda: levels.append(_allocated_peak(step)))
    return Peak(levels[0], resident)


def _allocated_peak(step: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profiler.start()
    try:
        step()
    finally:
        with _quiet():
            profiler.stop()
    kineto: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's native code writes a line at each start and stop, to the file descriptors themselves."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        for target, source in zip((1, 2), saved):
            os.dup2(source, target)
            os.close(source)
        os.close(null)


def _resident_peak(step: Callable[[], object]) -> int | None:
    """The step's own high-water mark. Free heap is given back first, so that its reuse counts."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")  # the mark falls to what is resident now
        before = _status("VmRSS")
    except OSError:
        step()
        return None
    step()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", STATUS.read_text())
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return int(found.group(1)) * 1024
