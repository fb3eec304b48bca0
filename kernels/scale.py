"""x *= scale in place, the product in float32.

Bytes: x is read and written once; where the scale, which only the device knows, is 1, as the usual upstream gradient
is, nothing is touched.
A bounded number of programs, each walking over its share: where there is nothing to do there is little to launch.
"""

import triton
import triton.language as tl
from torch import Tensor

from .arguments import expect, expect_float32, on_device_of
from .rows import DTYPES, store_rounded
from .shapes import SHAPES

# Enough programs for any GPU, few enough to cost little where the scale is 1. Not tuned on a GPU.
SCALE_PROGRAMS = 2048


@triton.jit
def scale_kernel(x_ptr, row_stride, rows, width, scale_ptr, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        # A row may be a whole tensor: its indices are 64-bit.
        first = tl.program_id(1).to(tl.int64) * BLOCK
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            x_row = x_ptr + tl.cast(row, tl.int64) * row_stride
            for start in range(first, width, tl.num_programs(1) * BLOCK):
                i = start + tl.arange(0, BLOCK)
                x = tl.load(x_row + i, mask=i < width, other=0.0).to(tl.float32)
                store_rounded(x_row + i, x * scale, i < width)


def scale_in_place(x: Tensor, scale: Tensor) -> None:
    """``x [rows, width]`` (unit stride along a row) times ``scale``, one float32."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    expect(x.dtype, x=x)
    expect_float32(scale=scale)
    rows, width = x.shape
    at_once = min(rows, SCALE_PROGRAMS)
    along = min(triton.cdiv(width, SHAPES["scale"]["BLOCK"]), max(SCALE_PROGRAMS // max(at_once, 1), 1))
    if rows and width:
        with on_device_of(x):
            scale_kernel[(at_once, along)](x, x.stride(0), rows, width, scale, **SHAPES["scale"])
