"""``fastloss bench --calibrate``: which schedule of the linear head is the faster on this CPU, measured, as the table that fastloss reads."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastloss
from fastloss.bench import clock, contention, internals
from fastloss.bench.machine import machine

SHAPES = ((1024, 512, 32000), (512, 2048, 16000))
QUICK = ((40, 16, 500),)
GRADIENTS = ("all", "frozen weight", "none")
MARGIN = (
    1.03  # chunks of rows must be faster by more than this, since blocks of the vocabulary take less memory
)


class _Call:
    """A call of the head by one schedule, as bench/clock.py times it."""

    def __init__(self, schedule: str, dtype: torch.dtype, shape: tuple[int, int, int], gradients: str):
        rows, dim, vocab = shape
        numbers = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, dim, generator=numbers, dtype=torch.float32, device="cpu").to(dtype)
        weight = (
            torch.randn(vocab, dim, generator=numbers, dtype=torch.float32, device="cpu").to(dtype) / dim**0.5
        )
        self.hidden = hidden.requires_grad_(gradients != "none")
        self.weight = weight.detach().requires_grad_(gradients == "all")
        self.target = torch.randint(0, vocab, (rows,), generator=numbers, dtype=torch.int64, device="cpu")
        self.schedule = schedule

    def prepare(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def __call__(self) -> None:
        with internals.only(self.schedule):
            loss = fastloss.linear_cross_entropy(self.hidden, self.weight, self.target, backend="cpu")
            if loss.requires_grad:
                loss.backward()

    def taken(self) -> str:
        with internals.only(self.schedule):
            plan = fastloss.explain(
                fastloss.linear_cross_entropy, self.hidden, self.weight, self.target, backend="cpu"
            )
        return str(plan["schedule"])


def measure(quick: bool, repeats: int, budget: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Times of both schedules, in turn, and the faster by dtype.

    Raises:
        RuntimeError: the CPU kernels are not there.
    """
    if internals.cpu_instruction_sets() is None:
        raise RuntimeError("the native CPU module is not there: nothing to calibrate")
    free = contention.spins(torch.get_num_threads())
    about = machine("cpu")
    found: dict[str, Any] = {
        "kind": internals.cpu_kind(),
        "cpu": about["cpu"],
        "threads": torch.get_num_threads(),
        "versions": about["versions"],
        "faster": {},
        "measured": [],
        "contended": False,
    }
    for dtype in internals.CALIBRATED:
        name, ratios = str(dtype).removeprefix("torch."), []
        for shape in QUICK if quick else SHAPES:
            for gradients in GRADIENTS:
                calls = {s: _Call(s, dtype, shape, gradients) for s in internals.SCHEDULES}
                if [call.taken() for call in calls.values()] != list(calls):
                    continue  # one schedule is all that this CPU has for it
                tell(f"{name}, gradients: {gradients}, {list(shape)}")
                times = clock.round_robin(calls, "cpu", repeats, budget, lambda: None, True, free=free.free)
                blocks, chunks = (1e3 * statistics.median(taken.seconds) for taken in times.values())
                found["contended"] |= any(taken.contended for taken in times.values())
                ratios.append(chunks / blocks)
                found["measured"].append(
                    {
                        "dtype": name,
                        "gradients": gradients,
                        "shape": list(shape),
                        "blocks_ms": blocks,
                        "chunks_ms": chunks,
                    }
                )
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            found["faster"][name] = internals.SCHEDULES[mean < 1 / MARGIN]
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the printed table."""
    return [
        (
            m["dtype"], m["gradients"], " x ".join(map(str, m["shape"])), f"{m['blocks_ms']:.1f}",
            f"{m['chunks_ms']:.1f}", f"{m['chunks_ms'] / m['blocks_ms']:.2f}",
        )
        for m in found["measured"]
    ]  # fmt: skip


def write(found: dict[str, Any], out: Path | None) -> Path:
    """The file that fastloss reads, at ``out`` or where it looks for one."""
    path = out or internals.calibration_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in found.items() if name != "contended"}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return path
