"""Advantages: recurrences over time, and baselines over groups of responses (docs/policy_gradient.md).

Everything here is a constant of the loss: no gradient flows through it, and nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss import checks, dispatch, reference
from fastloss.checks import ShapeError
from fastloss.ops.native_rows import acc_dtype
from fastloss.ops.policy_batch import check_like, flat_mask, flat_offsets


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
    offsets, length, count = flat_offsets("rewards", rewards, cu_seqlens)
    keep = flat_mask(mask, rewards)
    run = _choose("gae", backend, rewards, values)
    with torch.no_grad():
        result = run.gae(_acc(rewards), _acc(values, rewards), keep, offsets, length, count, gamma, lam)
    return result[0].view(rewards.shape), result[1].view(rewards.shape)


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
    offsets, length, count = flat_offsets("rewards", rewards, cu_seqlens)
    keep = flat_mask(mask, rewards)
    run = _choose("discounted_returns", backend, rewards)
    with torch.no_grad():
        return run.discounted_returns(_acc(rewards), keep, offsets, length, count, gamma).view(rewards.shape)


@torch.no_grad()
def group_advantages(rewards: Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """GRPO's advantage (arXiv:2402.03300): ``(r - mean of its group) / (deviation + eps)``.

    The deviation is the sample's (n - 1), as TRL's and verl's. A group of one, or whose rewards are all equal, gets 0. A
    NaN reward (could not be scored) is left out of the statistics and gets 0.

    Args:
        rewards: ``[B]``, the responses to one prompt beside each other. group_size: responses per prompt.
        scale: deviation of the "group", of the "batch" (arXiv:2508.08221), or "none" (Dr. GRPO, arXiv:2503.20783).

    >>> import torch, fastloss
    >>> fastloss.group_advantages(torch.tensor([0.0, 1.0, 5.0, 5.0]), 2, scale="none")
    tensor([-0.5000,  0.5000,  0.0000,  0.0000])
    """
    checks.is_one_of("scale", scale, ("group", "batch", "none"))
    groups = _groups(rewards, group_size)  # [groups, group_size]
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
    groups = _groups(rewards, group_size)
    scored = (~groups.isnan()).sum(1, keepdim=True)
    others = (groups.nansum(1, keepdim=True) - groups) / (scored - 1)
    advantages = torch.where(scored > 1, groups - others, torch.where(groups.isnan(), groups, 0 * groups))
    # The mean of equal rewards need not be their bits.
    advantages = torch.where(_varied(groups), advantages, 0 * advantages)
    if normalize:
        advantages = (advantages - advantages.nanmean()) / (_deviation(advantages.reshape(1, -1), 1) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).reshape(-1)


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
    offsets, length, count = flat_offsets("rewards", rewards, cu_seqlens)
    keep = flat_mask(mask, rewards).bool()
    if kl is not None:
        check_like("kl", kl, rewards)
        rewards = rewards - kl_coef * kl
    returns = discounted_returns(rewards, mask, gamma=gamma, cu_seqlens=cu_seqlens, backend=backend)
    if group_size is not None:
        seq = reference.Sequences(offsets, length, count, rewards.numel(), rewards.device)
        outcome = seq.first(returns.reshape(-1), keep)
        mean = _groups(outcome, group_size).mean(1).repeat_interleave(group_size)
        returns = returns - seq.expand(mean).view(returns.shape)
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
    offsets, length, count = flat_offsets("rewards", rewards, cu_seqlens)
    checks.has_shape("greedy_rewards", greedy_rewards, (count,))
    returns = discounted_returns(rewards, mask, cu_seqlens=cu_seqlens, backend=backend)
    seq = reference.Sequences(offsets, length, count, rewards.numel(), rewards.device)
    baseline = seq.expand(_acc(greedy_rewards, rewards)).view(rewards.shape)
    return torch.where(flat_mask(mask, rewards).bool().view(rewards.shape), returns - baseline, 0)


@torch.no_grad()
def opo_advantages(rewards: Tensor, lengths: Tensor, group_size: int) -> Tensor:
    """OPO (arXiv:2505.23585): a reward minus its group's mean weighted by length, the baseline of least variance.

    Args:
        rewards: ``[B]``. lengths: tokens of each response, ``[B]``, int or float. group_size: responses per prompt.

    >>> import torch, fastloss
    >>> fastloss.opo_advantages(torch.tensor([0.0, 1.0]), torch.tensor([3, 1]), 2)
    tensor([-0.2500,  0.7500])
    """
    groups = _groups(rewards, group_size)
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
    groups = _groups(rewards, group_size)
    centered = group_advantages(rewards, group_size, scale="none")
    varied = _varied(groups).sum().clamp(min=1)
    return centered * (groups.shape[0] / varied)


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
    x = torch.where(keep, x.detach().to(acc_dtype(x.dtype)), 0)
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
    offsets, length, count = flat_offsets("mask", mask, cu_seqlens)
    checks.has_shape("rewards", rewards, (count,))
    checks.same_device("rewards", rewards, mask.device)
    keep = flat_mask(mask, mask).bool()
    seq = reference.Sequences(offsets, length, count, keep.numel(), keep.device)
    position = torch.arange(keep.numel(), device=keep.device)
    backwards = torch.where(keep, -position, 1)  # the smallest is the last unmasked
    last = -backwards
    if offsets is None:
        best = last.reshape(count, length).amax(-1) if length else last.new_full((count,), -1)
    else:
        best = last.new_full((count,), -1).scatter_reduce(0, seq.ids, last, "amax")
    on_last = keep & (position == seq.expand(best))
    return torch.where(on_last, seq.expand(_acc(rewards)), 0).view(mask.shape)


def _floating(name: str, value: Any) -> Tensor:
    checks.is_floating(name, value)
    return value


def _acc(x: Tensor, like: Tensor | None = None) -> Tensor:
    return x.detach().reshape(-1).to(acc_dtype((x if like is None else like).dtype)).contiguous()


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    """acc ``[groups, group_size]``."""
    _floating("rewards", rewards)
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size: expected a positive int, got {group_size!r}")
    if rewards.dim() != 1 or rewards.numel() % group_size:
        raise ShapeError(
            f"rewards: expected shape [B] with B a multiple of group_size={group_size}, got {list(rewards.shape)}"
        )
    return _acc(rewards).view(-1, group_size)


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


def _choose(function: str, backend: str, *tensors: Tensor) -> Any:
    """The module whose function of that name runs: an adapter, or the definition."""
    if torch.compiler.is_compiling():
        return reference
    choice = dispatch.choose(backend, tensors[0], unsupported=dispatch.tracing_reason(*tensors))
    dispatch.announce(function, choice)
    return reference if choice.rows is None else choice.rows
