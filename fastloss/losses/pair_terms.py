"""Losses of pairs from Σ log p of each response: their options and constants, the launches of pair_loss, their metrics."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.autograd import differentiable_again
from fastloss.engine.backend import tracing_reason
from fastloss.engine.contract import Backend
from fastloss.engine.definition import REFERENCE
from fastloss.tables import DIVERGENCES, PAIR_TERMS, Number, PairConstants, PairOptions

CODES = {name: code for code, name in enumerate(PAIR_TERMS)}
LOSS_TYPES = (*(name for name in CODES if name != "center"), "aot", "aot_unpaired")
NEED_LENGTHS = {"ipo", "sft", "sigmoid_norm", "simpo", "orpo", "simper"}
WITHOUT_REFERENCE = {"sft", "simpo", "orpo", "simper"}
PER_TOKEN = {"simpo", "orpo", "simper"}  # their rewards are log-probs per token
WITH_MARGIN = {"sigmoid", "hinge", "exo_pair", "robust", "discopop", "sigmoid_norm", "aot", "aot_unpaired"}
# The reference's normaliser cancels in these, or plays no part: the ones TRL accepts an f-divergence for.
WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
SORTED = ("aot", "aot_unpaired")
MAX_EXPONENT = 80.0  # e^80 is finite in float32
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class PreferenceOptions:
    """The options of a call that are the same for every pair, and what follows from them."""

    loss_weights: tuple[tuple[str, float], ...]  # of each loss type
    divergence: int
    alpha: float
    tau: float
    delta: float
    simpo_gamma: float
    simpo_alpha: float
    length_normalized: bool
    average_rewards: bool
    per_token: bool  # the log-probs are divided by their lengths before the contrast
    needs_lengths: bool
    needs_reference: bool
    one_launch: bool  # of pair_loss, with nothing to prepare before it and no metric to add after it

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.loss_weights)

    def has(self, *names: str) -> bool:
        return any(name in names for name, _ in self.loss_weights)


class PreferenceSpec(NamedTuple):
    """The options of a call as a user gives them. A tuple, for it is made and looked up in a cache at every call."""

    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    bco_delta: float = 0.0
    simpo_gamma: float = 0.5
    simpo_alpha: float = 0.0
    length_normalized: bool = False
    average_rewards: bool | None = None


def parse_options(spec: PreferenceSpec) -> PreferenceOptions:
    """The checked options; the error of one that does not fit names it. Cached, but not where torch.compile traces."""
    return _parse(spec) if torch.compiler.is_compiling() else _cached_parse(*spec)


def _parse(spec: PreferenceSpec) -> PreferenceOptions:
    loss_type, loss_weights = spec.loss_type, spec.loss_weights
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
    checks.is_one_of("f_divergence_type", spec.f_divergence_type, DIVERGENCES)
    divergence = DIVERGENCES.index(spec.f_divergence_type)
    alpha = checks.number("f_alpha_divergence_coef", spec.f_alpha_divergence_coef)
    if divergence == 3 and abs(alpha - 1.0) < 1e-6:  # the limit is the logarithm
        divergence = 0
    if spec.f_divergence_type != "reverse_kl" and not WITH_DIVERGENCE.issuperset(weights):
        wrong = ", ".join(repr(name) for name in weights if name not in WITH_DIVERGENCE)
        raise ValueError(
            f"f_divergence_type: expected 'reverse_kl' for loss_type {wrong}, got {spec.f_divergence_type!r}"
        )
    shape, shaped = checks.number("simpo_alpha", spec.simpo_alpha), False
    if shape:
        shaped = True
    if shaped and (
        len(set(weights) - {"sft"}) != 1 or not set(weights) <= {"sft", "simpo", "ipo", "sigmoid", "hinge"}
    ):
        raise ValueError(
            "simpo_alpha: expected 0 unless loss_type is one of 'simpo', 'sigmoid', 'hinge', 'ipo' (and 'sft'), "
            f"got {spec.simpo_alpha} with {', '.join(map(repr, weights))}"
        )
    average_rewards = spec.average_rewards
    if average_rewards is None:
        average_rewards = WITHOUT_REFERENCE.issuperset(weights) and not PER_TOKEN.isdisjoint(weights)
    per_token = bool(spec.length_normalized or (shaped and ("simpo" in weights or "ipo" in weights)))
    return PreferenceOptions(
        loss_weights=tuple(weights.items()),
        divergence=divergence,
        alpha=alpha,
        tau=checks.number("discopop_tau", spec.discopop_tau, low=0.0, open_low=True),
        delta=checks.number("bco_delta", spec.bco_delta),
        simpo_gamma=checks.number("simpo_gamma", spec.simpo_gamma),
        simpo_alpha=shape,
        length_normalized=bool(spec.length_normalized),
        average_rewards=average_rewards,
        per_token=per_token,
        needs_lengths=per_token or average_rewards or not NEED_LENGTHS.isdisjoint(weights),
        needs_reference=not WITHOUT_REFERENCE.issuperset(weights),
        one_launch=not (per_token or average_rewards or shaped)
        and not {"sft", *PER_TOKEN, *SORTED}.intersection(weights),
    )


@functools.lru_cache(maxsize=256, typed=True)  # True is no 1.0
def _cached_parse(*fields: Any) -> PreferenceOptions:
    return _parse(PreferenceSpec(*fields))


@dataclass(frozen=True)
class PairBatch:
    """What a contrast reads without a gradient: None, a number for all pairs, or a tensor ``[B]``."""

    constants: PairConstants
    beta: Number
    smoothing: Number
    margin: Number
    total: int  # pairs of the whole batch
    mean_tokens: Tensor | None = None  # chosen tokens per pair of the whole batch, where this is a part of it

    def part(self, first: int, last: int) -> PairBatch:
        """The pairs [first, last) alone; the sft term keeps the batch's count of tokens."""

        def cut(x: Any) -> Any:
            return x[first:last] if isinstance(x, Tensor) else x

        k, lengths = self.constants, self.constants.chosen_lengths
        mean = lengths.mean() if self.mean_tokens is None and lengths is not None else self.mean_tokens
        constants = PairConstants(
            cut(k.ref_chosen),
            cut(k.ref_rejected),
            cut(k.chosen_lengths),
            cut(k.rejected_lengths),
            cut(k.weight),
        )
        return PairBatch(constants, cut(self.beta), cut(self.smoothing), cut(self.margin), self.total, mean)


