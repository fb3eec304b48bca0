"""kl_estimate: a KL per token from sampled log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.backend import announce_pointwise
from fastloss.losses.policy_inputs import check_like
from fastloss.tables import ACC_DTYPES, KL_KINDS, MAX_LOG_RATIO


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
    announce_pointwise("kl_estimate", backend)
    acc = ACC_DTYPES[logprobs.dtype]
    t = (ref_logprobs.detach().to(acc) - logprobs.to(acc)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -t
    if kind == "k2":
        return t.square() / 2
    if kind == "abs":
        return t.abs()
    k3 = torch.expm1(t) - t
    return k3 if kind == "k3" else k3.clamp(-10, 10)
