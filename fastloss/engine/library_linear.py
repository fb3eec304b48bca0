"""The torch.library operators of the linear head: linear_row_grad, linear_cross_entropy, linear_token_stats."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.engine import coefficients, head, linear
from fastloss.engine import cross_entropy as ce
from fastloss.engine import token_stats as ts
from fastloss.engine.head import Head, Needs
from fastloss.engine.library_common import (
    check_targets,
    fake_stats,
    late,
    pack,
    reduced_loss,
    rows_of,
    stats_coefficients,
)
from fastloss.engine.native_rows import STATS, acc_dtype

NO_NEEDS = Needs(False, False, False)


def _make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    chunk: int,
    target: Tensor | None,
    ignore_index: int,
    backend: str,
    needs: Needs,
) -> Head:
    rows = head.count_kept(hidden.shape[0], target, ignore_index)
    chunk = linear.chunk_of_rows(backend, dtype, weight, rows, needs, chunk or None)
    return linear._head(hidden, weight, bias, dtype, chunk)


def _or_nothing(like: Tensor, grads: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [like.new_empty(0) if g is None else g for g in grads]


@torch.library.custom_op("fastloss::linear_row_grad", mutates_args=())
def linear_row_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    lse: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    d: Tensor | None,
    w: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    needs: list[bool],
    dtype: torch.dtype,
    chunk: int,
    backend: str,
) -> list[Tensor]:
    h = _make_head(hidden, weight, bias, dtype, chunk, target, ignore_index, backend, Needs(*needs))
    k = coefficients.Coefficients(a, b, c, d)
    given = head.Given(target, lse, k, w, ignore_index, scale, softcap)
    grads = linear.recompute(h, Needs(*needs), rows_of(backend), given)
    return _or_nothing(hidden, linear.finish(grads, linear._dtypes(hidden, weight, bias)))


@linear_row_grad.register_fake
def _(
    hidden,
    weight,
    bias,
    target,
    lse,
    a,
    b,
    c,
    d,
    w,
    ignore_index,
    scale,
    softcap,
    needs,
    dtype,
    chunk,
    backend,
):  # type: ignore[no-untyped-def]
    return _fake_grads(hidden, weight, bias, needs, linear._dtypes(hidden, weight, bias))


def _fake_grads(hidden, weight, bias, needs, dtypes):  # type: ignore[no-untyped-def]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return [
        hidden.new_empty(shape, dtype=t) if need else hidden.new_empty(0)
        for need, shape, t in zip(needs, shapes, dtypes, strict=True)
    ]


@torch.library.custom_op("fastloss::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    w: Tensor | None,
    factor_tensor: Tensor | None,
    factor: float,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    scale: float,
    softcap: float,
    want: str,
    needs: list[bool],
    dtype: torch.dtype,
    chunk: int,
    backend: str,
) -> list[Tensor]:
    check_targets(target, weight.shape[0], ignore_index)
    rows = head.count_kept(hidden.shape[0], target, ignore_index)
    chunk = linear.chunk_of_cross_entropy(
        backend, dtype, weight, rows, Needs(*needs), chunk or None, reduction == "none",
        target is None or label_smoothing > 0,
    )  # fmt: skip
    h = linear._head(hidden, weight, bias, dtype, chunk)
    names = tuple(want.split(",")) if want else ()
    call = ce.CrossEntropyCall(
        rows_of(backend),
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        scale,
        softcap,
        False,
        dtype,
        names,
    )
    f = ce.Factor(factor, factor_tensor)
    out, grads = linear.cross_entropy_rows(h, Needs(*needs), target, w, call, f)
    dtypes = _grad_dtypes(hidden, weight, bias, dtype)
    return [
        reduced_loss(out["loss"], reduction, f),
        *pack(out, want, out["loss"]),
        *_or_nothing(hidden, linear.finish(grads, dtypes)),
    ]


def _grad_dtypes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[torch.dtype, ...]:
    """float16 gradients wait, unscaled, in float32 for the upstream gradient."""
    return (
        (hidden.dtype, torch.float32, torch.float32)
        if ce.factor_is_late(dtype)
        else linear._dtypes(hidden, weight, bias)
    )


@linear_cross_entropy.register_fake
def _(
    hidden,
    weight,
    bias,
    target,
    w,
    factor_tensor,
    factor,
    reduction,
    ignore_index,
    label_smoothing,
    z_loss,
    scale,  # type: ignore[no-untyped-def]
    softcap,
    want,
    needs,
    dtype,
    chunk,
    backend,
):
    rows = hidden.shape[0]
    acc = hidden.new_empty(0, dtype=acc_dtype(dtype))
    loss = acc.new_empty((rows,) if reduction == "none" else ())
    return [
        loss,
        *fake_stats(acc, rows, want),
        *_fake_grads(hidden, weight, bias, needs, _grad_dtypes(hidden, weight, bias, dtype)),
    ]


def _save_linear_cross_entropy(ctx, inputs, output):  # type: ignore[no-untyped-def]
    (
        hidden,
        weight,
        bias,
        target,
        w,
        factor_tensor,
        ctx.factor,
        ctx.reduction,
        ctx.ignore_index,
        ctx.label_smoothing,
        ctx.z_loss,
        ctx.scale,
        ctx.softcap,
        _,
        ctx.made,
        ctx.dtype,
        ctx.chunk,
        ctx.backend,
    ) = inputs
    ctx.needs = list(ctx.needs_input_grad[:3])
    ctx.dtypes = linear._dtypes(hidden, weight, bias)
    made = any(ctx.made)
    operands = (None,) * 5 if made else (hidden, weight, bias, target, w)
    ctx.save_for_backward(
        *operands, *(output[-3:] if made else (None,) * 3), None if made else output[1], factor_tensor
    )


def _backward_linear_cross_entropy(ctx, upstream):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, w, *made, lse, factor_tensor = ctx.saved_tensors
    g = upstream[0]
    if any(ctx.made):
        scale = g[:, None] if ctx.reduction == "none" else g * late(ctx.dtype, ctx.factor, factor_tensor)
        grads = [
            (x * scale).to(t) if need else None for x, need, t in zip(made, ctx.made, ctx.dtypes, strict=True)
        ]
    else:
        if ctx.reduction != "none":
            g = (g * ctx.factor if factor_tensor is None else g * ctx.factor * factor_tensor).expand(
                hidden.shape[0]
            )
        k = coefficients.of_cross_entropy(g, lse, target, w, weight.shape[0], ctx.label_smoothing, ctx.z_loss)
        k = coefficients.Coefficients(*[None if x is None else x.contiguous() for x in k])
        grads = linear_row_grad(
            hidden,
            weight,
            bias,
            target,
            lse,
            *k,
            w,
            ctx.ignore_index,
            ctx.scale,
            ctx.softcap,
            ctx.needs,
            ctx.dtype,
            ctx.chunk,
            ctx.backend,
        )
        grads = [x if need else None for x, need in zip(grads, ctx.needs, strict=True)]
    return (*grads, *[None] * 15)


linear_cross_entropy.register_autograd(
    _backward_linear_cross_entropy, setup_context=_save_linear_cross_entropy
)


@torch.library.custom_op("fastloss::linear_token_stats", mutates_args=())
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    want: str,
    dtype: torch.dtype,
    chunk: int,
    backend: str,
) -> list[Tensor]:
    check_targets(target, weight.shape[0], ignore_index)
    rows = head.count_kept(hidden.shape[0], target, ignore_index)
    chunk = chunk or head.default_chunk(rows, weight.shape[0], dtype, hidden.device)
    h = linear._head(hidden, weight, bias, dtype, chunk)
    call = ts.StatsCall(rows_of(backend), ignore_index, scale, softcap, False, tuple(want.split(",")))
    out, _ = linear.token_stats_rows(h, NO_NEEDS, target, call)
    return pack(out, want, out["logsumexp"])


@linear_token_stats.register_fake
def _(hidden, weight, bias, target, ignore_index, scale, softcap, want, dtype, chunk, backend):  # type: ignore[no-untyped-def]
    return fake_stats(hidden.new_empty(0, dtype=acc_dtype(dtype)), hidden.shape[0], want)


def _save_linear_token_stats(ctx, inputs, output):  # type: ignore[no-untyped-def]
    (
        hidden,
        weight,
        bias,
        target,
        ctx.ignore_index,
        ctx.scale,
        ctx.softcap,
        ctx.want,
        ctx.dtype,
        ctx.chunk,
        ctx.backend,
    ) = inputs
    ctx.needs = list(ctx.needs_input_grad[:3])
    by_name = dict(zip(STATS, output, strict=True))
    ctx.save_for_backward(hidden, weight, bias, target, by_name["logsumexp"], by_name["entropy"])


def _backward_linear_token_stats(ctx, upstream):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, lse, entropy = ctx.saved_tensors
    k = stats_coefficients(ctx.want, upstream, entropy, lse.dtype)
    grads = linear_row_grad(
        hidden,
        weight,
        bias,
        target,
        lse,
        *k,
        None,
        ctx.ignore_index,
        ctx.scale,
        ctx.softcap,
        ctx.needs,
        ctx.dtype,
        ctx.chunk,
        ctx.backend,
    )
    return (*[x if need else None for x, need in zip(grads, ctx.needs, strict=True)], *[None] * 8)


linear_token_stats.register_autograd(_backward_linear_token_stats, setup_context=_save_linear_token_stats)