def _pair_loss_again(ctx: Any) -> Any:
    chosen, rejected, nll, *_ = ctx.saved_tensors
    constants, options, per_pair = ctx.given
    loss = REFERENCE.pair_loss(chosen, rejected, nll, constants, options).loss
    return [loss if per_pair else loss.sum()], [chosen, rejected, nll]


class _PairLoss(torch.autograd.Function):
    """(chosen, rejected, nll) -> loss of each pair, or their sum; the gradient is made in the forward, in one launch."""

    @staticmethod
    def forward(
        ctx: Any,
        chosen: Tensor,
        rejected: Tensor,
        nll: Tensor | None,
        backend: Backend,
        constants: PairConstants,
        options: PairOptions,
        per_pair: bool,
        rest: list[Tensor],
    ) -> Tensor:
        own = None if nll is None else nll.contiguous()
        out = backend.pair_loss(chosen.contiguous(), rejected.contiguous(), own, constants, options)
        rest.extend((out.chosen_reward, out.rejected_reward, out.sums))  # without a gradient
        ctx.given = constants, options, per_pair
        d_nll = None if nll is None else out.d_nll
        ctx.save_for_backward(chosen, rejected, nll, out.d_chosen, out.d_rejected, d_nll)
        return out.loss if per_pair else out.sums[0].clone()

    @staticmethod
    @differentiable_again(_pair_loss_again)
    def backward(ctx: Any, upstream: Tensor) -> Any:
        wanted = zip(ctx.saved_tensors[3:], ctx.needs_input_grad, strict=False)
        return (*[d * upstream if need else None for d, need in wanted], *[None] * 5)


