"""A gradient that was made in the forward, times what the upstream gradient turns out to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.engine import backend as dispatch


def scale_in_place(grad: Tensor, scale: float | Tensor, rows: Any = None) -> Tensor:
    """``grad`` (exclusively ours) times ``scale``: a number, a 0-d tensor, or a column of one per row.

    A 0-d tensor on a GPU is read by the kernel alone: the host does not wait for it, and where it is 1 the gradient is
    neither read nor written. (torch's ``mul_`` would do both, and round the scale to the gradient's dtype.)

    Args:
        rows: the adapter whose kernel multiplies; by default that of the first GPU backend that takes ``grad``.
    """
    if not isinstance(scale, Tensor):
        return grad if scale == 1.0 else grad.mul_(scale)
    matrix = _as_rows(grad) if scale.dim() == 0 else None
    if matrix is None:
        return grad.mul_(scale)
    kernels = rows if hasattr(rows, "scale_in_place") else dispatch.gpu_kernels(grad)
    if kernels is None or kernels.why_not_for(grad):
        return grad.mul_(scale)
    kernels.scale_in_place(matrix, scale.to(grad.device, torch.float32))
    torch.autograd.graph.increment_version(grad)
    return grad


def _as_rows(x: Tensor) -> Tensor | None:
    """``x`` as ``[rows, width]`` in which a row is contiguous, as few rows as there can be; None where it is none."""
    if x.is_contiguous():
        return x.view(1, -1)
    if x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(0) >= x.shape[1]:
        return x
    return None
