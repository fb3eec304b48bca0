"""A divergence of two models' distributions: from two tensors of logits, and from two linear heads a chunk of rows at a time.

The student's and the teacher's logits of a chunk are made one after the other (1 GEMM each), the row kernel overwrites the
student's with their gradient, and that goes into d hidden and d weight (1 GEMM each).

Of a vocabulary that is cut, the row kernel gets the lse_parts of whole rows, and gives this shard's terms of the sums. So the processes
exchange the one, then the other, and the gradient comes after both: the logits are read once more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import devices
from fastloss.engine import head as heads
from fastloss.engine import shards as cut
from fastloss.engine.contract import Backend
from fastloss.engine.head import Schedule
from fastloss.engine.head_rows import count_gemms
from fastloss.engine.head_types import NOTHING, Grads, Head, Limits, Needs
from fastloss.engine.shards import Shards
from fastloss.tables import ACC_DTYPES, DISTILLATION_SUMS, LSE_PARTS, DistillationOptions, RowOptions


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

    def of(x: Tensor, scale: float, row_scale: Tensor | None, bias: Tensor | None) -> Tensor:
        row = RowOptions(options.ignore_index, scale, row_scale=row_scale)
        return backend.row_stats(x, target, row, want=(LSE_PARTS,), bias=bias)[LSE_PARTS]

    student = of(logits, options.scale, options.row_scale, bias)
    hard = None
    if options.hard_loss_coef:
        hard = student if options.is_plain else of(logits, 1.0, None, bias)
    theirs = of(teacher_logits, options.teacher_scale, options.teacher_row_scale, teacher_bias)
    return LogSums(student, theirs, hard)


# --- a vocabulary that is cut --------------------------------------------------------------------------------------------

_AGREEMENT, _HARD = DISTILLATION_SUMS.index("agreement"), DISTILLATION_SUMS.index("hard_loss")


class Columns(NamedTuple):
    """This process's columns ``[rows, V_r]`` of both models' logits, of one dtype, and of their biases."""

    shards: Shards
    backend: Backend
    logits: Tensor
    teacher: Tensor
    bias: Tensor | None = None
    teacher_bias: Tensor | None = None


def sums_of_columns(
    x: Columns, target: Tensor | None, options: DistillationOptions
) -> tuple[LogSums, Tensor]:
    """(the lse_parts of whole rows, the sums ``[rows, 8]`` of whole rows), the same bits on every process: two all-gathers."""
    parts, hard = _whole_log_sums(x, target, options)
    local, _ = x.shards.local(target, options.ignore_index)
    rows, acc = x.logits.shape[0], parts.student.dtype
    if x.shards.own:
        sums = x.backend.row_divergence(
            x.logits, x.teacher, local, _soft(options), lse_parts=parts.student, teacher_lse_parts=parts.teacher,
            bias=x.bias, teacher_bias=x.teacher_bias,
        )  # fmt: skip
    else:
        sums = torch.zeros((rows, len(DISTILLATION_SUMS)), dtype=acc, device=x.logits.device)
    sums = cut.add_in_order(x.shards, sums)
    sums[:, _AGREEMENT].clamp_(max=1)  # rows whose largest logit stands on several shards
    if hard is not None:
        sums[:, 0] += options.hard_loss_coef * hard
        sums[:, _HARD] = hard
    return parts, sums


def _whole_log_sums(
    x: Columns, target: Tensor | None, options: DistillationOptions
) -> tuple[LogSums, Tensor | None]:
    """(of whole rows, the hard loss of each)."""
    shards, acc = x.shards, ACC_DTYPES[x.logits.dtype]
    local, _ = shards.local(target, options.ignore_index)

    def of(
        z: Tensor, scale: float, row_scale: Tensor | None, bias: Tensor | None, want: tuple[str, ...]
    ) -> dict[str, Tensor]:
        if not shards.own:
            return cut.neutral(z.shape[0], want, acc, z.device)
        row = RowOptions(cut.NO_TARGET, scale, row_scale=row_scale)
        out = x.backend.row_stats(z, local, row, want=want, bias=bias)

        def masked() -> Tensor:
            return ((z if bias is None else z + bias) == -torch.inf).all(1)

        out[LSE_PARTS] = cut.without_share(out[LSE_PARTS], masked)
        return out

    hard = bool(options.hard_loss_coef)
    same = options.is_plain
    names = (LSE_PARTS, *(("logprobs",) if hard and same else ()))
    student = of(x.logits, options.scale, options.row_scale, x.bias, names)
    teacher = of(x.teacher, options.teacher_scale, options.teacher_row_scale, x.teacher_bias, (LSE_PARTS,))
    message = [student[LSE_PARTS], teacher[LSE_PARTS]]
    if hard:
        own = student if same else of(x.logits, 1.0, None, x.bias, (LSE_PARTS, "logprobs"))
        if not same:
            message.append(own[LSE_PARTS])
        message.append(own["logprobs"].unsqueeze(1))
    everyone = shards.gather(torch.cat(message, 1).contiguous())  # [processes, rows, numbers]
    ignored = None if target is None else target == options.ignore_index

    def whole(place: int, logprobs: Tensor | None = None) -> dict[str, Tensor]:
        got = {LSE_PARTS: everyone[..., 2 * place : 2 * place + 2]}
        owner = None
        if logprobs is not None and target is not None and ignored is not None:
            got["logprobs"], owner = logprobs, shards.owner(target.masked_fill(ignored, 0))
        return cut.combine(got, shards.sizes, owner, ignored)

    if not hard:
        return LogSums(whole(0)[LSE_PARTS].contiguous(), whole(1)[LSE_PARTS].contiguous(), None), None
    out = whole(0 if same else 2, everyone[..., -1])
    labels = out[LSE_PARTS].contiguous()
    student_parts = labels if same else whole(0)[LSE_PARTS].contiguous()
    return LogSums(student_parts, whole(1)[LSE_PARTS].contiguous(), labels), -out["logprobs"]


def _soft(options: DistillationOptions) -> DistillationOptions:
    return replace(options, hard_loss_coef=0.0, ignore_index=cut.NO_TARGET)


def gradient_of_columns(
    x: Columns,
    target: Tensor | None,
    options: DistillationOptions,
    parts: LogSums,
    slopes: Tensor,
    factors: Tensor,
    out: Tensor,
) -> None:
    """The gradient of Σ factors · loss, to ``out [rows, V_r]``, which may be the logits."""
    if not x.shards.own:
        return
    local, mine = x.shards.local(target, options.ignore_index)
    own = replace(options, ignore_index=cut.NO_TARGET)
    elsewhere, first = None, None
    if parts.hard is not None and target is not None and mine is not None:
        # The kernel gives the hard loss's class its part, and here another shard has the class: the first column, which stands for it,
        # is made apart.
        elsewhere = ~mine & (target != options.ignore_index)
        first = _first_column(x, local, options, parts, slopes, factors)
    x.backend.row_divergence_grad(
        x.logits, x.teacher, local, own, lse_parts=parts.student, teacher_lse_parts=parts.teacher, slopes=slopes,
        factors=factors, out=out, hard_lse_parts=parts.hard, bias=x.bias, teacher_bias=x.teacher_bias,
    )  # fmt: skip
    if elsewhere is not None and first is not None:
        out[:, 0] = torch.where(elsewhere & ~out[:, 0].isnan(), first.to(out.dtype), out[:, 0])


def _first_column(
    x: Columns,
    local: Tensor | None,
    options: DistillationOptions,
    parts: LogSums,
    slopes: Tensor,
    factors: Tensor,
) -> Tensor:
    """The gradient of this shard's first class where the hard loss's is another's, acc ``[rows]``."""
    assert parts.hard is not None
    z, y = (logits[:, :1].to(slopes.dtype).contiguous() for logits in (x.logits, x.teacher))
    made = torch.empty_like(z)
    bias, teacher_bias = (None if b is None else b[:1].contiguous() for b in (x.bias, x.teacher_bias))
    x.backend.row_divergence_grad(
        z, y, local, _soft(options), lse_parts=parts.student, teacher_lse_parts=parts.teacher, slopes=slopes,
        factors=factors, out=made, bias=bias, teacher_bias=teacher_bias,
    )  # fmt: skip
    raw = z[:, 0] if bias is None else z[:, 0] + bias
    probability = ((raw - parts.hard[:, 0]) - parts.hard[:, 1]).exp()
    return made[:, 0] + factors * options.hard_loss_coef * probability


