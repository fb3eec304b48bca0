"""The arguments of a policy loss: checked by name, laid flat, in acc."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks
from fastloss.engine.checks import ShapeError
from fastloss.engine.native_rows import acc_dtype
from fastloss.losses.policy_options import PolicyOptions, Spec, cached_resolve, resolve


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch laid flat: acc tensors ``[N]``, contiguous. The constants are detached."""

    advantages: Tensor  # [N] or [count]
    mask: Tensor  # uint8 [N]
    old: Tensor | None
    ref: Tensor | None
    sampler: Tensor | None
    weights: Tensor | None  # [N], factors of the policy term
    offsets: Tensor | None
    length: int
    count: int

    @property
    def sequences(self) -> reference.Sequences:
        return reference.Sequences(self.offsets, self.length, self.count, self.mask.numel(), self.mask.device)

    def advantage_per_token(self) -> Tensor:
        if self.advantages.numel() == self.mask.numel():
            return self.advantages
        return self.sequences.expand(self.advantages)

    def weighted(self, weight: Tensor | None) -> Tensor | None:
        """``weight`` times the user's own, where there are any."""
        if weight is None or self.weights is None:
            return self.weights if weight is None else weight
        return weight * self.weights


def check_like(name: str, value: Any, like: Tensor) -> None:
    checks.is_floating(name, value)
    checks.has_shape(name, value, tuple(like.shape))
    checks.same_device(name, value, like.device)


def flat_offsets(name: str, like: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, int, int]:
    """(offsets, length, count) of ``[B, T]``, or of ``[N]`` with ``cu_seqlens``."""
    if cu_seqlens is None:
        if like.dim() != 2:
            raise ShapeError(f"{name}: expected shape [B, T], or [N] with cu_seqlens, got {list(like.shape)}")
        return None, like.shape[1], like.shape[0]
    checks.is_tensor("cu_seqlens", cu_seqlens)
    if like.dim() != 1:
        raise ShapeError(f"{name}: expected shape [N] with cu_seqlens, got {list(like.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"cu_seqlens: expected int32 or int64 of shape [B + 1], got {cu_seqlens.dtype} of shape "
            f"{list(cu_seqlens.shape)}"
        )
    checks.same_device("cu_seqlens", cu_seqlens, like.device)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != like.numel() or sorted(ends) != ends:
            raise ValueError(
                f"cu_seqlens: expected a non-decreasing run from 0 to {like.numel()}, got {ends[0]} … {ends[-1]}"
            )
    return cu_seqlens.to(torch.int64).contiguous(), 0, cu_seqlens.numel() - 1


def flat_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """uint8 ``[N]``; None is all ones."""
    if mask is None:
        return torch.ones(like.numel(), dtype=torch.uint8, device=like.device)
    checks.is_tensor("mask", mask)
    checks.has_shape("mask", mask, tuple(like.shape))
    checks.same_device("mask", mask, like.device)
    mask = mask if mask.dtype == torch.bool else mask != 0
    return mask.reshape(-1).contiguous().view(torch.uint8)


def lay_flat(
    name: str,
    like: Tensor,
    old: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None,
    ref: Tensor | None,
    sampler: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Batch:
    """Every constant of a call checked against ``like`` and laid flat in acc."""
    offsets, length, count = flat_offsets(name, like, cu_seqlens)
    acc = acc_dtype(like.dtype if dtype is None else dtype)

    def flat(x: Tensor) -> Tensor:
        return x.detach().reshape(-1).to(acc).contiguous()

    def constant(label: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        checks.is_floating(label, x)
        checks.has_shape(label, x, tuple(like.shape))
        checks.same_device(label, x, like.device)
        return flat(x)

    def per_token_or_sequence(label: str, x: Tensor) -> Tensor:
        checks.same_device(label, x, like.device)
        if tuple(x.shape) not in (tuple(like.shape), (count,), (count, 1)):
            raise ShapeError(f"{label}: expected shape {[count]} or {list(like.shape)}, got {list(x.shape)}")
        return flat(x)

    keep = flat_mask(mask, like)
    if advantages is None:
        adv = keep.new_zeros(count, dtype=acc)
    else:
        checks.is_floating("advantages", advantages)
        adv = per_token_or_sequence("advantages", advantages)
    batch = Batch(
        adv,
        keep,
        constant("old_logprobs", old),
        constant("ref_logprobs", ref),
        constant("sampler_logprobs", sampler),
        None,
        offsets,
        length,
        count,
    )
    if weights is None:
        return batch
    checks.is_tensor("weights", weights)
    factors = per_token_or_sequence("weights", weights)
    if factors.numel() != keep.numel():
        factors = batch.sequences.expand(factors).contiguous()
    return dataclasses.replace(batch, weights=factors)


def options_of(spec: Spec, batch: Batch, *, packed: bool) -> PolicyOptions:
    options = (resolve if torch.compiler.is_compiling() else cached_resolve)(
        spec,
        with_sampler=batch.sampler is not None,
        default_length=None if packed else batch.length,
    )
    check_given(options, spec, with_ref=batch.ref is not None)
    return options


def check_given(options: PolicyOptions, spec: Spec, *, with_ref: bool) -> None:
    """Options that need a tensor, or another option, are errors without it."""
    if options.beta and not with_ref:
        raise ValueError(f"ref_logprobs: expected a tensor for beta={options.beta}, got None")
    for name, value in (("importance_cap", spec.importance_cap), ("importance_floor", spec.importance_floor)):
        if value is not None and not options.correction:
            raise ValueError(f"sampler_logprobs: expected a tensor for {name}={value}, got None")
    if options.dual_clip != math.inf and spec.variant.surrogate != "clip":
        raise ValueError(f"dual_clip: expected None for loss_type={spec.loss_type!r}, got {spec.dual_clip}")
    if options.delta != math.inf and spec.variant.surrogate != "clip":
        raise ValueError(f"delta: expected None for loss_type={spec.loss_type!r}, got {spec.delta}")


def normalizer_of(normalizer: float | Tensor | None, like: Tensor) -> float | Tensor | None:
    """None, a number, or acc ``[1]`` on the device."""
    value = checks.normalizer_value(normalizer, "mean", like.device)
    return value.to(acc_dtype(like.dtype)).reshape(1) if isinstance(value, Tensor) else value
