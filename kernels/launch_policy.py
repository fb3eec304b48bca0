"""Sections 7 and 8 of docs/sequences.md over float32 tensors: outputs allocated; policy_loss in two launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastloss.engine.native_policy import SUMS, as_bytes, empty_gradient, runs_of
from fastloss.losses.policy_options import AGGREGATIONS, PolicyOptions

from . import policy, scan
from .launch import _on_device_of

# 128 threads with four tokens each: one 16-byte load per input, and the sums stay in registers (two each spilled 8 bytes
# on sm_100, tools/kernel_report_triton.py). Not tuned on a GPU.
POLICY_SHAPE = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}
TOTAL_SHAPE = {"ROWS": 32, "num_warps": 4, "enable_fp_fusion": True}
SCAN_SHAPE = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}


def _check(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, got {tensor.dtype}")


def codes_of(o: PolicyOptions, of_sequence: bool, with_agg: bool, with_sampler: bool) -> dict[str, Any]:
    """The compile-time options of policy_loss_kernel."""
    return {
        "SURROGATE": o.surrogate,
        "LEVEL": o.level,
        "KL_KIND": o.kl_kind,
        "KL_UNBIASED": bool(o.kl_unbiased),
        "CORRECTION": o.correction if with_sampler else 0,
        "SEQ_MEAN": not with_agg and AGGREGATIONS[o.aggregation] == "seq-mean-token-mean",
        "OF_SEQUENCE": of_sequence,
        "DUAL": o.dual_clip != math.inf,
        "OFF_POLICY": o.off_policy_threshold != math.inf,
    }


def numbers_of(o: PolicyOptions) -> tuple[float, ...]:
    """The numbers of policy_loss_kernel, in its order."""
    numbers = (
        1.0 - o.clip_low, 1.0 + o.clip_high, o.log_low, o.log_high, o.delta, o.dual_clip, o.cispo_low, o.cispo_high,
        o.sapo_pos, o.sapo_neg, o.vespo_k_pos, o.vespo_lambda_pos, o.vespo_k_neg, o.vespo_lambda_neg, o.kl_cov_coef,
        o.beta, o.entropy_coef, o.cap, o.floor, math.log(o.cap) if o.cap > 0 else -math.inf,
        math.log(o.floor) if o.floor > 0 else -math.inf, o.off_policy_threshold,
    )  # fmt: skip
    return tuple(map(float, numbers))


def policy_loss(
    logprobs: Tensor,
    *,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None = None,
    entropy: Tensor | None = None,
    sampler: Tensor | None = None,
    token_weight: Tensor | None = None,
    select: Tensor | None = None,
    agg: Tensor | None = None,
    offsets: Tensor | None = None,
    length: int,
    count: int,
    options: PolicyOptions,
    normalizer: float | Tensor | None = None,
) -> dict[str, Any]:
    _check(
        logprobs=logprobs, old=old, advantages=advantages, ref=ref, entropy=entropy, sampler=sampler,
        token_weight=token_weight, agg=agg,
    )  # fmt: skip
    n = logprobs.numel()
    runs = runs_of(advantages, agg, offsets, n, length, count, options)
    grad = empty_gradient(logprobs, runs.offsets)
    grad_entropy = None
    if entropy is not None and options.entropy_coef != 0:
        grad_entropy = empty_gradient(logprobs, runs.offsets)
    out, sums = logprobs.new_empty(SUMS), logprobs.new_empty(runs.number * SUMS)
    by_length = agg is None and AGGREGATIONS[options.aggregation] == "seq-mean-token-sum-norm"
    factor = float(options.max_length) if by_length else 1.0
    in_memory = isinstance(normalizer, Tensor)
    with _on_device_of(logprobs):
        if runs.number:
            policy.policy_loss_kernel[(runs.number,)](
                logprobs, old, advantages, as_bytes(mask), ref, entropy, sampler, token_weight, as_bytes(select), agg,
                runs.offsets, n, runs.length, *numbers_of(options), grad, grad_entropy, sums,
                **codes_of(options, runs.advantage_of_sequence, agg is not None, sampler is not None), **POLICY_SHAPE,
            )  # fmt: skip
        policy.policy_total_kernel[(1,)](
            sums, runs.number, normalizer if in_memory else None,
            0.0 if in_memory or normalizer is None else float(normalizer), factor, max(runs.number, 1) * factor, out,
            HAS_NORMALIZER=normalizer is not None,
            BY_TOKENS=agg is not None or AGGREGATIONS[options.aggregation] == "token-mean", **TOTAL_SHAPE,
        )  # fmt: skip
    return {"grad": grad, "grad_entropy": grad_entropy, "out": out}


def _halves(x: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is ``x`` to 48 bits: Triton takes no double by value."""
    high = float(torch.tensor(x, dtype=torch.float32))
    return high, x - high


def _scan(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor,
    offsets: Tensor | None,
    length: int,
    count: int,
    gamma: float,
    lam: float,
) -> tuple[Tensor | None, Tensor]:
    _check(rewards=rewards, values=values)
    advantages = None if values is None else empty_gradient(rewards, offsets)
    returns = empty_gradient(rewards, offsets)
    decay = gamma if values is None else gamma * lam
    if count and rewards.numel():
        with _on_device_of(rewards):
            scan.scan_kernel[(count,)](
                rewards, values, as_bytes(mask), offsets, length, *_halves(gamma), *_halves(decay), advantages, returns,
                **SCAN_SHAPE,
            )  # fmt: skip
    return advantages, returns


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    length: int,
    count: int,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    advantages, returns = _scan(rewards, values, mask, offsets, length, count, gamma, lam)
    assert advantages is not None
    return advantages, returns


def discounted_returns(
    rewards: Tensor, mask: Tensor, offsets: Tensor | None, length: int, count: int, gamma: float
) -> Tensor:
    return _scan(rewards, None, mask, offsets, length, count, gamma, 0.0)[1]
