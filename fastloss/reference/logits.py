"""From raw logits to the logits a loss sees."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_logits(
    logits: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """``scale · softcap · tanh((logits + bias) / softcap)`` in float32 (float64 for float64 logits)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z if scale == 1.0 else z * scale


def linear_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """``input @ linear_weight.T + linear_bias``: the head that fastloss never materialises."""
    return torch.nn.functional.linear(input, linear_weight, linear_bias)
