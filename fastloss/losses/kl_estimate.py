"""kl_estimate: a KL per token from sampled log-probs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.autograd import differentiable_again
from fastloss.engine.backend import resolve_call, resolves_views
from fastloss.engine.contract import Backend
from fastloss.engine.definition import REFERENCE
from fastloss.losses.policy_inputs import check_like
from fastloss.tables import ACC_DTYPES, KL_KINDS


@resolves_views
def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, kind: str = "k3", backend: str = "auto") -> Tensor:
    """A per-token estimate of KL(policy, reference) from sampled tokens, with gradient through ``logprobs``.

    With t = clamp(ref - logprobs, -20, 20): k1 = -t, k2 = t²/2, k3 = e^t - 1 - t, ``abs = |t|``, low_var_kl = clamp(k3, -10, 10)
    (joschu.net/blog/kl-approx.html). For a KL in the reward: ``rewards - beta * kl_estimate(old, ref, kind="k1")`` per
    token, or its masked sum per sequence.

    Args:
        logprobs, ref_logprobs: the same shape, any.

    Returns:
        float32 (float64 for float64 log-probs), the same shape.

    >>> import torch, fastloss
    >>> fastloss.kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), kind="k1")
    tensor([0.5000])
    """
    checks.is_floating("logprobs", logprobs)
    check_like("ref_logprobs", ref_logprobs, logprobs)
    checks.is_one_of("kind", kind, KL_KINDS)
    call = resolve_call("kl_estimate", backend, logprobs, ref_logprobs, has_operators=False)
    call.announce()
    acc = ACC_DTYPES[logprobs.dtype]
    x, ref = logprobs.to(acc), ref_logprobs.detach().to(acc)
    if call.backend.differentiable:
        return call.backend.kl_estimate(x, ref, KL_KINDS.index(kind), None)
    flat, flat_ref = x.reshape(-1).contiguous(), ref.reshape(-1).contiguous()
    out: Tensor = _KlEstimate.apply(flat, flat_ref, call.backend, KL_KINDS.index(kind))
    return out.view(logprobs.shape)


def _again(ctx: Any) -> Any:
    logprobs, ref = ctx.saved_tensors
    return [REFERENCE.kl_estimate(logprobs, ref, ctx.kind, None)], [logprobs]


class _KlEstimate(torch.autograd.Function):
    """logprobs -> the estimate of each token; its derivative is made again in the backward, from what is held anyway."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, ref: Tensor, backend: Backend, kind: int) -> Tensor:
        ctx.backend, ctx.kind = backend, kind
        ctx.save_for_backward(logprobs, ref)
        return backend.kl_estimate(logprobs, ref, kind, None)

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor) -> Any:
        logprobs, ref = ctx.saved_tensors
        return ctx.backend.kl_estimate(logprobs, ref, ctx.kind, upstream.contiguous()), None, None, None
