"""The torch.library operators: what torch.compile, export, FakeTensor and FlopCounterMode see.

Eager calls on plain tensors take the autograd functions beside this file instead, which cost less per call and can
give their gradient buffer away; the numbers are the same, both run the same rows and the same head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastloss import coefficients, dispatch, head
from fastloss.head import Head, Needs
from fastloss.ops import cross_entropy as ce
from fastloss.ops import linear
from fastloss.ops import token_stats as ts
from fastloss.ops.native_rows import STATS, acc_dtype

NO_NEEDS = Needs(False, False, False)


def _rows(backend: str) -> Any:
    adapter, reason = dispatch._load(backend)
    if reason:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    return adapter


def _pack(out: dict[str, Tensor], want: str, like: Tensor) -> list[Tensor]:
    names = want.split(",") if want else []
    return [out[n] if n in names or n == "logsumexp" else _nothing(like, n) for n in STATS]


def _nothing(like: Tensor, name: str = "") -> Tensor:
    return like.new_empty(0, dtype=torch.uint8 if name == "is_top1" else acc_dtype(like.dtype))


def _fake_stats(like: Tensor, rows: int, want: str) -> list[Tensor]:
    names = want.split(",") if want else []
    return [
        like.new_empty(
            rows if n in names or n == "logsumexp" else 0,
            dtype=torch.uint8 if n == "is_top1" else acc_dtype(like.dtype),
        )
        for n in STATS
    ]


def _check_cpu_targets(target: Tensor | None, vocab: int, ignore_index: int) -> None:
    if target is not None and (target.device.type == "cpu" or dispatch.targets_are_validated()):
        ce.reject_bad_targets(target, vocab, ignore_index)


def _loss(loss: Tensor, reduction: str, factor: ce.Factor) -> Tensor:
    return loss if reduction == "none" else ce.reduced(loss, factor, loss.dtype)


# --- row_grad ---------------------------------------------------------------------------------------------------


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
    _rows(backend).row_grad(
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


# --- cross_entropy ----------------------------------------------------------------------------------------------


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
    _check_cpu_targets(target, logits.shape[1], ignore_index)
    names = tuple(want.split(",")) if want else ()
    call = ce.CrossEntropyCall(
        _rows(backend),
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
        _loss(out["loss"], reduction, f),
        *_pack(out, want, logits),
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
    return [loss, *_fake_stats(logits, rows, want), logits.new_empty(logits.shape if with_grad else (0,))]


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


def _late(dtype: torch.dtype, factor: float, factor_tensor: Tensor | None) -> Tensor | float:
    if not ce.factor_is_late(dtype):
        return 1.0
    return factor if factor_tensor is None else factor_tensor * factor


def _backward_cross_entropy(ctx, upstream):  # type: ignore[no-untyped-def]
    grad, logits, lse, target, w, factor_tensor = ctx.saved_tensors
    g = upstream[0]
    if ctx.with_grad:
        out = (grad * (g * _late(ctx.dtype, ctx.factor, factor_tensor))).to(ctx.dtype)
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


# --- token_stats ------------------------------------------------------------------------------------------------


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
    _check_cpu_targets(target, logits.shape[1], ignore_index)
    call = ts.StatsCall(_rows(backend), ignore_index, scale, softcap, False, tuple(want.split(",")))
    return _pack(ts.stats(call, logits, target, None), want, logits)


@token_stats.register_fake
def _(logits, target, ignore_index, scale, softcap, want, backend):  # type: ignore[no-untyped-def]
    return _fake_stats(logits, logits.shape[0], want)


def _save_token_stats(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, target, ctx.ignore_index, ctx.scale, ctx.softcap, ctx.want, ctx.backend = inputs
    by_name = dict(zip(STATS, output, strict=True))
    ctx.save_for_backward(logits, target, by_name["logsumexp"], by_name["entropy"])


def _stats_coefficients(want: str, upstream: list[Tensor], entropy: Tensor, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    names = want.split(",")
    g = {n: x for n, x in zip(STATS, upstream, strict=True) if n in names and n in ts.DIFFERENTIABLE}
    made = [coefficients.vector(g.get(n), dtype) for n in ts.DIFFERENTIABLE]
    return coefficients.of_token_stats(made[0], made[1], made[2], entropy)


def _backward_token_stats(ctx, upstream):  # type: ignore[no-untyped-def]
    logits, target, lse, entropy = ctx.saved_tensors
    k = _stats_coefficients(ctx.want, upstream, entropy, lse.dtype)
    return (
        row_grad(logits, target, lse, *k, None, ctx.ignore_index, ctx.scale, ctx.softcap, ctx.backend),
        *[None] * 6,
    )


token_stats.register_autograd(_backward_token_stats, setup_context=_save_token_stats)


# --- the linear head --------------------------------------------------------------------------------------------


def _make_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunk: int) -> Head:
    chunk = chunk or head.default_chunk(hidden.shape[0], weight.shape[0], dtype, hidden.device)
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
    h = _make_head(hidden, weight, bias, dtype, chunk)
    grads = head.backward(
        h,
        Needs(*needs),
        _rows(backend),
        target,
        lse,
        coefficients.Coefficients(a, b, c, d),
        w,
        ignore_index=ignore_index,
        scale=scale,
        softcap=softcap,
    )
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
    _check_cpu_targets(target, weight.shape[0], ignore_index)
    h = _make_head(hidden, weight, bias, dtype, chunk)
    names = tuple(want.split(",")) if want else ()
    call = ce.CrossEntropyCall(
        _rows(backend), reduction, ignore_index, label_smoothing, z_loss, scale, softcap, False, dtype, names
    )
    f = ce.Factor(factor, factor_tensor)
    out, grads = linear.cross_entropy_rows(h, Needs(*needs), target, w, call, f)
    dtypes = _grad_dtypes(hidden, weight, bias, dtype)
    return [
        _loss(out["loss"], reduction, f),
        *_pack(out, want, out["loss"]),
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
        *_fake_stats(acc, rows, want),
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
        scale = g[:, None] if ctx.reduction == "none" else g * _late(ctx.dtype, ctx.factor, factor_tensor)
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
    _check_cpu_targets(target, weight.shape[0], ignore_index)
    h = _make_head(hidden, weight, bias, dtype, chunk)
    call = ts.StatsCall(_rows(backend), ignore_index, scale, softcap, False, tuple(want.split(",")))

    def row_function(z: Tensor, start: int, stop: int, overwrite: bool) -> dict[str, Tensor]:
        return ts.stats(call, z, None if target is None else target[start:stop], h.bias)

    out, _ = head.run(h, NO_NEEDS, row_function)
    return _pack(out, want, out["logsumexp"])


@linear_token_stats.register_fake
def _(hidden, weight, bias, target, ignore_index, scale, softcap, want, dtype, chunk, backend):  # type: ignore[no-untyped-def]
    return _fake_stats(hidden.new_empty(0, dtype=acc_dtype(dtype)), hidden.shape[0], want)


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
    k = _stats_coefficients(ctx.want, upstream, entropy, lse.dtype)
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


# --- FLOPs: an opaque operator would count 0 and lower a user's MFU ----------------------------------------------


def _gemm_flops(hidden_shape, weight_shape, count: int) -> int:  # type: ignore[no-untyped-def]
    rows, dim = hidden_shape
    return 2 * rows * dim * weight_shape[0] * count


@register_flop_formula(torch.ops.fastloss.linear_cross_entropy)
def _(
    hidden_shape,
    weight_shape,
    bias,
    target,
    w,
    factor_tensor,
    factor,
    reduction,
    ignore_index,
    label_smoothing,  # type: ignore[no-untyped-def]
    z_loss,
    scale,
    softcap,
    want,
    needs,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    return _gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))


@register_flop_formula(torch.ops.fastloss.linear_token_stats)
def _(hidden_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _gemm_flops(hidden_shape, weight_shape, 1)


@register_flop_formula(torch.ops.fastloss.linear_row_grad)
def _(
    hidden_shape,
    weight_shape,
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
    *args,  # type: ignore[no-untyped-def]
    out_shape=None,
    **kwargs,
) -> int:
    return _gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))
