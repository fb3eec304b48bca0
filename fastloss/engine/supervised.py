"""Supervised losses of a token: value and slope from the statistics of its row, from logits and from a head.

A loss here is a function f of a token's log-probability and of statistics that carry no gradient. Its row's gradient is that of the
log-probability times f': ``a = f'``, ``b = -f'`` (engine/coefficients.py). So one pass makes statistics, coefficients and gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine import head as heads
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import Backend
from fastloss.engine.head import Schedule
from fastloss.engine.head_types import Grads, Head, Needs
from fastloss.tables import LSE_PARTS, SUPERVISED_LOSSES, SupervisedOptions

_FURTHER = {"eaft": ("entropy",), "deft": ("log_sum_sq_probs",)}


class Labels(NamedTuple):
    """Of each row: its class, whether that is to become unlikely (None: none is), and what the loss's gradient is multiplied by
    (None: it is not made)."""

    target: Tensor
    unlikely: Tensor | None
    factors: Tensor | None


def wanted(o: SupervisedOptions) -> tuple[str, ...]:
    """The statistics that a loss reads."""
    return ("logprobs", *_FURTHER.get(SUPERVISED_LOSSES[o.kind], ()))


def value_and_slope(
    stats: dict[str, Tensor], unlikely: Tensor | None, o: SupervisedOptions
) -> tuple[Tensor, Tensor]:
    """f and df / d log p of each row."""
    logprob = stats["logprobs"]
    value, slope = _of(SUPERVISED_LOSSES[o.kind], logprob, stats, o)
    if unlikely is not None:
        other, other_slope = _of("unlikelihood", logprob, stats, o)
        value, slope = torch.where(unlikely, other, value), torch.where(unlikely, other_slope, slope)
    return value, slope


def _of(name: str, logprob: Tensor, stats: dict[str, Tensor], o: SupervisedOptions) -> tuple[Tensor, Tensor]:
    if name == "nll":
        return -logprob, torch.full_like(logprob, -1.0)
    if name in ("power", "deft"):
        q = stats["log_sum_sq_probs"].exp() if name == "deft" else o.power
        return -torch.expm1(q * logprob) / q, -(q * logprob).exp()
    if name in ("focal", "unlikelihood"):
        rest = -torch.expm1(logprob)
        least = 1e-15 if logprob.dtype == torch.float64 else 1e-7
        inside, rest = rest >= least, rest.clamp(min=least)
        if name == "unlikelihood":
            return -rest.log(), torch.where(inside, logprob.exp() / rest, 0.0)
        weight, gamma = rest**o.focal_gamma, o.focal_gamma
        by_weight = torch.where(inside, gamma * weight * (logprob.exp() / rest) * logprob, 0.0)
        # Of an impossible token p log p is 0.
        return -weight * logprob, torch.where(logprob == -torch.inf, 0.0, by_weight) - weight
    if name == "dft":
        weight = logprob.exp()
    elif name == "eaft":
        weight = (stats["entropy"].clamp(min=0.0) / o.eaft_scale) ** o.eaft_alpha
    elif name == "soft_trim":
        weight = torch.sigmoid((o.trim_threshold + logprob) / o.trim_width)
    else:
        raise ValueError(f"loss_type: no formula for {name!r}")
    return -weight * torch.where(weight == 0, 0.0, logprob), -weight


def _sums(stats: dict[str, Tensor], value: Tensor, target: Tensor, o: SupervisedOptions) -> Tensor:
    """The sums ``[rows, 3]`` (fastloss.tables.SUPERVISED_SUMS): 0 where the target is ignored."""
    logprob = stats["logprobs"]
    out = torch.stack([value, -logprob, stats.get("entropy", torch.zeros_like(logprob))], 1)
    return out.masked_fill((target == o.ignore_index)[:, None], 0.0)


def _coefficients(slope: Tensor, factors: Tensor) -> Coefficients:
    a = torch.where(factors == 0, 0.0, slope * factors).contiguous()
    return Coefficients(a=a, b=-a)


def rows_of_logits(
    backend: Backend, logits: Tensor, labels: Labels, o: SupervisedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums ``[rows, 3]``, and what the backward needs: the slopes and the lse_parts."""
    stats = backend.row_stats(logits, labels.target, o, want=(LSE_PARTS, *wanted(o)))
    value, slope = value_and_slope(stats, labels.unlikely, o)
    return _sums(stats, value, labels.target, o), slope, stats[LSE_PARTS]


def gradient_of_logits(
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    slope: Tensor,
    factors: Tensor,
    lse_parts: Tensor,
    o: SupervisedOptions,
    out: Tensor,
) -> None:
    """The gradient of Σ factors · loss, to ``out [rows, V]``."""
    k = _coefficients(slope, factors)
    backend.row_grad(logits, target, o, lse_parts=lse_parts, coefficients=k, out=out)


def rows_of_head(
    head: Head, needs: Needs, labels: Labels, o: SupervisedOptions, schedule: Schedule, keep: Tensor | None
) -> tuple[Tensor, Grads]:
    """The sums ``[rows, 3]``, and the gradients of Σ factors · loss."""
    labels = Labels(*(heads.pick(x, keep) for x in labels))  # type: ignore[arg-type]
    want, outs = (LSE_PARTS, *wanted(o)), []
    with heads.begin(head, needs, keep, schedule, logprobs_only=True) as run:
        for part in run.parts():
            own = Labels(*(part.of(x) for x in labels))
            stats = part.stats(own.target, o, want)
            value, slope = value_and_slope(stats, own.unlikely, o)
            if needs:
                assert own.factors is not None
                part.gradients(own.target, o, stats[LSE_PARTS], _coefficients(slope, own.factors))
            outs.append({"sums": _sums(stats, value, own.target, o)})
        return run.collect(outs)["sums"], run.grads()
