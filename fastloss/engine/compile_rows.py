"""The operators of torch.compile for rows of logits: cross-entropy, statistics of tokens, and the gradient from coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.engine import backend as backends
from fastloss.engine import head as heads
from fastloss.engine.coefficients import Coefficients, of_cross_entropy
from fastloss.engine.compile_ops import (
    CROSS_ENTROPY,
    GIVEN,
    LOSS,
    LSE_PARTS_AT,
    OUTPUTS,
    ROW,
    ROW_SCALE,
    all_of,
    check_targets,
    contiguous,
    count_arguments,
    fake_stats,
    names_of,
    numbers_and_fields,
    operator,
    pack_stats,
    record_of,
    stats_coefficients,
    sum_of,
    times_factor,
    traced_record_of,
)
from fastloss.engine.contract import Factor
from fastloss.tables import (
    ACC_DTYPES,
    ARGMAX,
    LSE_PARTS,
    CrossEntropyOptions,
    RowOptions,
)


@operator("row_grad", f"Tensor logits, {GIVEN}, {ROW_SCALE}", RowOptions, "str backend", "Tensor")
def _row_grad(  # type: ignore[no-untyped-def]
    logits, target, lse_parts, a, b, c, d, w, row_scale=None, numbers=None, *, backend, **fields
):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.runnable(backend).row_grad(
        logits,
        target,
        record_of(RowOptions, fields, row_scale, numbers),
        lse_parts=lse_parts,
        coefficients=Coefficients(a, b, c, d),
        out=out,
        w=w,
    )
    return out


@_row_grad.register_fake
def _(logits, *tensors, **fields):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def row_grad(
    logits: Tensor,
    target: Tensor | None,
    lse_parts: Tensor,
    k: Coefficients,
    w: Tensor | None,
    options: RowOptions,
    backend: str,
) -> Tensor:
    numbers, fields = numbers_and_fields(options, ROW)
    return _row_grad(logits, target, lse_parts, *k, w, options.row_scale, numbers, **fields, backend=backend)


@operator(
    "cross_entropy",
    f"Tensor logits, Tensor? target, Tensor? w, Tensor? factor_tensor, {ROW_SCALE}",
    CrossEntropyOptions,
    f"{LOSS}, str backend",
    "Tensor[]",
)
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits,
    target,
    w,
    factor_tensor,
    row_scale=None,
    numbers=None,
    *,
    factor,
    reduction,
    want,
    backend,
    **fields,
):
    options, names = record_of(CrossEntropyOptions, fields, row_scale, numbers), names_of(want)
    check_targets(target, logits.shape[1], options.ignore_index)
    out = backends.runnable(backend).row_cross_entropy(logits, target, options, want=names, w=w)
    total = sum_of(backend, out["loss"], reduction, Factor(factor, factor_tensor))
    return [total, *pack_stats(out, names, logits, logits.dtype)]


@_cross_entropy.register_fake
def _(logits, target, w, factor_tensor, row_scale=None, numbers=None, *, reduction, want, **fields):  # type: ignore[no-untyped-def]
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=ACC_DTYPES[logits.dtype])
    return [loss, *fake_stats(logits, rows, names_of(want), logits.dtype)]


def _save_cross_entropy(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given, ctx.arguments = keyword_only_inputs, count_arguments(inputs, 4)
    ctx.save_for_backward(*all_of(inputs, 6), output[LSE_PARTS_AT])


def _backward_cross_entropy(ctx, upstream):  # type: ignore[no-untyped-def]
    """The gradient is made here, of the upstream one, and not in the forward: multiplying it afterwards would be another pass
    over all logits, into memory of its own. A graph may not write into what it saved (retain_graph runs it twice, and
    functionalisation copies what an operator writes to), so that eager's multiplication in place is no way out."""
    logits, target, w, factor_tensor, row_scale, numbers, lse_parts = ctx.saved_tensors
    given, g = ctx.given, upstream[0]
    options = traced_record_of(CrossEntropyOptions, given, row_scale, numbers)
    if given["reduction"] != "none":
        g = times_factor(g, given["factor"], factor_tensor, logits.shape[0])
    k = contiguous(of_cross_entropy(g, lse_parts, target, w, logits.shape[1], options))
    grad = row_grad(logits, target, lse_parts, k, w, options, given["backend"])
    return grad, *[None] * (ctx.arguments - 1)


_cross_entropy.register_autograd(_backward_cross_entropy, setup_context=_save_cross_entropy)


def cross_entropy(
    logits: Tensor,
    target: Tensor | None,
    w: Tensor | None,
    factor: Factor,
    options: CrossEntropyOptions,
    reduction: str,
    want: tuple[str, ...],
    backend: str,
) -> list[Tensor]:
    """[loss, statistics …, lse_parts]."""
    numbers, fields = numbers_and_fields(options, CROSS_ENTROPY)
    return _cross_entropy(
        logits,
        target,
        w,
        factor.tensor,
        options.row_scale,
        numbers,
        **fields,
        factor=factor.value,
        reduction=reduction,
        want=",".join(want),
        backend=backend,
    )


@operator(
    "token_stats",
    f"Tensor logits, Tensor? target, {ROW_SCALE}",
    RowOptions,
    "str want, str backend",
    "Tensor[]",
)
def _token_stats(logits, target, row_scale=None, numbers=None, *, want, backend, **fields):  # type: ignore[no-untyped-def]
    options, names = record_of(RowOptions, fields, row_scale, numbers), names_of(want)
    check_targets(target, logits.shape[1], options.ignore_index)
    out = backends.runnable(backend).row_stats(logits, target, options, want=heads.with_lse_parts(names))
    return pack_stats(out, names, logits, logits.dtype)


@_token_stats.register_fake
def _(logits, target, row_scale=None, numbers=None, *, want, **fields):  # type: ignore[no-untyped-def]
    return fake_stats(logits, logits.shape[0], names_of(want), logits.dtype)


def _save_token_stats(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given, ctx.arguments = keyword_only_inputs, count_arguments(inputs, 2)
    by_name = dict(zip(OUTPUTS, output, strict=True))
    ctx.save_for_backward(*all_of(inputs, 4), by_name[LSE_PARTS], by_name["entropy"])


def _backward_token_stats(ctx, upstream):  # type: ignore[no-untyped-def]
    logits, target, row_scale, numbers, lse_parts, entropy = ctx.saved_tensors
    k = stats_coefficients(names_of(ctx.given["want"]), upstream, entropy, lse_parts.dtype)
    options = traced_record_of(RowOptions, ctx.given, row_scale, numbers)
    grad = row_grad(logits, target, lse_parts, k, None, options, ctx.given["backend"])
    return grad, *[None] * (ctx.arguments - 1)


_token_stats.register_autograd(_backward_token_stats, setup_context=_save_token_stats)


def token_stats(
    logits: Tensor, target: Tensor | None, options: RowOptions, want: tuple[str, ...], backend: str
) -> list[Tensor]:
    """The statistics in the order of STATS."""
    names = ",".join(name for name in want if name != ARGMAX)
    numbers, fields = numbers_and_fields(options, ROW)
    return _token_stats(logits, target, options.row_scale, numbers, **fields, want=names, backend=backend)[
        :-1
    ]
