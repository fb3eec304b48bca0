"""The ``triton`` backend: the contract by the kernels of ``fastloss.kernels``, which is imported when it is first needed."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastloss.engine import gather
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import (
    ONE_BLOCK,
    WHOLE,
    ExponentialRows,
    Factor,
    PairResult,
    PolicyInputs,
    PolicyResult,
    UnpairedResult,
    ValueInputs,
    ValueResult,
    count_plainly,
)
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Read once, as Triton does: its interpreter runs the kernels, slowly, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("fastloss.kernels")


class TritonBackend:
    """The kernels of ``fastloss.kernels``, on every GPU that Triton compiles for; on the CPU in Triton's interpreter.

    Accumulates in float32; what it computes: :class:`fastloss.engine.contract.Backend`.
    """

    name = "triton"
    differentiable = False
    host_reads = False

    def why_not(self) -> str:
        try:
            _kernels()
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        if INTERPRETED or torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
            return ""
        return "no GPU is there (TRITON_INTERPRET=1 runs the kernels, slowly, on the CPU)"

    def why_not_for(self, tensor: Tensor) -> str:
        if tensor.device.type == "cpu" and not INTERPRETED:
            return "it takes GPU tensors, got cpu (TRITON_INTERPRET=1 runs the kernels, slowly, on the CPU)"
        if tensor.dtype not in DTYPES:
            return f"it has no kernel for {tensor.dtype}"
        return ""

    def row_stats(
        self,
        logits: Tensor,
        target: Tensor | None,
        options: RowOptions,
        *,
        want: Sequence[str],
        bias: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return _kernels().row_stats(logits, target, options, want=want, bias=bias)

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
        _kernels().row_grad(
            logits,
            target,
            options,
            lse_parts=lse_parts,
            coefficients=coefficients,
            out=out,
            bias=bias,
            w=w,
        )

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
        return _kernels().row_cross_entropy(
            logits, target, options, factor=factor, grad=grad, want=want, bias=bias, w=w
        )

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
        made: ExponentialRows = _kernels().row_exponentials(
            logits, target, options, factor=factor, bias=bias, w=w
        )
        return made

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
        return _kernels().row_divergence(
            logits, teacher_logits, target, options, lse_parts=lse_parts, teacher_lse_parts=teacher_lse_parts,
            hard_lse_parts=hard_lse_parts, factors=factors, grad=grad, bias=bias, teacher_bias=teacher_bias,
        )  # fmt: skip

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
        _kernels().row_divergence_grad(
            logits, teacher_logits, target, options, lse_parts=lse_parts, teacher_lse_parts=teacher_lse_parts,
            slopes=slopes, factors=factors, out=out, hard_lse_parts=hard_lse_parts, bias=bias, teacher_bias=teacher_bias,
        )  # fmt: skip

    def gathered_dots(self, x: Tensor, m: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
        return gather.dots(x, m, index, offsets)

    def gathered_sums(self, m: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, out: Tensor) -> None:
        gather.sums(m, index, weights, offsets, out)

    def sum_rows(self, values: Tensor, factor: Factor) -> Tensor:
        if values.numel() > ONE_BLOCK:
            return factor.times(values.sum())
        return _kernels().sum_rows(values, factor)

    def reciprocal_count(self, target: Tensor, ignore_index: int) -> Tensor:
        if target.numel() > ONE_BLOCK:
            return count_plainly(target, ignore_index, torch.float32)
        return _kernels().reciprocal_count(target, ignore_index)

    def scale_in_place(self, x: Tensor, scale: Tensor) -> None:
        _kernels().scale_in_place(x, scale)

    def segment_sum(self, values: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
        return _kernels().segment_sum(values, weights, layout)

    def segment_expand(self, upstream: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
        return _kernels().segment_expand(upstream, weights, layout)

    def pair_loss(
        self,
        chosen: Tensor,
        rejected: Tensor,
        nll: Tensor | None,
        constants: PairConstants,
        options: PairOptions,
    ) -> PairResult:
        return _kernels().pair_loss(chosen, rejected, nll, constants, options)

    def unpaired_loss(
        self, logps: Tensor, constants: UnpairedConstants, options: UnpairedOptions
    ) -> UnpairedResult:
        return _kernels().unpaired_loss(logps, constants, options)

    def policy_loss(
        self, logprobs: Tensor, entropy: Tensor | None, inputs: PolicyInputs, options: PolicyOptions
    ) -> PolicyResult:
        return _kernels().policy_loss(logprobs, entropy, inputs, options)

    def value_loss(self, values: Tensor, inputs: ValueInputs) -> ValueResult:
        return _kernels().value_loss(values, inputs)

    def kl_estimate(self, logprobs: Tensor, ref: Tensor, kind: int, upstream: Tensor | None) -> Tensor:
        return _kernels().kl_estimate(logprobs, ref, kind, upstream)

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, layout: Sequences, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        return _kernels().gae(rewards, values, mask, layout, gamma, lam)

    def discounted_returns(self, rewards: Tensor, mask: Tensor, layout: Sequences, gamma: float) -> Tensor:
        return _kernels().discounted_returns(rewards, mask, layout, gamma)
