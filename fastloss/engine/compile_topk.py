"""The operators of torch.compile for selected log-probabilities and for teachers of K classes (engine/topk.py)."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastloss.engine import backend as backends
from fastloss.engine import head as heads
from fastloss.engine.autograd import new_gradient
from fastloss.engine.compile_ops import (
    NUMBERS,
    ROW,
    ROW_SCALE,
    all_of,
    check_targets,
    count_arguments,
    fake_grads,
    floats_of,
    gemm_flops,
    grad_dtypes,
    limits_of,
    numbers_and_fields,
    numbers_of,
    one_pass_gradients,
    operator,
    or_nothing,
    record_of,
    save_one_pass,
)
from fastloss.engine.contract import WHOLE
from fastloss.engine.head import Limits, Needs
from fastloss.engine.selection import LEFT_OUT, marks
from fastloss.engine.topk import (
    Chosen,
    logprobs_gradient,
    logprobs_of_head,
    logprobs_of_logits,
    rows_of_head,
    rows_of_logits,
    schedule_of,
    teacher_of,
)
from fastloss.tables import ACC_DTYPES, TOPK_SUMS, RowOptions, TopKOptions

_TOPK = numbers_of(TopKOptions), floats_of(TopKOptions)
HOW = "bool[] needs, ScalarType dtype, int chunk, str memory, bool float_logits, str backend"


# --- log-probabilities ---------------------------------------------------------------------------------------------------


@operator(
    "selected_logprobs", f"Tensor logits, Tensor ids, {ROW_SCALE}", RowOptions, "str backend", "Tensor[]"
)
def _selected(logits, ids, row_scale=None, numbers=None, *, backend, **fields):
    check_targets(ids, logits.shape[1], -1)
    mark = marks(ids, None, logits.shape[1], LEFT_OUT)
    options = record_of(RowOptions, fields, row_scale, numbers)
    return [*logprobs_of_logits(backends.runnable(backend), logits, ids, mark, options)]


@_selected.register_fake
def _(logits, ids, row_scale=None, numbers=None, **fields):
    acc = ACC_DTYPES[logits.dtype]
    return [logits.new_empty(ids.shape, dtype=acc), logits.new_empty((ids.shape[0], 2), dtype=acc)]


@operator(
    "selected_logprobs_grad", f"Tensor logits, Tensor ids, Tensor parts, Tensor upstream, {ROW_SCALE}", RowOptions,
    "str backend", "Tensor",
)  # fmt: skip
def _selected_grad(logits, ids, parts, upstream, row_scale=None, numbers=None, *, backend, **fields):
    own = Chosen(marks(ids, None, logits.shape[1], LEFT_OUT), ids, upstream.contiguous(), row_scale)
    out = new_gradient(logits.shape, logits.dtype, logits.device)
    options = record_of(RowOptions, fields, row_scale, numbers)
    logprobs_gradient(backends.runnable(backend), logits, own, parts, options, out)
    return out


@_selected_grad.register_fake
def _(logits, *tensors, **fields):
    return logits.new_empty(logits.shape)


def _save_selected(ctx, inputs, keyword_only_inputs, output):
    ctx.given, ctx.arguments = keyword_only_inputs, count_arguments(inputs, 2)
    ctx.save_for_backward(*all_of(inputs, 4), output[1])


def _backward_selected(ctx, upstream):
    logits, ids, row_scale, numbers, parts = ctx.saved_tensors
    grad = _selected_grad(logits, ids, parts, upstream[0], row_scale, numbers, **ctx.given)
    return grad, *[None] * (ctx.arguments - 1)


_selected.register_autograd(_backward_selected, setup_context=_save_selected)


def selected_logprobs(logits: Tensor, ids: Tensor, options: RowOptions, backend: str) -> Tensor:
    numbers, fields = numbers_and_fields(options, ROW)
    return _selected(logits, ids, options.row_scale, numbers, **fields, backend=backend)[0]


HEAD = "Tensor hidden, Tensor weight, Tensor? bias, "


@operator(
    "linear_selected_logprobs",
    f"{HEAD}Tensor ids, Tensor? upstream, {ROW_SCALE}",
    RowOptions,
    HOW,
    "Tensor[]",
)
def _linear_selected(
    hidden, weight, bias, ids, upstream, row_scale=None, numbers=None, *,
    needs, dtype, chunk, memory, float_logits, backend, **fields,
):  # fmt: skip
    check_targets(ids, weight.shape[0], -1)
    head = heads.make_head(backends.runnable(backend), hidden, weight, bias, dtype)
    mark, needed = marks(ids, None, weight.shape[0], LEFT_OUT), Needs(*needs)
    keep = heads.kept_rows(mark, LEFT_OUT, traced=True)
    count = heads.count_kept(hidden.shape[0], keep)
    schedule = schedule_of(head, count, needed, limits_of(chunk, memory, float_logits))
    own = Chosen(mark, ids, None if upstream is None else upstream.contiguous(), row_scale)
    options = record_of(RowOptions, fields, row_scale, numbers)
    out, grads = logprobs_of_head(head, needed, own, options, schedule, keep)
    dtypes = grad_dtypes(hidden, weight, bias, dtype)
    return [out, *or_nothing(hidden, heads.finish(grads, dtypes, head.backend))]


@_linear_selected.register_fake
def _(hidden, weight, bias, ids, upstream, row_scale=None, numbers=None, *, needs, dtype, **fields):
    out = hidden.new_empty(ids.shape, dtype=ACC_DTYPES[dtype])
    return [out, *fake_grads(hidden, weight, bias, needs, grad_dtypes(hidden, weight, bias, dtype))]


def _save_linear_selected(ctx, inputs, keyword_only_inputs, output):
    ctx.given, ctx.needs = keyword_only_inputs, list(ctx.needs_input_grad[:3])
    ctx.dtypes, ctx.arguments = heads.leaf_dtypes(*inputs[:3]), count_arguments(inputs, 5)
    hidden, weight, bias, ids, _, row_scale, numbers = all_of(inputs, 7)
    ctx.save_for_backward(hidden, weight, bias, ids, row_scale, numbers)


def _backward_linear_selected(ctx, upstream):
    *operands, row_scale, numbers = ctx.saved_tensors
    how = {**ctx.given, "needs": ctx.needs}
    _, *made = _linear_selected(*operands, upstream[0], row_scale, numbers, **how)
    grads = [x.to(t) if need else None for x, need, t in zip(made, ctx.needs, ctx.dtypes, strict=True)]
    return (*grads, *[None] * (ctx.arguments - 3))


_linear_selected.register_autograd(_backward_linear_selected, setup_context=_save_linear_selected)


def linear_selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    options: RowOptions,
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
) -> Tensor:
    numbers, fields = numbers_and_fields(options, ROW)
    return _linear_selected(
        hidden, weight, bias, ids, None, options.row_scale, numbers, **fields, needs=[False] * 3, dtype=dtype,
        chunk=limits.chunk_size or 0, memory=limits.memory, float_logits=limits.float_logits, backend=backend,
    )[0]  # fmt: skip


# --- a teacher of K classes ----------------------------------------------------------------------------------------------

# TopKOptions's tensors, and the numbers that change.
_ROWS = f"Tensor? row_scale=None, Tensor? row_factor=None, {NUMBERS}"
_TEACHER = f"Tensor ids, Tensor logprobs, Tensor? target, Tensor? factors, {_ROWS}"


def _options(fields, row_scale, row_factor, numbers) -> TopKOptions:
    return replace(record_of(TopKOptions, fields, row_scale, numbers), row_factor=row_factor)


def _check(ids: Tensor, target: Tensor | None, vocab: int, options: TopKOptions) -> None:
    check_targets(ids, vocab, -1)
    check_targets(target, vocab, options.ignore_index)


@operator("topk_distillation", "Tensor logits, " + _TEACHER, TopKOptions, "str backend", "Tensor[]")
def _topk(
    logits,
    ids,
    logprobs,
    target,
    factors,
    row_scale=None,
    row_factor=None,
    numbers=None,
    *,
    backend,
    **fields,
):
    options, vocab = _options(fields, row_scale, row_factor, numbers), logits.shape[1]
    _check(ids, target, vocab, options)
    teacher = teacher_of(ids, logprobs, target, factors, vocab, options, ACC_DTYPES[logits.dtype])
    out = None if factors is None else new_gradient(logits.shape, logits.dtype, logits.device)
    sums = rows_of_logits(backends.runnable(backend), logits, teacher, options, out)
    return [sums[:, 0].clone(), sums, logits.new_empty(0) if out is None else out]


@_topk.register_fake
def _(logits, ids, logprobs, target, factors, row_scale=None, row_factor=None, numbers=None, **fields):
    acc, rows = ACC_DTYPES[logits.dtype], logits.shape[0]
    return [
        logits.new_empty(rows, dtype=acc),
        logits.new_empty((rows, len(TOPK_SUMS)), dtype=acc),
        logits.new_empty(0 if factors is None else logits.shape),
    ]


def _save_topk(ctx, inputs, keyword_only_inputs, output):
    ctx.given, ctx.arguments = keyword_only_inputs, count_arguments(inputs, 5)
    logits, ids, logprobs, target, _, *own = all_of(inputs, 8)
    ctx.save_for_backward(logits, ids, logprobs, target, *own)


def _backward_topk(ctx, upstream):
    logits, ids, logprobs, target, *own = ctx.saved_tensors
    grad = _topk(logits, ids, logprobs, target, upstream[0].contiguous(), *own, **ctx.given)[2]
    return grad, *[None] * (ctx.arguments - 1)


_topk.register_autograd(_backward_topk, setup_context=_save_topk)


def topk_distillation(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    target: Tensor | None,
    options: TopKOptions,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss [rows], sums [rows, 7])."""
    numbers, fields = numbers_and_fields(options, _TOPK)
    own = options.row_scale, options.row_factor, numbers
    loss, sums, _ = _topk(logits, ids, logprobs, target, None, *own, **fields, backend=backend)
    return loss, sums.detach()


