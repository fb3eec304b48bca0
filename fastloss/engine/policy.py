"""Autograd of the policy-gradient loss over log-probs, its metrics, and its selections over the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine.once import once_differentiable
from fastloss.losses.policy_batch import Batch
from fastloss.losses.policy_options import PolicyOptions

# The public metrics, in the order of csrc/common/policy_arguments.h. The last three where their inputs are given.
METRICS = (
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


class PolicyCall(NamedTuple):
    """Everything about a call but what carries gradients."""

    rows: Any
    batch: Batch
    options: PolicyOptions
    normalizer: float | Tensor | None
    token_weight: Tensor | None
    select: Tensor | None

    def arguments(self) -> dict[str, Any]:
        b = self.batch
        return {
            "old": b.old,
            "advantages": b.advantages,
            "mask": b.mask,
            "ref": b.ref,
            "sampler": b.sampler,
            "token_weight": self.token_weight,
            "select": self.select,
            "agg": None,
            "offsets": b.offsets,
            "length": b.length,
            "count": b.count,
            "options": self.options,
            "normalizer": self.normalizer,
        }


class PolicyLossFunction(torch.autograd.Function):
    """(logprobs, entropy) -> (loss, out [16]); both carry gradients, made in the forward."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor | None, call: PolicyCall) -> Any:
        result = call.rows.policy_loss(logprobs, entropy=entropy, **call.arguments())
        out = result["out"]
        ctx.save_for_backward(result["grad"], result["grad_entropy"], out)
        ctx.mark_non_differentiable(out)
        return out[0].clone(), out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        grad, grad_entropy, out = ctx.saved_tensors
        scale = upstream * out[1]
        need_logprobs, need_entropy, _ = ctx.needs_input_grad
        return (
            grad * scale if need_logprobs else None,
            grad_entropy * scale if need_entropy and grad_entropy is not None else None,
            None,
        )


def policy_loss(logprobs: Tensor, entropy: Tensor | None, call: PolicyCall) -> tuple[Tensor, Tensor]:
    """Loss and ``out [16]`` through the kernels, or through the definition where ``call.rows`` is None."""
    if call.rows is None:
        return reference.policy_loss(logprobs, entropy=entropy, **call.arguments())
    if logprobs.numel() == 0:
        nothing = logprobs.sum() if entropy is None else logprobs.sum() + entropy.sum()
        return nothing * 0, empty_out(logprobs)
    return PolicyLossFunction.apply(logprobs, entropy, call)


def empty_out(like: Tensor) -> Tensor:
    """The statistics of no tokens at all."""
    out = torch.zeros(16, dtype=like.dtype, device=like.device)
    out[1] = out[10] = out[11] = 1
    return out


def combine_out(parts: Tensor) -> Tensor:
    """``out [chunks, 16]`` of chunks whose scale is the same -> ``[16]``."""
    out = parts.sum(0)
    seen = parts[:, 2] > 0  # a chunk without tokens says 1 for its extremes
    one = torch.ones((), dtype=parts.dtype, device=parts.device)
    inf = one * torch.inf
    out[1] = parts[0, 1]
    out[10] = torch.where(seen.any(), torch.where(seen, parts[:, 10], inf).amin(), one)
    out[11] = torch.where(seen.any(), torch.where(seen, parts[:, 11], -inf).amax(), one)
    return out


def metrics_from(
    out: Tensor, *, with_ref: bool, with_entropy: bool, with_correction: bool
) -> dict[str, Tensor]:
    """The public metrics, on the device, without a synchronisation. Means are over unmasked tokens."""
    with torch.no_grad():
        tokens = out[2].clamp(min=1)
        means = (out / tokens).unbind()
        sums = out.unbind()
        values = (
            sums[15] * sums[1],
            means[3],
            means[4],
            means[3] + means[4],
            means[5],
            means[6],
            means[7],
            means[12],
            sums[10],
            sums[11],
            means[12] * sums[12] / sums[13].clamp(min=torch.finfo(out.dtype).tiny),
            means[8] if with_ref else None,
            means[9] if with_entropy else None,
            means[14] if with_correction else None,
        )
        return {name: value for name, value in zip(METRICS, values, strict=True) if value is not None}
