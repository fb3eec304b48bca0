"""Seeded pairs, a call of preference_loss on them, and the comparison with the definition in float64."""

from __future__ import annotations

from typing import Any

import torch
from backends_under_test import DEVICE
from torch import Tensor

import fastloss
from fastloss import PreferenceOutput
from fastloss.tables import PAIR_TERMS

TYPES = [name for name in PAIR_TERMS if name != "center"]  # center is reward_model_loss's own
SORTED = ("aot", "aot_unpaired")  # made of terms over sorted pairs
# The loss types that take an f-divergence.
WITH_DIVERGENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]


def needed(name: str | list[str]) -> dict[str, Any]:
    """The options without which a loss type is an error."""
    return {"label_smoothing": 0.1} if "exo_pair" in (name if isinstance(name, list) else [name]) else {}


def numbers(count: int, dtype: torch.dtype, scale: float = 3.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)

    def random(k: int) -> Tensor:
        return torch.randn(k, count, generator=generator)

    lengths = torch.randint(1, 9, (3, count), generator=generator)
    logps = -random(4).abs() * scale - 0.1
    uniform = torch.rand(5, count, generator=generator)
    out = {
        "c": logps[0].to(dtype),
        "r": logps[1].to(dtype),
        "rc": logps[2],
        "rr": logps[3],
        "lc": lengths[0],
        "lr": lengths[1],
        "nll": (-random(1)[0].abs() * scale).to(dtype),
        "nll_lengths": lengths[2] + 5,
        "beta": uniform[0] + 0.05,
        "smoothing": uniform[1] * 0.3 + 0.05,
        "margin": uniform[2],
        "weights": uniform[3] + 0.5,
        "upstream": uniform[4] + 0.5,
    }
    return {name: value.to(DEVICE) for name, value in out.items()}


def call(x: dict[str, Tensor], options: dict[str, Any], backend: str) -> PreferenceOutput:
    options = {name: x[v] if isinstance(v, str) and v in x else v for name, v in options.items()}
    if options.pop("nll", False):
        options["chosen_nll_logps"] = x["nll"]
    if options.pop("nll_lengths", False):
        options["chosen_nll_lengths"] = x["nll_lengths"]
    ref = () if options.get("simpo_alpha") else (x["rc"], x["rr"])
    return fastloss.preference_loss(
        x["c"], x["r"], *ref, chosen_lengths=x["lc"], rejected_lengths=x["lr"], backend=backend, **options
    )


def evaluate(x: dict[str, Tensor], options: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Loss, rewards, metrics and gradients through an upstream gradient that is not 1, in float64."""
    leaves = {name: x[name].clone().requires_grad_() for name in ("c", "r", "nll")}
    out = call({**x, **leaves}, options, backend)
    assert not any(v.requires_grad for v in (*out[1:5], *out.metrics.values()))
    upstream = x["upstream"].to(out.loss.dtype) if out.loss.dim() else 1.5
    (out.loss * upstream).sum().backward()
    result = {
        "loss": out.loss,
        "chosen_rewards": out.chosen_rewards,
        "rejected_rewards": out.rejected_rewards,
    }
    result |= out.metrics
    for name, leaf in leaves.items():
        assert leaf.grad is None or leaf.grad.dtype == leaf.dtype
        result[f"d {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {name: value.detach().double().cpu() for name, value in result.items()}


def double(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.double() if v.is_floating_point() else v for name, v in x.items()}


def assert_close(
    got: dict[str, Tensor], exact: dict[str, Tensor], bound: dict[str, Tensor], eps: float
) -> None:
    """No error above that of the definition in the same dtype, or a few roundings of the result."""
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        error = (got[name] - want).abs().max().item() if want.numel() else 0.0
        eager = (bound[name] - want).abs().max().item() if want.numel() else 0.0
        size = max(want.abs().max().item(), 0.05) if want.numel() else 0.0  # terms of about beta cancel
        assert error <= max(eager, 16 * eps * max(size, 1.0 if name[:2] != "d " else 0.0)), (
            name,
            error,
            eager,
        )
