"""Supervised losses of a token beside its negative log-likelihood, each a function of the token's log-probability."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastloss.reference.token_stats import token_stats
from fastloss.tables import SUPERVISED_LOSSES, SupervisedOptions


def others(logprob: Tensor) -> Tensor:
    """1 - p, at least 1e-7 (float64: 1e-15)."""
    return (-torch.expm1(logprob)).clamp(min=1e-15 if logprob.dtype == torch.float64 else 1e-7)


def weighted(weight: Tensor, logprob: Tensor) -> Tensor:
    """-sg[weight] · log p; a weight of 0 leaves nothing of a token that is impossible."""
    weight = weight.detach()
    return -weight * torch.where(weight == 0, 0.0, logprob)


def nll(logprob: Tensor, entropy: Tensor, sum_sq: Tensor, o: SupervisedOptions) -> Tensor:
    return -logprob


def dft(logprob: Tensor, entropy: Tensor, sum_sq: Tensor, o: SupervisedOptions) -> Tensor:
    return weighted(logprob.exp(), logprob)


def eaft(logprob: Tensor, entropy: Tensor, sum_sq: Tensor, o: SupervisedOptions) -> Tensor:
    return weighted((entropy.clamp(min=0.0) / o.eaft_scale) ** o.eaft_alpha, logprob)


def focal(logprob: Tensor, entropy: Tensor, sum_sq: Tensor, o: SupervisedOptions) -> Tensor:
    # Of an impossible token the weight is 1, with slope 0.
    possible = torch.where(logprob == -torch.inf, -1e4, logprob)
    return -(others(possible) ** o.focal_gamma) * logprob


def power(logprob: Tensor, entropy: Tensor, sum_sq: Tensor, o: SupervisedOptions) -> Tensor:
    return -torch.expm1(o.power * logprob) / o.power


def deft(logprob: Tensor, entropy: Tensor, sum_sq: Tensor, o: SupervisedOptions) -> Tensor:
    q = sum_sq.detach()
    return -torch.expm1(q * logprob) / q


def soft_trim(logprob: Tensor, entropy: Tensor, sum_sq: Tensor, o: SupervisedOptions) -> Tensor:
    return weighted(torch.sigmoid((o.trim_threshold + logprob) / o.trim_width), logprob)


def unlikelihood(logprob: Tensor, entropy: Tensor, sum_sq: Tensor, o: SupervisedOptions) -> Tensor:
    return -others(logprob).log()


LOSS: dict[str, Callable[[Tensor, Tensor, Tensor, SupervisedOptions], Tensor]] = {
    "nll": nll,
    "dft": dft,
    "eaft": eaft,
    "focal": focal,
    "power": power,
    "deft": deft,
    "soft_trim": soft_trim,
    "unlikelihood": unlikelihood,
}


def supervised_terms(
    logprob: Tensor, entropy: Tensor, sum_sq: Tensor, unlikely: Tensor | None, o: SupervisedOptions
) -> Tensor:
    """Each token's loss from its log-probability, entropy and Σ p²; where ``unlikely``, the unlikelihood."""
    entropy = entropy.detach()
    loss = LOSS[SUPERVISED_LOSSES[o.kind]](logprob, entropy, sum_sq, o)
    return (
        loss if unlikely is None else torch.where(unlikely, unlikelihood(logprob, entropy, sum_sq, o), loss)
    )


def supervised_rows(
    logits: Tensor, target: Tensor, unlikely: Tensor | None, o: SupervisedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, -log p, entropy) of each row of ``logits [N, V]``; 0 where the target is ignored, NaN where it is no class."""
    stats = token_stats(
        logits, target, scale=o.factor, softcap=o.softcap or None, ignore_index=o.ignore_index
    )
    ignored = target == o.ignore_index
    loss = supervised_terms(
        stats["logprobs"], stats["entropy"], stats["log_sum_sq_probs"].exp(), unlikely, o
    ).masked_fill(ignored, 0.0)
    return loss, -stats["logprobs"].detach(), stats["entropy"].detach()
