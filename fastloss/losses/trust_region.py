"""trust_region_mask: which tokens the sampler and the trainer agree about well enough to learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.sequences import Sequences, flat_mask, layout_of
from fastloss.losses.policy_inputs import check_like
from fastloss.tables import ACC_DTYPES, MAX_LOG_RATIO

STATISTICS = ("ratio", "k2", "k3", "tv", "binary_kl")
LEVELS = ("token", "seq_mean", "seq_sum", "seq_max")


@torch.no_grad()
def trust_region_mask(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    statistic: str = "ratio",
    level: str = "token",
    low: float | None = None,
    high: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rejects tokens or sequences whose divergence between trainer and sampler lies outside [low, high].

    With p = exp(sampler), q = exp(old), t = clamp(old - sampler, ±20): "ratio" e^t, "k2" t²/2, "k3" e^t - 1 - t, "tv" ``|p - q|``,
    "binary_kl" p log(p/q) + (1-p) log((1-p)/(1-q)) with p, q within [1e-6, 1 - 1e-6]. Over a sequence the mean, sum or
    maximum of its unmasked tokens decides for all of them; of "ratio" the mean or sum of t, as the geometric mean or
    the product.

    Give the result to ``policy_loss`` as ``weights`` (rejected tokens count in the mean; OpenRLHF) or as ``mask`` (they do
    not; verl's ``rollout_rs``). How it maps to their options: docs/policy_gradient.md.

    Args:
        old_logprobs, sampler_logprobs: the trainer's and the sampling engine's log-probs of the sampled tokens, ``[B, T]``, or
            packed ``[N]`` with ``cu_seqlens``. A NaN (a token that the engine did not score) counts as no difference.
        mask: bool or 0/1 likewise; None: all.
        level: "token", "seq_mean", "seq_sum" or "seq_max". low, high: None: no bound on that side.

    Returns:
        bool like ``old_logprobs``: unmasked and not rejected.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; low and high both None.

    >>> import torch, fastloss
    >>> old, sampler = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.1, -3.0]])
    >>> fastloss.trust_region_mask(old, sampler, high=2.0)
    tensor([[ True, False]])
    """
    checks.is_floating("old_logprobs", old_logprobs)
    check_like("sampler_logprobs", sampler_logprobs, old_logprobs)
    checks.is_one_of("statistic", statistic, STATISTICS)
    checks.is_one_of("level", level, LEVELS)
    if low is None and high is None:
        raise ValueError("high: expected a number for high, low or both, got None")
    low = 0.0 if low is None else checks.number("low", low, low=0)
    high = torch.inf if high is None else checks.number("high", high, low=low)
    if statistic == "ratio" and level == "seq_max":
        raise ValueError(
            "level: expected 'token', 'seq_mean' or 'seq_sum' for statistic='ratio', got 'seq_max'"
        )
    layout = layout_of("old_logprobs", old_logprobs, cu_seqlens)
    keep = flat_mask(mask, old_logprobs).bool()
    acc = ACC_DTYPES[old_logprobs.dtype]
    old, sampler = (x.detach().reshape(-1).to(acc) for x in (old_logprobs, sampler_logprobs))
    values = torch.where(keep & ~sampler.isnan(), _divergence(statistic, old, sampler), 0)
    if level != "token":
        values = layout.expand(_reduce(level, values, keep, layout))
    if statistic == "ratio":
        values = values.exp()
    return (keep & (values >= low) & (values <= high)).view(old_logprobs.shape)


def _divergence(statistic: str, old: Tensor, sampler: Tensor) -> Tensor:
    """Of "ratio" its logarithm."""
    if statistic in ("tv", "binary_kl"):
        if statistic == "tv":
            return (sampler.exp() - old.exp()).abs()
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (sampler, old))
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    t = (old - sampler).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if statistic == "ratio":
        return t
    return 0.5 * t.square() if statistic == "k2" else t.expm1() - t


def _reduce(level: str, values: Tensor, keep: Tensor, layout: Sequences) -> Tensor:
    """Per sequence; 0 for one without unmasked tokens.  # [count]"""
    if level == "seq_max":
        if layout.offsets is None:
            rows = values.reshape(layout.count, layout.length)
            return rows.amax(-1) if layout.length else rows.sum(-1)
        zeros = torch.zeros(layout.count, dtype=values.dtype, device=values.device)
        return zeros.scatter_reduce(0, layout.ids, values, "amax")
    total = layout.sum(values)
    if level == "seq_sum":
        return total
    return total / layout.sum(keep.to(values.dtype)).clamp(min=1)
