"""Sections 4 to 6 of docs/sequences.md over float32 tensors: outputs allocated, one launch each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.engine.pair_call import Number, PairCall

from . import pairs as kernels
from .launch import _on_device_of

SFT = 11
# 128 threads, one pair or eight tokens each; sums in float64 take two registers a number. Not tuned on a GPU.
PAIR_SHAPE = {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": True}
SUM_SHAPE = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}


def _check(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"expected float32, got {tensor.dtype}")


def _number(value: Number) -> tuple[float, Tensor | None]:
    return (0.0, value) if isinstance(value, Tensor) else (float(value), None)


def segment_sum(
    values: Tensor, weights: Tensor | None, offsets: Tensor | None, length: int, count: int
) -> Tensor:
    _check(values, weights)
    out = values.new_empty(count)
    if count:
        with _on_device_of(values):
            kernels.segment_sum_kernel[(count,)](values, weights, offsets, length, out, **SUM_SHAPE)
    return out


def segment_expand(
    upstream: Tensor, weights: Tensor | None, offsets: Tensor | None, length: int, n: int
) -> Tensor:
    _check(upstream, weights)
    out, count = upstream.new_empty(n), upstream.numel()
    if n:
        # A long sequence is cut, each program doing about four blocks of it.
        chunks = min(max(n // (count + 1) // (4 * SUM_SHAPE["BLOCK"]), 1), 64)
        with _on_device_of(out):
            kernels.segment_expand_kernel[(count + 1, chunks)](
                upstream, weights, offsets, length, count, n, out, chunks, **SUM_SHAPE
            )
    return out


def pair_loss(c: Tensor, r: Tensor, nll: Tensor | None, call: PairCall) -> dict[str, Any]:
    _check(c, r, call.rc, call.rr, call.lc, call.lr, nll, call.weight)
    if len(call.terms) > 8:
        raise ValueError(f"terms: expected at most 8, got {len(call.terms)}")
    out: dict[str, Any] = {
        name: torch.empty_like(c) for name in ("loss", "d_c", "d_r", "chosen_reward", "rejected_reward")
    }
    out["d_nll"] = None if nll is None else torch.empty_like(c)
    out["sums"] = c.new_empty(7)
    codes = tuple(code for code, _ in call.terms)
    weights = [float(w) for _, w in call.terms] + [0.0] * (8 - len(call.terms))
    alpha_minus_1 = 0.0 if abs(call.alpha - 1) < 1e-6 else call.alpha - 1
    with _on_device_of(c):
        kernels.pair_loss_kernel[(1,)](
            c, r, c.numel(), call.rc, call.rr, call.lc, call.lr, nll, *weights, float(alpha_minus_1), *_number(call.beta),
            *_number(call.smoothing), *_number(call.margin), call.weight, *_number(call.delta), float(call.tau), out["loss"], out["d_c"], out["d_r"], out["d_nll"],
            out["chosen_reward"], out["rejected_reward"], out["sums"],
            TERMS=codes, NEEDS_TOKENS=SFT in codes and call.lc is not None, DIVERGENCE=call.divergence,
            AVERAGE_REWARDS=call.average_rewards, **PAIR_SHAPE,
        )  # fmt: skip
    return out


def unpaired_loss(
    logps: Tensor,
    *,
    ref: Tensor | None = None,
    desirable: Tensor,
    weight: Tensor | None = None,
    kl: Tensor | None = None,
    code: int = 0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> dict[str, Tensor]:
    _check(logps, ref, weight, kl)
    out = {name: torch.empty_like(logps) for name in ("loss", "d", "reward")}
    out["sums"] = logps.new_empty(7)
    with _on_device_of(logps):
        kernels.unpaired_loss_kernel[(1,)](
            logps, logps.numel(), ref, desirable.view(torch.uint8), weight, kl, float(beta), float(desirable_weight),
            float(undesirable_weight), out["loss"], out["d"], out["reward"], out["sums"], CODE=code, **PAIR_SHAPE,
        )  # fmt: skip
    return out
