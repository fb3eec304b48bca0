"""The ``reference`` backend: the contract by the definitions of fastloss/reference, in plain PyTorch on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import exponentials, gather
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import (
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
    KL_KINDS,
    LSE_PARTS,
    CrossEntropyOptions,
    DistillationOptions,
    PairConstants,
    PairOptions,
    PolicyOptions,
    RowOptions,
    UnpairedConstants,
    UnpairedOptions,
)


class ReferenceBackend:
    """Every method is differentiable, twice, by autograd."""

    name = "reference"
    differentiable = True
    host_reads = False

    def why_not(self) -> str:
        return ""

    def why_not_for(self, tensor: Tensor) -> str:
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
        out = reference.token_stats(logits, target, bias=bias, **_transform(options))
        if LSE_PARTS in want:
            out[LSE_PARTS] = reference.lse_parts(logits, target, bias=bias, **_transform(options))
        return {name: out[name] for name in want}

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
        out.copy_(
            reference.row_gradient(
                logits, target, lse_parts, *coefficients, w=w, bias=bias, **_transform(options)
            )
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
        x = logits if grad is None else logits.detach().requires_grad_()
        with torch.set_grad_enabled(torch.is_grad_enabled() or grad is not None):
            loss = reference.cross_entropy(
                x,
                w if target is None else target,  # type: ignore[arg-type]
                weight=None if target is None else w,
                reduction="none",
                label_smoothing=0.0 if target is None else options.label_smoothing,
                z_loss=options.z_loss,
                bias=bias,
                **_transform(options),
            )
        stats = self.row_stats(logits, target, options, want=(LSE_PARTS, *want), bias=bias)
        if grad is not None:
            scale = factor.value if factor.tensor is None else factor.value * factor.tensor
            grad.copy_(torch.autograd.grad(loss.sum() * scale, x)[0])
            loss = loss.detach()
        return {**stats, "loss": loss}

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
        return exponentials.plainly(logits, target, options, factor, bias, w)

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
        """The column "slope" is 0: autograd, which makes the gradient, has no use for it."""
        x = logits if grad is None else logits.detach().requires_grad_()
        with torch.set_grad_enabled(torch.is_grad_enabled() or grad is not None):
            rows = reference.distillation_rows(
                x, teacher_logits, target, options, bias=bias, teacher_bias=teacher_bias
            )
        if grad is not None:
            upstream = torch.ones_like(rows.loss) if factors is None else factors
            grad.copy_(torch.autograd.grad(rows.loss, x, upstream)[0])
            rows = rows._replace(loss=rows.loss.detach())
        return torch.stack([*rows, torch.zeros_like(rows.kl)], -1)

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
        self.row_divergence(
            logits, teacher_logits, target, options, lse_parts=lse_parts, teacher_lse_parts=teacher_lse_parts,
            factors=factors, grad=out, bias=bias, teacher_bias=teacher_bias,
        )  # fmt: skip

    def gathered_dots(self, x: Tensor, m: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
        return gather.dots(x, m, index, offsets)

    def gathered_sums(self, m: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, out: Tensor) -> None:
        gather.sums(m, index, weights, offsets, out)

    def sum_rows(self, values: Tensor, factor: Factor) -> Tensor:
        return factor.times(values.sum())

    def reciprocal_count(self, target: Tensor, ignore_index: int) -> Tensor:
        return count_plainly(target, ignore_index, torch.float64)

    def scale_in_place(self, x: Tensor, scale: Tensor) -> None:
        x.mul_(scale)

    def segment_sum(self, values: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
        return reference.segment_sum(values, weights, layout.offsets, layout.length, layout.count)

    def segment_expand(self, upstream: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
        each = torch.cat([upstream, upstream.new_zeros(1)])
        if layout.offsets is None:
            each = upstream.unsqueeze(-1).expand(layout.count, layout.length).reshape(-1)
        else:
            each = each[layout.ids]
        return each if weights is None else torch.where(weights == 0, 0, each * weights)

    def pair_loss(
        self,
        chosen: Tensor,
        rejected: Tensor,
        nll: Tensor | None,
        constants: PairConstants,
        options: PairOptions,
    ) -> PairResult:
        return PairResult(**reference.pair_loss(chosen, rejected, nll, constants, options))

    def unpaired_loss(
        self, logps: Tensor, constants: UnpairedConstants, options: UnpairedOptions
    ) -> UnpairedResult:
        return UnpairedResult(**reference.unpaired_loss(logps, constants, options))

    def policy_loss(
        self, logprobs: Tensor, entropy: Tensor | None, inputs: PolicyInputs, options: PolicyOptions
    ) -> PolicyResult:
        loss, out = reference.policy_loss(
            logprobs,
            old=inputs.old,
            advantages=inputs.advantages,
            mask=inputs.mask,
            ref=inputs.ref,
            entropy=entropy,
            sampler=inputs.sampler,
            token_weight=inputs.token_weight,
            select=inputs.select,
            share=inputs.share,
            offsets=inputs.layout.offsets,
            length=inputs.layout.length,
            count=inputs.layout.count,
            options=options,
            normalizer=inputs.normalizer,
        )
        return PolicyResult(loss, out)

    def value_loss(self, values: Tensor, inputs: ValueInputs) -> ValueResult:
        x = inputs
        loss, metrics = reference.value_terms(
            values,
            x.old,
            x.returns,
            x.mask.bool(),
            1.0 if x.share is None else x.share,
            x.scale,
            x.clip_range,
        )
        scale = 1 / x.mask.sum().clamp(min=1).to(values.dtype) if x.scale is None else x.scale
        return ValueResult(loss, torch.stack([loss.detach(), scale.to(loss.dtype), *metrics.values()]))

    def kl_estimate(self, logprobs: Tensor, ref: Tensor, kind: int, upstream: Tensor | None) -> Tensor:
        if upstream is None:
            return reference.kl_estimate(logprobs, ref, name_of_kind(kind))
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            kl = reference.kl_estimate(leaf, ref, name_of_kind(kind))
        return torch.autograd.grad(kl, leaf, upstream)[0]

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, layout: Sequences, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        return reference.gae(rewards, values, mask, layout.offsets, layout.length, layout.count, gamma, lam)

    def discounted_returns(self, rewards: Tensor, mask: Tensor, layout: Sequences, gamma: float) -> Tensor:
        return reference.discounted_returns(rewards, mask, layout.offsets, layout.length, layout.count, gamma)


def name_of_kind(kind: int) -> str:
    if kind not in range(len(KL_KINDS)):
        raise ValueError(f"kind: expected the code of one of {', '.join(map(repr, KL_KINDS))}, got {kind}")
    return KL_KINDS[kind]


def _transform(options: RowOptions) -> dict[str, Any]:
    return {
        "ignore_index": options.ignore_index,
        "scale": options.factor,
        "softcap": options.softcap or None,
    }


REFERENCE = ReferenceBackend()
