"""What a backend must implement, once: every loss reaches its kernels through these methods and no other way.

Implemented by :class:`fastloss.engine.definition.ReferenceBackend` (plain PyTorch), :class:`fastloss.engine.native.NativeBackend`
(the CPU's C++, CUDA, and CUDA emulated in the tests) and :class:`fastloss.engine.triton.TritonBackend`.

Conventions. ``acc`` is float32, float64 for float64 input. Per-row and per-token tensors are contiguous; logits have unit
stride along the vocabulary, rows may be any distance apart. Codes are positions in fastloss/tables.py; one that does not
exist raises ValueError, on every backend. What the kernels compute: docs/engine.md and docs/sequences.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastloss.engine.coefficients import Coefficients
from fastloss.engine.sequences import Sequences
from fastloss.tables import (
    CrossEntropyOptions,
    DistillationOptions,
    PairConstants,
    PairOptions,
    PolicyOptions,
    RowOptions,
    UnpairedConstants,
    UnpairedOptions,
)


class Factor(NamedTuple):
    """What the sum of the rows' losses is multiplied by: ``value``, times ``tensor`` (acc, 0-d) where that is on a device."""

    value: float = 1.0
    tensor: Tensor | None = None
    of_count: bool = False  # one over how many rows count: infinite where none does, and every gradient 0

    def of_gradient(self) -> float | Tensor:
        """What gradients that were kept unscaled are multiplied by: 0 where no row counts, for 0 · inf is NaN."""
        if self.tensor is None:
            return 0.0 if self.of_count and math.isinf(self.value) else self.value
        factor = self.tensor if self.value == 1.0 else self.tensor * self.value
        return torch.where(factor.isinf(), 0.0, factor) if self.of_count else factor

    def times(self, total: Tensor) -> Tensor:
        """``total`` times the factor: on a GPU no launch for a factor of 1."""
        total = total if self.value == 1.0 else total * self.value
        return total if self.tensor is None else total * self.tensor


WHOLE = Factor()

# Rows up to which a GPU's kernels reduce with one block: beyond, PyTorch's several are quicker.
ONE_BLOCK = 1 << 17


def count_plainly(target: Tensor, ignore_index: int, acc: torch.dtype) -> Tensor:
    """``reciprocal_count`` by PyTorch's operations, in ``acc``."""
    return (target != ignore_index).sum(dtype=acc).reciprocal()


class ExponentialRows(NamedTuple):
    """What row_exponentials makes beside the exponentials, acc ``[rows]``; 0 for ignored and for marked rows."""

    loss: Tensor
    lse_parts: Tensor  # [rows, 2]: the target's logit, and log Σ e^(z - it)
    multiplier: Tensor  # the gradient of a row's logits is this times its exponentials
    residue: Tensor  # what its rounding took off the exponentials' entry of the target
    rough: Tensor  # uint8: the row's exponentials do not fit, and are 0


class PairResult(NamedTuple):
    """What pair_loss makes, acc ``[B]``. A differentiable backend makes no gradients: they are None."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    sums: Tensor  # acc [7], fastloss.tables.PAIR_SUMS
    d_chosen: Tensor | None = None
    d_rejected: Tensor | None = None
    d_nll: Tensor | None = None


class UnpairedResult(NamedTuple):
    """What unpaired_loss makes, acc ``[B]``."""

    loss: Tensor
    reward: Tensor
    sums: Tensor  # acc [7], fastloss.tables.UNPAIRED_SUMS
    d_logps: Tensor | None = None


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy loss reads without a gradient: acc ``[N]`` unless said otherwise, None where not given."""

    layout: Sequences
    advantages: Tensor  # [N] or [count]
    mask: Tensor  # uint8 [N]
    old: Tensor | None = None
    ref: Tensor | None = None
    sampler: Tensor | None = None
    token_weight: Tensor | None = None
    select: Tensor | None = None  # uint8 [N], kl_cov's tokens
    share: Tensor | None = None  # each token's share of the aggregate, in place of the options' aggregation
    normalizer: float | Tensor | None = None  # acc [1]


