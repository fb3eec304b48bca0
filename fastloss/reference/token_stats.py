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
    support: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """All statistics of ``logits [..., V]`` at ``target [...]`` (None: those that need no target).

    ``support``: the distribution is that of each row's kept classes alone (the others' logits are -inf, and in no mean), of ``logits
    [N, V]``: their ids ``[entries]`` (-1: padding) and the sets' bounds ``[N + 1]``. A row is NaN where its target is none of them, or
    where an id is no class.
    """
    vocab = logits.shape[-1]
    kept, bad_sets = (None, None) if support is None else kept_mask(*support, vocab)
    ignored = torch.zeros((), dtype=torch.bool, device=logits.device)
    if target is not None:
        ignored = target == ignore_index
        # An ignored row must not reach the gradient, not even through a NaN.
        logits = torch.where(
            ignored.unsqueeze(-1), torch.zeros((), dtype=logits.dtype, device=logits.device), logits
        )
    z = effective_logits(logits, bias=bias, scale=scale, softcap=softcap)
    mean = z.mean(-1) if kept is None else torch.where(kept, z, 0).sum(-1) / kept.sum(-1)
    if kept is not None:
        z = torch.where(kept | ignored.unsqueeze(-1), z, -torch.inf)
    logp = z.log_softmax(-1)
    p = logp.exp()
    stats = {
        "logsumexp": z.logsumexp(-1),
        "entropy": -torch.where(p == 0, p, p * torch.where(p == 0, torch.zeros_like(logp), logp)).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1).detach(),
        "mean_logits": mean.detach(),
    }
    if target is not None:
        bad = ((target < 0) | (target >= vocab)) & ~ignored
        safe = torch.where(ignored | bad, torch.zeros_like(target), target).unsqueeze(-1)
        if kept is not None:
            bad = (bad | ~kept.gather(-1, safe).squeeze(-1)) & ~ignored
        stats["logprobs"] = logp.gather(-1, safe).squeeze(-1).masked_fill(bad, float("nan"))
        stats["is_top1"] = (z.gather(-1, safe).squeeze(-1) >= z.amax(-1)) & ~bad
        stats = {name: value.masked_fill(ignored, 0) for name, value in stats.items()}
    if bad_sets is not None:
        wrong = bad_sets & ~ignored
        stats = {
            name: x.masked_fill(wrong, torch.nan) if x.is_floating_point() else x for name, x in stats.items()
        }
    return stats


def kept_mask(ids: Tensor, offsets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Which classes a sampler kept, bool ``[N, V]``, from the sets' ids ``[entries]`` (-1: padding) and their bounds ``[N + 1]``; and the
    rows that have an id of no class, bool ``[N]``."""
    rows = offsets.shape[0] - 1
    place = torch.arange(ids.shape[0], dtype=torch.int64, device=ids.device)
    row = torch.searchsorted(offsets[1:].contiguous(), place, right=True).clamp(max=max(0, rows - 1))
    known = (ids >= 0) & (ids < vocab)
    column = torch.where(known, ids, vocab)
    mask = torch.zeros(rows * (vocab + 1), dtype=torch.bool, device=ids.device)
    mask = mask.scatter(0, row * (vocab + 1) + column, True).view(rows, vocab + 1)[:, :vocab]
    wrong = (~known & (ids != -1)).to(torch.int64)
    bad = torch.zeros(rows, dtype=torch.int64, device=ids.device).scatter_reduce(0, row, wrong, "amax") > 0
    return mask, bad


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
