"""Reward models: the Bradley-Terry contrast of two scores, and the process reward of each step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.backend import resolve_call, resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.engine.direct import DirectPairs
from fastloss.losses.cross_entropy import cross_entropy
from fastloss.losses.pair_terms import CODES, constant, launch_pairs, per_pair
from fastloss.losses.preference import direct_pairs, is_direct_pairs
from fastloss.tables import ACC_DTYPES, Number, PairConstants, PairOptions


class RewardOutput(NamedTuple):
    """``loss`` (0-d, or per pair with ``reduction="none"``) carries a gradient; ``metrics`` are detached 0-d tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]


@resolves_views
def reward_model_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Number | None = None,
    center_coefficient: float = 0.0,
    label_smoothing: Number = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> RewardOutput:
    r"""Bradley-Terry: ``-log σ(r_c - r_r - margin) + center_coefficient · (r_c + r_r)²`` (arXiv:2203.02155).

    Args:
        chosen_rewards, rejected_rewards: scores ``[B]`` (or ``[B, 1]``, as a one-label classifier gives them), any float dtype.
        margin: how much better the chosen one is said to be, a number or one per pair (Llama 2, arXiv:2307.09288).
        center_coefficient: pulls the scores' mean to 0 (arXiv:2312.09244). TRL's ``center_rewards_coefficient``.
        label_smoothing: the probability that a label is wrong, a number or one per pair.
        weights: a constant factor of each pair's loss, ``[B]``.
        reduction: "mean", "sum" or "none".

    Returns:
        :class:`RewardOutput` in float32 (float64 for float64 scores), with ``rewards/accuracies`` (chosen above rejected),
        ``rewards/margins``, ``rewards/chosen``, ``rewards/rejected``, ``min_reward``, ``mean_reward``, ``max_reward``.
        No pairs: all 0.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message names the argument.

    >>> import torch, fastloss
    >>> out = fastloss.reward_model_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]))
    >>> round(out.loss.item(), 4), out.metrics["rewards/accuracies"].item()
    (0.8133, 0.5)
    """
    checks.is_one_of("reduction", reduction, checks.REDUCTIONS)
    numbers = label_smoothing, 0.0 if margin is None else margin, center_coefficient
    if weights is None and is_direct_pairs(chosen_rewards, rejected_rewards, None, None, numbers, backend):
        loss, _, _, values = direct_pairs(
            _direct_options(reduction, chosen_rewards.shape[0], *numbers),
            chosen_rewards,
            rejected_rewards,
            per_pair=reduction == "none",
            extremes=True,
        )
        return RewardOutput(loss, _named(values[:4], *values[6:]))
    for name, value in (("chosen_rewards", chosen_rewards), ("rejected_rewards", rejected_rewards)):
        checks.is_floating(name, value)
        if value.dim() not in (1, 2) or (value.dim() == 2 and value.shape[1] != 1):
            raise ShapeError(f"{name}: expected shape [B] or [B, 1], got {list(value.shape)}")
    checks.has_shape("rejected_rewards", rejected_rewards, tuple(chosen_rewards.shape))
    checks.same_device("rejected_rewards", rejected_rewards, chosen_rewards.device)
    acc, device = ACC_DTYPES[chosen_rewards.dtype], chosen_rewards.device
    c, r = chosen_rewards.to(acc).reshape(-1), rejected_rewards.to(acc).reshape(-1)
    count = c.shape[0]
    options = PairOptions(
        terms=_terms(reduction, count, center_coefficient),
        beta=1.0,
        smoothing=per_pair("label_smoothing", label_smoothing, count, acc, device, 0.0, 1.0),
        margin=per_pair("margin", 0.0 if margin is None else margin, count, acc, device),
    )
    constants = PairConstants(weight=constant("weights", weights, count, acc, device))
    call = resolve_call(
        "reward_model_loss", backend, c, r, margin, label_smoothing, weights, has_operators=False
    )
    call.announce()
    loss, _, _, sums = launch_pairs(call.backend, c, r, None, constants, options, reduction == "none")
    means = (sums / max(count, 1)).unbind()
    with torch.no_grad():
        lowest = highest = means[0]
        if count:
            lows, highs = zip(torch.aminmax(c.detach()), torch.aminmax(r.detach()), strict=True)
            lowest, highest = torch.minimum(*lows), torch.maximum(*highs)
        return RewardOutput(loss, _named(means[1:5], lowest, highest))


def _terms(reduction: str, count: int, center_coefficient: float) -> tuple[tuple[int, float], ...]:
    scale = 1.0 / max(count, 1) if reduction == "mean" else 1.0
    center = checks.number("center_coefficient", center_coefficient, low=0.0)
    sigmoid = (CODES["sigmoid"], scale)
    return (sigmoid, (CODES["center"], center * scale)) if center else (sigmoid,)


