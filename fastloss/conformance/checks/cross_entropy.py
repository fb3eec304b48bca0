"""Cross-entropy from logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator

from fastloss.conformance import measure, right
from fastloss.conformance.check import Check, Inputs
from fastloss.conformance.checks.tolerances import BF16, EXACT, FP16, LOW_RESULT, OFFSET, ROUNDING

TORCH = "torch.nn.functional.cross_entropy in float64"
Z = "arXiv:2204.02311 (PaLM), mean over tokens as Liger-Kernel and Megatron take it; torch in float64"
SOFTCAP = "arXiv:2408.00118 (Gemma 2): cap · tanh(z / cap); torch in float64"


def logits(
    rows: int = 6,
    classes: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    ignored: int | None = None,
    some: int = 2,
    scale: float = 2.0,
    offset: float = 0.0,
) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        z = (
            torch.randn(rows, classes, generator=generator, dtype=torch.float32, device="cpu") * scale
            + offset
        ).to(dtype)
        target = torch.randint(
            0, classes, (rows,), generator=generator, dtype=torch.int64, device=generator.device
        )
        if ignored is not None:
            target[:some] = ignored
        return {"logits": z, "target": target}

    return make


def changed(
    base: Callable[[Generator], Inputs], change: Callable[[Inputs], Inputs]
) -> Callable[[Generator], Inputs]:
    return lambda generator: change(base(generator))


def masked(inputs: Inputs) -> Inputs:
    """Every second class is masked with -inf, no target among them."""
    inputs["logits"][:, 1::2] = -torch.inf
    inputs["target"] = inputs["target"] // 2 * 2
    return inputs


def sliced(inputs: Inputs) -> Inputs:
    inputs["logits"] = inputs["logits"][::2, 1:-3]
    inputs["target"] = inputs["target"][::2] % inputs["logits"].shape[1]
    return inputs


def transposed(inputs: Inputs) -> Inputs:
    inputs["logits"] = inputs["logits"].T.contiguous().T
    return inputs


def repeated(inputs: Inputs) -> Inputs:
    inputs["logits"] = inputs["logits"][:1].expand(6, -1)
    return inputs


def negative(inputs: Inputs) -> Inputs:
    inputs["logits"] = torch._neg_view(inputs["logits"])
    return inputs


def target_is(value: int) -> Callable[[Inputs], Inputs]:
    def change(inputs: Inputs) -> Inputs:
        inputs["target"] = inputs["target"].clone()
        inputs["target"][2] = value
        return inputs

    return change


def column(inputs: Inputs) -> Inputs:
    inputs["target"] = inputs["target"][:, None]
    return inputs


def all_equal(value: float) -> Callable[[Inputs], Inputs]:
    def change(inputs: Inputs) -> Inputs:
        inputs["logits"] = torch.full_like(inputs["logits"], value)
        return inputs

    return change


PLAIN = logits()


def row(
    name: str,
    bug: str,
    inputs: Callable[[Generator], Inputs] = PLAIN,
    how: Any = measure.gradients,
    source: str = TORCH,
    tolerance: Any = ROUNDING,
    dtype: torch.dtype = torch.float32,
    leaves: tuple[str, ...] = ("logits",),
    **options: Any,
) -> Check:
    return Check(
        f"ce: {name}",
        "cross_entropy",
        inputs,
        right.cross_entropy,
        how,
        tolerance,
        source,
        options,
        leaves,
        dtype,
        bug,
    )


WEIGHT = torch.linspace(0.25, 2.0, 37, dtype=torch.float32, device="cpu")

CHECKS = (
    row("value and gradient", "the plain case"),
    row("an upstream gradient of 1024", "a gradient made in the forward is not scaled", how=measure.scaled),
    row(
        "an expanded upstream gradient",
        "strides of 0 are read as a vector",
        how=measure.expanded,
        reduction="none",
    ),
    row("an upstream gradient per row", "one factor for all rows", how=measure.each, reduction="none"),
    row("backward twice", "a buffer scaled in place is scaled twice", how=measure.twice),
    row("second derivative", "silent zeros or None; a clear error is not supported", how=measure.second),
    row("per-sample gradients", "vmap(grad) meets an opaque kernel", how=measure.per_sample),
    row(
        "logits left unchanged",
        "the gradient overwrites logits that a metric needs",
        how=measure.unchanged,
        source="closed form: the inputs",
        tolerance=EXACT,
    ),
    row("logits read by another loss", "the gradient overwrites instead of adds", how=measure.added_up),
    row("mean over kept tokens", "the mean counts ignored tokens", logits(ignored=-100)),
    row(
        "class weights",
        "the mean is divided by the count, not by the sum of weights",
        logits(ignored=-100),
        weight=WEIGHT,
    ),
    row(
        "normalizer",
        "num_items_in_batch is applied twice or not at all",
        logits(ignored=-100),
        source="closed form: torch's sum in float64 / normalizer",
        normalizer=16,
    ),
    row("all ignored, sum", "NaN in place of 0", logits(ignored=-100, some=6), reduction="sum"),
    row(
        "all ignored, mean",
        "0 hides what torch says with NaN",
        logits(ignored=-100, some=6),
        how=measure.value,
    ),
    row(
        "all ignored, sum, float16",
        "a late factor of inf × 0",
        logits(ignored=-100, some=6, dtype=FP16),
        tolerance=LOW_RESULT,
        dtype=FP16,
        reduction="sum",
    ),
    row("no rows, sum", "a launch of an empty grid", logits(0), reduction="sum"),
    row("ignore_index 0", "only negative ones are known", logits(ignored=0), ignore_index=0),
    row("ignore_index V - 1", "only negative ones are known", logits(ignored=36), ignore_index=36),
    row("ignore_index -1", "-1 is read as the last class", logits(ignored=-1), ignore_index=-1),
    row("label smoothing", "the mean of logits misses the tail", label_smoothing=0.1),
    row(
        "label smoothing, ignored",
        "smoothing of ignored tokens counts",
        logits(ignored=-100),
        label_smoothing=0.1,
    ),
    row(
        "label smoothing, class weights",
        "the smoothed part is not weighted",
        logits(ignored=-100),
        weight=WEIGHT,
        label_smoothing=0.1,
    ),
    row(
        "z-loss",
        "reported without its gradient, or over another count",
        logits(ignored=-100),
        source=Z,
        z_loss=0.01,
    ),
    row(
        "z-loss, class weights",
        "divided by the sum of class weights",
        logits(ignored=-100),
        source=Z,
        z_loss=0.01,
        weight=WEIGHT,
    ),
    row("soft-cap", "1 - tanh² is missing", logits(scale=10.0), source=SOFTCAP, softcap=5.0),
    row(
        "soft-cap, label smoothing",
        "smoothing of raw logits",
        logits(scale=10.0),
        source=SOFTCAP,
        softcap=5.0,
        label_smoothing=0.1,
    ),
    row("one class", "the masked tail of a block wins the maximum", logits(6, 1)),
    row("odd vocabulary, all negative", "the tail's 0 enters the maximum", logits(5, 131, offset=-50.0)),
    row("-inf logits", "-inf - -inf, 0 × -inf", changed(logits(), masked)),
    row("sliced logits", "read with the wrong stride", changed(logits(8), sliced)),
    row("transposed logits", "read with the wrong stride", changed(logits(), transposed)),
    row("expanded logits", "strides of 0", changed(logits(), repeated), how=measure.value, leaves=()),
    row(
        "a negative view",
        "the address of memory with the other sign",
        changed(logits(), negative),
        how=measure.value,
        leaves=(),
    ),
    row(
        "target out of range",
        "memory outside the row",
        changed(logits(), target_is(1000)),
        how=measure.refused,
        leaves=(),
        tolerance=EXACT,
        source="torch raises IndexError",
    ),
    row(
        "target below zero",
        "memory outside the row",
        changed(logits(), target_is(-7)),
        how=measure.refused,
        leaves=(),
        tolerance=EXACT,
        source="torch raises IndexError",
    ),
    row(
        "target [N, 1]",
        "garbage in place of an error",
        changed(logits(), column),
        how=measure.refused,
        leaves=(),
        tolerance=EXACT,
        source="torch raises RuntimeError",
    ),
    row(
        "float16, large logits",
        "exp or the sum overflows",
        logits(4, 257, dtype=FP16, scale=20.0, offset=30.0),
        tolerance=LOW_RESULT,
        dtype=FP16,
    ),
    row(
        "bfloat16, 8192 classes",
        "statistics in bfloat16",
        logits(3, 8192, dtype=BF16),
        tolerance=LOW_RESULT,
        dtype=BF16,
    ),
    row(
        "a common offset of 1e4",
        "digits lost in a stored logsumexp",
        logits(offset=1e4),
        how=measure.each,
        tolerance=OFFSET,
        reduction="none",
    ),
    row("all logits -1e30", "z - logsumexp is 0: a gradient of 1", changed(logits(), all_equal(-1e30))),
    row("default dtype float64", "scratch without a dtype", how=measure.default_dtype),
    row(
        "state is left alone",
        "random state, default dtype or threads changed",
        how=measure.state,
        tolerance=EXACT,
        source="closed form: nothing changes",
    ),
)
