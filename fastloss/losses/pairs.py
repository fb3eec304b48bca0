"""A contrast of pairs: its options, checked once, and the launches of pair_loss that they become."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine import preference as ops
from fastloss.engine.pair_call import Number, PairCall
from fastloss.reference import preference as definition

CODES = {term.__name__: code for code, term in enumerate(definition.PAIR_TERMS)}
LOSS_TYPES = (*(name for name in CODES if name != "center"), "aot", "aot_unpaired")
NEED_LENGTHS = {"ipo", "sft", "sigmoid_norm", "simpo", "orpo"}
WITHOUT_REFERENCE = {"sft", "simpo", "orpo"}
WITH_MARGIN = {"sigmoid", "hinge", "exo_pair", "robust", "discopop", "sigmoid_norm", "aot", "aot_unpaired"}
# The reference's normaliser cancels in these, or plays no part: the ones TRL accepts an f-divergence for.
WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
SORTED = ("aot", "aot_unpaired")
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class Options(NamedTuple):
    """The options of a call that are the same for every pair, and what follows from them."""

    weights: dict[str, float]  # of each loss type
    divergence: int
    alpha: float
    tau: float
    delta: float
    simpo_gamma: float
    simpo_alpha: float
    length_normalized: bool
    average_rewards: bool
    per_token: bool  # c and r are divided by their lengths before the contrast
    needs_lengths: bool
    needs_reference: bool
    plain: bool  # one launch, nothing before it and no more metrics after it

    def has(self, *names: str) -> bool:
        return any(name in self.weights for name in names)


@functools.lru_cache(maxsize=256)
def options(
    loss_type: str | tuple[str, ...],
    loss_weights: tuple[float, ...] | None,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    discopop_tau: float,
    bco_delta: float,
    simpo_gamma: float,
    simpo_alpha: float,
    length_normalized: bool,
    average_rewards: bool | None,
) -> Options:
    """Checked; every error names its option."""
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    if not names or len(names) > 8:
        raise ValueError(f"loss_type: expected 1 to 8 names, got {len(names)}")
    for name in names:
        checks.is_one_of("loss_type", name, LOSS_TYPES)
    if loss_weights is None:
        loss_weights = (1.0,) * len(names)
    if len(loss_weights) != len(names):
        raise ValueError(
            f"loss_weights: expected {len(names)} numbers, one per loss_type, got {len(loss_weights)}"
        )
    weights: dict[str, float] = {}
    for name, weight in zip(names, loss_weights, strict=True):
        weights[name] = weights.get(name, 0.0) + checks.number("loss_weights", weight)
    checks.is_one_of("f_divergence_type", f_divergence_type, definition.DIVERGENCES)
    divergence = definition.DIVERGENCES.index(f_divergence_type)
    alpha = checks.number("f_alpha_divergence_coef", f_alpha_divergence_coef)
    if divergence == 3 and abs(alpha - 1.0) < 1e-6:  # the limit is the logarithm
        divergence = 0
    if f_divergence_type != "reverse_kl" and not WITH_DIVERGENCE.issuperset(weights):
        wrong = ", ".join(repr(name) for name in weights if name not in WITH_DIVERGENCE)
        raise ValueError(
            f"f_divergence_type: expected 'reverse_kl' for loss_type {wrong}, got {f_divergence_type!r}"
        )
    shape = checks.number("simpo_alpha", simpo_alpha)
    if shape and (
        len(set(weights) - {"sft"}) != 1 or not set(weights) <= {"sft", "simpo", "ipo", "sigmoid", "hinge"}
    ):
        raise ValueError(
            "simpo_alpha: expected 0 unless loss_type is one of 'simpo', 'sigmoid', 'hinge', 'ipo' (and 'sft'), "
            f"got {simpo_alpha} with {', '.join(map(repr, weights))}"
        )
    if average_rewards is None:
        average_rewards = WITHOUT_REFERENCE.issuperset(weights) and ("simpo" in weights or "orpo" in weights)
    per_token = bool(length_normalized or (shape and ("simpo" in weights or "ipo" in weights)))
    return Options(
        weights,
        divergence,
        alpha,
        checks.number("discopop_tau", discopop_tau, low=0.0, open_low=True),
        checks.number("bco_delta", bco_delta),
        checks.number("simpo_gamma", simpo_gamma),
        shape,
        bool(length_normalized),
        average_rewards,
        per_token,
        per_token or average_rewards or not NEED_LENGTHS.isdisjoint(weights),
        not WITHOUT_REFERENCE.issuperset(weights),
        not (per_token or average_rewards or shape)
        and not {"sft", "simpo", "orpo", *SORTED}.intersection(weights),
    )


class Pairs(NamedTuple):
    """What a contrast takes as given: None, a number for all pairs, or a tensor ``[B]``."""

    rc: Tensor | None  # reference log-probs
    rr: Tensor | None
    lc: Tensor | None  # tokens
    lr: Tensor | None
    beta: Number
    smoothing: Number
    margin: Number
    weight: Tensor | None
    total: int  # pairs of the whole batch
    share: Tensor | None = None  # chosen tokens per pair of the whole batch, where this is a part of it

    def part(self, start: int, stop: int) -> Pairs:
        """These pairs alone; the sft term keeps the batch's count of tokens."""
        cut = (x[start:stop] if isinstance(x, Tensor) else x for x in self[:8])
        share = self.lc.mean() if self.share is None and self.lc is not None else self.share
        return Pairs(*cut, self.total, share)  # type: ignore[call-arg, arg-type]