def sent(
    shards: Shards,
    rows: int,
    options: DistillationOptions,
    acc: torch.dtype,
    passes: int = 1,
    hidden: Tensor | None = None,
) -> dict[str, Any]:
    """The bytes that ``explain`` tells: two lse_parts, the hard loss's, and the sums of each token."""
    hard = 0 if not options.hard_loss_coef else 1 if options.is_plain else 3
    numbers = 4 + hard + len(DISTILLATION_SUMS)
    return shards.told(passes * rows * numbers * acc.itemsize, 0, hidden)


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
    if keep is not None:
        options = options.of_rows(lambda x: x.index_select(0, keep))
    backend, outs = head.backend, []
    # Once the student's pass hides its GEMMs from dispatch modes, the teacher's would not be counted.
    count_gemms(teacher, teacher.hidden.shape[0] if keep is None else keep.numel(), 1)
    with (
        heads.begin(head, needs, keep, schedule) as run,
        heads.begin(teacher, NOTHING, keep, schedule) as frozen,
    ):
        for part, theirs in zip(run.parts(), frozen.parts(), strict=True):
            own, classes, mine = part.logits, part.of(target), options.of_rows(part.of)
            if head.shards is not None:
                outs.append(
                    {"sums": _of_shard(head, teacher, part, theirs, classes, part.of(factors), needs, mine)}
                )
                continue
            common = torch.promote_types(own.dtype, theirs.logits.dtype)
            z, y = own.to(common), theirs.logits.to(common)
            sums = log_sums(backend, z, y, classes, mine, head.bias, teacher.bias)
            out = backend.row_divergence(
                z, y, classes, mine, lse_parts=sums.student, teacher_lse_parts=sums.teacher, hard_lse_parts=sums.hard,
                factors=part.of(factors), grad=z if needs else None, bias=head.bias, teacher_bias=teacher.bias,
            )  # fmt: skip
            outs.append({"sums": out})
            if needs and z is not own:
                own.copy_(z)
            part.add_gradients()
        return run.collect(outs)["sums"], run.grads()


