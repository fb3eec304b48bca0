"""Autograd of the token statistics over rows of logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import coefficients
from fastloss.engine.once import once_differentiable

DIFFERENTIABLE = ("logprob", "entropy", "logsumexp")


class StatsCall(NamedTuple):
    """Everything about a call but its tensors."""

    rows: Any
    ignore_index: int
    scale: float
    softcap: float
    inplace: bool
    want: tuple[str, ...]  # engine names, in the order of the function's outputs
    differentiable: tuple[str, ...] = DIFFERENTIABLE  # of those, what carries a gradient


def stats(call: StatsCall, logits: Tensor, target: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
    want = call.want if "logsumexp" in call.want else (*call.want, "logsumexp")
    return call.rows.row_stats(
        logits,
        target,
        ignore_index=call.ignore_index,
        bias=bias,
        scale=call.scale,
        softcap=call.softcap,
        want=want,
    )


def row_coefficients(
    call: StatsCall, upstream: tuple[Tensor | None, ...], entropy: Tensor | None, dtype: torch.dtype
) -> coefficients.Coefficients:
    by_name = dict(zip(call.want, upstream, strict=True))
    g = [coefficients.vector(by_name.get(name), dtype) for name in DIFFERENTIABLE]
    return coefficients.of_token_stats(g[0], g[1], g[2], entropy)


class TokenStatsFunction(torch.autograd.Function):
    """(logits, target) -> the wanted statistics; logprob, entropy and logsumexp carry gradients."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor | None, call: StatsCall) -> Any:
        out = stats(call, logits, target, None)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, out["logsumexp"], out.get("entropy"))
        ctx.mark_non_differentiable(*[out[n] for n in call.want if n not in DIFFERENTIABLE])
        return tuple(out[name] for name in call.want)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        call: StatsCall = ctx.call
        logits, target, lse, entropy = ctx.saved_tensors
        if all(g is None for g in upstream):
            return None, None, None
        k = row_coefficients(call, upstream, entropy, lse.dtype)
        out = (
            logits.detach()
            if call.inplace
            else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        )
        call.rows.row_grad(
            logits,
            target,
            ignore_index=call.ignore_index,
            bias=None,
            scale=call.scale,
            softcap=call.softcap,
            lse=lse,
            a=k.a,
            b=k.b,
            c=k.c,
            d=k.d,
            out=out,
        )
        if call.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, None, None
