"""Log-probabilities and entropy of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator

from fastloss.conformance import measure, right
from fastloss.conformance.check import Check, Inputs
from fastloss.conformance.checks import cross_entropy, linear
from fastloss.conformance.checks.tolerances import BF16, LOW_RESULT, OFFSET, PEAKED, ROUNDING

LOG_SOFTMAX = "torch.log_softmax in float64"
ENTROPY = "-Σ p log p in float64, 0 where p = 0"


def of_logits(base: Callable[[Generator], Inputs]) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        return {"logits": base(generator)["logits"]}

    return make


def row(
    name: str,
    bug: str,
    interface: str,
    inputs: Callable[[Generator], Inputs],
    source: str,
    tolerance: Any = ROUNDING,
    how: Any = measure.each,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Check:
    leaves = ("hidden", "linear_weight") if interface == "linear_logprobs" else ("logits",)
    function = getattr(right, interface)
    return Check(
        f"tokens: {name}", interface, inputs, function, how, tolerance, source, options, leaves, dtype, bug
    )


_logits, _masked = cross_entropy.logits, cross_entropy.masked
_peaked = cross_entropy.logits(scale=30.0)

CHECKS = (
    row("log-prob", "the plain case", "logprobs", _logits(), LOG_SOFTMAX, how=measure.gradients),
    row("log-prob, gradient per row", "one factor for all rows", "logprobs", _logits(), LOG_SOFTMAX),
    row(
        "log-prob, temperature 0.7",
        "divided in low precision or twice",
        "logprobs",
        _logits(),
        LOG_SOFTMAX,
        how=measure.gradients,
        temperature=0.7,
    ),
    row(
        "log-prob, bfloat16",
        "statistics in bfloat16",
        "logprobs",
        _logits(3, 8192, dtype=BF16),
        LOG_SOFTMAX,
        LOW_RESULT,
        measure.gradients,
        BF16,
    ),
    row(
        "log-prob, offset of 1e4",
        "logit - logsumexp cancels",
        "logprobs",
        _logits(offset=1e4),
        LOG_SOFTMAX,
        OFFSET,
        measure.gradients,
    ),
    row(
        "log-prob, -inf logits",
        "-inf - -inf",
        "logprobs",
        cross_entropy.changed(_logits(), _masked),
        LOG_SOFTMAX,
    ),
    row(
        "log-prob from hidden states",
        "the plain case",
        "linear_logprobs",
        linear.head(),
        LOG_SOFTMAX,
        how=measure.gradients,
    ),
    row(
        "log-prob from hidden states, per row",
        "one factor for all rows",
        "linear_logprobs",
        linear.head(),
        LOG_SOFTMAX,
    ),
    row(
        "log-prob from hidden states, temperature",
        "the gradient is not divided",
        "linear_logprobs",
        linear.head(),
        LOG_SOFTMAX,
        how=measure.gradients,
        temperature=0.7,
    ),
    row("entropy", "its gradient is forgotten", "entropy", of_logits(_logits()), ENTROPY),
    row(
        "entropy, -inf logits",
        "0 × -inf",
        "entropy",
        of_logits(cross_entropy.changed(_logits(), _masked)),
        ENTROPY,
        how=measure.gradients,
    ),
    row("entropy, peaked", "p underflows before log", "entropy", of_logits(_peaked), ENTROPY, PEAKED),
    row(
        "entropy, offset of 1e4",
        "logsumexp - Σ p z cancels",
        "entropy",
        of_logits(_logits(offset=1e4)),
        ENTROPY,
        OFFSET,
    ),
)
