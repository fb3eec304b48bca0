"""The operators of torch.compile for the recurrences over time (GAE, discounted returns), which nobody differentiates.

A trace of their definition would repeat its loop for every step, and for a packed batch it cannot know how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from fastloss.engine import backend as backends
from fastloss.engine.changing import constant, in_one_tensor
from fastloss.engine.sequences import Sequences


@library.custom_op("fastloss::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    length: int,
    count: int,
    gamma: float,
    lam: float,
    backend: str,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if numbers is not None:
        gamma, lam = numbers.tolist()
    layout = Sequences(offsets, length, count, rewards.numel(), rewards.device)
    advantages, returns = backends.runnable(backend).gae(rewards, values, mask, layout, gamma, lam)
    return advantages.contiguous(), returns.contiguous()


@_gae.register_fake
def _(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    length: int,
    count: int,
    gamma: float,
    lam: float,
    backend: str,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


@library.custom_op("fastloss::discounted_returns", mutates_args=())
def _discounted_returns(
    rewards: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    length: int,
    count: int,
    gamma: float,
    backend: str,
    numbers: Tensor | None = None,
) -> Tensor:
    if numbers is not None:
        (gamma,) = numbers.tolist()
    layout = Sequences(offsets, length, count, rewards.numel(), rewards.device)
    return backends.runnable(backend).discounted_returns(rewards, mask, layout, gamma).contiguous()


@_discounted_returns.register_fake
def _(
    rewards: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    length: int,
    count: int,
    gamma: float,
    backend: str,
    numbers: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(rewards)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, x: Sequences, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    numbers = in_one_tensor((gamma, lam))
    gamma, lam = constant(gamma), constant(lam)
    return _gae(rewards, values, mask, x.offsets, x.length, x.count, gamma, lam, backend, numbers)


def discounted_returns(rewards: Tensor, mask: Tensor, x: Sequences, gamma: float, backend: str) -> Tensor:
    numbers, gamma = in_one_tensor((gamma,)), constant(gamma)
    return _discounted_returns(rewards, mask, x.offsets, x.length, x.count, gamma, backend, numbers)
