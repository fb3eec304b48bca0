"""Definition of the recurrences over time: GAE (arXiv:1506.02438) and discounted returns, as a loop over time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _backwards(
    mask: Tensor, offsets: Tensor | None, length: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """From the last step to the first: (flat positions ``[count]``, whether each sequence has a token there). No value of a
    padded batch is looked at, so that a trace of it is one of numbers."""
    n, device = mask.numel(), mask.device
    if offsets is None:
        starts = torch.arange(count, device=device, dtype=torch.int64) * length
        lengths, steps = torch.full_like(starts, length), length if n else 0
    else:
        starts, lengths = offsets[:-1], offsets.diff()
        steps = 0
        if count and n:
            steps = (
                n if lengths.is_meta else int(lengths.max())
            )  # a meta tensor has no lengths: the most there can be
    for t in reversed(range(steps)):
        position = (starts + t).clamp(max=n - 1)
        yield position, (t < lengths) & mask[position].bool()


def _put(out: Tensor, position: Tensor, live: Tensor, value: Tensor) -> Tensor:
    """``value`` where ``live``; what is not goes to one place past the end of ``out [N + 1]``."""
    place = torch.where(live, position, out.numel() - 1)
    return out.index_copy(0, place, torch.where(live, value, 0))


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
    advantages = returns = rewards.new_zeros(rewards.numel() + 1)
    next_value = rewards.new_zeros(count)
    next_advantage = rewards.new_zeros(count)
    for position, live in _backwards(mask, offsets, length, count):
        value = values[position]
        advantage = rewards[position] + gamma * next_value - value + gamma * lam * next_advantage
        next_value = torch.where(live, value, next_value)
        next_advantage = torch.where(live, advantage, next_advantage)
        advantages = _put(advantages, position, live, advantage)
        returns = _put(returns, position, live, advantage + value)
    return advantages[:-1], returns[:-1]


def discounted_returns(
    rewards: Tensor, mask: Tensor, offsets: Tensor | None, length: int, count: int, gamma: float
) -> Tensor:
    """``G_t = r_t + γ G_next`` over unmasked tokens."""
    returns = rewards.new_zeros(rewards.numel() + 1)
    following = rewards.new_zeros(count)
    for position, live in _backwards(mask, offsets, length, count):
        following = torch.where(live, rewards[position] + gamma * following, following)
        returns = _put(returns, position, live, following)
    return returns[:-1]