def _of_shard(
    head: Head,
    teacher: Head,
    part: Any,
    theirs: Any,
    target: Tensor | None,
    factors: Tensor | None,
    needs: Needs,
    options: DistillationOptions,
) -> Tensor:
    """The sums of a part's whole rows, and its gradients."""
    assert head.shards is not None
    own = part.logits
    common = torch.promote_types(own.dtype, theirs.logits.dtype)
    z = own.to(common)
    x = Columns(head.shards, head.backend, z, theirs.logits.to(common), head.bias, teacher.bias)
    parts, sums = sums_of_columns(x, target, options)
    if needs and own.shape[0]:
        assert factors is not None
        gradient_of_columns(x, target, options, parts, sums[:, -1].contiguous(), factors, z)
        if z is not own:
            own.copy_(z)
    part.add_gradients()
    return sums


def schedule_of(head: Head, rows: int, needs: Needs, limits: Limits) -> Schedule:
    """Chunks of rows. "low" on a CPU: three quarters of what one head takes, for the two buffers."""
    schedule = heads.chunked(head, rows, needs, limits)
    if limits.chunk_size or limits.memory != "low" or devices.is_gpu(head.hidden.device):
        return schedule
    return schedule._replace(chunk=min(schedule.chunk, max(32, schedule.chunk * 3 // 4)))


def details(
    head: Head,
    teacher: Head,
    schedule: Schedule,
    rows: int,
    needs: Needs,
    again: bool,
    options: DistillationOptions,
) -> dict[str, Any]:
    """What ``explain`` tells. ``again``: the backward makes both models' logits once more."""
    told = schedule.details(head, rows, needs, again)
    if head.shards is not None:
        acc = ACC_DTYPES[torch.promote_types(head.dtype, teacher.dtype)]
        hidden = head.hidden if needs.hidden else None
        told.update(sent(head.shards, rows, options, acc, 1 + again, hidden))
    told["gemms"] += 1 + again
    told["buffer_bytes"] += heads.buffer_bytes(teacher, told["chunk_rows"], schedule.float_logits)
    return told
