"""Divergences of a student's distribution q from a teacher's p, per row of logits, in forms that are exactly 0 at q = p.

Each is a sum over classes of a term that is 0, with slope 0, at q = p: ``q - p - p d`` for KL(p ‖ q) with d = log q - log p, where
Σ (q - p) = 0. So rounding cannot make a divergence of equal rows anything but 0, and small divergences keep their digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.tables import ACC_DTYPES, DISTILLATION_DIVERGENCES, DistillationOptions


class DistillationRows(NamedTuple):
    """Per row, 0 where it is ignored and NaN where its target is no class: the loss, and detached statistics."""

    loss: Tensor
    kl: Tensor
    reverse_kl: Tensor
    agreement: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    hard_loss: Tensor


def distillation_rows(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    o: DistillationOptions,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> DistillationRows:
    """``logits [N, V]``, ``teacher_logits [N, V]``, which gets no gradient; ``target [N]``: the hard loss's class, or ``ignore_index``."""
    acc = ACC_DTYPES[logits.dtype]
    valid = torch.ones(logits.shape[:1], dtype=torch.bool, device=logits.device)
    bad = torch.zeros_like(valid)
    if target is not None:
        valid = target != o.ignore_index
        bad = valid & ((target < 0) | (target >= logits.shape[-1]))
    keep = valid.unsqueeze(-1)
    z, y = logits.to(acc), teacher_logits.detach().to(acc)
    z = z if bias is None else z + bias
    y = y if teacher_bias is None else y + teacher_bias
    # An ignored row may hold anything, NaN too: it is replaced before anything is computed from it.
    z, y = torch.where(keep, z, 0.0), torch.where(keep, y, 0.0)
    log_q = _scaled(z, o.scale, o.row_scale).log_softmax(-1)
    log_p = _scaled(y, o.teacher_scale, o.teacher_row_scale).log_softmax(-1)
    if o.divergence not in range(len(DISTILLATION_DIVERGENCES)):
        raise ValueError(
            f"divergence: expected a code of {', '.join(DISTILLATION_DIVERGENCES)}, got {o.divergence}"
        )
    name = DISTILLATION_DIVERGENCES[o.divergence]
    loss = divergence(name, log_p, log_q, o.interpolation).sum(-1) * o.factor
    if o.row_factor is not None:
        loss = loss * o.row_factor
    hard = torch.zeros_like(loss)
    if o.hard_loss_coef and target is not None:
        label = torch.where(valid & ~bad, target, 0).unsqueeze(-1)
        hard = z.logsumexp(-1) - z.gather(-1, label).squeeze(-1)
        loss = loss + o.hard_loss_coef * hard
    with torch.no_grad():
        log_q = log_q.detach()
        # Of equal logits all are the largest: rows agree where a class is the largest of both.
        agree = ((log_q == log_q.amax(-1, keepdim=True)) & (log_p == log_p.amax(-1, keepdim=True))).any(-1)
        rows = (
            divergence("forward_kl", log_p, log_q, 0.5).sum(-1),
            divergence("reverse_kl", log_p, log_q, 0.5).sum(-1),
            agree.to(acc),
            -_plogp(log_q),
            -_plogp(log_p),
            hard.detach(),
        )
    made = (torch.where(valid, torch.where(bad, math.nan, row), 0.0) for row in (loss, *rows))
    return DistillationRows(*made)


def _scaled(z: Tensor, scale: float, row_scale: Tensor | None) -> Tensor:
    return z * scale if row_scale is None else z * (row_scale * scale).unsqueeze(-1)


def _plogp(log_p: Tensor) -> Tensor:
    return (log_p.exp() * torch.where(log_p == -math.inf, 0.0, log_p)).sum(-1)


def divergence(name: str, log_p: Tensor, log_q: Tensor, w: float) -> Tensor:
    """The terms of a divergence, per class. Their sum is it. ``w`` is the interpolation."""
    p, q = log_p.exp(), log_q.exp()
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    d = torch.where(no_p | no_q, 0.0, log_q - log_p)
    if name == "tvd":
        return (p - q).abs() / 2
    if name == "forward_kl":
        return _with_zeros(q - p - p * d, q, _infinite(p), no_p, no_q)
    if name == "reverse_kl":
        return _with_zeros(p - q + q * d, _infinite(q), p, no_p, no_q)
    if name == "jsd":
        e = _log_mixture(d, w)
        terms = -w * (p * e) - (1 - w) * (q * (e - d))
        return _with_zeros(terms, -(1 - w) * math.log1p(-w) * q, -w * math.log(w) * p, no_p, no_q)
    if name == "skewed_forward_kl":
        terms = (1 - w) * (q - p) - p * _log_mixture(d, w)
        return _with_zeros(terms, (1 - w) * q, (w - 1 - math.log(w)) * p, no_p, no_q)
    if name == "skewed_reverse_kl":
        terms = (1 - w) * (p - q) - q * (_log_mixture(d, 1 - w) - d)
        return _with_zeros(terms, (w - 1 - math.log(w)) * q, (1 - w) * p, no_p, no_q)
    if name == "alpha":
        low, high = d.clamp(max=0.0), d.clamp(min=0.0)  # e^d overflows on the other side
        below = p * ((1 - w) * torch.expm1(low) - torch.expm1((1 - w) * low))
        above = q * (w * torch.expm1(-high) - torch.expm1(-w * high))
        terms = torch.where(d > 0, above, below) / (w * (1 - w))
        return _with_zeros(terms, q / w, p / (1 - w), no_p, no_q)
    raise ValueError(f"divergence: no formula for {name!r}")


def _log_mixture(d: Tensor, w: float) -> Tensor:
    """``log(w + (1 - w) e^d)``: the mixture w p + (1 - w) q over p. Exactly 0 at d = 0; no overflow."""
    if w == 1.0:
        return torch.zeros_like(d)
    if w == 0.0:
        return d
    low, high = d.clamp(max=0.0), d.clamp(min=0.0)
    return torch.where(
        d > 0, high + torch.log1p(w * torch.expm1(-high)), torch.log1p((1 - w) * torch.expm1(low))
    )


def _infinite(mass: Tensor) -> Tensor:
    """Infinity where there is mass, without its gradient (which has no value there)."""
    return torch.where(mass > 0, math.inf, 0.0).to(mass.dtype)


def _with_zeros(terms: Tensor, at_no_p: Tensor, at_no_q: Tensor, no_p: Tensor, no_q: Tensor) -> Tensor:
    """The limits of a term where a probability is 0 (a logit of -inf); 0 where both are."""
    terms = torch.where(no_p, at_no_p, terms)
    terms = torch.where(no_q, at_no_q, terms)
    return torch.where(no_p & no_q, 0.0, terms)
