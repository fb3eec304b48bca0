"""A divergence of two models' distributions: from two tensors of logits, and from two linear heads a chunk of rows at a time.

The student's and the teacher's logits of a chunk are made one after the other (1 GEMM each), the row kernel overwrites the
student's with their gradient, and that goes into d hidden and d weight (1 GEMM each).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import head as heads
from fastloss.engine.contract import Backend
from fastloss.engine.head import Schedule
from fastloss.engine.head_rows import count_gemms
from fastloss.engine.head_types import NOTHING, Grads, Head, Needs
from fastloss.tables import LSE_PARTS, DistillationOptions, RowOptions


class LogSums(NamedTuple):
    """The lse_parts that a row's divergence needs, acc ``[rows, 2]``."""

    student: Tensor
    teacher: Tensor
    hard: Tensor | None  # of the student's logits at temperature 1; None: no hard loss


def log_sums(
    backend: Backend,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    options: DistillationOptions,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> LogSums:
    """Of ``logits [rows, V]`` and ``teacher_logits [rows, V]``."""

    def of(x: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        row = RowOptions(options.ignore_index, scale)
        return backend.row_stats(x, target, row, want=(LSE_PARTS,), bias=bias)[LSE_PARTS]

    student = of(logits, options.scale, bias)
    hard = None
    if options.hard_loss_coef:
        hard = student if options.scale == 1.0 else of(logits, 1.0, bias)
    return LogSums(student, of(teacher_logits, options.teacher_scale, teacher_bias), hard)


def of_heads(
    head: Head,
    teacher: Head,
    needs: Needs,
    target: Tensor | None,
    factors: Tensor | None,
    options: DistillationOptions,
    schedule: Schedule,
    keep: Tensor | None,
) -> tuple[Tensor, Grads]:
    """The sums ``[rows, 8]`` (fastloss.tables.DISTILLATION_SUMS) of all rows, and the gradients of Σ factors · loss.
    ``keep``: :func:`fastloss.engine.head.kept_rows`."""
    target, factors = heads.pick(target, keep), heads.pick(factors, keep)
    backend, outs = head.backend, []
    # Once the student's pass hides its GEMMs from dispatch modes, the teacher's would not be counted.
    count_gemms(teacher, teacher.hidden.shape[0] if keep is None else keep.numel(), 1)
    with (
        heads.begin(head, needs, keep, schedule) as run,
        heads.begin(teacher, NOTHING, keep, schedule) as frozen,
    ):
        for part, theirs in zip(run.parts(), frozen.parts(), strict=True):
            own, classes = part.logits, part.of(target)
            common = torch.promote_types(own.dtype, theirs.logits.dtype)
            z, y = own.to(common), theirs.logits.to(common)
            sums = log_sums(backend, z, y, classes, options, head.bias, teacher.bias)
            out = backend.row_divergence(
                z, y, classes, options, lse_parts=sums.student, teacher_lse_parts=sums.teacher, hard_lse_parts=sums.hard,
                factors=part.of(factors), grad=z if needs else None, bias=head.bias, teacher_bias=teacher.bias,
            )  # fmt: skip
            outs.append({"sums": out})
            if needs and z is not own:
                own.copy_(z)
            part.add_gradients()
        return run.collect(outs)["sums"], run.grads()


def details(
    head: Head, teacher: Head, schedule: Schedule, rows: int, needs: Needs, again: bool
) -> dict[str, Any]:
    """What ``explain`` tells. ``again``: the backward makes both models' logits once more."""
    told = schedule.details(head, rows, needs, again)
    told["gemms"] += 1 + again
    told["buffer_bytes"] += heads.buffer_bytes(teacher, told["chunk_rows"], schedule.float_logits)
    return told