def contrast(
    rows: Any,
    c: Tensor,
    r: Tensor,
    nll: Tensor | None,
    pairs: Pairs,
    o: Options,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, chosen rewards, rejected rewards, sums) from Σ log p ``[B]`` each; the loss is of each pair for "none"."""
    rc, rr, lc, lr = pairs.rc, pairs.rr, pairs.lc, pairs.lr
    if not o.needs_lengths:
        lc = lr = None
    if o.has("sft") and lc is not None and (pairs.share is not None or o.per_token):
        tokens = lc.mean() if pairs.share is None else pairs.share
        factor = torch.where(tokens > 0, (1.0 if o.per_token else lc.mean()) / tokens, 0.0)
        nll = (c if nll is None else nll) * factor
    if o.per_token:
        assert lc is not None and lr is not None
        tokens_c, tokens_r = lc.clamp(min=1), lr.clamp(min=1)
        c, r = c / tokens_c, r / tokens_r
        rc, rr = rc if rc is None else rc / tokens_c, rr if rr is None else rr / tokens_r
        lc = lr = None
    if o.simpo_alpha:
        if nll is None and o.has("sft"):
            nll = c
        c, r = alpha_reward(c, o.simpo_alpha), alpha_reward(r, o.simpo_alpha)

    scale = 1.0 / pairs.total if reduction == "mean" and pairs.total else 1.0
    here = {name: scale * weight for name, weight in o.weights.items() if name not in SORTED}
    terms = [(CODES[name], weight) for name, weight in here.items()]
    base = PairCall(
        terms,
        rc,
        rr,
        lc,
        lr,
        o.divergence,
        o.alpha,
        pairs.beta,
        pairs.smoothing,
        pairs.margin,
        pairs.weight,
        o.delta,
        o.tau,
        o.average_rewards and lc is not None,
    )
    per_pair = reduction == "none"
    if o.plain:
        return ops.pair_loss(rows, c, r, None, base, per_pair)
    launches: list[tuple[Tensor, Tensor, Tensor | None, PairCall]] = []
    if "simpo" in here:
        simpo_margin = pairs.margin + o.simpo_gamma
        if WITH_MARGIN.isdisjoint(here):
            base = checks.replaced(base, margin=simpo_margin)
        elif o.simpo_gamma != 0.0:  # a margin of its own: a launch of its own
            own = [(CODES["simpo"], here["simpo"])]
            terms = [term for term in terms if term not in own]
            launches.append((c, r, None, checks.replaced(base, terms=own, margin=simpo_margin)))
    first = checks.replaced(base, terms=terms or [(CODES["sigmoid"], 0.0)])
    launches.insert(0, (c, r, nll if "sft" in here else None, first))
    alone = checks.replaced(base, rc=None, rr=None, lc=None, lr=None, average_rewards=False)
    for name in SORTED:
        if name in o.weights:
            own = [(CODES["sigmoid"], scale * o.weights[name])]
            launches.append((*sorted_ratios(name, c, r, rc, rr), None, checks.replaced(alone, terms=own)))
    (loss, won, lost, sums), *more = (ops.pair_loss(rows, *launch, per_pair) for launch in launches)
    for extra in more:
        loss = loss + extra[0]
    return loss, won, lost, sums


def sorted_ratios(
    name: str, c: Tensor, r: Tensor, rc: Tensor | None, rr: Tensor | None
) -> tuple[Tensor, Tensor]:
    """aot, aot_unpaired (arXiv:2406.05882): the two distributions of log-ratios whose quantiles are compared."""
    zero = torch.zeros_like(c)
    rc, rr = zero if rc is None else rc, zero if rr is None else rr
    if name == "aot":
        return (c - r).sort().values, (rc - rr).sort().values
    return (c - rc).sort().values, (r - rr).sort().values


def alpha_reward(x: Tensor, alpha: float) -> Tensor:
    """AlphaPO's (1 - p^-α)/α of log p (arXiv:2501.03884); the exponent is clamped at 80."""
    return (1 - (-alpha * x).clamp(max=definition.MAX_EXPONENT).exp()) / alpha


def metrics(
    sums: Tensor, c: Tensor, r: Tensor, nll: Tensor | None, pairs: Pairs, o: Options
) -> dict[str, Tensor]:
    """TRL's names; detached 0-d tensors, means over the pairs (0 where there are none)."""
    _, *means = (sums / max(pairs.total, 1)).unbind()
    out = dict(zip(METRICS, means, strict=True))
    if o.plain:
        return out
    count = max(pairs.total, 1)
    with torch.no_grad():
        per_c, per_r = c, r
        if o.average_rewards or o.per_token:
            assert pairs.lc is not None and pairs.lr is not None
            per_c, per_r = c / pairs.lc.clamp(min=1), r / pairs.lr.clamp(min=1)
        out["logps/chosen"], out["logps/rejected"] = per_c.sum() / count, per_r.sum() / count
        if o.has("sft"):
            assert pairs.lc is not None
            out["nll_loss"] = -(c if nll is None else nll).sum() / pairs.lc.sum().clamp(min=1)
        if o.has("orpo"):
            log_odds = definition.log_odds(per_c, per_r)
            out["log_odds_chosen"] = log_odds.sum() / count
            out["log_odds_ratio"] = torch.nn.functional.logsigmoid(log_odds).sum() / count
    return out