@operator("linear_topk_distillation", HEAD + _TEACHER, TopKOptions, HOW, "Tensor[]")
def _linear_topk(
    hidden,
    weight,
    bias,
    ids,
    logprobs,
    target,
    factors,
    row_scale=None,
    row_factor=None,
    numbers=None,
    *,
    needs,
    dtype,
    chunk,
    memory,
    float_logits,
    backend,
    **fields,
):
    options = _options(fields, row_scale, row_factor, numbers)
    vocab, kernels = weight.shape[0], backends.runnable(backend)
    _check(ids, target, vocab, options)
    needed = Needs(*needs)
    teacher = teacher_of(
        ids, logprobs, target, factors if needed else None, vocab, options, ACC_DTYPES[dtype]
    )
    keep = heads.kept_rows(teacher.mark, LEFT_OUT, traced=True)
    head = heads.make_head(kernels, hidden, weight, bias, dtype)
    count = heads.count_kept(hidden.shape[0], keep)
    schedule = schedule_of(head, count, needed, limits_of(chunk, memory, float_logits))
    sums, grads = rows_of_head(head, needed, teacher, options, schedule, keep)
    loss = sums[:, 0]
    total = loss.clone() if factors is None else kernels.sum_rows(loss * factors, WHOLE)
    dtypes = grad_dtypes(hidden, weight, bias, dtype)
    return [total, sums, *or_nothing(hidden, heads.finish(grads, dtypes, head.backend))]


