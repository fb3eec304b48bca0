"""Reward models beyond one pair: ties, ranked lists (DPO on lists too), and regression with several heads."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.backend import announce_pointwise, resolves_views
from fastloss.engine.changing import scalar_like
from fastloss.engine.checks import ShapeError
from fastloss.losses.reward_model import RewardOutput
from fastloss.tables import ACC_DTYPES

TIE_MODELS = ("rao_kupper", "davidson")
LIST_LOSSES = ("plackett_luce", "softmax", "pair_logistic", "pair_hinge", "lambda")
REGRESSION_LOSSES = ("mse", "huber", "bce")


class ListwiseOutput(NamedTuple):
    """``loss`` (0-d, or per list with ``reduction="none"``) carries a gradient; the rest is detached."""

    loss: Tensor
    rewards: Tensor  # beta · (log p - log p_ref), [B, K]
    metrics: dict[str, Tensor]


@resolves_views
def tied_reward_loss(
    first_rewards: Tensor,
    second_rewards: Tensor,
    outcome: Tensor,
    *,
    model: str = "rao_kupper",
    tie_strength: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> RewardOutput:
    r"""The likelihood of comparisons of which some are ties (arXiv:2410.05328), with d = first - second.

    ``rao_kupper``: P(first) = σ(d - η), P(second) = σ(-d - η), P(tie) = (e^{2η} - 1) σ(d - η) σ(-d - η).
    ``davidson``: first, tie and second are a softmax of d / 2, log ν and -d / 2.

    Args:
        first_rewards, second_rewards: scores ``[B]`` (or ``[B, 1]``), any float dtype.
        outcome: ``[B]``: 1 where the first is better, -1 where the second is, 0 for a tie.
        tie_strength: > 0; η, in units of the rewards, or ν. Near 0 ties are rare, and ``rao_kupper`` is Bradley-Terry.
        weights: a constant factor of each comparison's loss, ``[B]``.
        reduction: "mean", "sum" or "none".

    Returns:
        :class:`RewardOutput` in float32 (float64 for float64 scores). Metrics: ``accuracy`` (of the comparisons that are no ties, the better
        one has the larger score), ``tie_probability`` and ``ties`` (share of outcomes). No comparisons: all 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; the message names the argument.

    >>> import torch, fastloss
    >>> first, second = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    >>> out = fastloss.tied_reward_loss(first, second, torch.tensor([1, 0]))
    >>> round(out.loss.item(), 4)
    0.7325
    """
    checks.is_one_of("reduction", reduction, checks.REDUCTIONS)
    checks.is_one_of("model", model, TIE_MODELS)
    strength = checks.number("tie_strength", tie_strength, low=0.0, open_low=True)
    for name, value in (("first_rewards", first_rewards), ("second_rewards", second_rewards)):
        checks.is_floating(name, value)
        if value.dim() not in (1, 2) or (value.dim() == 2 and value.shape[1] != 1):
            raise ShapeError(f"{name}: expected shape [B] or [B, 1], got {list(value.shape)}")
    checks.has_shape("second_rewards", second_rewards, tuple(first_rewards.shape))
    checks.same_device("second_rewards", second_rewards, first_rewards.device)
    count, device = first_rewards.shape[0], first_rewards.device
    checks.is_tensor("outcome", outcome)
    checks.has_shape("outcome", outcome, (count,))
    checks.same_device("outcome", outcome, device)
    acc = ACC_DTYPES[first_rewards.dtype]
    factor = _constant("weights", weights, (count,), acc, device)
    announce_pointwise("tied_reward_loss", backend)
    d = (first_rewards.to(acc) - second_rewards.to(acc)).reshape(-1)
    one = torch.ones((), dtype=acc, device=device) * strength
    if model == "rao_kupper":
        lost, won = F.softplus(one + d), F.softplus(one - d)
        tied = won + lost - torch.expm1(2 * one).log()
    else:
        total = torch.stack([d / 2, one.log().expand_as(d), -d / 2]).logsumexp(0)
        won, lost, tied = total - d / 2, total + d / 2, total - one.log()
    loss = torch.where(outcome > 0, won, torch.where(outcome < 0, lost, tied))
    with torch.no_grad():
        decided = outcome != 0
        right = (torch.where(outcome > 0, d, -d) > 0) & decided
        metrics = {
            "accuracy": right.sum().to(acc) / decided.sum().clamp(min=1),
            "tie_probability": (-tied).exp().sum() / max(1, count),
            "ties": (~decided).sum().to(acc) / max(1, count),
        }
    return RewardOutput(_reduced(loss, factor, reduction), metrics)


@resolves_views
def listwise_reward_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    loss_type: str = "plackett_luce",
    top: int | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> RewardOutput:
    r"""A ranked list of answers to one prompt: the larger a label, the better the answer. s are the scores, ψ the labels.

    ==================  ====================================================================  ===================
    ``loss_type``       a list's loss                                                         paper
    ==================  ====================================================================  ===================
    ``plackett_luce``   Σ_i log Σ_{j not before i} e^{s_j} - s_i, over the order of ψ          arXiv:2306.17492
    ``softmax``         -Σ_i ψ_i / Σ_j ψ_j · log softmax(s)_i, ψ ≥ 0                           arXiv:2402.01878
    ``pair_logistic``   Σ over ψ_i > ψ_j of log(1 + e^{s_j - s_i})                             arXiv:2402.01878
    ``pair_hinge``      Σ over ψ_i > ψ_j of max(0, 1 - s_i + s_j)                              arXiv:2402.01878
    ``lambda``          ``pair_logistic`` times what the pair's swap changes in DCG            arXiv:2402.01878
    ==================  ====================================================================  ===================

    Args:
        scores: ``[B, K]``, any float dtype.
        labels: ``[B, K]``, a constant: ranks or scores of a judge. Equal ones: ``plackett_luce`` takes the first as better, pairs leave out.
        mask: bool or 0/1 ``[B, K]``: answers that are there.
        top: ``plackett_luce`` of the first so many choices alone. 1: the best against all others.
        weights: a constant factor of each list's loss, ``[B]``.
        reduction: "mean" (over lists), "sum" or "none".

    Returns:
        :class:`RewardOutput` in float32 (float64 for float64 scores). Metrics: ``accuracy`` (of the pairs with different labels, those whose
        scores have the same order) and ``top1`` (an answer of the largest label has the largest score). No lists: all 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; the message names the argument.

    >>> import torch, fastloss
    >>> out = fastloss.listwise_reward_loss(torch.zeros(1, 3), torch.tensor([[3, 2, 1]]))
    >>> round(out.loss.item(), 4)  # log 3!
    1.7918
    """
    checks.is_floating("scores", scores)
    announce_pointwise("listwise_reward_loss", backend)
    s = scores.to(ACC_DTYPES[scores.dtype])
    loss, metrics, _ = _of_lists("scores", s, labels, mask, loss_type, top, weights, reduction)
    return RewardOutput(loss, metrics)


@resolves_views
def listwise_preference_loss(
    logps: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    reference_free: bool = False,
    mask: Tensor | None = None,
    loss_type: str = "plackett_luce",
    top: int | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> ListwiseOutput:
    """DPO on lists: :func:`listwise_reward_loss` of the rewards β (log p - log p_ref) of K answers to each prompt.

    LiPO (arXiv:2402.01878) is all of its loss types; DPO's Plackett-Luce form (arXiv:2305.18290) the default; S-DPO (arXiv:2406.09215), one
    good answer among unordered bad ones, ``top=1``. With K = 2 each but ``softmax`` and ``lambda`` is a pair's DPO or hinge.

    Args:
        logps: Σ log p of each answer, ``[B, K]``, any float dtype.
        labels: ``[B, K]``; mask, loss_type, top, weights, reduction: as in :func:`listwise_reward_loss`.
        ref_logps: the same of the reference model, ``[B, K]``; a constant.
        beta: > 0. reference_free: the reference is taken to be uniform, whatever is passed.

    Returns:
        :class:`ListwiseOutput`; its metrics are those of :func:`listwise_reward_loss`.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; the message names the argument.

    >>> import torch, fastloss
    >>> logps = torch.tensor([[-10.0, -12.0, -11.0]])
    >>> out = fastloss.listwise_preference_loss(logps, torch.tensor([[1, 0, 0]]), logps - 1.0, top=1)
    >>> round(out.loss.item(), 4)  # log 3
    1.0986
    """
    checks.is_floating("logps", logps)
    scale = checks.number("beta", beta, low=0.0, open_low=True)
    acc = ACC_DTYPES[logps.dtype]
    rewards = logps.to(acc)
    if not reference_free:
        if ref_logps is None:
            raise ValueError("ref_logps: expected a tensor, got None; pass reference_free=True to mean it")
        checks.is_floating("ref_logps", ref_logps)
        checks.has_shape("ref_logps", ref_logps, tuple(logps.shape))
        checks.same_device("ref_logps", ref_logps, logps.device)
        rewards = rewards - ref_logps.detach().to(acc)
    announce_pointwise("listwise_preference_loss", backend)
    rewards = rewards * scale
    loss, metrics, valid = _of_lists("logps", rewards, labels, mask, loss_type, top, weights, reduction)
    return ListwiseOutput(loss, torch.where(valid, rewards.detach(), 0.0), metrics)


def _of_lists(
    name: str,
    s: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    loss_type: str,
    top: int | None,
    weights: Tensor | None,
    reduction: str,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(the loss, metrics, which answers are there) of scores ``[B, K]`` in the accumulation dtype."""
    checks.is_one_of("reduction", reduction, checks.REDUCTIONS)
    checks.is_one_of("loss_type", loss_type, LIST_LOSSES)
    if s.dim() != 2 or not s.shape[1]:
        raise ShapeError(f"{name}: expected shape [B, K], got {list(s.shape)}")
    if top is not None:
        if isinstance(top, bool) or not isinstance(top, numbers.Integral) or top < 1:
            raise ValueError(f"top: expected a positive int, got {top!r}")
        if loss_type != "plackett_luce":
            raise ValueError(f"top: expected None for loss_type={loss_type!r}, got {top}")
    checks.is_tensor("labels", labels)
    checks.has_shape("labels", labels, tuple(s.shape))
    checks.same_device("labels", labels, s.device)
    valid = torch.ones_like(s, dtype=torch.bool)
    if mask is not None:
        checks.is_tensor("mask", mask)
        checks.has_shape("mask", mask, tuple(s.shape))
        checks.same_device("mask", mask, s.device)
        valid = mask != 0
    factor = _constant("weights", weights, (s.shape[0],), s.dtype, s.device)
    # What is not there may hold anything.
    s = torch.where(valid, s, 0.0)
    psi = torch.where(valid, labels.detach().to(s.dtype), 0.0)
    both = valid[:, :, None] & valid[:, None, :]
    better = both & (psi[:, :, None] > psi[:, None, :])  # [B, K, K]: the first index above the second
    difference = s[:, :, None] - s[:, None, :]
    if loss_type == "plackett_luce":
        place = _places(psi, valid)
        later = (place[:, None, :] >= place[:, :, None]) & valid[:, None, :]
        # A row of an answer that is not there is a row of zeros, which nobody reads.
        among = s[:, None, :].expand_as(difference).masked_fill(~later & valid[:, :, None], -torch.inf)
        choice = among.logsumexp(-1) - s
        counts = valid if top is None else valid & (place < top)
        loss = torch.where(counts, choice, 0.0).sum(-1)
    elif loss_type == "softmax":
        share = psi / torch.where(psi.sum(-1, keepdim=True) > 0, psi.sum(-1, keepdim=True), 1.0)
        log_p = s - s.masked_fill(~valid, torch.finfo(s.dtype).min).logsumexp(-1, keepdim=True)
        loss = -(share * torch.where(valid, log_p, 0.0)).sum(-1)
    else:
        pairs = F.relu(1 - difference) if loss_type == "pair_hinge" else F.softplus(-difference)
        if loss_type == "lambda":
            discount = 1 / torch.log(2.0 + _places(s.detach(), valid).to(s.dtype))
            gain = torch.exp2(psi) - 1
            swap = (gain[:, :, None] - gain[:, None, :]) * (discount[:, :, None] - discount[:, None, :])
            pairs = pairs * swap.abs()
        loss = torch.where(better, pairs, 0.0).sum((1, 2))
    with torch.no_grad():
        ordered = better & (difference > 0)
        least = torch.finfo(s.dtype).min
        highest = s == s.masked_fill(~valid, least).amax(-1, keepdim=True)
        best = psi == psi.masked_fill(~valid, least).amax(-1, keepdim=True)
        there = valid.any(-1)
        metrics = {
            "accuracy": ordered.sum().to(s.dtype) / better.sum().clamp(min=1),
            "top1": (highest & best & valid).any(-1).sum().to(s.dtype) / there.sum().clamp(min=1),
        }
    return _reduced(loss, factor, reduction), metrics, valid


