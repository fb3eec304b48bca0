"""Log-probabilities of K classes per row, and a student's divergence from a teacher that named K: over the whole vocabulary."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.reference.distillation import divergence
from fastloss.reference.logits import effective_logits
from fastloss.tables import ACC_DTYPES, DISTILLATION_DIVERGENCES, TAILS, Number, TopKOptions


def selected_logprobs(
    logits: Tensor, ids: Tensor, *, scale: Number = 1.0, softcap: float | None = None
) -> Tensor:
    """Of ``logits [N, V]`` at ``ids [N, K]``: 0 at -1, NaN in a row that has an id of no class. ``scale``: a number, or ``[N]``."""
    bad = ((ids < -1) | (ids >= logits.shape[1])).any(1, keepdim=True)
    # A row without ids may hold anything: it is replaced before anything is computed from it.
    logits = torch.where((ids != -1).any(1, keepdim=True), logits, 0.0)
    log_p = effective_logits(logits, scale=scale, softcap=softcap).log_softmax(-1)
    out = log_p.gather(1, torch.where((ids < 0) | bad, 0, ids)).masked_fill(ids == -1, 0.0)
    return out.masked_fill(bad, math.nan)


class TopKRows(NamedTuple):
    """Per row, 0 where it does not count and NaN where an id or a target is no class: the loss, and detached statistics."""

    loss: Tensor
    kl: Tensor
    reverse_kl: Tensor
    agreement: Tensor
    mass: Tensor
    teacher_mass: Tensor
    hard_loss: Tensor


def topk_distillation_rows(
    logits: Tensor, ids: Tensor, teacher_logprobs: Tensor, target: Tensor | None, o: TopKOptions
) -> TopKRows:
    """``logits [N, V]``; ``ids``, ``teacher_logprobs [N, K]``; ``target [N]``: the hard loss's class, or ``ignore_index``."""
    acc, vocab = ACC_DTYPES[logits.dtype], logits.shape[1]
    named = ids != -1
    bad = (named & ((ids < 0) | (ids >= vocab))).any(1)
    valid = named.any(1) if target is None else target != o.ignore_index
    if target is not None:
        bad = valid & (bad | (target < 0) | (target >= vocab))
    z = effective_logits(
        torch.where(valid[:, None], logits.to(acc), 0.0),
        scale=o.row_options().factor,
        softcap=o.softcap or None,
    )
    log_q = z.log_softmax(-1)
    place = torch.where(named & ~bad[:, None], ids, 0)
    given = torch.where(named & valid[:, None], teacher_logprobs.detach().to(acc), -math.inf).exp()
    # Probabilities of a class that is named twice add up.
    p = torch.zeros_like(z).scatter_add(1, place, given)
    is_named = torch.zeros_like(z).scatter_add(1, place, named.to(acc)) > 0
    log_p = p.log()
    tail = TAILS[o.tail]
    if o.divergence not in range(len(DISTILLATION_DIVERGENCES)):
        raise ValueError(
            f"divergence: expected a code of {', '.join(DISTILLATION_DIVERGENCES)}, got {o.divergence}"
        )
    inside = torch.where(is_named, log_q, -math.inf)
    some = is_named.any(1, keepdim=True)
    if tail == "bin":
        rest_q, rest_p = _log_sum(log_q, ~is_named), (1 - p.sum(1, keepdim=True)).clamp(min=0)
        rest_p = torch.where((rest_q == -math.inf) & (rest_p <= 1e-4), 0.0, rest_p)
        rest_p = torch.where(some, rest_p, rest_q.detach().exp())
        student, teacher = torch.cat([inside, rest_q], 1), torch.cat([log_p, rest_p.log()], 1)
    elif tail == "renormalize":
        student = inside - torch.where(some, _log_sum(log_q, is_named), 0.0)
        teacher = log_p - torch.where(some, log_p.logsumexp(1, keepdim=True), 0.0)
    else:
        student, teacher = inside, log_p

    def terms(name: str) -> Tensor:
        f = divergence(name, teacher, student, o.interpolation)
        if tail == "none":  # what cancels in a sum over all classes
            difference = (student.exp() - teacher.exp()) * {
                "forward_kl": 1.0, "reverse_kl": -1.0, "skewed_forward_kl": 1 - o.interpolation,
                "skewed_reverse_kl": o.interpolation - 1,
            }.get(name, 0.0)  # fmt: skip
            f = f - difference
        return f.sum(1)

    loss = terms(DISTILLATION_DIVERGENCES[o.divergence]) * o.factor
    if o.row_factor is not None:
        loss = loss * o.row_factor
    hard = torch.zeros_like(loss)
    if o.hard_loss_coef and target is not None:
        hard = -log_q.gather(1, torch.where(valid & ~bad, target, 0)[:, None]).squeeze(1)
        loss = loss + o.hard_loss_coef * hard
    with torch.no_grad():
        best = torch.where(is_named, log_p, -math.inf).argmax(1, keepdim=True)
        agreement = some.squeeze(1) & (z.gather(1, best).squeeze(1) >= z.amax(1))
        rows = (
            terms("forward_kl"), terms("reverse_kl"), agreement.to(acc), inside.exp().sum(1), p.sum(1), hard.detach(),
        )  # fmt: skip
    made = (torch.where(valid, torch.where(bad, math.nan, row), 0.0) for row in (loss, *rows))
    return TopKRows(*made)


def _log_sum(log_q: Tensor, where: Tensor) -> Tensor:
    """log Σ q over some classes, ``[N, 1]``; -inf, without a gradient, where there are none."""
    some = where.any(1, keepdim=True)
    total = torch.where(where | ~some, log_q, -math.inf).logsumexp(1, keepdim=True)
    return torch.where(some, total, -math.inf)
