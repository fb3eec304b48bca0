"""factor · Σ values, and one over how many targets count: what a reduction needs beside the row kernels.

Bytes: one number a row is read, 4 or 8 bytes, and one written.
One program, so that one launch does it and the sum has one order: a thread adds up its own entries, which meet once, after the
loop. The caller gives no more rows than one is quick with.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.engine.contract import Factor

from .arguments import expect, expect_float32, floats, on_device_of
from .shapes import SHAPES


@triton.jit
def sum_rows_kernel(values_ptr, n, factor, factor_ptr, out_ptr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + i, mask=i < n, other=0.0)
    if factor_ptr is not None:
        factor *= tl.load(factor_ptr)
    tl.store(out_ptr, tl.sum(total, 0) * factor)


@triton.jit
def reciprocal_count_kernel(target_ptr, n, ignore_index, out_ptr, BLOCK: tl.constexpr):
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count += (tl.load(target_ptr + i, mask=i < n, other=ignore_index) != ignore_index).to(tl.int32)
    tl.store(out_ptr, tl.div_rn(1.0, tl.sum(count, 0).to(tl.float32)))


def sum_rows(values: Tensor, factor: Factor) -> Tensor:
    """``factor · Σ values``, float32 0-d, of contiguous float32 ``values``."""
    expect_float32(values=values, factor=factor.tensor)
    out = floats(1, values.device).view(())
    with on_device_of(values):
        sum_rows_kernel[(1,)](
            values, values.numel(), float(factor.value), factor.tensor, out, **SHAPES["reduce"]
        )
    return out


def reciprocal_count(target: Tensor, ignore_index: int) -> Tensor:
    """``1 / (how many of target are not ignore_index)``, float32 0-d, of a contiguous int64 ``target``."""
    expect(torch.int64, target=target)
    out = floats(1, target.device).view(())
    with on_device_of(target):
        reciprocal_count_kernel[(1,)](target, target.numel(), ignore_index, out, **SHAPES["reduce"])
    return out
