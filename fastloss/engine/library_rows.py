"""The torch.library operators over rows of logits: row_grad, cross_entropy, token_stats."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.engine import coefficients
from fastloss.engine import cross_entropy as ce
from fastloss.engine import token_stats as ts
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


@torch.library.custom_op("fastloss::row_grad", mutates_args=())
def row_grad(
    logits: Tensor,
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
    backend: str,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows_of(backend).row_grad(
        logits,
        target,
        ignore_index=ignore_index,
        bias=None,
        scale=scale,
        softcap=softcap,
        lse=lse,
        a=a,
        b=b,
        c=c,
        d=d,
        w=w,
        out=out,
    )
    return out


@row_grad.register_fake
def _(logits, target, lse, a, b, c, d, w, ignore_index, scale, softcap, backend):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@torch.library.custom_op("fastloss::cross_entropy", mutates_args=())
def cross_entropy(
    logits: Tensor,
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
    with_grad: bool,
    backend: str,
) -> list[Tensor]:
    check_targets(target, logits.shape[1], ignore_index)
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
        logits.dtype,
        names,
    )
    f = ce.Factor(factor, factor_tensor)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if with_grad else None
    out = ce.run(call, logits, target, w, None, grad, f)
    return [
        reduced_loss(out["loss"], reduction, f),
        *pack(out, want, logits),
        logits.new_empty(0) if grad is None else grad,
    ]


@cross_entropy.register_fake
def _(
    logits,
    target,
    w,
    factor_tensor,
    factor,
    reduction,
    ignore_index,
    label_smoothing,
    z_loss,
    scale,
    softcap,  # type: ignore[no-untyped-def]
    want,
    with_grad,
    backend,
):
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=acc_dtype(logits.dtype))
    return [loss, *fake_stats(logits, rows, want), logits.new_empty(logits.shape if with_grad else (0,))]


def _save_cross_entropy(ctx, inputs, output):  # type: ignore[no-untyped-def]
    (
        logits,
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
        ctx.with_grad,
        ctx.backend,
    ) = inputs
    saved = (output[-1], None, None) if ctx.with_grad else (None, logits, output[1])
    ctx.dtype = logits.dtype
    ctx.save_for_backward(*saved, target, w, factor_tensor)


def _backward_cross_entropy(ctx, upstream):  # type: ignore[no-untyped-def]
    grad, logits, lse, target, w, factor_tensor = ctx.saved_tensors
    g = upstream[0]
    if ctx.with_grad:
        out = (grad * (g * late(ctx.dtype, ctx.factor, factor_tensor))).to(ctx.dtype)
    else:
        if ctx.reduction != "none":
            g = (g * ctx.factor if factor_tensor is None else g * ctx.factor * factor_tensor).expand(
                logits.shape[0]
            )
        k = coefficients.of_cross_entropy(g, lse, target, w, logits.shape[1], ctx.label_smoothing, ctx.z_loss)
        out = row_grad(
            logits,
            target,
            lse,
            *[None if x is None else x.contiguous() for x in k],
            w,
            ctx.ignore_index,
            ctx.scale,
            ctx.softcap,
            ctx.backend,
        )
    return (out, *[None] * 13)


cross_entropy.register_autograd(_backward_cross_entropy, setup_context=_save_cross_entropy)


@torch.library.custom_op("fastloss::token_stats", mutates_args=())
def token_stats(
    logits: Tensor,
    target: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    want: str,
    backend: str,
) -> list[Tensor]:
    check_targets(target, logits.shape[1], ignore_index)
    call = ts.StatsCall(rows_of(backend), ignore_index, scale, softcap, False, tuple(want.split(",")))
    return pack(ts.stats(call, logits, target, None), want, logits)


@token_stats.register_fake
def _(logits, target, ignore_index, scale, softcap, want, backend):  # type: ignore[no-untyped-def]
    return fake_stats(logits, logits.shape[0], want)


def _save_token_stats(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, target, ctx.ignore_index, ctx.scale, ctx.softcap, ctx.want, ctx.backend = inputs
    by_name = dict(zip(STATS, output, strict=True))
    ctx.save_for_backward(logits, target, by_name["logsumexp"], by_name["entropy"])


def _backward_token_stats(ctx, upstream):  # type: ignore[no-untyped-def]
    logits, target, lse, entropy = ctx.saved_tensors
    k = stats_coefficients(ctx.want, upstream, entropy, lse.dtype)
    return (
        row_grad(logits, target, lse, *k, None, ctx.ignore_index, ctx.scale, ctx.softcap, ctx.backend),
        *[None] * 6,
    )


token_stats.register_autograd(_backward_token_stats, setup_context=_save_token_stats)
