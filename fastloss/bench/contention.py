"""Is somebody else running? Every thread does the same small work, which takes longest where a core is shared.

A call of two threads on two cores, one of them shared with another process, is not a little slower but many times: its
threads wait for each other. So a time counts only if the machine was free before and after it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

# Of SHA-256, in the CPU's registers, about 20 ms: longer than a scheduler's slice. hashlib gives the GIL away meanwhile.
ROUNDS = 100_000
SLOWER = (
    1.35  # than the fastest: somebody else is running; what a clock that slows down under load stays below
)
SHARE = 0.85  # of a core's time that a thread got, at least


def _spin() -> tuple[float, float]:
    start, own = time.perf_counter(), time.thread_time()
    hashlib.pbkdf2_hmac("sha256", b"", b"", ROUNDS)
    return time.perf_counter() - start, time.thread_time() - own


class Spins:
    """Measures on ``threads`` threads at once (no more than there are cores for them), and remembers the fastest: what
    the machine can do when it is free."""

    def __init__(self, threads: int):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = min(threads, cores)
        self.pool = ThreadPoolExecutor(self.threads)
        self.fastest = min(self._slowest()[0] for _ in range(5))
        self.worst = 1.0

    def _slowest(self) -> tuple[float, float]:
        """Seconds of the thread that took longest, and the least share of a core that one got."""
        times = [future.result() for future in [self.pool.submit(_spin) for _ in range(self.threads)]]
        return max(wall for wall, _ in times), min(own / wall for wall, own in times)

    def free(self) -> bool:
        """Whether all threads had a core each, now."""
        wall, share = self._slowest()
        self.fastest = min(self.fastest, wall)
        slower = max(wall / self.fastest, 1.0 / share if share < SHARE else 1.0)
        self.worst = max(self.worst, slower)
        return slower <= SLOWER and share >= SHARE


@functools.cache
def spins(threads: int) -> Spins:
    """One for the whole run, so that a case in which the machine is never free is measured against another."""
    return Spins(threads)
