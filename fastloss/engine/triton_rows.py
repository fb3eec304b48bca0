"""Adapter of the ``triton`` backend."""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    from fastloss.kernels.launch import row_cross_entropy, row_grad, row_stats, scale_in_place
    from fastloss.kernels.launch_pairs import pair_loss, segment_expand, segment_sum, unpaired_loss
    from fastloss.kernels.launch_policy import discounted_returns, gae, policy_loss

    _why_not = ""
except ImportError as error:
    _why_not = f"triton cannot be imported ({error})"

__all__ = [
    "discounted_returns",
    "gae",
    "pair_loss",
    "policy_loss",
    "row_cross_entropy",
    "row_grad",
    "row_stats",
    "scale_in_place",
    "segment_expand",
    "segment_sum",
    "unpaired_loss",
    "why_not",
    "why_not_for",
]

_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str:
    if _why_not:
        return _why_not
    if (
        not _interpreted
        and not torch.cuda.is_available()
        and not (hasattr(torch, "xpu") and torch.xpu.is_available())
    ):
        return "no GPU is there (TRITON_INTERPRET=1 runs the kernels, slowly, on the CPU)"
    return ""


def why_not_for(tensor: Tensor) -> str:
    if tensor.device.type == "cpu" and not _interpreted:
        return "it takes GPU tensors, got cpu (TRITON_INTERPRET=1 runs the kernels, slowly, on the CPU)"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no kernel for {tensor.dtype}"
    return ""
