"""z = x wᵀ in float32, whose every number follows from its row of x and its row of w alone: the same bits in any batch.

Bytes: as any GEMM of tiles [M, N]: x is read V / N times, w rows / M times, z is written once; bound by arithmetic.
The tiles' sizes and the order over K follow from the dtype, never from how many rows there are; nothing is split over K, and
nothing is added by atomics. A library chooses all of that by the shape, so that a row's last bits depend on its batch. Not tuned
on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import expect, on_device_of
from .rows import DTYPES, INTERPRETED
from .shapes import TILES, WARP

FARTHEST = 1 << 23  # elements from row to row: 128 of them are 32-bit offsets
TOGETHER = 8  # tiles of rows that go through the weight together: each tile of it, 1 MB at D = 4096 in bfloat16, is read for all of them at about one time


@triton.jit(do_not_specialize=["rows"])
def logits_kernel(
    x_ptr, x_stride, w_ptr, w_stride, z_ptr, z_stride, rows, vocab, dim,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    across = tl.cdiv(vocab, N)
    first = program // (TOGETHER * across) * TOGETHER
    high = tl.minimum(tl.cdiv(rows, M) - first, TOGETHER)
    inside = program % (TOGETHER * across)
    top, left = (first + inside % high) * M, inside // high * N
    row, column, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    # A tile may begin 2^31 elements away; within it offsets are 32-bit, or unaligned rows would spill.
    x = x_ptr + top.to(tl.int64) * x_stride
    w = w_ptr + left.to(tl.int64) * w_stride
    x_at = row[:, None] * x_stride + k[None, :]
    w_at = column[None, :] * w_stride + k[:, None]
    has_row, has_column = (top + row < rows)[:, None], (left + column < vocab)[None, :]
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, dim, K):
        there = start + k < dim
        a = tl.load(x + x_at, mask=has_row & there[None, :], other=0.0)
        b = tl.load(w + w_at, mask=has_column & there[:, None], other=0.0)
        if (
            INTERPRETED
        ):  # numpy's product is wrong in bfloat16, and its last bits follow from the place in the tile
            acc += tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        x += K
        w += K
    z = z_ptr + top.to(tl.int64) * z_stride + left
    tl.store(z + row[:, None] * z_stride + column[None, :], acc, mask=has_row & has_column)


def tile_of(itemsize: int, warp: int = WARP) -> dict[str, Any]:
    """The constants of a launch over operands of ``itemsize`` bytes. ``warp``: 64 on AMD, whose shared memory of 64 KB has two stages."""
    tile = TILES[itemsize]
    return {**tile, "TOGETHER": TOGETHER, "num_stages": 2 if warp == 64 else tile["num_stages"]}


def invariant_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out [rows, V] = hidden [rows, D] · weight [V, D]ᵀ``; ``out`` float32, the others float32, bfloat16 or float16; unit stride
    along a row."""
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden: expected float32, bfloat16 or float16, got {hidden.dtype}")
    expect(hidden.dtype, hidden=hidden, weight=weight)
    expect(torch.float32, out=out)
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    if weight.shape[1] != dim or out.shape != (rows, vocab):
        raise ValueError(f"out: expected [{rows}, {vocab}] of operands of one width, got {list(out.shape)}")
    if any(x.stride(1) != 1 and x.shape[1] > 1 for x in (hidden, weight, out)):
        raise ValueError("hidden, weight, out: expected unit stride along a row")
    if any(x.stride(0) >= FARTHEST for x in (hidden, weight, out)):
        raise ValueError(f"hidden, weight, out: expected rows less than {FARTHEST} elements apart")
    if not rows or not vocab:
        return
    tile = tile_of(hidden.element_size())
    programs = triton.cdiv(rows, tile["M"]) * triton.cdiv(vocab, tile["N"])
    with on_device_of(hidden):
        logits_kernel[(programs,)](
            hidden, hidden.stride(0), weight, weight.stride(0), out, out.stride(0), rows, vocab, dim, **tile
        )
