"""Advantages per response: its reward against those of the other responses to its prompt (docs/policy_gradient.md).

Everything here is a constant of the loss: no gradient flows through it, and nothing waits for the device.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.checks import ShapeError
from fastloss.tables import ACC_DTYPES


@torch.no_grad()
def group_advantages(rewards: Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """GRPO's advantage (arXiv:2402.03300): ``(r - mean of its group) / (deviation + eps)``.

    The deviation is the sample's (n - 1), as TRL's and verl's. A group of one, or whose rewards are all equal, gets 0. A
    NaN reward (could not be scored) is left out of the statistics and gets 0.

    Args:
        rewards: ``[B]``, float, int or bool, the responses to one prompt beside each other. group_size: responses per prompt.
        scale: deviation of the "group", of the "batch" (arXiv:2508.08221), or "none" (Dr. GRPO, arXiv:2503.20783).

    >>> import torch, fastloss
    >>> fastloss.group_advantages(torch.tensor([0.0, 1.0, 5.0, 5.0]), 2, scale="none")
    tensor([-0.5000,  0.5000,  0.0000,  0.0000])
    """
    checks.is_one_of("scale", scale, ("group", "batch", "none"))
    groups = grouped(rewards, group_size)  # [groups, group_size]
    eps = checks.number("eps", eps, low=0)
    advantages = torch.where(_varied(groups), groups - groups.nanmean(1, keepdim=True), 0 * groups)
    if scale == "group":
        advantages = advantages / (_deviation(groups, 1) + eps)
    elif scale == "batch":
        advantages = advantages / (_deviation(groups.reshape(1, -1), 1) + eps)
    return torch.nan_to_num(advantages, nan=0.0).reshape(-1)


@torch.no_grad()
def rloo_advantages(rewards: Tensor, group_size: int, *, normalize: bool = False) -> Tensor:
    """Leave-one-out (arXiv:2402.14740): a reward minus the mean of the others of its group.

    A group of one gets 0; a NaN reward is left out and gets 0.

    Args:
        rewards: ``[B]``. group_size: responses per prompt. normalize: whiten over the batch (TRL's normalize_advantages).

    >>> import torch, fastloss
    >>> fastloss.rloo_advantages(torch.tensor([0.0, 1.0, 5.0]), 3)
    tensor([-3.0000, -1.5000,  4.5000])
    """
    groups = grouped(rewards, group_size)
    scored = (~groups.isnan()).sum(1, keepdim=True)
    others = (groups.nansum(1, keepdim=True) - groups) / (scored - 1)
    advantages = torch.where(scored > 1, groups - others, torch.where(groups.isnan(), groups, 0 * groups))
    # The mean of equal rewards need not be their bits.
    advantages = torch.where(_varied(groups), advantages, 0 * advantages)
    if normalize:
        advantages = (advantages - advantages.nanmean()) / (_deviation(advantages.reshape(1, -1), 1) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).reshape(-1)


@torch.no_grad()
def opo_advantages(rewards: Tensor, lengths: Tensor, group_size: int) -> Tensor:
    """OPO (arXiv:2505.23585): a reward minus its group's mean weighted by length, the baseline of least variance.

    Args:
        rewards: ``[B]``. lengths: tokens of each response, ``[B]``, int or float. group_size: responses per prompt.

    >>> import torch, fastloss
    >>> fastloss.opo_advantages(torch.tensor([0.0, 1.0]), torch.tensor([3, 1]), 2)
    tensor([-0.2500,  0.7500])
    """
    groups = grouped(rewards, group_size)
    checks.is_tensor("lengths", lengths)
    checks.has_shape("lengths", lengths, tuple(rewards.shape))
    checks.same_device("lengths", lengths, rewards.device)
    weights = torch.where(groups.isnan(), 0, lengths.to(groups.dtype).view(groups.shape))
    total = weights.sum(1, keepdim=True)
    baseline = (weights * torch.nan_to_num(groups, nan=0.0)).sum(1, keepdim=True) / total.clamp(min=1e-30)
    advantages = torch.where(_varied(groups), groups - baseline, 0 * groups)
    return torch.nan_to_num(advantages, nan=0.0).reshape(-1)


@torch.no_grad()
def gpg_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GPG (arXiv:2504.02546): reward minus its group's mean, times groups / groups whose rewards are not all equal.

    >>> import torch, fastloss
    >>> fastloss.gpg_advantages(torch.tensor([0.0, 1.0, 5.0, 5.0]), 2)
    tensor([-1.,  1.,  0.,  0.])
    """
    groups = grouped(rewards, group_size)
    centered = group_advantages(rewards, group_size, scale="none")
    varied = _varied(groups).sum().clamp(min=1)
    return centered * (groups.shape[0] / varied)


@torch.no_grad()
def pass_at_k_advantages(
    rewards: Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-6
) -> Tensor:
    """Pass@k (arXiv:2503.19595): a group's best response gets its lead over the second, the others get 0.

    Of several equal to the best none has a lead. A NaN reward (could not be scored) is left out and gets 0.

    Args:
        rewards: ``[B]``, float, int or bool, the responses to one prompt beside each other. group_size: responses per prompt, at least 2.
        scale: "group" divides by the group's sample deviation + ``eps``; "none" does not.

    >>> import torch, fastloss
    >>> fastloss.pass_at_k_advantages(torch.tensor([0.0, 1.0, 4.0]), 3, scale="none")
    tensor([0., 0., 3.])
    """
    checks.is_one_of("scale", scale, ("group", "none"))
    eps = checks.number("eps", eps, low=0)
    groups = grouped(rewards, group_size)
    if group_size < 2:
        raise ValueError(f"group_size: expected at least 2, got {group_size}")
    scored = torch.where(groups.isnan(), -torch.inf, groups)
    top, second = scored.topk(2, dim=1).values.unbind(1)
    lead = torch.where(second.isfinite(), top - second, 0).unsqueeze(1)
    if scale == "group":
        lead = lead / (_deviation(groups, 1) + eps)
    return torch.where(scored == top.unsqueeze(1), lead, 0).reshape(-1)


@torch.no_grad()
def gdpo_advantages(
    rewards: Tensor, group_size: int, *, weights: Tensor | None = None, eps: float = 1e-4
) -> Tensor:
    """GDPO (arXiv:2601.05242): several rewards, each normalised over its group, then summed and normalised over the batch.

    A reward of large spread does not drown the others, as it does in ``group_advantages`` of their sum. TRL's
    ``multi_objective_aggregation="normalize_then_sum"``.

    Args:
        rewards: ``[B, K]``, K rewards of each response; NaN where one does not apply: it is left out.
        group_size: responses per prompt, beside each other. weights: ``[K]``; None: 1 each.
        eps: added to both deviations (sample, n - 1).

    Returns:
        ``[B]``; 0 for a response with no reward at all.

    >>> import torch, fastloss
    >>> fastloss.gdpo_advantages(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 100.0]]), 2)
    tensor([-0.5476,  0.5476, -1.0954,  1.0954])
    """
    checks.is_floating("rewards", rewards)
    eps = checks.number("eps", eps, low=0)
    check_group_size(group_size)
    if rewards.dim() != 2 or rewards.shape[0] % group_size:
        raise ShapeError(
            f"rewards: expected shape [B, K] with B a multiple of group_size={group_size}, got {list(rewards.shape)}"
        )
    table = rewards.detach().to(ACC_DTYPES[rewards.dtype]).T  # [K, B]
    normal = torch.stack([group_advantages(row.contiguous(), group_size, eps=eps) for row in table], 1)
    if weights is not None:
        checks.is_floating("weights", weights)
        checks.has_shape("weights", weights, (rewards.shape[1],))
        checks.same_device("weights", weights, rewards.device)
        normal = normal * weights.to(normal.dtype)
    total = torch.where(rewards.isnan().all(1), torch.nan, normal.sum(1)).unsqueeze(0)
    advantages = (total - total.nanmean()) / (_deviation(total, 1) + eps)
    return torch.nan_to_num(advantages, nan=0.0).reshape(-1)


def check_group_size(group_size: Any, of: str = "", count: int = 0) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, numbers.Integral) or group_size < 1:
        raise ValueError(f"group_size: expected a positive int, got {group_size!r}")
    if count % group_size:
        raise ValueError(f"group_size: expected a divisor of the {count} {of}, got {group_size}")


