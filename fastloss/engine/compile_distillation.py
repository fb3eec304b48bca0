"""The operators of torch.compile for distillation from logits and from two heads (engine/distillation.py)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastloss.engine import backend as backends
from fastloss.engine import head as heads
from fastloss.engine.compile_ops import (
    DISTILLATION,
    HEAD,
    NUMBERS,
    all_of,
    check_targets,
    count_arguments,
    fake_grads,
    gemm_flops,
    grad_dtypes,
    limits_of,
    numbers_and_fields,
    one_pass_gradients,
    operator,
    or_nothing,
    record_of,
    save_one_pass,
)
from fastloss.engine.contract import WHOLE
from fastloss.engine.distillation import log_sums, of_heads
from fastloss.engine.distillation import schedule_of as schedule_of_distillation
from fastloss.engine.head import Limits, Needs
from fastloss.tables import (
    ACC_DTYPES,
    DISTILLATION_SUMS,
    DistillationOptions,
)

# DistillationOptions's tensors, and the numbers that change.
_OWN = f"Tensor? row_scale=None, Tensor? teacher_row_scale=None, Tensor? row_factor=None, {NUMBERS}"


def _distillation_record(  # type: ignore[no-untyped-def]
    fields, row_scale, teacher_row_scale, row_factor, numbers
) -> DistillationOptions:
    record = record_of(DistillationOptions, fields, row_scale, numbers)
    return dataclasses.replace(record, teacher_row_scale=teacher_row_scale, row_factor=row_factor)


@operator(
    "distillation_grad",
    "Tensor logits, Tensor teacher, Tensor? target, Tensor student_parts, Tensor teacher_parts, Tensor? hard_parts, "
    f"Tensor slopes, Tensor factors, {_OWN}",
    DistillationOptions,
    "str backend",
    "Tensor",
)
def _distillation_grad(  # type: ignore[no-untyped-def]
    logits,
    teacher,
    target,
    student_parts,
    teacher_parts,
    hard_parts,
    slopes,
    factors,
    row_scale=None,
    teacher_row_scale=None,
    row_factor=None,
    numbers=None,
    *,
    backend,
    **fields,
):
    options = _distillation_record(fields, row_scale, teacher_row_scale, row_factor, numbers)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.runnable(backend).row_divergence_grad(
        logits, teacher, target, options, lse_parts=student_parts,
        teacher_lse_parts=teacher_parts, slopes=slopes, factors=factors, out=out, hard_lse_parts=hard_parts,
    )  # fmt: skip
    return out


@_distillation_grad.register_fake
def _(logits, *tensors, **fields):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@operator(
    "distillation",
    f"Tensor logits, Tensor teacher, Tensor? target, {_OWN}",
    DistillationOptions,
    "str backend",
    "Tensor[]",
)
def _distillation(  # type: ignore[no-untyped-def]
    logits, teacher, target, row_scale=None, teacher_row_scale=None, row_factor=None, numbers=None, *, backend, **fields
):  # fmt: skip
    options = _distillation_record(fields, row_scale, teacher_row_scale, row_factor, numbers)
    kernels = backends.runnable(backend)
    check_targets(target, logits.shape[1], options.ignore_index)
    parts = log_sums(kernels, logits, teacher, target, options)
    sums = kernels.row_divergence(
        logits, teacher, target, options,
        lse_parts=parts.student, teacher_lse_parts=parts.teacher, hard_lse_parts=parts.hard,
    )  # fmt: skip
    hard = parts.hard
    if hard is None:  # a coefficient that changes may have become 0
        hard = torch.zeros_like(parts.student) if fields["hard_loss_coef"] else sums.new_empty(0)
    return [sums[:, 0].clone(), sums, parts.student, parts.teacher, hard.clone()]


@_distillation.register_fake
def _(logits, teacher, target, *own, hard_loss_coef, **fields):  # type: ignore[no-untyped-def]
    rows, acc = logits.shape[0], ACC_DTYPES[logits.dtype]
    shapes = [
        (rows,),
        (rows, len(DISTILLATION_SUMS)),
        (rows, 2),
        (rows, 2),
        (rows, 2) if hard_loss_coef else (0,),
    ]
    return [logits.new_empty(shape, dtype=acc) for shape in shapes]


def _save_distillation(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given = keyword_only_inputs
    _, sums, student_parts, teacher_parts, hard_parts = output
    hard = hard_parts if ctx.given["hard_loss_coef"] else None
    ctx.arguments = count_arguments(inputs, 3)
    logits, teacher, target, *own = all_of(inputs, 7)
    ctx.save_for_backward(logits, teacher, target, student_parts, teacher_parts, hard, sums, *own)


def _backward_distillation(ctx, upstream):  # type: ignore[no-untyped-def]
    *tensors, sums, row_scale, teacher_row_scale, row_factor, numbers = ctx.saved_tensors
    slopes = sums[:, DISTILLATION_SUMS.index("slope")].contiguous()
    factors = upstream[0].to(slopes.dtype).contiguous()
    own = row_scale, teacher_row_scale, row_factor, numbers
    grad = _distillation_grad(*tensors, slopes, factors, *own, **ctx.given)
    return grad, *[None] * (ctx.arguments - 1)


_distillation.register_autograd(_backward_distillation, setup_context=_save_distillation)


def distillation(
    logits: Tensor, teacher: Tensor, target: Tensor | None, options: DistillationOptions, backend: str
) -> tuple[Tensor, Tensor]:
    """(loss [rows], sums [rows, 8])."""
    numbers, fields = numbers_and_fields(options, DISTILLATION)
    own = options.row_scale, options.teacher_row_scale, options.row_factor, numbers
    loss, sums, *_ = _distillation(logits, teacher, target, *own, **fields, backend=backend)
    return loss, sums.detach()


_TWO_HEADS = (
    f"{HEAD}, Tensor teacher_hidden, Tensor teacher_weight, "
    + "Tensor? teacher_bias, Tensor? target, Tensor? factors, "
    + _OWN
)


_HOW_TWO = "bool[] needs, ScalarType dtype, ScalarType teacher_dtype, int chunk, str memory, str backend, bool float_logits=False"


@operator("linear_distillation", _TWO_HEADS, DistillationOptions, _HOW_TWO, "Tensor[]")
def _linear_distillation(  # type: ignore[no-untyped-def]
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, factors, row_scale=None,
    teacher_row_scale=None, row_factor=None, numbers=None, *,
    needs, dtype, teacher_dtype, chunk, memory, backend, float_logits=False, **fields,
):  # fmt: skip
    options = _distillation_record(fields, row_scale, teacher_row_scale, row_factor, numbers)
    kernels = backends.runnable(backend)
    check_targets(target, weight.shape[0], options.ignore_index)
    head = heads.make_head(kernels, hidden, weight, bias, dtype)
    teacher = heads.make_head(kernels, teacher_hidden, teacher_weight, teacher_bias, teacher_dtype)
    keep, needed = heads.kept_rows(target, options.ignore_index, traced=True), Needs(*needs)
    rows = heads.count_kept(hidden.shape[0], keep)
    schedule = schedule_of_distillation(head, rows, needed, limits_of(chunk, memory, float_logits))
    sums, grads = of_heads(head, teacher, needed, target, factors, options, schedule, keep)
    loss = sums[:, 0]
    total = loss.clone() if factors is None else kernels.sum_rows(loss * factors, WHOLE)
    dtypes = grad_dtypes(hidden, weight, bias, dtype)
    return [total, sums, *or_nothing(hidden, heads.finish(grads, dtypes, head.backend))]


@_linear_distillation.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, factors, *own,
    needs, dtype, teacher_dtype, **fields,
):  # fmt: skip
    rows, acc = hidden.shape[0], ACC_DTYPES[torch.promote_types(dtype, teacher_dtype)]
    total = hidden.new_empty((rows,) if factors is None else (), dtype=acc)
    sums = hidden.new_empty((rows, len(DISTILLATION_SUMS)), dtype=acc)
    return [total, sums, *fake_grads(hidden, weight, bias, needs, grad_dtypes(hidden, weight, bias, dtype))]


def _backward_linear_distillation(ctx, upstream):  # type: ignore[no-untyped-def]
    return tuple(one_pass_gradients(ctx, upstream[0], _linear_distillation, _DISTILLATION_FACTORS_AT))


_DISTILLATION_FACTORS_AT = 7  # among the inputs


_linear_distillation.register_autograd(_backward_linear_distillation, setup_context=save_one_pass(12, 8))


def linear_distillation(
    operands: tuple[Tensor | None, ...],
    target: Tensor | None,
    factors: Tensor | None,
    options: DistillationOptions,
    needs: Needs,
    dtypes: tuple[torch.dtype, torch.dtype],
    limits: Limits,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(Σ factors · loss, or the loss [rows] where factors is None; sums [rows, 8])."""
    numbers, fields = numbers_and_fields(options, DISTILLATION)
    total, sums, *_ = _linear_distillation(
        *operands,
        target,
        factors,
        options.row_scale,
        options.teacher_row_scale,
        options.row_factor,
        numbers,
        **fields,
        needs=list(needs),
        dtype=dtypes[0],
        teacher_dtype=dtypes[1],
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
    )
    return total, sums.detach()


@register_flop_formula(torch.ops.fastloss.linear_distillation)
def _(
    hidden_shape, weight_shape, bias_shape, teacher_hidden_shape, teacher_weight_shape, *args, needs, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    student = gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))
    return student + gemm_flops(teacher_hidden_shape, teacher_weight_shape, 1)
