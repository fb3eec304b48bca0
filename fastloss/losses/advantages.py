"""Advantages per token: recurrences over time and their baselines (docs/policy_gradient.md); per response: group_advantages.py.

Everything here is a constant of the loss: no gradient flows through it, and nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.engine import checks, compile_scans
from fastloss.engine.backend import Call, resolve_call, resolves_views
from fastloss.engine.jagged import takes_jagged
from fastloss.engine.sequences import TimeSteps, flat_mask, layout_of
from fastloss.losses.group_advantages import check_group_size, grouped
from fastloss.losses.policy_inputs import check_like
from fastloss.tables import ACC_DTYPES


@takes_jagged()
@resolves_views
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438) as a scan over time; sequences never see each other.

    ``δ_t = r_t + γ V_next - V_t``, ``A_t = δ_t + γλ A_next``, ``return_t = A_t + V_t``; the next token is the next
    unmasked one, and past the end V and A are 0.

    Args:
        rewards, values: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``.
        mask: bool or 0/1 likewise; None: all.
        gamma, lam: in [0, 1].

    Returns:
        (advantages, returns), float32 (float64 for float64 rewards), 0 where masked.

    >>> import torch, fastloss
    >>> fastloss.gae(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), None, lam=0.5)[0]
    tensor([[0.5000, 1.0000]])
    """
    check_like("values", values, _floating("rewards", rewards))
    gamma, lam = checks.number("gamma", gamma, low=0, high=1), checks.number("lam", lam, low=0, high=1)
    layout = layout_of("rewards", rewards, cu_seqlens)
    keep = flat_mask(mask, rewards)
    call = _resolve("gae", backend, rewards, values, mask, cu_seqlens)
    with torch.no_grad():
        given = (_acc(rewards), _acc(values, rewards), keep, layout, gamma, lam)
        result = compile_scans.gae(*given, call.backend.name) if call.traced else call.backend.gae(*given)
    return result[0].view(rewards.shape), result[1].view(rewards.shape)


