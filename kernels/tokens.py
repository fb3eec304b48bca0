"""value_loss and kl_estimate of docs/sequences.md ("Single tokens"). Names: csrc/common/token_terms.h.

Bytes per token: value_loss 9 (13 with a clip, 4 more with shares) and 4 for the gradient; kl_estimate 8 (12 backwards) and 4.
value_loss takes one program per part of BLOCK tokens, and a second, tiny launch that adds the parts up in order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.engine.contract import ValueInputs, ValueResult
from fastloss.tables import KL_KINDS, VALUE_OUT

from .arguments import as_bytes, code, expect_float32, floats, on_device_of
from .policy import clamped, kl_and_slope
from .shapes import SHAPES

LOSS = tl.constexpr(VALUE_OUT.index("loss"))
SCALE = tl.constexpr(VALUE_OUT.index("scale"))
CLIP_RATIO = tl.constexpr(VALUE_OUT.index("clip_ratio"))
EXPLAINED_VARIANCE = tl.constexpr(VALUE_OUT.index("explained_variance"))
MEAN = tl.constexpr(VALUE_OUT.index("mean"))
SUMS = tl.constexpr(8)  # of a part, in the order of ValuePart
LOWEST = tl.constexpr(-3.402823466e38)


@triton.jit
def value_term(value, target, old_ptr, i, live, clip_range):
    """½ max((v - r)², (clip(v, old ± range) - r)²), its derivative, and whether the clip decided. A NaN in old stays one."""
    missed = value - target
    loss = 0.5 * missed * missed
    slope = missed
    clipped = live & (live == 0)
    if old_ptr is not None:
        old = tl.load(old_ptr + i, mask=live, other=0.0)
        moved = value - old
        near = (old + clamped(moved, -clip_range, clip_range)) - target
        further = 0.5 * near * near
        # What the clip leaves alone is not computed again: its rounding would decide which of the two is larger.
        stays = ((moved >= -clip_range) & (moved <= clip_range)) | (further <= loss)
        clipped = (further > loss) & (stays == 0)
        slope = tl.where(stays, slope, tl.where(moved == moved, 0.0, moved))  # a constant, but for a NaN
        loss = tl.where(stays, loss, further)
    return loss, slope, clipped


@triton.jit
def moments_of(x, live, tokens):
    """Mean of the live numbers and Σ (x - mean)², counted from the largest of them: the same numbers have no variance."""
    largest = tl.max(tl.where(live, x, LOWEST), 0)
    from_ = tl.where(largest > LOWEST, largest, 0.0).to(tl.float64)
    off = tl.where(live, x.to(tl.float64) - from_, 0.0)
    n = tl.maximum(tokens, 1.0)
    total = tl.sum(off, 0)
    squares = tl.sum(off * off, 0) - total * total / n
    squares = tl.where(squares < 0.0, 0.0, squares)
    return tl.where(tokens > 0.0, from_ + total / n, 0.0), squares


@triton.jit
def value_loss_kernel(
    values_ptr, returns_ptr, old_ptr, share_ptr, mask_ptr, n, clip_range, grad_ptr, parts_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    i = part * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    live = tl.load(mask_ptr + i, mask=there, other=0) != 0
    value = tl.load(values_ptr + i, mask=live, other=0.0)
    target = tl.load(returns_ptr + i, mask=live, other=0.0)
    loss, slope, clipped = value_term(value, target, old_ptr, i, live, clip_range)
    if share_ptr is not None:
        share = tl.load(share_ptr + i, mask=live, other=0.0)
        loss *= share
        slope *= share
    tl.store(grad_ptr + i, tl.where(live, slope, 0.0), mask=there)
    tokens = tl.sum(live.to(tl.float64), 0)
    returns_mean, returns_squares = moments_of(target, live, tokens)
    missed_mean, missed_squares = moments_of(target - value, live, tokens)
    row = parts_ptr + part * SUMS
    tl.store(row, tokens)
    tl.store(row + 1, tl.sum((clipped & live).to(tl.float64), 0))
    tl.store(row + 2, tl.sum(tl.where(live, loss, 0.0).to(tl.float64), 0))
    tl.store(row + 3, tl.sum(value.to(tl.float64), 0))
    tl.store(row + 4, returns_mean)
    tl.store(row + 5, returns_squares)
    tl.store(row + 6, missed_mean)
    tl.store(row + 7, missed_squares)


@triton.jit
def largest_mean(parts_ptr, place, count, ROWS: tl.constexpr):
    """Of the parts that have a token; 0 where none has."""
    most = tl.full([ROWS], float("-inf"), tl.float64)
    for start in range(0, count, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        tokens = tl.load(parts_ptr + row * SUMS, mask=row < count, other=0.0)
        mean = tl.load(parts_ptr + row * SUMS + place, mask=row < count, other=0.0)
        most = tl.maximum(most, tl.where(tokens > 0.0, mean, float("-inf")))
    found = tl.max(most, 0)
    return tl.where(found > float("-inf"), found, 0.0)


@triton.jit
def merged_squares(parts_ptr, place, count, tokens, ROWS: tl.constexpr):
    """Σ (x - mean)² of all tokens from each part's mean (at ``place``) and squares (after it)."""
    from_ = largest_mean(parts_ptr, place, count, ROWS)
    total = tl.zeros([ROWS], tl.float64)
    squares = tl.zeros([ROWS], tl.float64)
    for start in range(0, count, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        there = row < count
        n = tl.load(parts_ptr + row * SUMS, mask=there, other=0.0)
        mean = tl.load(parts_ptr + row * SUMS + place, mask=there, other=0.0)
        off = tl.where(n > 0.0, mean - from_, 0.0)
        total += n * off
        squares += tl.load(parts_ptr + row * SUMS + place + 1, mask=there, other=0.0) + n * off * off
    whole = tl.sum(total, 0)
    left = tl.sum(squares, 0) - whole * whole / tl.maximum(tokens, 1.0)
    return tl.where(left < 0.0, 0.0, left)


@triton.jit
def value_total_kernel(parts_ptr, count, scale_ptr, out_ptr, loss_ptr, ROWS: tl.constexpr):
    """``out`` from the parts' sums, in float64; the loss once more, as a tensor of its own."""
    sums = tl.zeros([ROWS, SUMS], tl.float64)
    k = tl.arange(0, SUMS)
    for start in range(0, count, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        there = (row < count)[:, None] & (k < 4)[None, :]
        sums += tl.load(parts_ptr + row[:, None] * SUMS + k[None, :], mask=there, other=0.0)
    all_ = tl.sum(sums, 0)
    tokens = tl.sum(tl.where(k == 0, all_, 0.0), 0)
    clipped = tl.sum(tl.where(k == 1, all_, 0.0), 0)
    loss = tl.sum(tl.where(k == 2, all_, 0.0), 0)
    values = tl.sum(tl.where(k == 3, all_, 0.0), 0)
    spread = merged_squares(parts_ptr, 4, count, tokens, ROWS)
    missed = merged_squares(parts_ptr, 6, count, tokens, ROWS)
    n = tl.maximum(tokens, 1.0)
    scale = 1.0 / n
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float64)
    explained = tl.where(spread <= 0.0, 0.0, 1.0 - missed / tl.where(spread <= 0.0, 1.0, spread))
    loss = (loss * scale).to(tl.float32)
    tl.store(out_ptr + LOSS, loss)
    tl.store(out_ptr + SCALE, scale.to(tl.float32))
    tl.store(out_ptr + CLIP_RATIO, (clipped / n).to(tl.float32))
    tl.store(out_ptr + EXPLAINED_VARIANCE, explained.to(tl.float32))
    tl.store(out_ptr + MEAN, (values / n).to(tl.float32))
    tl.store(loss_ptr, loss)


@triton.jit
def kl_estimate_kernel(
    logprobs_ptr, ref_ptr, upstream_ptr, n, out_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    raw = tl.load(ref_ptr + i, mask=there, other=0.0) - tl.load(logprobs_ptr + i, mask=there, other=0.0)
    kl, slope = kl_and_slope(raw, KIND)
    if upstream_ptr is not None:
        kl = tl.load(upstream_ptr + i, mask=there, other=0.0) * slope
    tl.store(out_ptr + i, kl, mask=there)


def value_loss(values: Tensor, inputs: ValueInputs) -> ValueResult:
    """The loss of flat float32 values ``[N]``, N > 0, its gradient (not yet times the scale) and its metrics."""
    x = inputs
    expect_float32(values=values, returns=x.returns, old=x.old, share=x.share, scale=x.scale)
    n, device = values.numel(), values.device
    parts = math.ceil(n / SHAPES["value"]["BLOCK"])
    grad, out = floats(n, device), floats(len(VALUE_OUT), device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    sums = torch.empty(parts * SUMS.value, dtype=torch.float64, device=device)
    with on_device_of(values):
        value_loss_kernel[(parts,)](
            values, x.returns, x.old, x.share, as_bytes("mask", x.mask), n, float(x.clip_range), grad, sums, **SHAPES["value"]
        )  # fmt: skip
        value_total_kernel[(1,)](sums, parts, x.scale, out, loss, **SHAPES["value_total"])
    return ValueResult(loss, out, grad)


def kl_estimate(logprobs: Tensor, ref: Tensor, kind: int, upstream: Tensor | None) -> Tensor:
    """float32 ``[N]``: the estimate, or ``upstream`` times its derivative for ``logprobs``."""
    expect_float32(logprobs=logprobs, ref=ref, upstream=upstream)
    out = floats(logprobs.numel(), logprobs.device)
    if out.numel():
        with on_device_of(logprobs):
            kl_estimate_kernel[(math.ceil(out.numel() / SHAPES["kl"]["BLOCK"]),)](
                logprobs, ref, upstream, out.numel(), out, KIND=code("kind", kind, KL_KINDS), **SHAPES["kl"]
            )  # fmt: skip
    return out
