"""What a check is: one row of data. What it gives: a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # the positional arguments of the function, in order
Loss = Callable[..., Tensor]  # takes the inputs by position
Measured = dict[str, Tensor]
Measure = Callable[[Loss, Inputs, tuple[str, ...]], Measured]

# What a provider's function is called with. A keyword that its signature lacks is "not supported".
INTERFACES = {
    "cross_entropy": "(logits [N, C], target [N]) -> loss",
    "linear_cross_entropy": "(hidden [N, D], weight [C, D], target [N]) -> loss",
    "logprobs": "(logits [N, V], target [N]) -> [N]",
    "linear_logprobs": "(hidden [N, D], weight [V, D], target [N]) -> [N]",
    "entropy": "(logits [N, V]) -> [N]",
    "dpo": "(chosen [B], rejected [B], ref_chosen [B], ref_rejected [B]) -> mean loss",
    "kto": "(logps [B], ref_logps [B], desirable [B]) -> mean loss",
    "orpo": "(chosen [B], rejected [B], chosen_lengths [B], rejected_lengths [B]) -> mean loss",
    "bco": "(logps [B], ref_logps [B], desirable [B]; delta) -> mean loss",
    "policy": "(logprobs [B, T], old [B, T], advantages [B], mask [B, T]) -> loss",
    "packed_policy": "(logprobs [N], old [N], advantages [B], cu_seqlens [B + 1]) -> loss",
    "kl": "(logprobs [N], ref_logprobs [N]) -> [N]",
    "gae": "(rewards [B, T], values [B, T], mask [B, T]) -> advantages [B, T]",
    "packed_gae": "(rewards [N], values [N], cu_seqlens [B + 1]) -> advantages [N]",
    "group_advantages": "(rewards [B]; group_size) -> [B]",
    "whiten": "(x [B, T], mask [B, T]) -> [B, T]",
}


@dataclass(frozen=True)
class Tolerance:
    """``units`` × the dtype's rounding step × the largest right number of a tensor: an error that rounding explains."""

    units: float
    reason: str

    def allowed(self, dtype: torch.dtype, right: Tensor) -> float:
        finite = right[right.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        return self.units * torch.finfo(dtype).eps * largest + math.sqrt(torch.finfo(dtype).tiny) * 1e-3


@dataclass(frozen=True)
class Check:
    """``measure`` is run twice: with the provider's function, and with ``right`` on the same inputs in float64."""

    name: str
    interface: str
    inputs: Callable[[torch.Generator], Inputs]
    right: Loss
    measure: Measure
    tolerance: Tolerance
    source: str  # where the right value comes from
    options: Mapping[str, Any] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()  # the inputs that are differentiated
    dtype: torch.dtype = torch.float32
    bug: str = ""  # how a loss is known to go wrong here


@dataclass(frozen=True)
class Result:
    check: str
    provider: str
    state: str  # "pass", "fail", "error", "refused" or "not supported"
    detail: str = ""


def mask_of(lengths: tuple[int, ...], width: int) -> Tensor:
    """True for as many first places of each row as its length.  # [rows, width]"""
    ends = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    return torch.arange(width, dtype=torch.int64, device="cpu") < ends[:, None]
