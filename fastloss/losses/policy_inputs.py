"""The tensors of a policy-gradient loss: checked by name and laid flat; shares and sampler weights, which follow from them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.changing import scalar_like
from fastloss.engine.checks import ShapeError
from fastloss.engine.contract import PolicyInputs
from fastloss.engine.sequences import Sequences, flat_mask, layout_of
from fastloss.tables import ACC_DTYPES, AGGREGATIONS, CORRECTIONS, PolicyOptions


def check_like(name: str, value: Any, like: Tensor) -> None:
    checks.is_floating(name, value)
    checks.has_shape(name, value, tuple(like.shape))
    checks.same_device(name, value, like.device)


def _same(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(shape) == len(other) and all(a == b for a, b in zip(shape, other, strict=True))


def lay_flat(
    name: str,
    like: Tensor,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> PolicyInputs:
    """Every constant of a call checked against ``like`` (the argument ``name``) and laid flat in the accumulation dtype."""
    layout = layout_of(name, like, cu_seqlens)
    acc = ACC_DTYPES[dtype]

    def flat(x: Tensor) -> Tensor:
        return x.detach().reshape(-1).to(acc).contiguous()

    def per_token(label: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        check_like(label, x, like)
        return flat(x)

    def per_token_or_sequence(label: str, x: Tensor) -> Tensor:
        checks.same_device(label, x, like.device)
        count = layout.count
        # Not by `in`: torch.compile takes a symbolic size for another than the number that it stands for there.
        if not any(_same(tuple(x.shape), shape) for shape in (tuple(like.shape), (count,), (count, 1))):
            raise ShapeError(f"{label}: expected shape {[count]} or {list(like.shape)}, got {list(x.shape)}")
        return flat(x)

    keep = flat_mask(mask, like)
    if advantages is None:
        adv = keep.new_zeros(layout.count, dtype=acc)
    else:
        checks.is_floating("advantages", advantages)
        adv = per_token_or_sequence("advantages", advantages)
    factors = None
    if weights is not None:
        checks.is_tensor("weights", weights)
        factors = per_token_or_sequence("weights", weights)
        if factors.numel() != keep.numel():
            factors = layout.expand(factors).contiguous()
    return PolicyInputs(
        layout=layout,
        advantages=adv,
        mask=keep,
        old=per_token("old_logprobs", old_logprobs),
        ref=per_token("ref_logprobs", ref_logprobs),
        sampler=per_token("sampler_logprobs", sampler_logprobs),
        token_weight=factors,
        normalizer=normalizer_of(normalizer, dtype, like.device),
    )


def normalizer_of(
    normalizer: float | Tensor | None, dtype: torch.dtype, device: torch.device
) -> float | Tensor | None:
    """None, a number, or acc ``[1]`` on the device."""
    value = checks.normalizer_value(normalizer, "mean", device)
    return value.to(ACC_DTYPES[dtype]).reshape(1) if isinstance(value, Tensor) else value


def advantage_per_token(inputs: PolicyInputs) -> Tensor:
    if inputs.advantages.numel() == inputs.mask.numel():
        return inputs.advantages
    return inputs.layout.expand(inputs.advantages)


def weighted(inputs: PolicyInputs, weight: Tensor | None) -> PolicyInputs:
    """The inputs with ``weight`` (acc ``[N]``) as a factor of the policy term, times the user's own weights."""
    if weight is None:
        return inputs
    own = inputs.token_weight
    return replace(inputs, token_weight=weight if own is None else weight * own)


def shares(
    mask: Tensor,
    layout: Sequences,
    aggregation: int,
    max_length: float,
    normalizer: float | Tensor | None,
    acc: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Each token's share of the aggregate ``[N]``, and the scale of their sum (0-d). ``mask`` is bool ``[N]``."""
    n = layout.sum(mask.to(acc)).clamp(min=1)
    share = mask.to(acc)
    how = AGGREGATIONS[aggregation]
    if how == "seq-mean-token-mean":
        share = share / layout.expand(n)
    if normalizer is not None:
        given = normalizer.reshape(()).to(mask.device, acc) if isinstance(normalizer, Tensor) else normalizer
        total = torch.ones((), dtype=acc, device=mask.device) * given
    elif how == "token-mean":
        total = mask.sum().to(acc).clamp(min=1)
    else:
        total = n.new_full((), max(layout.count, 1))
    return share, 1 / (total * max_length if how == "seq-mean-token-sum-norm" else total)


def sampler_weight(inputs: PolicyInputs, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """exp(old - sampler) per token or per sequence, truncated or masked, and which tokens it cuts (acc and bool ``[N]``)."""
    assert inputs.old is not None and inputs.sampler is not None
    mask, layout = inputs.mask.bool(), inputs.layout
    old, sampler = torch.where(mask, inputs.old, 0), torch.where(mask, inputs.sampler, 0)
    d = torch.nan_to_num(old - sampler, nan=0.0, posinf=math.inf, neginf=-math.inf)
    d = torch.where(mask, d, 0)
    mode = CORRECTIONS[options.correction]
    weight = (layout.expand(layout.sum(d)) if mode.startswith("sequence") else d).exp()
    outside = (weight < options.floor) | (weight > options.cap)
    if mode.endswith("truncate"):
        return weight.clamp(scalar_like(weight, options.floor), scalar_like(weight, options.cap)), outside
    return torch.where(outside, 0, weight), outside
