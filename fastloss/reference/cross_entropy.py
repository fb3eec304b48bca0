"""Definition of cross-entropy with label smoothing (arXiv:1512.00567) and z-loss (arXiv:2204.02311)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference.logits import effective_logits, linear_logits
from fastloss.reference.numbers import scalar
from fastloss.tables import Number


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: Number = 1.0,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> Tensor:
    """Loss of ``logits [rows, V]`` for int64 ``target [rows]`` or class probabilities ``[rows, V]``; in float32/64.
    ``token_weight [rows]`` multiplies the rows' losses, and no count."""
    rows, vocab = logits.shape
    if not vocab:
        return _without_classes(logits, target, reduction, label_smoothing, normalizer)
    if target.is_floating_point():
        z = effective_logits(logits, bias=bias, scale=scale, softcap=softcap)
        w = torch.ones(vocab, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
        smoothed = target.to(z.dtype) * (1 - label_smoothing) + label_smoothing / vocab
        loss = -(w * smoothed * _log_softmax(z)).sum(-1)
        count = scalar(loss, rows)
        kept = None
    else:
        kept = target != ignore_index
        # An ignored row must not reach the gradient, not even through a NaN.
        logits = torch.where(
            kept.unsqueeze(-1), logits, torch.zeros((), dtype=logits.dtype, device=logits.device)
        )
        z = effective_logits(logits, bias=bias, scale=scale, softcap=softcap)
        w = torch.ones(vocab, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
        bad = kept & ((target < 0) | (target >= vocab))
        safe = torch.where(kept & ~bad, target, torch.zeros_like(target))
        logp = _log_softmax(z)
        w_target = w[safe] * kept
        loss = -w_target * logp.gather(-1, safe.unsqueeze(-1)).squeeze(-1) * (1 - label_smoothing)
        if label_smoothing:
            loss = loss - (w * logp).sum(-1) * (label_smoothing / vocab)
        loss = loss.masked_fill(bad, float("nan"))
        count = w_target.sum()
    if z_loss:
        penalty = z_loss * z.logsumexp(-1).square()
        if kept is not None and weight is not None and reduction == "mean" and normalizer is None:
            penalty = penalty * (count / kept.sum())  # a z-loss has no class: its mean is over tokens
        loss = loss + penalty
    if token_weight is not None:
        factors = token_weight.to(loss.dtype)
        loss = loss * (factors if kept is None else factors.masked_fill(~kept, 0))
    if kept is not None:
        loss = loss.masked_fill(~kept, 0)
    if reduction == "none":
        return loss
    if normalizer is not None:
        return loss.sum() / divisor(loss, normalizer)
    return loss.sum() / count if reduction == "mean" else loss.sum()


def _log_softmax(z: Tensor) -> Tensor:
    """Step by step: the backward of PyTorch's own takes exp of a rounded log-probability, and its sums over many classes are less exact."""
    u = z - z.detach().amax(-1, keepdim=True)
    return u - u.exp().sum(-1, keepdim=True).log()


def divisor(loss: Tensor, normalizer: float | Tensor) -> Tensor:
    """As a tensor: the tangent of a 0-d float32 tensor divided by a Python number is float64 in PyTorch."""
    return normalizer if isinstance(normalizer, Tensor) else scalar(loss, normalizer)


def _without_classes(
    logits: Tensor,
    target: Tensor,
    reduction: str,
    label_smoothing: float,
    normalizer: float | Tensor | None,
) -> Tensor:
    """torch's results for ``logits [rows, 0]``: 0 for each row, NaN where it divides the smoothing of a target by no class, and
    the mean of nothing is NaN."""
    loss = logits.sum(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    nan = scalar(loss, float("nan"))
    undefined = nan if label_smoothing and not target.is_floating_point() else scalar(loss, 1.0)
    loss = loss * undefined
    if reduction == "none":
        return loss
    total = loss.sum() * undefined
    if normalizer is not None:
        return total / divisor(loss, normalizer)
    return total * nan if reduction == "mean" else total


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options
) -> Tensor:
    """``cross_entropy`` of the logits of a linear head."""
    return cross_entropy(linear_logits(input, linear_weight, linear_bias), target, **options)
