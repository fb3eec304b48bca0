"""Every code, flag and output place that Python, C++ and Triton share, and the option records that a backend is given.

It imports nothing of fastloss, so that losses/, engine/, reference/ and kernels/ can all read it. Python hands a code to a
kernel as the position of its name here; each native module carries the same names in the same order and is compared with
them when it is loaded (engine/native.py), the Triton kernels build their constants from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

Number = float | Tensor  # one for all pairs, or one per pair [B]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
# The dtype of statistics and coefficients (acc).
ACC_DTYPES = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in DTYPES}
# Gradients of these are kept unscaled until the upstream gradient (GradScaler) is known: p/n underflows in them.
LATE_DTYPES = (torch.float16,)

# --- rows of logits (docs/engine.md) -------------------------------------------------------------------------------

STATS = ("logsumexp", "logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Beside them, [rows, 2]: a row's largest logit and log Σ e^(z - largest). Their sum is logsumexp; apart they keep the digits of
# p = e^((z - largest) - log Σ) that a float32 logsumexp loses where all logits share a large offset. What a backward needs.
LSE_PARTS = "lse_parts"
# The class of the largest logit, the first of several, int64. It is no row kernel's: PyTorch reads the logits once more, but in the
# CPU's blocks of the vocabulary, which find it on the way.
ARGMAX = "argmax"
STATS_WITHOUT_TARGET = ("logsumexp", "entropy", "log_sum_sq_probs", "mean_logits")
DIFFERENTIABLE_STATS = ("logprobs", "entropy", "logsumexp")


Row = TypeVar("Row", bound="RowOptions")


@dataclass(frozen=True)
class RowOptions:
    """From raw logits to the logits that a loss sees: ``scale · softcap · tanh((x + bias) / softcap)``."""

    ignore_index: int = -100
    scale: float = 1.0  # logit_scale / temperature
    softcap: float = 0.0  # 0: none
    # acc [rows]: a further factor of each row's logits, one over its temperature
    row_scale: Tensor | None = None

    @property
    def factor(self) -> Number:
        """``scale``, or that of each row ``[rows]``."""
        return self.scale if self.row_scale is None else self.row_scale * self.scale

    def of_rows(self: Row, part: Callable[[Tensor], Tensor]) -> Row:
        """With what belongs to some of the rows: ``part`` of each tensor that has one number per row."""
        return self if self.row_scale is None else replace(self, row_scale=part(self.row_scale))


@dataclass(frozen=True)
class CrossEntropyOptions(RowOptions):
    """Cross-entropy of a row, without its reduction."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


# --- pairs and single responses (docs/sequences.md) ----------------------------------------------------------------

PAIR_TERMS = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "simpo",
    "orpo",
    "center",
    "simper",
)
MAX_TERMS = 8
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Sums over the pairs, in the order in which a kernel writes them.
PAIR_SUMS = (
    "loss",
    "chosen_reward",
    "rejected_reward",
    "accuracy",
    "margin",
    "chosen_logps",
    "rejected_logps",
)
UNPAIRED_TERMS = ("kto", "apo_zero_unpaired", "bco")
UNPAIRED_SUMS = (
    "loss",
    "desirable",
    "desirable_reward",
    "undesirable_reward",
    "desirable_logps",
    "undesirable_logps",
    "unused",
)


@dataclass(frozen=True)
class PairOptions:
    """A weighted sum of terms per pair; ``Number`` fields may be a tensor ``[B]`` in the accumulation dtype."""

    terms: tuple[tuple[int, float], ...]  # (code of PAIR_TERMS, weight), at most MAX_TERMS
    divergence: int = 0  # code of DIVERGENCES
    alpha: float = 0.5
    beta: Number = 0.1
    smoothing: Number = 0.0
    margin: Number = 0.0
    delta: float = 0.0
    tau: float = 0.05
    average_rewards: bool = False