def launch_pairs(
    backend: Backend,
    chosen: Tensor,
    rejected: Tensor,
    nll: Tensor | None,
    constants: PairConstants,
    options: PairOptions,
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch: (loss of each pair, or their sum; chosen rewards; rejected rewards; sums)."""
    if backend.differentiable:
        out = backend.pair_loss(chosen, rejected, nll, constants, options)
        loss = out.loss if per_pair else out.loss.sum()
        return loss, out.chosen_reward, out.rejected_reward, out.sums
    rest: list[Tensor] = []
    loss = _PairLoss.apply(chosen, rejected, nll, backend, constants, options, per_pair, rest)
    return loss, rest[0], rest[1], rest[2]


def contrast(
    backend: Backend,
    chosen: Tensor,
    rejected: Tensor,
    nll: Tensor | None,
    pairs: PairBatch,
    o: PreferenceOptions,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, chosen rewards, rejected rewards, sums) from Σ log p ``[B]`` each; the loss is of each pair for "none"."""
    c, r, k = chosen, rejected, pairs.constants
    rc, rr, lc, lr = k.ref_chosen, k.ref_rejected, k.chosen_lengths, k.rejected_lengths
    if not o.needs_lengths:
        lc = lr = None
    if o.has("sft") and lc is not None and (pairs.mean_tokens is not None or o.per_token):
        tokens = lc.mean() if pairs.mean_tokens is None else pairs.mean_tokens
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
    here = {name: scale * weight for name, weight in o.loss_weights if name not in SORTED}
    terms = tuple((CODES[name], weight) for name, weight in here.items())
    given = PairConstants(rc, rr, lc, lr, k.weight)
    options = PairOptions(
        terms=terms,
        divergence=o.divergence,
        alpha=o.alpha,
        beta=pairs.beta,
        smoothing=pairs.smoothing,
        margin=pairs.margin,
        delta=o.delta,
        tau=o.tau,
        average_rewards=o.average_rewards and lc is not None,
    )
    per_pair = reduction == "none"
    if o.one_launch:
        return launch_pairs(backend, c, r, None, given, options, per_pair)
    launches: list[tuple[Tensor, Tensor, Tensor | None, PairConstants, PairOptions]] = []
    if "simpo" in here:
        simpo_margin = pairs.margin + o.simpo_gamma
        if WITH_MARGIN.isdisjoint(here):
            options = replace(options, margin=simpo_margin)
        elif o.simpo_gamma != 0.0:  # its margin is not the other terms': a second launch
            own = ((CODES["simpo"], here["simpo"]),)
            terms = tuple(term for term in terms if term not in own)
            launches.append((c, r, None, given, replace(options, terms=own, margin=simpo_margin)))
    first = replace(options, terms=terms or ((CODES["sigmoid"], 0.0),))
    launches.insert(0, (c, r, nll if "sft" in here else None, given, first))
    for name, weight in o.loss_weights:
        if name in SORTED:
            own = ((CODES["sigmoid"], scale * weight),)
            alone = replace(options, terms=own, average_rewards=False)
            sorted_ = sorted_ratios(name, c, r, rc, rr)
            launches.append((*sorted_, None, PairConstants(weight=k.weight), alone))
    (loss, won, lost, sums), *more = (launch_pairs(backend, *launch, per_pair) for launch in launches)
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
    return (1 - (-alpha * x).clamp(max=MAX_EXPONENT).exp()) / alpha


def log_odds(c: Tensor, r: Tensor) -> Tensor:
    """ORPO's log odds(chosen) - log odds(rejected) from log-probs per token (arXiv:2403.07691), for its metrics."""
    return (c - r) - (log1mexp(c) - log1mexp(r))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x), x < 0."""
    x = x.clamp(max=-1e-15 if x.dtype == torch.float64 else -1e-7)
    near = x > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, -0.5))))
    large = torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, -1.0), x)))
    return torch.where(near, small, large)


def metrics(
    sums: Tensor, c: Tensor, r: Tensor, nll: Tensor | None, pairs: PairBatch, o: PreferenceOptions
) -> dict[str, Tensor]:
    """The metrics under TRL's names: detached 0-d tensors, means over the pairs (0 where there are none)."""
    count = max(pairs.total, 1)
    _, *means = (sums / count).unbind()
    out = dict(zip(METRICS, means, strict=True))
    if o.one_launch:
        return out
    lc, lr = pairs.constants.chosen_lengths, pairs.constants.rejected_lengths
    with torch.no_grad():
        per_c, per_r = c, r
        if o.average_rewards or o.per_token:
            assert lc is not None and lr is not None
            per_c, per_r = c / lc.clamp(min=1), r / lr.clamp(min=1)
        out["logps/chosen"], out["logps/rejected"] = per_c.sum() / count, per_r.sum() / count
        if o.has("sft"):
            assert lc is not None
            out["nll_loss"] = -(c if nll is None else nll).sum() / lc.sum().clamp(min=1)
        if o.has("orpo"):
            odds = log_odds(per_c, per_r)
            out["log_odds_chosen"] = odds.sum() / count
            out["log_odds_ratio"] = torch.nn.functional.logsigmoid(odds).sum() / count
    return out


# --- the arguments of a call, checked -----------------------------------------------------------------------------


