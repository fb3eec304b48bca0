"""What one step costs with each loss: time in turns, FLOPs counted, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from . import measure
from .stage import Stage


@dataclass(frozen=True)
class Cost:
    """One optimizer step with one loss, measured on the trained model."""

    loss_by: str  # fastloss: which backend, and why
    counted_flops: int  # what the counter saw
    loss_peak: measure.Peak | None
    step_peak: measure.Peak
    step_s: float  # medians over rounds in which the losses take turns
    loss_s: float


def measure_costs(stage: Stage, names: Sequence[str], rounds: int = 5) -> dict[str, Cost]:
    device = next(stage.model.parameters()).device
    times = in_turns(stage, names, rounds)
    costs = {}
    with torch.random.fork_rng():
        for name in names:
            step = partial(stage.step(name, {}), 0)
            counted = measure.count_flops(step)
            alone = stage.loss_alone(name) if stage.loss_alone else None
            loss_peak = measure.peak_bytes(_clean(stage, alone), device) if alone else None
            step_peak = measure.peak_bytes(_clean(stage, step), device)
            costs[name] = Cost(stage.loss_by(name), counted, loss_peak, step_peak, *times[name])
    stage.model.zero_grad(set_to_none=True)
    return costs


def in_turns(stage: Stage, names: Sequence[str], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of forward and backward, and of the loss in it: each round takes the first step with each.

    Two runs lie minutes apart, and another job beside one of them would be taken for a difference of the losses.
    """
    device = next(stage.model.parameters()).device
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with torch.random.fork_rng():
        for round_ in range(rounds + 1):
            for name in names:
                step = stage.step(name, {})
                stage.model.zero_grad(set_to_none=True)
                measure.synchronize(device)
                started = time.perf_counter()
                metrics = step(0)
                measure.synchronize(device)
                if round_:  # the first one warms up
                    seen[name].append((time.perf_counter() - started, float(metrics["loss_s"])))
    stage.model.zero_grad(set_to_none=True)
    medians = {name: list(map(statistics.median, zip(*rows, strict=True))) for name, rows in seen.items()}
    return {name: (step_s, loss_s) for name, (step_s, loss_s) in medians.items()}


def _clean(stage: Stage, run: Callable[[], object]) -> Callable[[], None]:
    """Without gradients before and after: the gradients that ``run`` makes are part of its memory."""

    def clean() -> None:
        stage.model.zero_grad(set_to_none=True)
        run()
        stage.model.zero_grad(set_to_none=True)

    return clean
