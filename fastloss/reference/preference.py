"""Definitions of the preference losses: one function per term, from sequence log-probs (docs/sequences.md)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.reference.codes import name_of
from fastloss.reference.numbers import scalar
from fastloss.tables import (
    DIVERGENCES,
    PAIR_TERMS,
    UNPAIRED_TERMS,
    Number,
    PairConstants,
    PairOptions,
    UnpairedConstants,
    UnpairedOptions,
)

MAX_EXPONENT = 80.0  # e^80 is finite in float32
MAX_MARGIN = 1e16  # its square, summed over a batch, is finite in float32


def segment_sum(
    values: Tensor, weights: Tensor | None, offsets: Tensor | None, length: int, count: int
) -> Tensor:
    """Σ w·v over each of ``count`` sequences, ``[count]``: rows of ``length``, or ``[offsets[s], offsets[s + 1])``."""
    if weights is not None:  # where the weight is 0 not even a NaN counts
        values = torch.where(weights == 0, torch.zeros_like(values), values) * weights
    if offsets is None:
        return values.reshape(count, length).sum(1)
    # By search and not repeat_interleave, whose size torch.compile cannot know; sequence `count` is what lies past the end.
    position = torch.arange(values.numel(), dtype=torch.int64, device=values.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), position, right=True)  # [N]
    return torch.zeros(count + 1, dtype=values.dtype, device=values.device).index_add(0, sequence, values)[
        :-1
    ]


class Pair(NamedTuple):
    """What a term sees: numbers, or one per pair ``[B]``."""

    c: Tensor  # Σ log p of the chosen response
    r: Tensor  # Σ log p of the rejected response
    xc: Tensor  # log-ratios to the reference
    xr: Tensor
    sc: Tensor  # scores: the log-ratios through the f-divergence
    sr: Tensor
    lc: Number  # tokens, at least 1
    lr: Number
    nll: Tensor  # Σ log p that the sft term takes
    tokens: Number  # Σ tokens of the chosen responses / B
    beta: Number
    smoothing: Number
    margin: Number
    delta: Number
    tau: float


def difference(p: Pair) -> Tensor:
    """What most terms are a function of. (No property: torch 2.8 traces none of a named tuple.)"""
    return p.beta * (p.sc - p.sr) - p.margin


def smoothed(u: Tensor, smoothing: Number) -> Tensor:
    """Cross-entropy of ``sigmoid(u)`` and a label that is wrong with probability ``smoothing``."""
    return -(1 - smoothing) * F.logsigmoid(u) - smoothing * F.logsigmoid(-u)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x), x < 0."""
    x = x.clamp(max=-1e-15 if x.dtype == torch.float64 else -1e-7)
    near = x > -math.log(2)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, -0.5)))),
        torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, -1.0), x))),
    )


def sigmoid(p: Pair) -> Tensor:
    return smoothed(difference(p), p.smoothing)


def hinge(p: Pair) -> Tensor:
    return torch.relu(1 - difference(p))


def ipo(p: Pair) -> Tensor:
    return (p.sc / p.lc - p.sr / p.lr - 1 / (2 * p.beta)).clamp(-MAX_MARGIN, MAX_MARGIN) ** 2


def exo_pair(p: Pair) -> Tensor:
    smoothing = scalar(difference(p), p.smoothing)
    won = torch.sigmoid(difference(p)) * (F.logsigmoid(difference(p)) - torch.log1p(-smoothing))
    return won + torch.sigmoid(-difference(p)) * (F.logsigmoid(-difference(p)) - torch.log(smoothing))


def nca_pair(p: Pair) -> Tensor:
    won, lost = p.beta * p.xc, p.beta * p.xr
    return -F.logsigmoid(won) - 0.5 * F.logsigmoid(-won) - 0.5 * F.logsigmoid(-lost)


def robust(p: Pair) -> Tensor:
    clean, flipped = -F.logsigmoid(difference(p)), -F.logsigmoid(-difference(p))
    return ((1 - p.smoothing) * clean - p.smoothing * flipped) / (1 - 2 * p.smoothing)


def bco_pair(p: Pair) -> Tensor:
    return -F.logsigmoid(p.beta * p.xc - p.delta) - F.logsigmoid(-(p.beta * p.xr - p.delta))


def sppo_hard(p: Pair) -> Tensor:
    return (p.xc - 1 / (2 * p.beta)) ** 2 + (p.xr + 1 / (2 * p.beta)) ** 2


def apo_zero(p: Pair) -> Tensor:
    return torch.sigmoid(-p.beta * p.xc) + torch.sigmoid(p.beta * p.xr)  # 1 - σ(x) = σ(-x)


def apo_down(p: Pair) -> Tensor:
    return torch.sigmoid(p.beta * p.xc) + torch.sigmoid(-p.beta * (p.xc - p.xr))


def discopop(p: Pair) -> Tensor:
    mix = torch.sigmoid(difference(p) / p.tau)
    exponential = (-difference(p)).clamp(max=MAX_EXPONENT).exp()
    return -F.logsigmoid(difference(p)) * (1 - mix) + exponential * mix


def sft(p: Pair) -> Tensor:
    if isinstance(p.tokens, Tensor):
        return torch.where(p.tokens > 0, -p.nll / p.tokens.clamp(min=1e-30), torch.zeros_like(p.nll))
    return -p.nll / p.tokens