def reference_logps(
    o: PreferenceOptions, reference_free: bool, ref_chosen: Tensor | None, ref_rejected: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if o.simpo_alpha and not reference_free and (ref_chosen is not None or ref_rejected is not None):
        raise ValueError(
            "simpo_alpha: expected 0 where there are reference log-probs (or reference_free=True)"
        )
    if reference_free:
        return None, None
    for name, value in (("ref_chosen_logps", ref_chosen), ("ref_rejected_logps", ref_rejected)):
        if value is None and (o.needs_reference or ref_chosen is not ref_rejected):
            which = ", ".join(repr(n) for n in o.names if n not in WITHOUT_REFERENCE)
            raise ValueError(
                f"{name}: expected the reference's log-probs for loss_type {which or 'with one of them given'} "
                "(or reference_free=True), got None"
            )
    return ref_chosen, ref_rejected


def pair_batch(
    o: PreferenceOptions,
    count: int,
    acc: torch.dtype,
    device: torch.device,
    lengths: tuple[Tensor | None, Tensor | None],
    beta: Number,
    label_smoothing: Number,
    margin: Number | None,
    weights: Tensor | None,
) -> PairBatch:
    """The checked constants of a batch, without the reference's log-probs."""
    lc = lr = None
    if o.needs_lengths:
        for name, value in zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True):
            if value is None and (
                name == "chosen_lengths" or set(o.names) & (NEED_LENGTHS - {"sft"}) or o.per_token
            ):
                wanting = (
                    "length_normalized"
                    if o.length_normalized
                    else f"loss_type {', '.join(map(repr, o.names))}"
                )
                raise ValueError(f"{name}: expected the number of tokens [B] for {wanting}, got None")
        lc = constant("chosen_lengths", lengths[0], count, acc, device)
        lr = constant("rejected_lengths", lengths[1], count, acc, device)
    beta = per_pair("beta", beta, count, acc, device, 0.0, math.inf, True)
    smoothing = per_pair("label_smoothing", label_smoothing, count, acc, device, 0.0, 1.0)
    margin = per_pair("margin", 0.0 if margin is None else margin, count, acc, device)
    weight = constant("weights", weights, count, acc, device)
    if o.has("robust") and _largest(smoothing) >= 0.5:
        raise ValueError(
            "label_smoothing: expected a number in [0, 0.5) for loss_type 'robust', got 0.5 or more"
        )
    if o.has("exo_pair") and (_largest(smoothing) >= 1.0 or _smallest(smoothing) <= 0.0):
        raise ValueError("label_smoothing: expected a number in (0, 1) for loss_type 'exo_pair', got 0 or 1")
    if o.has(*SORTED):
        each = {"beta": beta, "label_smoothing": smoothing, "margin": margin, "weights": weight}
        for name, one in each.items():
            if isinstance(one, Tensor):
                raise ValueError(
                    f"{name}: expected no value per pair with loss_type 'aot' or 'aot_unpaired', which sort the pairs apart"
                )
    constants = PairConstants(chosen_lengths=lc, rejected_lengths=lr, weight=weight)
    return PairBatch(constants, beta, smoothing, margin, count)


def constant(
    name: str, value: Tensor | None, count: int, acc: torch.dtype, device: torch.device
) -> Tensor | None:
    """``[count]`` in the accumulation dtype, detached."""
    if value is None:
        return None
    checks.is_tensor(name, value)
    checks.has_shape(name, value, (count,))
    checks.same_device(name, value, device)
    return value.detach().to(acc).contiguous()


_checked = functools.lru_cache(maxsize=512, typed=True)(checks.number)


def per_pair(
    name: str,
    value: Number,
    count: int,
    acc: torch.dtype,
    device: torch.device,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> Number:
    """A checked number, or ``[count]`` (on the CPU its values are checked too)."""
    if not isinstance(value, Tensor):
        check = checks.number if torch.compiler.is_compiling() else _checked
        return check(name, value, low=low, high=high, open_low=open_low)
    out = constant(name, value.expand(count) if value.dim() == 0 else value, count, acc, device)
    assert out is not None
    readable = count and device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and tracing_reason(out) == "":
        for extreme in (float(out.min()), float(out.max())):
            checks.number(name, extreme, low=low, high=high, open_low=open_low)
    return out


def _known(value: Number, pick: Any) -> float | None:
    if not isinstance(value, Tensor):
        return value
    readable = value.numel() and value.device.type == "cpu" and not torch.compiler.is_compiling()
    return float(pick(value)) if readable else None


def _largest(value: Number) -> float:
    known = _known(value, torch.max)
    return 0.25 if known is None else known


def _smallest(value: Number) -> float:
    known = _known(value, torch.min)
    return 0.25 if known is None else known


def nll_logps(
    logps: Tensor,
    lengths: Tensor | None,
    pairs: PairBatch,
    o: PreferenceOptions,
    count: int,
    acc: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What the sft term takes, scaled to its own count of tokens where that is not the response's."""
    if not o.has("sft"):
        raise ValueError("chosen_nll_logps: expected a loss_type with 'sft', got none")
    checks.is_floating("chosen_nll_logps", logps)
    checks.has_shape("chosen_nll_logps", logps, (count,))
    nll = logps.to(acc)
    if lengths is None:
        return nll
    tokens = constant("chosen_nll_lengths", lengths, count, acc, device)
    assert tokens is not None and pairs.constants.chosen_lengths is not None
    return nll * (pairs.constants.chosen_lengths.sum() / tokens.sum().clamp(min=1))