def grouped(rewards: Tensor, group_size: int) -> Tensor:
    """acc ``[groups, group_size]``."""
    checks.is_tensor("rewards", rewards)
    if rewards.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        rewards = rewards.to(torch.float32)  # counts, and right or wrong
    checks.is_floating("rewards", rewards)
    check_group_size(group_size)
    group_size = int(group_size)
    if rewards.dim() != 1 or rewards.numel() % group_size:
        raise ShapeError(
            f"rewards: expected shape [B] with B a multiple of group_size={group_size}, got {list(rewards.shape)}"
        )
    return rewards.detach().to(ACC_DTYPES[rewards.dtype]).contiguous().view(-1, group_size)


def _varied(groups: Tensor) -> Tensor:
    """Which groups hold two different scored rewards, ``[groups, 1]``."""
    lowest = torch.nan_to_num(groups, nan=torch.inf).amin(1, keepdim=True)
    highest = torch.nan_to_num(groups, nan=-torch.inf).amax(1, keepdim=True)
    return lowest < highest


def _deviation(x: Tensor, dim: int) -> Tensor:
    """Sample deviation over what is not NaN; 0 of fewer than two."""
    n = (~x.isnan()).sum(dim, keepdim=True)
    squares = (x - x.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (n - 1).clamp(min=1)).sqrt()