def sigmoid_norm(p: Pair) -> Tensor:
    return smoothed(p.beta * (p.sc / p.lc - p.sr / p.lr) - p.margin, p.smoothing)


def simpo(p: Pair) -> Tensor:
    return smoothed(p.beta * (p.c / p.lc - p.r / p.lr) - p.margin, p.smoothing)


def orpo(p: Pair) -> Tensor:
    return -p.beta * F.logsigmoid(log_odds(p.c / p.lc, p.r / p.lr))


def log_odds(c: Tensor, r: Tensor) -> Tensor:
    """log odds(chosen) - log odds(rejected) from log-probs per token."""
    return (c - r) - (log1mexp(c) - log1mexp(r))


def center(p: Pair) -> Tensor:
    return (p.c + p.r) ** 2


def simper(p: Pair) -> Tensor:
    return (p.r / p.lr).exp() - (p.c / p.lc).exp()


PAIR_TERM = {
    term.__name__: term
    for term in (
        sigmoid,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        apo_zero,
        apo_down,
        discopop,
        sft,
        sigmoid_norm,
        simpo,
        orpo,
        center,
        simper,
    )
}


def f_divergence(x: Tensor, divergence: int, alpha: float) -> Tensor:
    """f'(e^x) up to a constant: the score that replaces the log-ratio (arXiv:2309.16240)."""
    name = name_of("divergence", divergence, DIVERGENCES)
    if name == "reverse_kl":
        return x
    if name == "forward_kl":
        return 1 - (-x).clamp(max=MAX_EXPONENT).exp()
    if name == "js_divergence":
        return math.log(2) + F.logsigmoid(x)
    if alpha == 1:  # the limit
        return x
    return (((alpha - 1) * x).clamp(max=MAX_EXPONENT).exp() - 1) / (alpha - 1)


def alpha_reward(logprobs: Tensor, alpha: float) -> Tensor:
    """AlphaPO's ``(1 - p^-α) / α`` (arXiv:2501.03884), which is log p as α goes to 0."""
    return (1 - (-alpha * logprobs).clamp(max=MAX_EXPONENT).exp()) / alpha


def pair_loss(
    c: Tensor, r: Tensor, nll: Tensor | None, constants: PairConstants, options: PairOptions
) -> dict[str, Tensor]:
    """``weight · Σ_k term_weight_k · term_k`` per pair ``[B]``, the rewards, and the seven sums of docs/sequences.md."""
    rc, rr = constants.ref_chosen, constants.ref_rejected
    lc, lr = constants.chosen_lengths, constants.rejected_lengths
    xc, xr = c if rc is None else c - rc, r if rr is None else r - rr
    pair = Pair(
        c,
        r,
        xc,
        xr,
        f_divergence(xc, options.divergence, options.alpha),
        f_divergence(xr, options.divergence, options.alpha),
        1.0 if lc is None else lc.clamp(min=1),
        1.0 if lr is None else lr.clamp(min=1),
        c if nll is None else nll,
        1.0 if lc is None else lc.mean(),
        options.beta,
        options.smoothing,
        options.margin,
        options.delta,
        options.tau,
    )
    loss = torch.zeros_like(c)
    for code, term_weight in options.terms:
        loss = loss + term_weight * PAIR_TERM[name_of("terms", code, PAIR_TERMS)](pair)
    if constants.weight is not None:
        loss = loss * constants.weight
    with torch.no_grad():
        won, lost = options.beta * xc, options.beta * xr
        if options.average_rewards:
            won, lost = won / pair.lc, lost / pair.lr
        each = (loss, won, lost, (won > lost).to(c.dtype), won - lost, c, r)
        sums = torch.stack([x.sum() for x in each])
    return {"loss": loss, "chosen_reward": won, "rejected_reward": lost, "sums": sums}


def unpaired_loss(logps: Tensor, constants: UnpairedConstants, options: UnpairedOptions) -> dict[str, Tensor]:
    """KTO, APO-zero and BCO of sequences that are good or bad on their own, ``[B]`` (docs/sequences.md, "Single responses")."""
    beta, kl = options.beta, constants.kl
    term = name_of("term", options.term, UNPAIRED_TERMS)
    x = logps if constants.ref is None else logps - constants.ref
    good = constants.desirable.bool()
    sign = torch.where(good, 1.0, -1.0).to(x.dtype)
    kl_value = torch.zeros((), dtype=x.dtype, device=x.device) if kl is None else kl.reshape(())
    if term == "kto":
        loss = torch.sigmoid(-sign * beta * (x - kl_value))
    elif term == "apo_zero_unpaired":
        loss = torch.sigmoid(-sign * beta * x)
    else:
        loss = -F.logsigmoid(sign * (beta * x - kl_value))
    weights = scalar(x, options.desirable_weight), scalar(x, options.undesirable_weight)
    loss = loss * torch.where(good, *weights)
    if constants.weight is not None:
        loss = loss * constants.weight
    with torch.no_grad():
        reward, g = beta * x, good.to(x.dtype)
        # Not a product: a response that is infinite, or no number, is in the sums of its own kind alone.
        split = (torch.where(at, v, 0) for v in (reward, logps) for at in (good, ~good))
        each = (loss, g, *split, torch.zeros_like(g))
        sums = torch.stack([v.sum() for v in each])
    return {"loss": loss, "reward": reward, "sums": sums}
