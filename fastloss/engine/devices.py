"""What a device is and what its library of products can do, asked of the device itself and kept: not of its name, nor of torch's
version."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

# Columns of a product's first operand that are converted to the accumulator's dtype at a time, where the library cannot.
CONVERT_BLOCK = 2048
THIN_BLOCK = 512  # where the second has few columns: what is converted stays in a core's cache
# FASTLOSS_SKIP_IGNORED=0: on a GPU rows without a target are computed too, and no call waits for it.
SKIP_IGNORED = os.environ.get("FASTLOSS_SKIP_IGNORED", "1") != "0"


def is_gpu(device: torch.device) -> bool:
    """Whether ``device`` has a library of its own with fast low-precision products, and works on while the host goes ahead."""
    return device.type != "cpu"


def may_wait(device: torch.device) -> bool:
    """Whether a call may read a few numbers back from ``device``: a GPU then finishes first what it was given before. Not while
    a CUDA graph is captured, nor where torch.compile traces, nor with ``FASTLOSS_SKIP_IGNORED=0``."""
    if not is_gpu(device):
        return True
    if not SKIP_IGNORED or torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


# What a device says of a bad moment and not of itself: full memory, a CUDA graph that is being captured without a call before it.
_OF_THE_MOMENT = (
    "out of memory",
    "stream is capturing",
    "during capture",
    "STATUS_ALLOC_FAILED",
    "STATUS_NOT_INITIALIZED",
)


def of_the_moment(reason: str) -> bool:
    """Whether an error says nothing of what a device can do: nobody may keep it as an answer, and go another way ever after."""
    return any(words in reason for words in _OF_THE_MOMENT)


@functools.lru_cache(maxsize=64)
def accumulates(device: torch.device, dtype: torch.dtype, acc: torch.dtype) -> bool:
    """Whether ``device`` adds a product of ``dtype`` operands to an accumulator of ``acc``: CUDA does from torch 2.10 on, ROCm
    and older ones do not."""
    operand = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=acc, device=device)
    try:
        torch.addmm(out, operand, operand, out_dtype=acc, out=out)
    except (RuntimeError, TypeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        if of_the_moment(str(error)):
            raise
        return False
    return True


@functools.lru_cache(maxsize=64)
def multiplies_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``device`` has products of ``dtype`` operands with a float32 result."""
    operand = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(operand, operand, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError, ValueError) as error:
        if of_the_moment(str(error)):
            raise
        return False
    return True


def multiply_wide(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out`` (float32) = a b, not rounded to the dtype of ``a`` and ``b`` on the way. a: [rows, D], b: [D, V]."""
    if multiplies_wide(out.device, a.dtype):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
        return
    a = a.float()
    for start in range(0, b.shape[1], CONVERT_BLOCK):
        torch.mm(a, b[:, start : start + CONVERT_BLOCK].float(), out=out[:, start : start + CONVERT_BLOCK])


def multiply_thin(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 ``[rows, r]``, of low-precision ``a [rows, V]`` and a thin float32 ``b [V, r]``, which is not rounded."""
    if multiplies_wide(a.device, a.dtype):
        high, low = split(b, a.dtype)
        return torch.mm(a, high, out_dtype=torch.float32) + torch.mm(a, low, out_dtype=torch.float32)
    out = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    for start in range(0, a.shape[1], THIN_BLOCK):
        columns = a[:, start : start + THIN_BLOCK].to(out.dtype)
        torch.addmm(out, columns, b[start : start + THIN_BLOCK], out=out)
    return out


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of ``dtype`` whose sum is ``x`` to twice the digits of ``dtype``."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).to(dtype)


def add_wide(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out`` (float32) += a b, not rounded to the dtype of ``a`` and ``b`` on the way; ``b`` [r, V] is thin."""
    if accumulates(out.device, a.dtype, out.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)


def add_transposed(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """``out`` (+)= aᵀ b, rounded to the dtype of ``out`` and no sooner; without ``accumulate`` what ``out`` held is not read.

    a: [rows, V], b: [rows, D], out: [V, D] in the accumulation dtype. No CPU code of fastloss is called: any device.
    """
    beta = int(accumulate)
    if a.dtype == out.dtype:
        torch.addmm(out, a.t(), b, beta=beta, out=out)
    elif accumulates(out.device, a.dtype, out.dtype):
        torch.addmm(out, a.t(), b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        b = b.to(out.dtype)
        for start in range(0, a.shape[1], CONVERT_BLOCK):
            block = out[start : start + CONVERT_BLOCK]
            columns = a[:, start : start + CONVERT_BLOCK].to(out.dtype)
            torch.addmm(block, columns.t(), b, beta=beta, out=block)