@dataclass(frozen=True)
class PairConstants:
    """What a pair's terms read without a gradient, each ``[B]`` in the accumulation dtype, or None."""

    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class UnpairedOptions:
    """A term per response that is good or bad on its own."""

    term: int = 0  # code of UNPAIRED_TERMS
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class UnpairedConstants:
    """What a response's term reads without a gradient."""

    desirable: Tensor  # uint8 [B]
    ref: Tensor | None = None  # [B]
    weight: Tensor | None = None  # [B]
    kl: Tensor | None = None  # [1]


# --- policy-gradient losses (docs/sequences.md) --------------------------------------------------------------------

SURROGATES = ("clip", "logprob", "cispo", "sapo", "vespo", "ratio")
LEVELS = ("token", "sequence", "sequence_sum", "geometric")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_KINDS = ("k1", "k2", "k3", "abs", "low_var_kl")
IMPORTANCE_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CORRECTIONS = ("none", *IMPORTANCE_MODES)
# The places of ``out [16]``: sums over the unmasked tokens, beside the loss, its scale and the extremes of the ratio.
POLICY_OUT = (
    "loss",
    "scale",
    "tokens",
    "low_clipped",
    "high_clipped",
    "dual_clipped",
    "k1",
    "k3",
    "kl",
    "entropy",
    "min_ratio",
    "max_ratio",
    "ratio",
    "ratio_squared",
    "cut",
    "policy",
)
# The places of value_loss's ``out``: the loss times its scale, that scale, and the metrics.
VALUE_OUT = ("loss", "scale", "clip_ratio", "explained_variance", "mean")
# The public metrics in the order in which they are made from those; the last three where their inputs are given.
POLICY_METRICS = (
    "policy_loss",
    "clip_ratio/low",
    "clip_ratio/high",
    "clip_ratio/region",
    "clip_ratio/dual",
    "approx_kl",
    "approx_kl_k3",
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "ess",
    "kl",
    "entropy",
    "importance/cut_fraction",
)
VALUE_PLACE = {name: place for place, name in enumerate(VALUE_OUT)}
POLICY_PLACE = {name: place for place, name in enumerate(POLICY_OUT)}
# Log-ratios are clamped here: e^20 is finite in float32, and so are its square and the sum of 2^64 of them.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyOptions:
    """What a kernel needs to know beside its tensors; infinity is "none"."""

    surrogate: int = 0  # code of SURROGATES
    level: int = 0  # of LEVELS
    aggregation: int = 0  # of AGGREGATIONS
    kl_kind: int = 2  # of KL_KINDS
    correction: int = 0  # of CORRECTIONS
    kl_unbiased: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float = math.inf
    dual_clip: float = math.inf
    cispo_low: float = 0.0
    cispo_high: float = 1.2
    sapo_pos: float = 1.0
    sapo_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    kl_cov_coef: float = 0.0
    beta: float = 0.0
    entropy_coef: float = 0.0
    cap: float = math.exp(MAX_LOG_RATIO)
    floor: float = 0.0
    off_policy_threshold: float = math.inf
    max_length: float = 1.0


def is_token_level(options: PolicyOptions) -> bool:
    """Whether a token's term can be made without having seen the rest of its sequence."""
    return (
        LEVELS[options.level] == "token"
        and SURROGATES[options.surrogate] != "vespo"
        and options.off_policy_threshold == math.inf
        and not CORRECTIONS[options.correction].startswith("sequence")
    )


# --- distillation (docs/distillation.md) ---------------------------------------------------------------------------

DISTILLATION_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "alpha",
)
# What is added up over a row's classes, in the order in which a kernel writes it. "slope" is Σ d divergence / d log q, which the
# gradient needs; "loss" holds the hard loss too.
DISTILLATION_SUMS = (
    "loss",
    "kl",
    "reverse_kl",
    "agreement",
    "entropy",
    "teacher_entropy",
    "hard_loss",
    "slope",
)


