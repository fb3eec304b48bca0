"""Numbers as tensors, for PyTorch's operations that take no symbolic ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.tables import Number


def scalar(like: Tensor, value: Number) -> Tensor:
    """``value``, 0-d, in the dtype and on the device of ``like``. One that changes under torch.compile is symbolic: a product
    takes it, where ``full`` and ``clamp`` would be compiled again at each value."""
    return torch.ones((), dtype=like.dtype, device=like.device) * value
