"""Which tokens a policy loss acts on, where their log-probs or their rank in the batch decide, by PyTorch's sorts and quantiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine.changing import scalar_like
from fastloss.engine.contract import PolicyInputs
from fastloss.losses.policy_inputs import advantage_per_token
from fastloss.losses.policy_options import PolicySpec
from fastloss.tables import PolicyOptions


class Selection(NamedTuple):
    """What :func:`select` chose, acc or uint8 ``[N]``; None: nothing."""

    weight: Tensor | None = None  # of the policy term
    penalised: Tensor | None = None  # kl_cov's tokens
    low: Tensor | None = None  # bool; what a divergence took out, by the sign of the advantage
    high: Tensor | None = None
    chosen: Tensor | None = None  # bool; the tokens of the largest entropies


def select(logprobs: Tensor, inputs: PolicyInputs, spec: PolicySpec, options: PolicyOptions) -> Selection:
    """The tokens of a loss_type whose :class:`Variant` has ``selects``."""
    if spec.loss_type == "clip_cov":
        return Selection(clip_cov_weight(logprobs, inputs, options, spec))
    if spec.loss_type == "kl_cov":
        return Selection(penalised=kl_cov_select(logprobs, inputs, spec.kl_cov_ratio))
    if spec.loss_type in ("dppo_tv", "dppo_kl"):
        low, high = beyond_divergence(logprobs, inputs, options, spec.loss_type)
        return Selection((~(low | high)).to(logprobs.dtype), low=low, high=high)
    return Selection()


def beyond_divergence(
    logprobs: Tensor, inputs: PolicyInputs, options: PolicyOptions, loss_type: str
) -> tuple[Tensor, Tensor]:
    """DPPO (arXiv:2602.04879): tokens that have moved too far from the old policy in the direction of their advantage.

    Their divergence is that of the sampled token against all others: |p - p_old| ("dppo_tv"), or the binary KL of p_old to
    p ("dppo_kl").
    """
    mask, adv = inputs.mask.bool(), advantage_per_token(inputs)
    logp = torch.where(mask, logprobs.detach(), 0)
    old = logp if inputs.old is None else torch.where(mask, inputs.old, 0)
    p, p_old = logp.exp(), old.exp()
    if loss_type == "dppo_tv":
        divergence = (p - p_old).abs()
    else:
        divergence = p_old * (old - logp) + (1 - p_old) * ((1 - p_old + 1e-8) / (1 - p + 1e-8)).log()
    low = mask & (adv <= 0) & (p < p_old) & (divergence > options.clip_low)
    high = mask & (adv > 0) & (p > p_old) & (divergence > options.clip_high)
    return low, high


def top_entropy(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """The unmasked tokens whose entropy is at least the (1 - quantile) quantile of the batch's (arXiv:2506.01939)."""
    mask = mask.bool()
    tokens = mask.sum()
    ordered = torch.where(mask, entropy.detach(), torch.inf).sort().values
    if not ordered.numel():
        return mask
    rank = (1 - quantile) * (tokens - 1).clamp(min=0).to(entropy.dtype)
    below = rank.floor()
    places = torch.stack([below, rank.ceil()]).long().clamp(max=ordered.numel() - 1)
    lower, upper = ordered.index_select(
        0, places
    ).unbind()  # an index of 0 dimensions would be a number of the trace
    threshold = torch.lerp(lower, upper, rank - below)
    return mask & (entropy.detach() >= threshold)


def covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """A token's part of the covariance of advantage and log-prob over the batch (arXiv:2505.22617)."""
    mask = mask.bool()
    tokens = mask.sum().to(logprobs.dtype).clamp(min=1)
    logprobs = torch.where(mask, logprobs.detach(), 0)
    advantages = torch.where(mask, advantages, 0)
    return (advantages - advantages.sum() / tokens) * (logprobs - logprobs.sum() / tokens)


def largest(keys: Tensor, eligible: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The ``max(1, ⌊fraction · tokens⌋)`` eligible tokens with the largest keys; none where fraction is 0."""
    if fraction == 0:
        return torch.zeros_like(eligible)
    order = torch.where(eligible, keys, -torch.inf).argsort(descending=True, stable=True)
    k = (mask.bool().sum().double() * fraction).floor().clamp(min=1)
    chosen = torch.arange(keys.numel(), device=keys.device, dtype=torch.int64) < k
    return torch.zeros_like(eligible).scatter(0, order, chosen) & eligible


def clip_cov_weight(
    logprobs: Tensor,
    inputs: PolicyInputs,
    options: PolicyOptions,
    spec: PolicySpec,
) -> Tensor:
    """Weights of clip_cov: 0 for the tokens taken out, 1 elsewhere. Of those whose covariance is within bounds and that
    PPO's clip leaves alone, at random with a generator, else those with the largest covariance."""
    mask, adv = inputs.mask.bool(), advantage_per_token(inputs)
    cov = covariance(logprobs, adv, mask)
    rho = torch.ones_like(logprobs)
    if inputs.old is not None:
        rho = torch.where(mask, (logprobs.detach() - inputs.old).clamp(-20, 20), 0).exp()
    low, high = scalar_like(rho, 1 - options.clip_low), scalar_like(rho, 1 + options.clip_high)
    already = rho.clamp(low, high) * adv < rho * adv
    eligible = mask & ~already & (cov > spec.clip_cov_low) & (cov < spec.clip_cov_high)
    keys, generator = cov, spec.generator
    if generator is not None:
        keys = torch.rand(cov.shape, generator=generator, device=generator.device, dtype=torch.float32).to(
            cov.device
        )
    return (~largest(keys, eligible, mask, spec.clip_cov_ratio)).to(logprobs.dtype)


def kl_cov_select(logprobs: Tensor, inputs: PolicyInputs, fraction: float) -> Tensor:
    """kl_cov's tokens: those with the largest covariance."""
    mask = inputs.mask.bool()
    cov = covariance(logprobs, advantage_per_token(inputs), mask)
    return largest(cov, mask, mask, fraction).to(torch.uint8)