@dataclass(frozen=True)
class DistillationOptions:
    """One divergence of a student from a teacher, times ``factor``, and a multiple of the cross-entropy beside it."""

    divergence: int = 0  # code of DISTILLATION_DIVERGENCES
    interpolation: float = 0.5  # jsd, alpha: inside (0, 1), the ends are KLs; skewed: (0, 1]
    scale: float = 1.0  # 1 / temperature
    teacher_scale: float = 1.0
    factor: float = 1.0
    hard_loss_coef: float = 0.0
    ignore_index: int = -100
    # acc [rows]: what multiplies scale, teacher_scale and factor in each row, where a token has its own temperature
    row_scale: Tensor | None = None
    teacher_row_scale: Tensor | None = None
    row_factor: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the student's probabilities are those of its logits, which the hard loss has."""
        return self.row_scale is None and self.scale == 1.0

    def of_rows(self, part: Callable[[Tensor], Tensor]) -> DistillationOptions:
        """With what belongs to some of the rows: ``part`` of each tensor."""
        each = self.row_scale, self.teacher_row_scale, self.row_factor
        if all(x is None for x in each):
            return self
        mine, theirs, factor = (None if x is None else part(x) for x in each)
        return replace(self, row_scale=mine, teacher_row_scale=theirs, row_factor=factor)


# What is done with the classes that a teacher of K classes did not name: they are one more outcome; both distributions are those of the
# named classes alone; nothing.
TAILS = ("bin", "renormalize", "none")
TOPK_SUMS = ("loss", "kl", "reverse_kl", "agreement", "mass", "teacher_mass", "hard_loss")


@dataclass(frozen=True)
class TopKOptions:
    """One divergence of a student from a teacher that named some classes, times ``factor``, and a multiple of the cross-entropy."""

    divergence: int = 0  # code of DISTILLATION_DIVERGENCES
    interpolation: float = 0.5
    tail: int = 0  # code of TAILS
    scale: float = 1.0  # logit_scale / temperature
    softcap: float = 0.0
    factor: float = 1.0
    hard_loss_coef: float = 0.0
    ignore_index: int = -100
    # acc [rows]: what multiplies scale and factor in each row, where a token has its own temperature
    row_scale: Tensor | None = None
    row_factor: Tensor | None = None

    def row_options(self) -> RowOptions:
        return RowOptions(scale=self.scale, softcap=self.softcap, row_scale=self.row_scale)


# --- supervised losses (docs/supervised.md) ------------------------------------------------------------------------

SUPERVISED_LOSSES = ("nll", "dft", "eaft", "focal", "power", "deft", "soft_trim", "unlikelihood")
# Columns of what a pass makes of each row; "entropy" is 0 where the loss does not need it.
SUPERVISED_SUMS = ("loss", "nll", "entropy")


@dataclass(frozen=True)
class SupervisedOptions(RowOptions):
    """One function of a token's log-probability."""

    kind: int = 0  # code of SUPERVISED_LOSSES
    eaft_alpha: float = 1.0
    eaft_scale: float = 3.0
    focal_gamma: float = 2.0
    power: float = 0.7
    trim_threshold: float = 8.0
    trim_width: float = 1.0


# What a native module's ``tables()`` must return: name -> the names of its codes, in order.
NATIVE_TABLES: dict[str, tuple[str, ...]] = {
    "dtypes": ("float32", "bfloat16", "float16", "float64"),
    "stats": STATS,
    "pair_terms": PAIR_TERMS,
    "divergences": DIVERGENCES,
    "pair_sums": PAIR_SUMS,
    "unpaired_terms": UNPAIRED_TERMS,
    "unpaired_sums": UNPAIRED_SUMS,
    "surrogates": SURROGATES,
    "levels": LEVELS,
    "aggregations": AGGREGATIONS,
    "kl_kinds": KL_KINDS,
    "corrections": CORRECTIONS,
    "policy_out": POLICY_OUT,
    "policy_metrics": POLICY_METRICS,
    "value_out": VALUE_OUT,
    "distillation_divergences": DISTILLATION_DIVERGENCES,
    "distillation_sums": DISTILLATION_SUMS,
}
