"""x *= scale in place, the product in float32.

Bytes: x is read and written once; where the scale, which only the device knows, is 1, as the usual upstream gradient
is, nothing is touched.
A bounded number of programs, each walking over its share: where there is nothing to do there is little to launch.
"""

import triton
import triton.language as tl

from .rows import store_rounded


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
