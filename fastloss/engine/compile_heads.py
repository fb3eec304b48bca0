"""The operators of torch.compile for cross-entropy and statistics of tokens from a linear head, and their FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastloss.engine import backend as backends
from fastloss.engine import head as heads
from fastloss.engine.coefficients import Coefficients, of_cross_entropy
from fastloss.engine.compile_ops import (
    CROSS_ENTROPY,
    GIVEN,
    HEAD,
    HOW,
    LOSS,
    LSE_PARTS_AT,
    OUTPUTS,
    ROW,
    ROW_SCALE,
    all_of,
    check_targets,
    contiguous,
    count_arguments,
    fake_grads,
    fake_stats,
    gemm_flops,
    given_limits,
    grad_dtypes,
    late_factor,
    limits_of,
    names_of,
    numbers_and_fields,
    operator,
    or_nothing,
    pack_stats,
    record_of,
    schedule_and_rows,
    stats_coefficients,
    sum_of,
    times_factor,
    traced_record_of,
)
from fastloss.engine.contract import WHOLE, Factor
from fastloss.engine.head import NOTHING, Limits, Needs, Saved
from fastloss.tables import (
    ACC_DTYPES,
    ARGMAX,
    LATE_DTYPES,
    LSE_PARTS,
    CrossEntropyOptions,
    RowOptions,
)


@operator("linear_row_grad", f"{HEAD}, {GIVEN}, {ROW_SCALE}", RowOptions, HOW, "Tensor[]")
def _linear_row_grad(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    target,
    lse_parts,
    a,
    b,
    c,
    d,
    w,
    row_scale=None,
    numbers=None,
    *,
    needs,
    dtype,
    chunk,
    backend,
    memory="auto",
    float_logits=False,
    **fields,
):
    options = record_of(RowOptions, fields, row_scale, numbers)
    needed = Needs(*needs)
    head = heads.make_head(backends.runnable(backend), hidden, weight, bias, dtype)
    schedule, keep = schedule_and_rows(
        head, target, options.ignore_index, needed, limits_of(chunk, memory, float_logits)
    )
    saved = Saved(target, lse_parts, Coefficients(a, b, c, d), options, keep, w)
    grads = heads.recompute(head, needed, schedule, saved)
    dtypes = heads.leaf_dtypes(hidden, weight, bias)
    return or_nothing(hidden, heads.finish(grads, dtypes, head.backend))


@_linear_row_grad.register_fake
def _(hidden, weight, bias, *given, needs, **fields):  # type: ignore[no-untyped-def]
    return fake_grads(hidden, weight, bias, needs, heads.leaf_dtypes(hidden, weight, bias))


def linear_row_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Saved,
    needs: list[bool],
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
) -> list[Tensor | None]:
    numbers, fields = numbers_and_fields(saved.options, ROW)
    grads = _linear_row_grad(
        hidden,
        weight,
        bias,
        saved.target,
        saved.lse_parts,
        *saved.coefficients,
        saved.w,
        saved.options.row_scale,
        numbers,
        **fields,
        needs=needs,
        dtype=dtype,
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
    )
    return [x if need else None for x, need in zip(grads, needs, strict=True)]


@operator(
    "linear_cross_entropy",
    f"{HEAD}, Tensor? target, Tensor? w, Tensor? factor_tensor, Tensor? token_weight=None, {ROW_SCALE}",
    CrossEntropyOptions,
    f"{LOSS}, {HOW}, float skip=0.0",
    "Tensor[]",
)
def _linear_cross_entropy(  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, w, factor_tensor, token_weight=None, row_scale=None, numbers=None, *,
    factor, reduction, want, needs, dtype, chunk, backend, memory="auto", float_logits=False, skip=0.0, **fields,
):  # fmt: skip
    options = record_of(CrossEntropyOptions, fields, row_scale, numbers)
    needed, names = Needs(*needs), names_of(want)
    check_targets(target, weight.shape[0], options.ignore_index)
    head = heads.make_head(backends.runnable(backend), hidden, weight, bias, dtype)
    per_row = reduction == "none"
    keep = heads.kept_rows(target, options.ignore_index, traced=True)
    rows = heads.count_kept(hidden.shape[0], keep)
    smooth = target is None or options.label_smoothing > 0
    schedule = heads.schedule_of_cross_entropy(
        head, rows, needed, limits_of(chunk, memory, float_logits, skip), per_row, smooth
    )
    f = Factor(factor, factor_tensor)
    out, grads = heads.cross_entropy(
        head,
        needed,
        target,
        w,
        options,
        names,
        WHOLE if dtype in LATE_DTYPES else f,
        schedule,
        keep,
        token_weight,
    )
    dtypes = grad_dtypes(hidden, weight, bias, dtype)
    return [
        sum_of(backend, out["loss"], reduction, f),
        *pack_stats(out, names, out["loss"], dtype),
        *or_nothing(hidden, heads.finish(grads, dtypes, head.backend)),
    ]


@_linear_cross_entropy.register_fake
def _(
    hidden,
    weight,
    bias,
    target,
    w,
    factor_tensor,
    token_weight=None,
    row_scale=None,
    numbers=None,
    *,
    reduction,
    want,
    needs,
    dtype,
    **fields,
):  # type: ignore[no-untyped-def]
    rows = hidden.shape[0]
    loss = hidden.new_empty((rows,) if reduction == "none" else (), dtype=ACC_DTYPES[dtype])
    grads = fake_grads(hidden, weight, bias, needs, grad_dtypes(hidden, weight, bias, dtype))
    return [loss, *fake_stats(loss, rows, names_of(want), dtype), *grads]


def _save_linear_cross_entropy(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, w, factor_tensor, token_weight, row_scale, numbers = all_of(inputs, 9)
    ctx.arguments = count_arguments(inputs, 6)
    ctx.given = keyword_only_inputs
    ctx.needs = list(ctx.needs_input_grad[:3])
    ctx.dtypes = heads.leaf_dtypes(hidden, weight, bias)
    made = any(ctx.given["needs"])
    operands: tuple[Tensor | None, ...] = (hidden, weight, bias, target, w, token_weight, row_scale, numbers)
    if made:
        operands = (None,) * len(operands)
    grads = output[-3:] if made else (None,) * 3
    ctx.save_for_backward(*operands, *grads, None if made else output[LSE_PARTS_AT], factor_tensor)


def _backward_linear_cross_entropy(ctx, upstream):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, w, token_weight, row_scale, numbers, *made, lse_parts, factor_tensor = (
        ctx.saved_tensors
    )
    given, g = ctx.given, upstream[0]
    factor, dtype, per_row = given["factor"], given["dtype"], given["reduction"] == "none"
    if any(given["needs"]):
        scale = g[:, None] if per_row else g * late_factor(dtype, factor, factor_tensor)
        needs = zip(made, given["needs"], ctx.dtypes, strict=True)
        acc = ACC_DTYPES[dtype]  # a scalar is not rounded to the gradient's dtype first
        grads = [(x.to(acc) * scale.to(acc)).to(t) if need else None for x, need, t in needs]
    else:
        options = traced_record_of(CrossEntropyOptions, given, row_scale, numbers)
        if not per_row:
            g = times_factor(g, factor, factor_tensor, hidden.shape[0])
        if token_weight is not None:
            g = g * token_weight
        k = contiguous(of_cross_entropy(g, lse_parts, target, w, weight.shape[0], options))
        saved = Saved(target, lse_parts, k, options, None, w)
        how = ctx.needs, dtype, given_limits(given), given["backend"]
        grads = linear_row_grad(hidden, weight, bias, saved, *how)
    return (*grads, *[None] * (ctx.arguments - 3))


_linear_cross_entropy.register_autograd(
    _backward_linear_cross_entropy, setup_context=_save_linear_cross_entropy
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    w: Tensor | None,
    token_weight: Tensor | None,
    factor: Factor,
    options: CrossEntropyOptions,
    reduction: str,
    want: tuple[str, ...],
    needs: Needs,
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
) -> list[Tensor]:
    """[loss, statistics …, lse_parts, d hidden, d weight, d bias]."""
    numbers, fields = numbers_and_fields(options, CROSS_ENTROPY)
    return _linear_cross_entropy(
        hidden,
        weight,
        bias,
        target,
        w,
        factor.tensor,
        token_weight,
        options.row_scale,
        numbers,
        **fields,
        factor=factor.value,
        reduction=reduction,
        want=",".join(want),
        needs=list(needs),
        dtype=dtype,
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
        skip=limits.skip,
    )


@operator(
    "linear_token_stats",
    f"{HEAD}, Tensor? target, {ROW_SCALE}",
    RowOptions,
    "str want, ScalarType dtype, int chunk, str backend, str memory='auto', bool float_logits=False",
    "Tensor[]",
)
def _linear_token_stats(
    hidden, weight, bias, target, row_scale=None, numbers=None, *,
    want, dtype, chunk, backend, memory="auto", float_logits=False, **fields,
):  # type: ignore[no-untyped-def]  # fmt: skip
    options, names = record_of(RowOptions, fields, row_scale, numbers), names_of(want)
    check_targets(target, weight.shape[0], options.ignore_index)
    head = heads.make_head(backends.runnable(backend), hidden, weight, bias, dtype)
    schedule, keep = schedule_and_rows(
        head, target, options.ignore_index, NOTHING, limits_of(chunk, memory, float_logits)
    )
    out, _ = heads.stats(head, target, options, names, schedule, keep)
    found = out[ARGMAX] if ARGMAX in names else out[LSE_PARTS].new_empty(0, dtype=torch.int64)
    return [*pack_stats(out, names, out[LSE_PARTS], dtype), found]


@_linear_token_stats.register_fake
def _(hidden, weight, bias, target, row_scale=None, numbers=None, *, want, dtype, **fields):  # type: ignore[no-untyped-def]
    like = hidden.new_empty(0, dtype=ACC_DTYPES[dtype])
    found = like.new_empty(hidden.shape[0] if ARGMAX in names_of(want) else 0, dtype=torch.int64)
    return [*fake_stats(like, hidden.shape[0], names_of(want), dtype), found]


def _save_linear_token_stats(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given = keyword_only_inputs
    ctx.needs, ctx.arguments = list(ctx.needs_input_grad[:3]), count_arguments(inputs, 4)
    by_name = dict(zip(OUTPUTS, output[:-1], strict=True))
    ctx.save_for_backward(*all_of(inputs, 6), by_name[LSE_PARTS], by_name["entropy"])


def _backward_linear_token_stats(ctx, upstream):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, row_scale, numbers, lse_parts, entropy = ctx.saved_tensors
    given = ctx.given
    k = stats_coefficients(names_of(given["want"]), upstream[:-1], entropy, lse_parts.dtype)
    saved = Saved(target, lse_parts, k, traced_record_of(RowOptions, given, row_scale, numbers), None)
    how = (
        ctx.needs,
        given["dtype"],
        given_limits(given),
        given["backend"],
    )
    return (*linear_row_grad(hidden, weight, bias, saved, *how), *[None] * (ctx.arguments - 3))


_linear_token_stats.register_autograd(_backward_linear_token_stats, setup_context=_save_linear_token_stats)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    options: RowOptions,
    want: tuple[str, ...],
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
) -> list[Tensor]:
    """The statistics in the order of STATS, and "argmax"."""
    numbers, fields = numbers_and_fields(options, ROW)
    *stats, _, found = _linear_token_stats(
        hidden,
        weight,
        bias,
        target,
        options.row_scale,
        numbers,
        **fields,
        want=",".join(want),
        dtype=dtype,
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
    )
    return [*stats, found]


@register_flop_formula(torch.ops.fastloss.linear_cross_entropy)
def _(hidden_shape, weight_shape, *args, needs, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))


@register_flop_formula(torch.ops.fastloss.linear_token_stats)
def _(hidden_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return gemm_flops(hidden_shape, weight_shape, 1)


@register_flop_formula(torch.ops.fastloss.linear_row_grad)
def _(hidden_shape, weight_shape, *args, needs, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))