def _places(values: Tensor, valid: Tensor) -> Tensor:
    """Of each answer of a list, how many come before it: larger values, and earlier ones of the same. Those that are not there last."""
    order = values.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)


@resolves_views
def reward_regression_loss(
    rewards: Tensor,
    labels: Tensor,
    *,
    loss_type: str = "mse",
    huber_delta: float = 1.0,
    mask: Tensor | None = None,
    head_weights: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> RewardOutput:
    """A reward model that learns scores themselves, with one head or several: HelpSteer2 (arXiv:2406.08673), ArmoRM (arXiv:2406.12845).

    Args:
        rewards: ``[B]``, or ``[B, H]`` of H heads, any float dtype.
        labels: the scores, of ``rewards``' shape; NaN where one was not given. "bce": probabilities.
        loss_type: "mse", (r - y)²; "huber", (r - y)² / 2 up to ``huber_delta``, linear beyond; "bce", cross-entropy of σ(r).
        mask: bool or 0/1 of ``rewards``' shape: labels that were given.
        head_weights: a constant factor of each head's loss, ``[H]``. weights: of each answer's, ``[B]``.
        reduction: "mean" over the labels that were given, "sum", or "none" (of ``rewards``' shape).

    Returns:
        :class:`RewardOutput` in float32 (float64 for float64 rewards). Metrics: ``mse`` and ``mae`` over the labels that were given ("bce": of
        σ(r)). No label: all 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; the message names the argument.

    >>> import torch, fastloss
    >>> labels = torch.tensor([[4.0, float("nan")], [2.0, 1.0]])
    >>> fastloss.reward_regression_loss(torch.full((2, 2), 2.0), labels).loss.item()  # (4 + 0 + 1) / 3
    1.6666666269302368
    """
    checks.is_one_of("reduction", reduction, checks.REDUCTIONS)
    checks.is_one_of("loss_type", loss_type, REGRESSION_LOSSES)
    delta = checks.number("huber_delta", huber_delta, low=0.0, open_low=True)
    checks.is_floating("rewards", rewards)
    if rewards.dim() not in (1, 2):
        raise ShapeError(f"rewards: expected shape [B] or [B, H], got {list(rewards.shape)}")
    checks.is_tensor("labels", labels)
    checks.has_shape("labels", labels, tuple(rewards.shape))
    checks.same_device("labels", labels, rewards.device)
    acc, device, shape = ACC_DTYPES[rewards.dtype], rewards.device, tuple(rewards.shape)
    y = labels.detach().to(acc)
    valid = ~y.isnan()
    if mask is not None:
        checks.is_tensor("mask", mask)
        checks.has_shape("mask", mask, shape)
        checks.same_device("mask", mask, device)
        valid = valid & (mask != 0)
    if head_weights is not None and rewards.dim() != 2:
        raise ShapeError(f"head_weights: expected None for rewards {list(shape)}, got a tensor")
    of_heads = _constant("head_weights", head_weights, shape[1:], acc, device)
    of_answers = _constant("weights", weights, shape[:1], acc, device)
    announce_pointwise("reward_regression_loss", backend)
    r, y = torch.where(valid, rewards.to(acc), 0.0), torch.where(valid, y, 0.0)
    if loss_type == "mse":
        loss = (r - y).square()
    elif loss_type == "huber":
        loss = _huber(r - y, scalar_like(r, delta))
    else:
        loss = F.softplus(r) - r * y
    if of_heads is not None:
        loss = loss * of_heads
    if of_answers is not None:
        loss = loss * of_answers.view(-1, *(1 for _ in shape[1:]))
    loss = torch.where(valid, loss, 0.0)
    with torch.no_grad():
        count = valid.sum().clamp(min=1)
        error = torch.where(valid, (r.sigmoid() if loss_type == "bce" else r) - y, 0.0)
        metrics = {"mse": error.square().sum() / count, "mae": error.abs().sum() / count}
    if reduction == "none":
        return RewardOutput(loss, metrics)
    return RewardOutput(loss.sum() / count if reduction == "mean" else loss.sum(), metrics)


def _huber(error: Tensor, delta: Tensor) -> Tensor:
    """``F.huber_loss``, whose schema has a number: under torch.compile one that changes is compiled again at each value."""
    far = error.abs()
    near = ~(far > delta)  # NaN too
    # What is not taken is not squared, or an infinite error would have a derivative of NaN.
    return torch.where(near, torch.where(near, error, 0.0).square() / 2, delta * (far - delta / 2))


def _constant(name: str, value: Any, shape: tuple[int, ...], acc: torch.dtype, device: torch.device) -> Any:
    if value is None:
        return None
    checks.is_tensor(name, value)
    checks.has_shape(name, value, shape)
    checks.same_device(name, value, device)
    return value.detach().to(acc)


def _reduced(loss: Tensor, factor: Tensor | None, reduction: str) -> Tensor:
    loss = loss if factor is None else loss * factor
    if reduction == "none":
        return loss
    return loss.sum() / max(1, loss.shape[0]) if reduction == "mean" else loss.sum()