@takes_jagged()
@resolves_views
def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None,
    *,
    gamma: float = 1.0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``G_t = r_t + γ G_next`` over each sequence's unmasked tokens; arguments and result as in :func:`gae`.

    >>> import torch, fastloss
    >>> fastloss.discounted_returns(torch.tensor([[0.0, 1.0]]), None, gamma=0.5)
    tensor([[0.5000, 1.0000]])
    """
    _floating("rewards", rewards)
    gamma = checks.number("gamma", gamma, low=0, high=1)
    layout = layout_of("rewards", rewards, cu_seqlens)
    keep = flat_mask(mask, rewards)
    call = _resolve("discounted_returns", backend, rewards, mask, cu_seqlens)
    with torch.no_grad():
        given = (_acc(rewards), keep, layout, gamma)
        if call.traced:
            returns = compile_scans.discounted_returns(*given, call.backend.name)
        else:
            returns = call.backend.discounted_returns(*given)
        return returns.view(rewards.shape)


@torch.no_grad()
def reinforce_plus_plus_advantages(
    rewards: Tensor,
    mask: Tensor | None,
    *,
    gamma: float = 1.0,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """REINFORCE++ (arXiv:2501.03262): the discounted return of reward and KL penalty, whitened over the batch.

    Args:
        rewards: per token, ``[B, T]`` or packed ``[N]`` with ``cu_seqlens``: an outcome reward stands on the last token
            (:func:`token_rewards`).
        mask: likewise.
        kl: per token (:func:`kl_estimate`, usually k1), subtracted times ``kl_coef``.
        group_size: subtract the group's mean return of the first token before whitening (the "baseline" form).

    Returns:
        advantages like ``rewards``, 0 where masked.

    >>> import torch, fastloss
    >>> fastloss.reinforce_plus_plus_advantages(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), None)
    tensor([[ 0.8660,  0.8660],
            [-0.8660, -0.8660]])
    """
    _floating("rewards", rewards)
    kl_coef = checks.number("kl_coef", kl_coef)
    layout = layout_of("rewards", rewards, cu_seqlens)
    keep = flat_mask(mask, rewards).bool()
    if kl is not None:
        check_like("kl", kl, rewards)
        rewards = rewards - kl_coef * kl
    returns = discounted_returns(rewards, mask, gamma=gamma, cu_seqlens=cu_seqlens, backend=backend)
    if group_size is not None:
        outcome = layout.first(returns.reshape(-1), keep)
        mean = grouped(outcome, group_size).mean(1).repeat_interleave(group_size)
        returns = returns - layout.expand(mean).view(returns.shape)
    return whiten(returns, keep.view(returns.shape))


@torch.no_grad()
def remax_advantages(
    rewards: Tensor,
    greedy_rewards: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """ReMax (arXiv:2310.10505): the return minus the reward of the greedy response to the same prompt.

    Args:
        rewards: ``[B]`` per response, or per token (``[B, T]``, packed ``[N]`` with ``cu_seqlens``): then the return of
            each token. greedy_rewards: ``[B]``.

    Returns:
        like ``rewards``; 0 where masked.

    >>> import torch, fastloss
    >>> fastloss.remax_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
    tensor([ 0.5000, -0.5000])
    """
    _floating("rewards", rewards)
    _floating("greedy_rewards", greedy_rewards)
    checks.same_device("greedy_rewards", greedy_rewards, rewards.device)
    if rewards.dim() == 1 and cu_seqlens is None:
        checks.has_shape("greedy_rewards", greedy_rewards, tuple(rewards.shape))
        return _acc(rewards) - _acc(greedy_rewards, rewards)
    layout = layout_of("rewards", rewards, cu_seqlens)
    checks.has_shape("greedy_rewards", greedy_rewards, (layout.count,))
    returns = discounted_returns(rewards, mask, cu_seqlens=cu_seqlens, backend=backend)
    baseline = layout.expand(_acc(greedy_rewards, rewards)).view(rewards.shape)
    return torch.where(flat_mask(mask, rewards).bool().view(rewards.shape), returns - baseline, 0)


@torch.no_grad()
def optimal_token_advantages(
    rewards: Tensor,
    logprobs: Tensor,
    log_sum_sq_probs: Tensor,
    mask: Tensor | None,
    group_size: int,
    *,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The return minus the optimal baseline of each time step (verl's ``optimal_token_baseline``).

    ``B_t = Σ G_t W_t / (Σ W_t + 1e-8)`` over the responses of a group that reach step t, with the cumulative path variance
    ``W_t = Σ_{j ≤ t} w_j² (1 - 2 p_j + Σ_v p_v²)``. Steps count unmasked tokens. A group of one has no baseline, nor has
    what the longest response of a group says after all others have ended.

    Args:
        rewards: per token, ``[B, T]``, or packed ``[N]`` with ``cu_seqlens`` (then it waits for the longest length);
            the responses to one prompt beside each other.
        logprobs, log_sum_sq_probs: likewise, of the sampling policy: ``linear_token_stats`` makes both in one pass.
        mask: bool or 0/1 likewise; None: all. group_size: responses per prompt.
        token_weights: w, the sampler's importance weights; None: 1.

    Returns:
        float32 (float64 for float64 rewards) like ``rewards``, 0 where masked.

    >>> import torch, fastloss
    >>> rewards, logprobs = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.full((2, 2), 0.5).log()
    >>> fastloss.optimal_token_advantages(rewards, logprobs, logprobs, None, 2)
    tensor([[ 0.5000,  0.5000],
            [-0.5000, -0.5000]])
    """
    _floating("rewards", rewards)
    for name, value in (
        ("logprobs", logprobs), ("log_sum_sq_probs", log_sum_sq_probs), ("token_weights", token_weights)
    ):  # fmt: skip
        if value is not None:
            check_like(name, value, rewards)
    layout = layout_of("rewards", rewards, cu_seqlens)
    count = layout.count
    check_group_size(group_size, "sequences", count)
    keep = flat_mask(mask, rewards).bool()
    returns = discounted_returns(rewards, mask, cu_seqlens=cu_seqlens)
    energy = 1 - 2 * _acc(logprobs, rewards).exp() + _acc(log_sum_sq_probs, rewards).exp()
    if token_weights is not None:
        energy = energy * _acc(token_weights, rewards).square()
    steps = TimeSteps(layout, keep)
    g = steps.by_step(returns.reshape(-1)).view(count // group_size, group_size, steps.width)
    live = steps.by_step(keep.to(returns.dtype)).view(g.shape)
    w = steps.by_step(torch.where(keep, energy, 0)).cumsum(1).view(g.shape) * live
    baseline = (g * w).sum(1, keepdim=True) / (w.sum(1, keepdim=True) + 1e-8)
    reached = live.sum(1, keepdim=True)  # how many responses of the group have this step
    return steps.by_token(g - torch.where(reached > 1, baseline, 0)).view(rewards.shape)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor | None, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over the unmasked values: ``(x - mean) / sqrt(var + eps)``, the sample variance (n - 1).

    Args:
        x: any shape. mask: bool or 0/1 likewise; None: all. shift_mean: False keeps the mean (TRL's for rewards).

    Returns:
        float32 (float64 for float64), 0 where masked; fewer than two values have no variance and are only centred.

    >>> import torch, fastloss
    >>> fastloss.whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([1, 1, 0]))
    tensor([-0.7071,  0.7071,  0.0000])
    """
    _floating("x", x)
    eps = checks.number("eps", eps, low=0)
    keep = flat_mask(mask, x).bool().view(x.shape)
    x = torch.where(keep, x.detach().to(ACC_DTYPES[x.dtype]), 0)
    n = keep.sum()
    mean = x.sum() / n.clamp(min=1)
    centered = torch.where(keep, x - mean, 0)
    variance = centered.square().sum() / (n - 1).clamp(min=1)
    white = torch.where(n > 1, centered * (variance + eps).rsqrt(), centered)
    return white if shift_mean else torch.where(keep, white + mean, 0)


@torch.no_grad()
def token_rewards(rewards: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Outcome rewards ``[B]`` on the last unmasked token of each response, 0 elsewhere: ``mask``'s shape.

    >>> import torch, fastloss
    >>> fastloss.token_rewards(torch.tensor([2.0]), torch.tensor([[1, 1, 0]]))
    tensor([[0., 2., 0.]])
    """
    _floating("rewards", rewards)
    checks.is_tensor("mask", mask)
    layout = layout_of("mask", mask, cu_seqlens)
    count, length = layout.count, layout.length
    checks.has_shape("rewards", rewards, (count,))
    checks.same_device("rewards", rewards, mask.device)
    keep = flat_mask(mask, mask).bool()
    position = torch.arange(keep.numel(), device=keep.device, dtype=torch.int64)
    backwards = torch.where(keep, -position, 1)  # the smallest is the last unmasked
    last = -backwards
    if layout.offsets is None:
        best = last.reshape(count, length).amax(-1) if length else last.new_full((count,), -1)
    else:
        best = last.new_full((count,), -1).scatter_reduce(0, layout.ids, last, "amax")
    on_last = keep & (position == layout.expand(best))
    return torch.where(on_last, layout.expand(_acc(rewards)), 0).view(mask.shape)


def _floating(name: str, value: Any) -> Tensor:
    checks.is_floating(name, value)
    return value


def _acc(x: Tensor, like: Tensor | None = None) -> Tensor:
    return x.detach().reshape(-1).to(ACC_DTYPES[(x if like is None else like).dtype]).contiguous()


def _resolve(function: str, backend: str, rewards: Tensor, *others: Tensor | None) -> Call:
    call = resolve_call(function, backend, rewards, *others, dtype=ACC_DTYPES[rewards.dtype])
    call.announce()
    return call
