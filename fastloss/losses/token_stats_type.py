"""TokenStats, and the engine's names of its fields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ENGINE_NAMES = {"logprobs": "logprob", "mean_logits": "mean_logit"}


class TokenStats(NamedTuple):
    """Statistics per token, float32 (float64 for float64 input) of shape ``[...]``; None where not asked for."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def from_engine(out: dict[str, Tensor], want: tuple[str, ...]) -> TokenStats:
    """Engine names to public ones."""
    values = {}
    for public in TokenStats._fields:
        name = ENGINE_NAMES.get(public, public)
        if name in want:
            values[public] = out[name].bool() if name == "is_top1" else out[name]
    return TokenStats(**values)
