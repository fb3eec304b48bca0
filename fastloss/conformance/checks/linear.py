"""Cross-entropy from hidden states, and log-probs from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator

from fastloss.conformance import measure, right
from fastloss.conformance.check import Check, Inputs
from fastloss.conformance.checks.tolerances import BF16, EXACT, LOW_LOGITS, ROUNDING

TORCH = "torch.nn.functional.linear and cross_entropy in float64"


def head(
    rows: int = 12,
    width: int = 16,
    classes: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    some: int = 0,
    common: float = 0.0,
) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        hidden = torch.randn(rows, width, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        weight = (
            torch.randn(classes, width, generator=generator, dtype=torch.float32, device="cpu") / 4 + common
        ).to(dtype)
        target = torch.randint(
            0, classes, (rows,), generator=generator, dtype=torch.int64, device=generator.device
        )
        target[:some] = -100
        return {"hidden": hidden, "linear_weight": weight, "target": target}

    return make


def transposed(base: Callable[[Generator], Inputs]) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        inputs = base(generator)
        inputs["hidden"] = inputs["hidden"].T.contiguous().T
        inputs["linear_weight"] = inputs["linear_weight"].T.contiguous().T
        return inputs

    return make


PLAIN = head()


def row(
    name: str,
    bug: str,
    inputs: Callable[[Generator], Inputs] = PLAIN,
    how: Any = measure.gradients,
    source: str = TORCH,
    tolerance: Any = ROUNDING,
    dtype: torch.dtype = torch.float32,
    leaves: tuple[str, ...] = ("hidden", "linear_weight"),
    **options: Any,
) -> Check:
    return Check(
        f"head: {name}",
        "linear_cross_entropy",
        inputs,
        right.linear_cross_entropy,
        how,
        tolerance,
        source,
        options,
        leaves,
        dtype,
        bug,
    )


CHECKS = (
    row("value and gradients", "the plain case"),
    row("an upstream gradient of 1024", "a gradient made in the forward is not scaled", how=measure.scaled),
    row("an upstream gradient per row", "one factor for all rows", how=measure.each, reduction="none"),
    row(
        "an expanded upstream gradient",
        "strides of 0 are read as a vector",
        how=measure.expanded,
        reduction="none",
    ),
    row("backward twice", "a buffer scaled in place is scaled twice", how=measure.twice),
    row("second derivative", "silent zeros or None; a clear error is not supported", how=measure.second),
    row("per-sample gradients", "vmap(grad) meets an opaque kernel", how=measure.per_sample),
    row("tied weight", "the head's gradient overwrites instead of adds", how=measure.added_up),
    row("frozen weight", "a gradient of the wrong leaf", leaves=("hidden",)),
    row("frozen hidden states", "a gradient of the wrong leaf", leaves=("linear_weight",)),
    row("mean over kept tokens", "the mean counts ignored tokens", head(some=5)),
    row("all ignored, sum", "NaN in place of 0", head(some=12), reduction="sum"),
    row(
        "bias",
        "the bias is forgotten in the gradient",
        bias=torch.linspace(-1.0, 1.0, 37, dtype=torch.float32, device="cpu"),
    ),
    row("label smoothing", "the mean of logits misses the tail", head(some=5), label_smoothing=0.1),
    row(
        "z-loss",
        "reported without its gradient, or over another count",
        head(some=5),
        z_loss=0.01,
        source="arXiv:2204.02311; torch in float64",
    ),
    row("soft-cap", "1 - tanh² is missing", softcap=2.0, source="arXiv:2408.00118; torch in float64"),
    row("transposed operands", "read with the wrong stride", transposed(head())),
    row(
        "bfloat16, 512 rows",
        "the weight's gradient is accumulated in bfloat16 chunk by chunk",
        head(512, 32, 67, dtype=BF16),
        tolerance=LOW_LOGITS,
        dtype=BF16,
    ),
    row(
        "autocast",
        "float32 leaves get bfloat16 gradients",
        how=measure.autocast,
        tolerance=LOW_LOGITS,
        dtype=BF16,
    ),
    row("default dtype float64", "scratch without a dtype", how=measure.default_dtype),
    row(
        "inputs left unchanged",
        "the gradient overwrites an operand",
        how=measure.unchanged,
        tolerance=EXACT,
        source="closed form: the inputs",
    ),
)
