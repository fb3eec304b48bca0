"""Autograd of the token-level policy loss from hidden states: 3 GEMMs, 2 with a frozen head.

A token's share of the aggregate is known from the mask, so its coefficients are made as soon as its logits are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import coefficients, head, policy
from fastloss.engine.head import Grads, Head, Needs
from fastloss.engine.linear import _dtypes, _head, factor_is_late, finish
from fastloss.engine.native_rows import acc_dtype
from fastloss.engine.once import once_differentiable
from fastloss.losses.policy_options import PolicyOptions

# The target of a masked row: no class, and none that a user can mean.
IGNORED = -(2**63)


class LinearPolicyCall(NamedTuple):
    """Everything about a call but what carries gradients; per-token tensors are acc ``[N]``, ``mask`` uint8."""

    rows: Any
    options: PolicyOptions
    target: Tensor  # IGNORED where masked
    advantages: Tensor
    mask: Tensor
    old: Tensor | None
    ref: Tensor | None
    sampler: Tensor | None
    token_weight: Tensor | None
    share: Tensor  # unscaled
    scale: Tensor  # 0-d
    bonus_share: Tensor | None  # scaled; an entropy bonus with an aggregation of its own
    bonus_coef: float
    logit_scale: float
    softcap: float
    with_entropy: bool

    def pick(self, keep: Tensor | None) -> LinearPolicyCall:
        """The call over the kept rows alone."""
        per_row = (
            "target",
            "advantages",
            "mask",
            "old",
            "ref",
            "sampler",
            "token_weight",
            "share",
            "bonus_share",
        )
        picked: dict[str, Any] = {name: head.pick(getattr(self, name), keep) for name in per_row}
        return self._replace(**picked)


def policy_rows(h: Head, needs: Needs, call: LinearPolicyCall) -> tuple[Tensor, Tensor, Grads]:
    """Loss, ``out [16]`` and the gradients of the loss (without ``scale`` where it is late: float16)."""
    keep = head.kept_rows(call.target, IGNORED)
    c = call.pick(keep)
    late = factor_is_late(h)
    agg = c.share if late else c.share * c.scale
    bonus_grad = None
    if c.bonus_share is not None:
        bonus_grad = -c.bonus_coef * (c.bonus_share / c.scale if late else c.bonus_share)
    want = ("logsumexp", "logprob", "entropy") if c.with_entropy else ("logsumexp", "logprob")
    outs: list[Tensor] = []
    bonuses: list[Tensor] = []

    def row_function(z: Tensor, start: int, stop: int, overwrite: bool) -> dict[str, Tensor]:
        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:stop]

        if start == stop:
            return {}
        where = {
            "ignore_index": IGNORED,
            "bias": h.bias,
            "scale": c.logit_scale,
            "softcap": c.softcap,
        }
        stats = c.rows.row_stats(z, part(c.target), want=want, **where)
        result = c.rows.policy_loss(
            stats["logprob"],
            old=part(c.old),
            advantages=part(c.advantages),
            mask=part(c.mask),
            ref=part(c.ref),
            entropy=stats.get("entropy"),
            sampler=part(c.sampler),
            token_weight=part(c.token_weight),
            select=None,
            agg=part(agg),
            offsets=None,
            length=stop - start,
            count=1,
            options=c.options,
            normalizer=1.0,
        )
        outs.append(result["out"])
        d_entropy = result["grad_entropy"] if c.options.entropy_coef else None
        if c.bonus_share is not None:
            bonuses.append((c.bonus_share[start:stop] * stats["entropy"]).sum())
            d_entropy = part(bonus_grad)
        if overwrite:
            k = coefficients.of_token_stats(result["grad"], d_entropy, None, stats.get("entropy"))
            c.rows.row_grad(
                z, part(c.target), lse=stats["logsumexp"], a=k.a, b=k.b, c=k.c, d=k.d, out=z, **where
            )
        return {}

    _, grads = head.run(h, needs, row_function, keep=keep)
    out = policy.combine_out(torch.stack(outs)) if outs else policy.empty_out(c.share)
    loss = out[0] * c.scale if late else out[0].clone()
    # The launches summed scaled shares: put the scale where metrics look for it.
    policy_term = out[15] if late else out[15] / c.scale
    out = torch.cat([loss.reshape(1), c.scale.reshape(1), out[2:15], policy_term.reshape(1)])
    if bonuses:
        loss = loss - c.bonus_coef * torch.stack(bonuses).sum()
    return loss, out, grads


class LinearPolicyLoss(torch.autograd.Function):
    """(hidden, weight, bias) -> (loss, out [16]); the gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LinearPolicyCall,
        dtype: torch.dtype,
        chunk: int,
        needs: Needs,
    ) -> Any:
        ctx.call, ctx.dtype, ctx.chunk, ctx.needs = call, dtype, chunk, needs
        h = _head(hidden, weight, bias, dtype, chunk)
        loss, out, grads = policy_rows(h, needs, call)
        ctx.late = factor_is_late(h)
        ctx.grads = grads if ctx.late else Grads(*finish(grads, _dtypes(hidden, weight, bias)))
        ctx.save_for_backward(hidden, weight, bias)
        ctx.mark_non_differentiable(out)
        return loss, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        grads = ctx.grads
        ctx.grads = None
        if grads is None:  # retain_graph: the first backward gave the buffers away
            grads = policy_rows(_head(hidden, weight, bias, ctx.dtype, ctx.chunk), ctx.needs, ctx.call)[2]
        scale = upstream.to(acc_dtype(ctx.dtype))
        if ctx.late:
            scale = scale * ctx.call.scale
        # On a GPU a comparison with 1 would wait for the device: the kernel that multiplies looks itself.
        factor = float(scale) if hidden.device.type == "cpu" else scale
        done = finish(grads, _dtypes(hidden, weight, bias), factor, ctx.call.rows)
        return (*done, None, None, None, None)
