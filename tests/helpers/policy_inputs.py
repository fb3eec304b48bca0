"""Seeded log-probs for the policy-gradient tests, a call on them, and the comparison with float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from backends_under_test import DEVICE
from torch import Tensor

import fastloss

B, T = 5, 9
STOPPED = (
    "cispo",
    "vespo",
    "dppo_tv",
    "dppo_kl",
)  # their weight is a constant: a numerical derivative sees it move


def batch(
    dtype: torch.dtype = torch.float32, spread: float = 0.4, b: int = B, t: int = T
) -> dict[str, Tensor]:
    """Padded, with NaN in the padding, one sequence masked as a whole and one advantage of 0."""
    g = torch.Generator().manual_seed(b * 100 + t)
    lengths = torch.randint((t + 1) // 2, t + 1, (b,), generator=g)
    mask = torch.arange(t)[None, :] < lengths[:, None]
    mask[:, 0] &= torch.rand(b, generator=g) > 0.3  # the first unmasked token need not be the first
    if b > 2:
        mask[2] = False
    old = -3 * torch.rand(b, t, generator=g)

    def near(scale: float) -> Tensor:
        return (old + scale * torch.randn(b, t, generator=g)).masked_fill(~mask, math.nan)

    advantages = torch.randn(b, generator=g)
    advantages[0] = -advantages[0].abs()
    if b > 3:
        advantages[1], advantages[3] = advantages[1].abs(), 0
    data = {
        "logprobs": near(spread),
        "old_logprobs": old.masked_fill(~mask, math.nan),
        "advantages": advantages,
        "ref_logprobs": near(spread),
        "sampler_logprobs": near(0.1),
        "entropy": torch.rand(b, t, generator=g).masked_fill(~mask, math.nan),
    }
    return {k: v.to(DEVICE, dtype) for k, v in data.items()} | {"mask": mask.to(DEVICE)}


def call(
    data: dict[str, Tensor], backend: str = "reference", upstream: float = 1.5, **options: Any
) -> dict[str, Tensor]:
    """Loss, gradients and metrics in float64; tensors that the options do not need are left out."""
    data = dict(data)
    if not options.get("beta"):
        data.pop("ref_logprobs", None)
    with_sampler = "importance_mode" in options or "importance_cap" in options
    if not with_sampler:
        data.pop("sampler_logprobs", None)
    leaves = {n: data[n].clone().requires_grad_() for n in ("logprobs", "entropy")}
    out = fastloss.policy_loss(**{**data, **leaves}, backend=backend, **options)
    (out.loss * upstream).backward()
    result = {"loss": out.loss, **{f"d_{n}": leaf.grad for n, leaf in leaves.items()}, **out.metrics}
    return {k: v.detach().double().cpu() for k, v in result.items() if v is not None}


def double(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in data.items()}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], eager: dict[str, Tensor], eps: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        size = max(value.abs().max().item(), 1.0 if value.dim() == 0 else 1e-3)
        allowed = max((eager[key] - value).abs().max().item(), 32 * eps * size)
        error = (got[key] - value).abs().max().item()
        assert error <= allowed, f"{key}: error {error:.3g}, allowed {allowed:.3g}"
