"""What every launch does first: its tensors are memory that a kernel may read, its codes exist, its device is the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.engine import gate


def expect(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Each tensor that is given is plain memory of ``dtype``."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        gate.check(tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {_name(dtype)}, got {_name(tensor.dtype)}")


def expect_float32(**tensors: Tensor | None) -> None:
    expect(torch.float32, **tensors)


def code(name: str, value: int, names: Sequence[str]) -> int:
    """``value``, the position of one of ``names`` (fastloss/tables.py)."""
    if value not in range(len(names)):
        raise ValueError(f"{name}: expected the code of one of {', '.join(map(repr, names))}, got {value}")
    return int(value)


def as_bytes(name: str, mask: Tensor | None) -> Tensor | None:
    """A mask of bool or uint8 as the kernels read it."""
    if mask is None:
        return None
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    expect(torch.uint8, **{name: mask})
    return mask


def floats(n: int, device: torch.device) -> Tensor:
    """An output ``[n]``, whatever the default dtype and device are."""
    return torch.empty(n, dtype=torch.float32, device=device)


def options_of(shape: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A launch shape without what the device's compiler does not know: ``maxnreg`` is NVIDIA's."""
    if device.type == "cuda" and torch.version.hip is None:
        return shape
    return {name: value for name, value in shape.items() if name != "maxnreg"}


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":  # the interpreter, whose numpy warns of every log(0) and inf - inf
        import numpy

        return numpy.errstate(all="ignore")
    module = getattr(torch, tensor.device.type)  # torch.cuda, torch.xpu
    same = tensor.device.index == module.current_device()
    return contextlib.nullcontext() if same else module.device(tensor.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