class PolicyResult(NamedTuple):
    """``out`` acc [16] (fastloss.tables.POLICY_OUT); gradients of the unscaled loss, to be multiplied by out's "scale"."""

    loss: Tensor  # 0-d
    out: Tensor
    d_logprobs: Tensor | None = None
    d_entropy: Tensor | None = None


@dataclass(frozen=True)
class ValueInputs:
    """What the loss of a value head reads without a gradient: acc ``[N]``, N > 0."""

    returns: Tensor
    mask: Tensor  # uint8 [N]
    old: Tensor | None = None  # with a clip alone
    clip_range: float = math.inf
    share: Tensor | None = None  # each token's share of the aggregate; None: 1
    scale: Tensor | None = None  # 0-d, what the sum of the shares is multiplied by; None: 1 / tokens


class ValueResult(NamedTuple):
    """``out`` acc [5] (fastloss.tables.VALUE_OUT); the gradient of the unscaled loss, to be multiplied by out's "scale"."""

    loss: Tensor  # 0-d
    out: Tensor
    d_values: Tensor | None = None


class Backend(Protocol):
    """What every backend computes."""

    name: str
    # True where the methods are plain PyTorch, which autograd differentiates (and differentiates twice).
    differentiable: bool
    # True where the host may read a tensor's value without waiting for a device.
    host_reads: bool

    def why_not(self) -> str:
        """Why it cannot run in this process; empty if it can."""
        ...

    def why_not_for(self, tensor: Tensor) -> str:
        """Why it cannot take this tensor (device, dtype); empty if it can."""
        ...

    def row_stats(
        self,
        logits: Tensor,
        target: Tensor | None,
        options: RowOptions,
        *,
        want: Sequence[str],
        bias: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The statistics named in ``want`` (of fastloss.tables.STATS) of each row of ``logits [rows, V]``, acc ``[rows]``;
        is_top1 is uint8, and lse_parts ``[rows, 2]``. ``target`` int64 ``[rows]`` may be None where neither logprobs nor is_top1 is wanted; then no row
        is ignored. ``bias`` acc ``[V]``."""
        ...

    def row_grad(
        self,
        logits: Tensor,
        target: Tensor | None,
        options: RowOptions,
        *,
        lse_parts: Tensor,
        coefficients: Coefficients,
        out: Tensor,
        bias: Tensor | None = None,
        w: Tensor | None = None,
    ) -> None:
        """Writes ``dz_v = a·[v = target] + b·p_v + c·p_v·log p_v + d·w_v``, through softcap and scale, to ``out [rows, V]``,
        which may be ``logits`` itself. ``lse_parts`` are those of :meth:`row_stats`. ``w`` acc ``[V]`` or ``[rows, V]``."""
        ...

    def row_cross_entropy(
        self,
        logits: Tensor,
        target: Tensor | None,
        options: CrossEntropyOptions,
        *,
        factor: Factor = WHOLE,
        grad: Tensor | None = None,
        want: Sequence[str] = (),
        bias: Tensor | None = None,
        w: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """ "loss" and "lse_parts" of each row, the statistics in ``want``, and into ``grad`` (may be ``logits``), where given,
        the gradient times ``factor``, in one pass. ``w``: class weights ``[V]``; with ``target=None`` the weighted class
        probabilities ``[rows, V]``."""
        ...

    def row_exponentials(
        self,
        logits: Tensor,
        target: Tensor,
        options: CrossEntropyOptions,
        *,
        factor: Factor = WHOLE,
        bias: Tensor | None = None,
        w: Tensor | None = None,
    ) -> ExponentialRows:
        """Overwrites bfloat16 ``logits [rows, V]`` with ``e^(z_v - z_target)`` times the soft-cap's slope, and at the target with
        what makes ``multiplier`` times all of them the gradient of the cross-entropy times ``factor``. No label smoothing. ``w``:
        class weights ``[V]``."""
        ...

    def row_divergence(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        options: DistillationOptions,
        *,
        lse_parts: Tensor,
        teacher_lse_parts: Tensor,
        hard_lse_parts: Tensor | None = None,
        factors: Tensor | None = None,
        grad: Tensor | None = None,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """acc ``[rows, 8]`` (fastloss.tables.DISTILLATION_SUMS) of each row of ``logits [rows, V]`` against the same row of
        ``teacher_logits [rows, V]``, of one dtype; and into ``grad`` (may be ``logits``), where given, the gradient of the loss
        times ``factors [rows]``. The lse_parts are :meth:`row_stats`'s: of the student's logits times ``options.scale`` (and
        ``row_scale``), of the teacher's times ``teacher_scale`` (and ``teacher_row_scale``), and ``hard_lse_parts`` (None: no hard loss) of the student's with scale 1."""
        ...

    def row_divergence_grad(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        options: DistillationOptions,
        *,
        lse_parts: Tensor,
        teacher_lse_parts: Tensor,
        slopes: Tensor,
        factors: Tensor,
        out: Tensor,
        hard_lse_parts: Tensor | None = None,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> None:
        """The gradient of :meth:`row_divergence` alone, to ``out [rows, V]``, which may be ``logits``; ``slopes [rows]`` are the
        column "slope" of its sums."""
        ...

    def gathered_dots(self, x: Tensor, m: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
        """acc ``[entries]``: ``x[s] · m[index[j]]`` of each entry j of segment s, which has the entries ``[offsets[s],
        offsets[s + 1])``; -inf where the index is negative. ``x [segments, D]`` and ``m [.., D]`` of one dtype, int64 ``index
        [entries]`` and ``offsets [segments + 1]``."""
        ...

    def gathered_sums(self, m: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, out: Tensor) -> None:
        """Writes Σ ``weights[j] · m[index[j]]`` over the entries j of each segment to ``out [segments, D]``, of ``m``'s dtype, rounded
        once. A weight (acc ``[entries]``) of 0 reads no row."""
        ...

    def sum_rows(self, values: Tensor, factor: Factor) -> Tensor:
        """factor · Σ values, 0-d; the same bits run after run, on a CPU with any number of threads."""
        ...

    def reciprocal_count(self, target: Tensor, ignore_index: int) -> Tensor:
        """1 / (how many of ``target`` int64 ``[rows]`` are not ``ignore_index``), 0-d on its device: float32, float64 from the
        definition; infinite where all are."""
        ...

    def scale_in_place(self, x: Tensor, scale: Tensor) -> None:
        """``x *= scale``, one acc number on the device, in float32; nothing is read or written where it is 1."""
        ...

    def segment_sum(self, values: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
        """Σ w·v over each sequence, acc ``[count]``. A position of weight 0 adds nothing, NaN or not."""
        ...

    def segment_expand(self, upstream: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
        """The gradient of :meth:`segment_sum`, acc ``[N]``."""
        ...

    def pair_loss(
        self,
        chosen: Tensor,
        rejected: Tensor,
        nll: Tensor | None,
        constants: PairConstants,
        options: PairOptions,
    ) -> PairResult:
        """The contrast of pairs of Σ log p (or of rewards), ``[B]``; ``nll`` is what the sft term takes (None: chosen)."""
        ...

    def unpaired_loss(
        self, logps: Tensor, constants: UnpairedConstants, options: UnpairedOptions
    ) -> UnpairedResult:
        """The loss of single responses from Σ log p ``[B]``."""
        ...

    def policy_loss(
        self, logprobs: Tensor, entropy: Tensor | None, inputs: PolicyInputs, options: PolicyOptions
    ) -> PolicyResult:
        """The policy-gradient loss of flat log-probs ``[N]``."""
        ...

    def value_loss(self, values: Tensor, inputs: ValueInputs) -> ValueResult:
        """The loss of a value head, flat ``[N]``."""
        ...

    def kl_estimate(self, logprobs: Tensor, ref: Tensor, kind: int, upstream: Tensor | None) -> Tensor:
        """An estimate of a KL per token, acc ``[N]``; with ``upstream``: it times the estimate's derivative for ``logprobs``."""
        ...

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, layout: Sequences, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """(advantages, returns) ``[N]``."""
        ...

    def discounted_returns(self, rewards: Tensor, mask: Tensor, layout: Sequences, gamma: float) -> Tensor:
        """Returns ``[N]``."""
        ...