@_linear_topk.register_fake
def _(
    hidden, weight, bias, ids, logprobs, target, factors, row_scale=None, row_factor=None, numbers=None, *,
    needs, dtype, **fields,
):  # fmt: skip
    rows, acc = hidden.shape[0], ACC_DTYPES[dtype]
    total = hidden.new_empty((rows,) if factors is None else (), dtype=acc)
    sums = hidden.new_empty((rows, len(TOPK_SUMS)), dtype=acc)
    return [total, sums, *fake_grads(hidden, weight, bias, needs, grad_dtypes(hidden, weight, bias, dtype))]


def _backward_linear_topk(ctx, upstream):
    return tuple(one_pass_gradients(ctx, upstream[0], _linear_topk, _FACTORS_AT))


_FACTORS_AT = 6  # among the inputs
_linear_topk.register_autograd(_backward_linear_topk, setup_context=save_one_pass(10, 7))


def linear_topk_distillation(
    operands: tuple[Tensor | None, ...],
    given: tuple[Tensor | None, ...],
    options: TopKOptions,
    needs: Needs,
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(Σ factors · loss, or the loss [rows] where factors is None; sums [rows, 7])."""
    numbers, fields = numbers_and_fields(options, _TOPK)
    total, sums, *_ = _linear_topk(
        *operands, *given, options.row_scale, options.row_factor, numbers, **fields, needs=list(needs), dtype=dtype,
        chunk=limits.chunk_size or 0, memory=limits.memory, float_logits=limits.float_logits, backend=backend,
    )  # fmt: skip
    return total, sums.detach()


@register_flop_formula(torch.ops.fastloss.linear_topk_distillation)
def _(hidden_shape, weight_shape, *args, needs, out_shape=None, **kwargs) -> int:
    return gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))


@register_flop_formula(torch.ops.fastloss.linear_selected_logprobs)
def _(hidden_shape, weight_shape, *args, needs, out_shape=None, **kwargs) -> int:
    return gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))
