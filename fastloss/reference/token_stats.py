"""Definition of the per-token statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference.logits import effective_logits, linear_logits
from fastloss.tables import Number


def token_stats(
    logits: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None = None,
    scale: Number = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """All statistics of ``logits [..., V]`` at ``target [...]`` (None: those that need no target)."""
    vocab = logits.shape[-1]
    ignored = torch.zeros((), dtype=torch.bool, device=logits.device)
    if target is not None:
        ignored = target == ignore_index
        # An ignored row must not reach the gradient, not even through a NaN.
        logits = torch.where(
            ignored.unsqueeze(-1), torch.zeros((), dtype=logits.dtype, device=logits.device), logits
        )
    z = effective_logits(logits, bias=bias, scale=scale, softcap=softcap)
    logp = z.log_softmax(-1)
    p = logp.exp()
    stats = {
        "logsumexp": z.logsumexp(-1),
        "entropy": -torch.where(p == 0, p, p * torch.where(p == 0, torch.zeros_like(logp), logp)).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1).detach(),
        "mean_logits": z.mean(-1).detach(),
    }
    if target is not None:
        bad = ((target < 0) | (target >= vocab)) & ~ignored
        safe = torch.where(ignored | bad, torch.zeros_like(target), target).unsqueeze(-1)
        stats["logprobs"] = logp.gather(-1, safe).squeeze(-1).masked_fill(bad, float("nan"))
        stats["is_top1"] = (z.gather(-1, safe).squeeze(-1) >= z.amax(-1)) & ~bad
        stats = {name: value.masked_fill(ignored, 0) for name, value in stats.items()}
    return stats


def lse_parts(
    logits: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None = None,
    scale: Number = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The largest logit of each row and log Σ e^(z - largest), ``[..., 2]``; 0 where the target is ignored."""
    z = effective_logits(logits.detach(), bias=bias, scale=scale, softcap=softcap)
    largest = z.amax(-1, keepdim=True)
    parts = torch.cat([largest, (z - largest).exp().sum(-1, keepdim=True).log()], -1)
    return parts if target is None else parts.masked_fill((target == ignore_index).unsqueeze(-1), 0)


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    **options,
) -> dict[str, Tensor]:
    """``token_stats`` of the logits of a linear head."""
    return token_stats(linear_logits(input, linear_weight, linear_bias), target, **options)
