"""The options of a policy-gradient loss, and the table of what each loss_type is made of.

A new variant is a row of ``VARIANTS`` (if it combines what is there), or a surrogate: its definition in
``reference/policy_gradient.py``, its term in the kernels, its name in ``fastloss/tables.py``, and a row here.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from fastloss.engine import checks
from fastloss.tables import (
    AGGREGATIONS,
    CORRECTIONS,
    IMPORTANCE_MODES,
    KL_KINDS,
    LEVELS,
    MAX_LOG_RATIO,
    SURROGATES,
    PolicyOptions,
)


class Variant(NamedTuple):
    """A loss_type: its surrogate, its paper's importance level and aggregation, and its paper's clip range."""

    surrogate: str
    level: str = "token"
    aggregation: str = "token-mean"
    clip: tuple[float, float] = (0.2, 0.2)  # taken where clip_low / clip_high is None
    selects: bool = (
        False  # tokens are chosen by their log-probs before the launch (losses/policy_selection.py)
    )
    largest_ratio: float | None = None  # of cispo's weight where cispo_max is None; None: 1 + clip_high


VARIANTS: dict[str, Variant] = {
    "reinforce": Variant("logprob", aggregation="seq-mean-token-sum"),
    "ppo": Variant("clip"),
    "grpo": Variant("clip", aggregation="seq-mean-token-mean"),
    "bnpo": Variant("clip"),
    "dr_grpo": Variant("clip", aggregation="seq-mean-token-sum-norm"),
    "dapo": Variant("clip", clip=(0.2, 0.28)),
    "gspo": Variant("clip", "sequence", "seq-mean-token-mean", (3e-4, 4e-4)),
    "gmpo": Variant("ratio", "geometric", "seq-mean-token-mean", (0.4, 0.4)),
    "cispo": Variant("cispo"),
    "sapo": Variant("sapo", aggregation="seq-mean-token-mean"),
    "vespo": Variant("vespo"),
    "luspo": Variant("clip", "sequence", "seq-mean-token-sum", (3e-4, 4e-4)),
    "gpg": Variant("logprob"),
    "importance_sampling": Variant("ratio", aggregation="seq-mean-token-sum"),
    "rloo": Variant("clip", "sequence_sum", "seq-mean-token-mean"),
    "clip_cov": Variant("clip", clip=(1.0, 1.0), selects=True),
    "kl_cov": Variant("ratio", selects=True),
    "dppo_tv": Variant("cispo", clip=(0.15, 0.15), selects=True, largest_ratio=20.0),
    "dppo_kl": Variant("cispo", clip=(0.05, 0.05), selects=True, largest_ratio=20.0),
}


class PolicySpec(NamedTuple):
    """The public options of a policy loss with their defaults, as a user gives them. A tuple, for it is made and looked up in
    a cache at every call."""

    loss_type: str = "dapo"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_unbiased: bool = False
    importance_level: str | None = None
    aggregation: str | None = None
    max_length: float | None = None
    entropy_coef: float = 0.0
    entropy_aggregation: str | None = None
    top_entropy_quantile: float = 1.0
    off_policy_threshold: float | None = None
    importance_mode: str | None = "token_truncate"
    importance_cap: float | None = None
    importance_floor: float | None = None
    cispo_min: float | None = None
    cispo_max: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    kl_cov_coef: float = 1.0
    kl_cov_ratio: float = 2e-4
    clip_cov_ratio: float = 2e-4
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    generator: torch.Generator | None = None


def resolve(spec: PolicySpec, *, with_sampler: bool, default_length: int | None) -> PolicyOptions:
    """Checks every option by name and makes the record for the kernels."""
    s = spec
    checks.is_one_of("loss_type", s.loss_type, tuple(VARIANTS))
    variant = VARIANTS[s.loss_type]
    level = variant.level if s.importance_level is None else s.importance_level
    how = variant.aggregation if s.aggregation is None else s.aggregation
    checks.is_one_of("importance_level", level, LEVELS)
    checks.is_one_of("aggregation", how, AGGREGATIONS)
    checks.is_one_of("kl_estimator", s.kl_estimator, KL_KINDS)
    if s.importance_mode is not None:
        checks.is_one_of("importance_mode", s.importance_mode, IMPORTANCE_MODES)
    if s.entropy_aggregation is not None:
        checks.is_one_of("entropy_aggregation", s.entropy_aggregation, AGGREGATIONS)
    checks.number("top_entropy_quantile", s.top_entropy_quantile, low=0.0, high=1.0)
    for name in ("kl_cov_ratio", "clip_cov_ratio"):
        checks.number(name, getattr(s, name), low=0.0, high=1.0)
    low = variant.clip[0] if s.clip_low is None else checks.number("clip_low", s.clip_low, low=0.0)
    high = variant.clip[1] if s.clip_high is None else checks.number("clip_high", s.clip_high, low=0.0)
    floor = _optional("importance_floor", s.importance_floor, 0.0, low=0.0)
    cap = _optional("importance_cap", s.importance_cap, math.exp(MAX_LOG_RATIO), low=0.0, open_low=True)
    _ordered("importance_floor", floor, "importance_cap", cap)
    cispo_low = _optional("cispo_min", s.cispo_min, 0.0, low=0.0)
    largest = 1.0 + high if variant.largest_ratio is None else variant.largest_ratio
    cispo_high = _optional("cispo_max", s.cispo_max, largest, low=0.0, open_low=True)
    _ordered("cispo_min", cispo_low, "cispo_max", cispo_high)
    _ordered(
        "clip_cov_low",
        checks.number("clip_cov_low", s.clip_cov_low),
        "clip_cov_high",
        checks.number("clip_cov_high", s.clip_cov_high),
    )
    kl_cov_coef = checks.number("kl_cov_coef", s.kl_cov_coef, low=0.0)
    return PolicyOptions(
        surrogate=SURROGATES.index(variant.surrogate),
        level=LEVELS.index(level),
        clip_low=low,
        clip_high=high,
        delta=_optional("delta", s.delta, math.inf, low=0.0, open_low=True),
        dual_clip=_optional("dual_clip", s.dual_clip, math.inf, low=1.0, open_low=True),
        cispo_low=cispo_low,
        cispo_high=cispo_high,
        sapo_pos=checks.number("sapo_temperature_pos", s.sapo_temperature_pos, low=0.0, open_low=True),
        sapo_neg=checks.number("sapo_temperature_neg", s.sapo_temperature_neg, low=0.0, open_low=True),
        vespo_k_pos=checks.number("vespo_k_pos", s.vespo_k_pos, low=0.0),
        vespo_lambda_pos=_at_least(1e-4, checks.number("vespo_lambda_pos", s.vespo_lambda_pos, low=0.0)),
        vespo_k_neg=checks.number("vespo_k_neg", s.vespo_k_neg, low=0.0),
        vespo_lambda_neg=_at_least(1e-4, checks.number("vespo_lambda_neg", s.vespo_lambda_neg, low=0.0)),
        kl_cov_coef=kl_cov_coef if s.loss_type == "kl_cov" else 0.0,
        beta=checks.number("beta", s.beta),
        kl_kind=KL_KINDS.index(s.kl_estimator),
        kl_unbiased=bool(s.kl_unbiased),
        entropy_coef=checks.number("entropy_coef", s.entropy_coef),
        correction=CORRECTIONS.index(s.importance_mode) if with_sampler and s.importance_mode else 0,
        cap=cap,
        floor=floor,
        off_policy_threshold=_optional("off_policy_threshold", s.off_policy_threshold, math.inf),
        aggregation=AGGREGATIONS.index(how),
        max_length=_max_length(how, s.max_length, default_length),
    )


@functools.lru_cache(maxsize=64, typed=True)  # a training step asks for the same again; True is no 1.0
def _cached_resolve(with_sampler: bool, default_length: int | None, *fields: Any) -> PolicyOptions:
    return resolve(PolicySpec(*fields), with_sampler=with_sampler, default_length=default_length)


def options_of(
    spec: PolicySpec, *, with_sampler: bool, with_ref: bool, default_length: int | None
) -> PolicyOptions:
    """The record for the kernels. Cached, but not where torch.compile traces. An option that needs a tensor, or another
    option, is an error without it."""
    if torch.compiler.is_compiling():
        options = resolve(spec, with_sampler=with_sampler, default_length=default_length)
    else:
        options = _cached_resolve(with_sampler, default_length, *spec)
    if options.beta and not with_ref:
        raise ValueError(f"ref_logprobs: expected a tensor for beta={options.beta}, got None")
    for name, value in (("importance_cap", spec.importance_cap), ("importance_floor", spec.importance_floor)):
        if value is not None and not options.correction:
            raise ValueError(f"sampler_logprobs: expected a tensor for {name}={value}, got None")
    if options.dual_clip != math.inf and VARIANTS[spec.loss_type].surrogate != "clip":
        raise ValueError(f"dual_clip: expected None for loss_type={spec.loss_type!r}, got {spec.dual_clip}")
    if options.delta != math.inf and VARIANTS[spec.loss_type].surrogate != "clip":
        raise ValueError(f"delta: expected None for loss_type={spec.loss_type!r}, got {spec.delta}")
    return options


def _ordered(low_name: str, low: float, high_name: str, high: float) -> None:
    if low > high:
        raise ValueError(f"{low_name}: expected at most {high_name} = {high}, got {low}")


def _optional(name: str, value: float | None, otherwise: float, **bounds: Any) -> float:
    return otherwise if value is None else checks.number(name, value, **bounds)


def _at_least(low: float, value: float) -> float:
    """(The ``max`` of a number that changes under torch.compile would be another expression to compile.)"""
    return low if value < low else value


def _max_length(aggregation: str, max_length: float | None, default: int | None) -> float:
    if max_length is not None:
        return checks.number("max_length", max_length, low=0.0, open_low=True)
    if aggregation == "seq-mean-token-sum-norm" and default is None:
        raise ValueError(
            "max_length: expected a number for aggregation='seq-mean-token-sum-norm' of packed sequences, got None"
        )
    return float(max(default or 1, 1))