@functools.lru_cache(maxsize=64, typed=True)
def _direct_options(
    reduction: str, count: int, smoothing: float, margin: float, center_coefficient: float
) -> DirectPairs:
    return DirectPairs(
        PairOptions(
            terms=_terms(reduction, count, center_coefficient),
            beta=1.0,
            smoothing=checks.number("label_smoothing", smoothing, low=0.0, high=1.0),
            margin=checks.number("margin", margin),
        )
    )


def _named(means: Sequence[Tensor], lowest: Tensor, highest: Tensor) -> dict[str, Tensor]:
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    return {
        **dict(zip(names, means, strict=True)),
        "mean_reward": (means[0] + means[1]) / 2,
        "min_reward": lowest,
        "max_reward": highest,
    }


def process_reward_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    **options: Any,
) -> RewardOutput:
    """Process reward model: each labelled step is classified by cross-entropy (arXiv:2305.20050; soft labels: arXiv:2312.08935).

    Args:
        logits: ``[..., C]``, two classes for right and wrong steps.
        labels: int64 ``[...]``; ``ignore_index`` on every token that ends no step. Or float: of two classes the probability of class 1
            ``[...]``, of more a probability of each ``[..., C]``; a step is ignored where it, or its first, is ``ignore_index``.
        options: those of :func:`cross_entropy` (``weight``, ``label_smoothing``, ``normalizer``, …).

    Returns:
        :class:`RewardOutput`: the loss as :func:`cross_entropy` gives it (a mean over no labelled step is NaN, as PyTorch),
        and ``accuracy`` over the labelled steps (0 where there are none).

    >>> import torch, fastloss
    >>> logits = torch.tensor([[[0.0, 4.0], [3.0, 0.0]]])
    >>> fastloss.process_reward_loss(logits, torch.tensor([[1, -100]])).metrics["accuracy"]
    tensor(1.)
    """
    checks.is_floating("logits", logits)
    if logits.dim() < 2:
        raise ShapeError(f"logits: expected shape [..., C], got {list(logits.shape)}")
    checks.is_tensor("labels", labels)
    if labels.is_floating_point():
        return _of_probabilities(logits, labels, ignore_index, reduction, backend, options)
    checks.index_target("labels", labels, tuple(logits.shape[:-1]), logits.device)
    flat = labels.reshape(-1)
    loss, stats = cross_entropy(
        checks.as_rows(logits),
        flat,
        ignore_index=ignore_index,
        reduction=reduction,
        return_stats=True,
        backend=backend,
        **options,
    )
    with torch.no_grad():
        kept = flat != ignore_index
        right = torch.count_nonzero(stats.is_top1 & kept) / torch.count_nonzero(kept).clamp(min=1)
    return RewardOutput(loss.reshape(labels.shape) if reduction == "none" else loss, {"accuracy": right})


def _of_probabilities(
    logits: Tensor, labels: Tensor, ignore_index: int, reduction: str, backend: str, options: dict[str, Any]
) -> RewardOutput:
    classes, lead = logits.shape[-1], tuple(logits.shape[:-1])
    two = classes == 2 and tuple(labels.shape) == lead
    if not two and labels.shape != logits.shape:
        raise ShapeError(
            f"labels: expected int64, or probabilities of 2 classes {list(lead)} or of each {list(logits.shape)}, got "
            f"{str(labels.dtype).removeprefix('torch.')} of shape {list(labels.shape)}"
        )
    checks.same_device("labels", labels, logits.device)
    p = (labels if two else labels[..., 1:]).detach().reshape(-1, classes - 1)
    first = labels.detach().reshape(-1, 1) if two else labels.detach().reshape(-1, classes)[:, :1]
    kept = first != ignore_index
    p = torch.where(kept, torch.cat([1 - p if two else first, p], 1), 0.0)
    normalizer = checks.normalizer_value(options.pop("normalizer", None), reduction, logits.device)
    # What is ignored may hold anything.
    rows = torch.where(kept, logits.reshape(-1, classes), 0.0)
    each = cross_entropy(rows, p, reduction="none", backend=backend, **options)
    kept = kept.squeeze(1)
    each = torch.where(kept, each, 0.0)
    count = kept.sum()
    with torch.no_grad():
        right = (rows.argmax(-1) == p.argmax(-1)) & kept
        metrics = {"accuracy": right.sum() / count.clamp(min=1)}
    if reduction == "none":
        return RewardOutput(each.reshape(lead), metrics)
    loss = each.sum()
    if normalizer is not None:
        loss = loss / normalizer
    elif reduction == "mean":  # of no step it is NaN, whose gradient is 0, as PyTorch's
        empty = count == 0
        loss = loss / count.masked_fill(empty, 1) + torch.where(empty, torch.nan, 0.0)
    return RewardOutput(loss, metrics)
