"""Definition of the recurrences over time: GAE (arXiv:1506.02438) and discounted returns, as a loop over time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _backwards(
    mask: Tensor, offsets: Tensor | None, length: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """From the last step to the first: (flat positions ``[count]``, whether each sequence has a token there)."""
    if offsets is None:
        starts = torch.arange(count, device=mask.device) * length
        lengths = torch.full_like(starts, length)
    else:
        starts, lengths = offsets[:-1], offsets.diff()
    steps = int(lengths.max()) if count and mask.numel() else 0
    for t in reversed(range(steps)):
        position = (starts + t).clamp(max=mask.numel() - 1)
        yield position, (t < lengths) & mask[position].bool()


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    length: int,
    count: int,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """``δ_t = r_t + γ V_next - V_t``, ``A_t = δ_t + γλ A_next`` over unmasked tokens; (advantages, returns)."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    next_value = rewards.new_zeros(count)
    next_advantage = rewards.new_zeros(count)
    for position, live in _backwards(mask, offsets, length, count):
        value = values[position]
        advantage = rewards[position] + gamma * next_value - value + gamma * lam * next_advantage
        next_value = torch.where(live, value, next_value)
        next_advantage = torch.where(live, advantage, next_advantage)
        here = position[live]
        advantages[here] = advantage[live]
        returns[here] = (advantage + value)[live]
    return advantages, returns


def discounted_returns(
    rewards: Tensor, mask: Tensor, offsets: Tensor | None, length: int, count: int, gamma: float
) -> Tensor:
    """``G_t = r_t + γ G_next`` over unmasked tokens."""
    returns = torch.zeros_like(rewards)
    following = rewards.new_zeros(count)
    for position, live in _backwards(mask, offsets, length, count):
        following = torch.where(live, rewards[position] + gamma * following, following)
        returns[position[live]] = following[live]
    return returns
