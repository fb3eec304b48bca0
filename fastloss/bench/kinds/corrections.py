"""What policy-gradient losses take beside ratio and advantage: factors per token, DPPO's divergence, a sampler's trust region
("policy-corrected"); the loss of a value head ("value"); estimates of the KL to a reference ("kl")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.bench.case import Call, Case, Data, Loss
from fastloss.bench.exact import Exact, over_numbers
from fastloss.bench.kinds.base import Kind, integers, normal, read_all_write_one, uniform
from fastloss.bench.kinds.policy import log_ratios, padding

CLIP, DIVERGENCE, LARGEST_RATIO = 0.2, 0.15, 20.0
LOW, HIGH = 0.5, 2.0  # of the ratio of trainer to sampler
# None of their differences under LOG_RATIOS is near DIVERGENCE: no token hangs on a rounding.
PROBABILITIES = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float32, device="cpu")


def _case(name: str, kind: str, quick: bool) -> Case:
    sequences, length = (4, 64) if quick else (64, 4096)
    options = (("name", name),)
    shape = (sequences * length, 0, 0)
    return Case(f"{name}-{sequences}x{length}", kind, *shape, torch.float32, length=length, options=options)


def cases(quick: bool) -> Iterator[Case]:
    for name in ("policy-weights", "policy-dppo", "policy-trust-region"):
        yield _case(name, "policy-corrected", quick)


def value_cases(quick: bool) -> Iterator[Case]:
    yield _case("value", "value", quick)


def kl_cases(quick: bool) -> Iterator[Case]:
    yield _case("kl", "kl", quick)


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    mask = padding(case)
    drawn = integers(0, len(PROBABILITIES), tuple(mask.shape), generator=generator)
    logprobs = PROBABILITIES.to(drawn.device)[drawn].log()
    old = logprobs - log_ratios(mask.shape, generator)
    advantages = normal(len(mask), generator=generator)
    tensors = {"logprobs": logprobs, "old": old, "advantages": advantages, "mask": mask}
    if _name(case) == "policy-weights":
        tensors["weights"] = uniform(mask.shape, generator=generator)
    if _name(case) == "policy-trust-region":
        tensors["sampler"] = old - 2 * log_ratios(mask.shape, generator)
    return tensors


def _name(case: Case) -> str:
    return dict(case.options)["name"]


def _clipped(ratio: Tensor, advantages: Tensor) -> Tensor:
    per_token = advantages.unsqueeze(1)
    return -torch.min(ratio * per_token, ratio.clamp(1 - CLIP, 1 + CLIP) * per_token)


def _mean(per_token: Tensor, mask: Tensor) -> Tensor:
    return (per_token * mask).sum() / mask.sum().clamp(min=1.0)


def _weights(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    return _mean(_clipped((logprobs - old).exp(), advantages) * weights, mask)


def _dppo(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Total variation of the sampled token (arXiv:2602.04879): no loss of a token that has moved too far its own way."""
    per_token = advantages.unsqueeze(1)
    ratio = (logprobs - old).exp().detach().clamp(max=LARGEST_RATIO)
    moved = logprobs.detach().exp() - old.exp()
    too_far = (moved.abs() > DIVERGENCE) & torch.where(per_token > 0, moved > 0, moved < 0)
    return _mean(-ratio * per_token * logprobs * ~too_far, mask)


def _trust(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, sampler: Tensor) -> Tensor:
    ratio = (old - sampler).exp()
    return _mean(_clipped((logprobs - old).exp(), advantages), mask & (ratio >= LOW) & (ratio <= HIGH))


EAGER: dict[str, Loss] = {"policy-weights": _weights, "policy-dppo": _dppo, "policy-trust-region": _trust}


def _eager(case: Case) -> Loss:
    return EAGER[_name(case)]


def _ours(case: Case, call: Call) -> Loss:
    if _name(case) == "policy-weights":
        options: dict[str, Any] = {"loss_type": "ppo", **call}
        return lambda *tensors: fastloss.policy_loss(*tensors[:4], weights=tensors[4], **options).loss
    if _name(case) == "policy-dppo":
        options = {"loss_type": "dppo_tv", "clip_low": DIVERGENCE, "clip_high": DIVERGENCE, **call}
        return lambda *tensors: fastloss.policy_loss(*tensors, **options).loss

    def trust(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, sampler: Tensor) -> Tensor:
        kept = fastloss.trust_region_mask(old, sampler, mask, low=LOW, high=HIGH)
        return fastloss.policy_loss(logprobs, old, advantages, kept, loss_type="ppo", **call).loss

    return trust


def _value_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Values lie well inside of the clip's range, or well outside."""
    mask = padding(case)
    values = normal(mask.shape, generator=generator)
    old = values + log_ratios(mask.shape, generator)
    return {
        "values": values,
        "old": old,
        "returns": normal(mask.shape, generator=generator),
        "mask": mask,
    }


def _eager_value(case: Case) -> Loss:
    """As verl's compute_value_loss."""

    def loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        clipped = torch.max(torch.min(values, old + CLIP), old - CLIP)
        return 0.5 * _mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)

    return loss


def _ours_value(case: Case, call: Call) -> Loss:
    return lambda *tensors: fastloss.value_loss(*tensors, clip_range=CLIP, **call).loss


def _kl_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (case.rows // case.length, case.length)
    logprobs = -2.0 * uniform(shape, generator=generator)
    return {"logprobs": logprobs, "ref": logprobs + 0.1 * normal(shape, generator=generator)}


def _eager_kl(case: Case) -> Loss:
    def loss(logprobs: Tensor, ref: Tensor) -> Tensor:
        return (torch.exp(ref - logprobs) - (ref - logprobs) - 1).mean()

    return loss


def _ours_kl(case: Case, call: Call) -> Loss:
    return lambda logprobs, ref: fastloss.kl_estimate(logprobs, ref, kind="k3", **call).mean()


def _truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, _eager(case))


def _value_truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, _eager_value(case))


def _kl_truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, _eager_kl(case))


TRAFFIC = ("read all, write one", read_all_write_one)
KINDS = {
    "policy-corrected": Kind(
        cases,
        _tensors,
        lambda case: ("logprobs",),
        _ours,
        _eager,
        _truth,
        TRAFFIC,
        kept=lambda tensors: int(tensors["mask"].sum()),
    ),
    "value": Kind(
        value_cases,
        _value_tensors,
        lambda case: ("values",),
        _ours_value,
        _eager_value,
        _value_truth,
        TRAFFIC,
        kept=lambda tensors: int(tensors["mask"].sum()),
    ),
    "kl": Kind(
        kl_cases,
        _kl_tensors,
        lambda case: ("logprobs",),
        _ours_kl,
        _eager_kl,
        _kl_truth,
        TRAFFIC,
        kept=lambda tensors: tensors["logprobs"].numel(),
    ),
}
