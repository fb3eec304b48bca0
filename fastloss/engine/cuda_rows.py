"""Adapter of the ``cuda`` backend: kernels built ahead of time, launched on PyTorch's current stream."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from fastloss.engine.native_pairs import NativePairs
from fastloss.engine.native_policy import NativePolicy
from fastloss.engine.native_rows import DTYPE_CODES, NativeRows

try:
    native: Any = importlib.import_module("fastloss._cuda")
    _why_not = ""
except ImportError as error:
    native = None
    _why_not = f"the native CUDA module is not there ({error})"


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


class _DeviceGuarded(NativeRows):
    """Launches on the tensor's own device, which need not be the current one."""

    def row_stats(self, logits: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with torch.cuda.device_of(logits):
            return super().row_stats(logits, *args, **kwargs)

    def row_grad(self, logits: Tensor, *args: Any, **kwargs: Any) -> None:
        with torch.cuda.device_of(logits):
            super().row_grad(logits, *args, **kwargs)

    def row_cross_entropy(self, logits: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with torch.cuda.device_of(logits):
            return super().row_cross_entropy(logits, *args, **kwargs)

    def scale_in_place(self, x: Tensor, scale: Tensor) -> None:
        with torch.cuda.device_of(x):
            super().scale_in_place(x, scale)


class _GuardedPairs(NativePairs):
    def _call(self, name: str, tensor: Tensor, *arguments: Any) -> None:
        with torch.cuda.device_of(tensor):
            super()._call(name, tensor, *arguments)


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def _ticket(tensor: Tensor) -> Tensor:
    """The counter of finished blocks: 0 between launches, one per stream; a CUDA graph being captured has its own."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=tensor.device)
    key = (tensor.device, _stream(tensor))
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=tensor.device)
    return _tickets[key]


class _GuardedPolicy(NativePolicy):
    def policy_loss(self, logprobs: Tensor, **kwargs: Any) -> dict[str, Any]:
        with torch.cuda.device_of(logprobs):
            return super().policy_loss(logprobs, **kwargs)

    def _scan(self, rewards: Tensor, *args: Any) -> tuple[Tensor | None, Tensor]:
        with torch.cuda.device_of(rewards):
            return super()._scan(rewards, *args)


rows = _DeviceGuarded(native, _stream)
pairs: NativePairs = _GuardedPairs(native, _stream)
policies: NativePolicy = _GuardedPolicy(native, _stream, _ticket)
_emulated = False


def row_stats(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return rows.row_stats(*args, **kwargs)


def row_grad(*args: Any, **kwargs: Any) -> None:
    rows.row_grad(*args, **kwargs)


def row_cross_entropy(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return rows.row_cross_entropy(*args, **kwargs)


def scale_in_place(x: Tensor, scale: Tensor) -> None:
    rows.scale_in_place(x, scale)


def segment_sum(*args: Any, **kwargs: Any) -> Tensor:
    return pairs.segment_sum(*args, **kwargs)


def segment_expand(*args: Any, **kwargs: Any) -> Tensor:
    return pairs.segment_expand(*args, **kwargs)


def pair_loss(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return pairs.pair_loss(*args, **kwargs)


def unpaired_loss(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return pairs.unpaired_loss(*args, **kwargs)


def policy_loss(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return policies.policy_loss(*args, **kwargs)


def gae(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return policies.gae(*args, **kwargs)


def discounted_returns(*args: Any, **kwargs: Any) -> Tensor:
    return policies.discounted_returns(*args, **kwargs)


def emulate(module: Any) -> None:
    """Run the CUDA source compiled for the CPU (tests/helpers/cuda_emulation) in place of the GPU's."""
    global rows, pairs, policies, _emulated, _why_not
    rows, _emulated, _why_not = NativeRows(module, lambda _: 0), True, ""  # type: ignore[assignment]
    pairs = NativePairs(module, lambda _: 0)
    policies = NativePolicy(module, lambda _: 0, _ticket)


def why_not() -> str:
    if _why_not:
        return _why_not
    if not _emulated and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return "" if _emulated or torch.version.cuda else "this torch is not built for CUDA"


@functools.cache
def _why_not_on(device: torch.device) -> str:
    """CUDA's own answer: an architecture that was not compiled, a driver older than the runtime in the module."""
    with torch.cuda.device(device):
        reason = native.why_not()
    return f"its kernels cannot run on {device} ({reason})" if reason else ""


def why_not_for(tensor: Tensor) -> str:
    if not tensor.is_cuda and not _emulated:
        return f"it takes cuda tensors, got {tensor.device.type}"
    if tensor.dtype not in DTYPE_CODES or tensor.dtype == torch.float64:
        return f"it has no kernel for {tensor.dtype}"
    return "" if _emulated else _why_not_on(tensor.device)
