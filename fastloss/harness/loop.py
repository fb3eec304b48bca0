"""The loop every stage shares. A stage is a step function: it makes gradients and returns what to log."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from . import parallel
from .badsteps import Watch

Metrics = dict[str, float | Tensor]
StepFn = Callable[[int], Metrics]  # step -> at least "loss" and "tokens"; leaves gradients in the parameters


def make_optimizer(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = []
    for alike in parallel.alike(parameters):
        groups.append({"params": [p for p in alike if p.ndim >= 2], "weight_decay": weight_decay})
        groups.append({"params": [p for p in alike if p.ndim < 2], "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=parameters[0].device.type in ("cpu", "cuda"))


def cosine(step: int, *, steps: int, peak: float, warmup: int, least: float) -> float:
    """Linear warm-up to ``peak``, then half a cosine down to ``least · peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * share)))


def run_steps(
    step_fn: StepFn,
    optimizer: torch.optim.Optimizer,
    *,
    first: int,
    last: int,
    lr_at: Callable[[int], float],
    clip: float = 0.0,
    log: Callable[[dict[str, Any]], None],
    save: Callable[[int], None],
    save_every: int = 0,
    watch: Watch | None = None,
) -> int:
    """Steps ``first`` to ``last - 1``; returns how many are done: fewer than ``last`` if a signal came.

    Of a step that ``watch`` finds bad no update is made: the run stops, or goes on with the next step's data.
    """
    watch = watch or Watch()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with StopSignal() as stop:
        for step in range(first, last):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step)
            optimizer.zero_grad(set_to_none=True)
            metrics = step_fn(step)
            parallel.sum_gradients(parameters)
            norm = clip_gradients(parameters, clip)
            row: dict[str, Any] = {"step": step, **{key: float(value) for key, value in metrics.items()}}
            bad = watch.judge(row["loss"], float(norm))
            error = watch.stops(step, bad) if bad else None
            if not bad:
                optimizer.step()
            row |= {"lr": lr_at(step), "grad_norm": float(norm), "step_s": time.perf_counter() - started}
            log(row | ({"bad": bad, "skipped": error is None} if bad else {}))
            if error:
                raise error
            done, stopped = step + 1, parallel.any_of(stop.requested)
            if done == last or stopped or (save_every and done % save_every == 0):
                save(done)
            if stopped:
                return done
    return last


def clip_gradients(parameters: list[Tensor], clip: float) -> Tensor:
    """Scaled down to the norm ``clip``, 0 for no scaling; the norm before, of the gradients of all shards."""
    groups = parallel.alike(parameters)
    grads = [[p.grad for p in alike if p.grad is not None] for alike in groups]
    norms = [parallel.whole(nn.utils.get_total_norm(some)) for some in grads]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for alike in groups:
        nn.utils.clip_grads_with_norm_(alike, clip or math.inf, norm)
    return norm


class StopSignal:
    """The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint; the second at once."""

    requested = False

    def __enter__(self) -> StopSignal:
        self._before: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
