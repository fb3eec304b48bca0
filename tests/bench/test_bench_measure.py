"""The clock and the memory meter, on steps whose cost is known."""

from __future__ import annotations

import time

import pytest
import torch

from fastloss.bench import clock, contention, memory

MIB = 1 << 20


class Sleep:
    def __init__(self, seconds: float):
        self.seconds, self.calls, self.prepared = seconds, 0, 0

    def prepare(self) -> None:
        self.prepared += 1

    def __call__(self) -> None:
        self.calls += 1
        time.sleep(self.seconds)


def test_a_known_allocation_is_found() -> None:
    kept: list[torch.Tensor] = []
    found = memory.peak(lambda: kept.append(torch.ones(16 * MIB) + torch.ones(16 * MIB)), "cpu")
    assert 192 * MIB <= found.allocated <= 192 * MIB + 4096  # two operands and their sum, 64 MiB each
    assert found.resident is None or 190 * MIB <= found.resident <= 220 * MIB


def test_native_memory_shows_in_the_resident_set() -> None:
    found = memory.peak(lambda: bytearray(64 * MIB), "cpu")
    if found.resident is None:
        pytest.skip("no /proc/self/clear_refs")
    assert found.allocated < MIB and found.resident >= 60 * MIB


def test_turns_budget_and_what_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    fast, slow = Sleep(0.001), Sleep(0.05)
    order: list[str] = []
    flushed: list[float] = []

    def before() -> None:
        flushed.append(time.perf_counter())
        time.sleep(0.02)

    times = clock.round_robin({"fast": fast, "slow": slow}, "cpu", 4, 0.12, before, False, order.append)
    assert order[:4] == ["fast", "slow", "fast", "slow"]
    seconds = {name: taken.seconds for name, taken in times.items()}
    assert len(seconds["fast"]) == 4 and len(seconds["slow"]) == 2 and slow.calls == 2
    assert len(flushed) == 6 and fast.prepared == 8
    assert seconds["fast"] == pytest.approx([0.001] * 4) and seconds["slow"] == pytest.approx([0.05] * 2)


def test_back_to_back_discards_the_call_that_warms() -> None:
    step = Sleep(0.0)
    times = clock.round_robin({"step": step}, "cpu", 3, 1.0, lambda: None, True)
    assert len(times["step"].seconds) == 3 and step.calls == 6


def test_one_that_raises_later_is_left_out() -> None:
    class Second(Sleep):
        def __call__(self) -> None:
            super().__call__()
            if self.calls > 1:
                raise RuntimeError("out of memory")

    failed: dict[str, Exception] = {}
    steps = {"good": Sleep(0.0), "bad": Second(0.0)}
    times = clock.round_robin(steps, "cpu", 3, 1.0, lambda: None, False, fail=failed.__setitem__)
    assert (
        len(times["good"].seconds) == 3 and set(times) == {"good"} and str(failed["bad"]) == "out of memory"
    )
    assert steps["bad"].calls == 2


def test_summary() -> None:
    found = clock.summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found == {"median": 3.0, "min": 1.0, "iqr": 2.0, "n": 5}
    assert clock.summary([2.0])["iqr"] == 0


class Looks:
    """A machine that is free as told, then always."""

    def __init__(self, *answers: bool):
        self.answers, self.count = list(answers), 0

    def __call__(self) -> bool:
        self.count += 1
        return self.answers.pop(0) if self.answers else True


def _rounds(monkeypatch: pytest.MonkeyPatch, free: Looks, repeats: int = 4) -> tuple[clock.Taken, Sleep]:
    monkeypatch.setattr(clock, "SPAN", 0.0)  # looks after each call
    step = Sleep(0.0)
    times = clock.round_robin({"step": step}, "cpu", repeats, 1.0, lambda: None, False, free=free)
    return times["step"], step


def test_a_call_beside_somebody_else_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, step = _rounds(monkeypatch, Looks(True, True, False, True))
    assert len(taken.clean) == 4 and len(taken.doubtful) == 2 and step.calls == 6
    assert not taken.contended and taken.seconds == taken.clean


def test_a_machine_that_is_never_free_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, step = _rounds(monkeypatch, Looks(*[False] * 100))
    assert taken.contended and step.calls == clock.TRIES * 4 == len(taken.seconds) and not taken.clean


def test_a_repeated_call_that_was_all_that_was_asked_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, step = _rounds(monkeypatch, Looks(True, False, True, True), repeats=1)
    assert (
        step.calls == 3 and len(taken.doubtful) == 2 and taken.seconds == taken.clean and not taken.contended
    )


def test_one_look_covers_the_calls_of_a_span() -> None:
    looks = Looks()
    clock.round_robin({"step": Sleep(0.0)}, "cpu", 50, 1.0, lambda: None, False, free=looks)
    assert looks.count <= 3


def test_spins_notice_a_thread_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told times: a free machine, a core that is shared, a machine that slowed down under threads that run all the time."""
    answers = [(0.02, 0.02)] * 10
    monkeypatch.setattr(contention, "_spin", lambda: answers.pop())
    monkeypatch.setattr(contention.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    spins = contention.Spins(2)
    answers[:] = [(0.02, 0.02), (0.021, 0.021)]
    assert spins.free() and spins.worst == pytest.approx(1.05)
    answers[:] = [(0.02, 0.02), (0.04, 0.02)]
    assert not spins.free() and spins.worst == pytest.approx(2.0)
    answers[:] = [(0.03, 0.03), (0.03, 0.03)]
    assert not spins.free()


def test_spins_measure_work_of_their_own() -> None:
    wall, own = contention._spin()
    assert own > 0 and wall > 1e-3  # some milliseconds of work on any machine
