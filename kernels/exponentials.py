"""E_v = 2^((z_v - z_t) log2 e) · slope_v over a row's bfloat16 logits, its cross-entropy, and what E is to be multiplied by.

Bytes per row: V·2 are read once and written once, in place, with one exponential an entry; a row whose exponentials do not fit is
zeroed (2 V more) and marked. One program per row, as in rows.py, whose launch shapes it has. docs/engine.md has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.engine.contract import WHOLE, ExponentialRows, Factor
from fastloss.engine.exponentials import CANCELLED, MOST
from fastloss.tables import CrossEntropyOptions

from . import exact
from .arguments import expect, expect_float32, floats, on_device_of, options_of
from .rows import (
    INF,
    _row_of,
    is_raw,
    launch_shape,
    load_values,
    nearest_logit,
    places,
    rate_of,
    read_target,
    scale_of,
    store_rounded,
    unit_of,
)

LARGEST = tl.constexpr(MOST)
SMALL = tl.constexpr(CANCELLED)


@triton.jit
def write_block(
    sums, x_row, bias_ptr, v, mask, t, scale, softcap, rate, value_t, RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):  # fmt: skip
    """Overwrites the entries v, which are read before; the sums of each lane with theirs, the target left out."""
    x, slope = load_values(x_row, bias_ptr, v, mask, scale, softcap, RAW, HAS_SOFTCAP, "evict_first")
    e = tl.exp2((x - value_t) * rate)
    if mask is not None:
        e = tl.where(mask, e, 0.0)
    if HAS_SOFTCAP:
        e = tl.where(v == t, 0.0, e)
        store_rounded(x_row + v, e * slope, mask)
    else:
        store_rounded(x_row + v, e, mask)
    return sums + tl.sum(e, 1)


@triton.jit
def exponentials_kernel(
    x_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, row_scale_ptr, softcap, w_ptr, z_loss, factor, factor_ptr,
    loss_ptr, lse_parts_ptr, multiplier_ptr, residue_ptr, rough_ptr,
    RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(scale, row_scale_ptr, row)
    x_row = x_ptr + row * row_stride
    wide_t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
    t = wide_t.to(tl.int32)  # compared with every entry
    unit = unit_of(scale, RAW)
    rate = rate_of(unit, x_row)
    value_t, slope_t = load_values(x_row, bias_ptr, t, has_target, scale, softcap, RAW, HAS_SOFTCAP, "")
    z_t = unit * value_t
    tl.debug_barrier()  # every thread has read the target's logit before one writes over it
    # A logit whose exponential is 0, so that no entry is asked whether it is the target; a soft-cap makes it finite.
    if not HAS_SOFTCAP:
        tl.store(x_row + t, tl.where(scale < 0.0, INF, -INF), mask=has_target)
        tl.debug_barrier()
    whole = vocab // BLOCK * BLOCK
    sums = tl.zeros([BLOCK // WIDTH], tl.float32)
    if has_target:
        for start in range(0, whole, BLOCK):
            v = places(start, ALIGNED, WIDTH, BLOCK)
            sums = write_block(
                sums, x_row, bias_ptr, v, None, t, scale, softcap, rate, value_t, RAW, HAS_SOFTCAP
            )
        if whole < vocab:
            v = places(whole, ALIGNED, WIDTH, BLOCK)
            sums = write_block(
                sums, x_row, bias_ptr, v, v < vocab, t, scale, softcap, rate, value_t, RAW, HAS_SOFTCAP
            )
    others = tl.sum(sums, 0)  # of e^(z - z_t), without the target
    tl.debug_barrier()  # the row's entries are written before the target's

    log_sum = tl.where(others < 1.0, exact.log1p(exact.at_most(others, 1.0)), exact.log(1.0 + others))
    lse = z_t + log_sum
    hit = 1.0
    if w_ptr is not None:
        hit = tl.load(w_ptr + t, mask=has_target, other=1.0)
    b = hit + 2.0 * z_loss * lse
    # Comparisons that a NaN fails. The last: what the target's entry is divided by.
    solvable = tl.where(b == 0.0, hit == 0.0, SMALL * tl.abs(b) >= tl.abs(hit))
    fits = has_target & (others <= LARGEST) & (tl.abs(z_t) < INF) & solvable
    if fits:
        # (b p_t - hit) / (b / sum), without the difference of p_t and 1.
        at_target = tl.where(b == 0.0, 0.0, tl.div_rn(b - hit - hit * others, b))
        if HAS_SOFTCAP:
            at_target *= slope_t
        rounded = nearest_logit(at_target, x_row)
        tl.store(x_row + t, rounded.to(tl.bfloat16))
        tl.store(residue_ptr + row, at_target - rounded)
    else:
        tl.store(residue_ptr + row, 0.0)
        for start in range(0, vocab, BLOCK):
            v = start + tl.arange(0, BLOCK)
            store_rounded(x_row + v, tl.zeros([BLOCK], tl.float32), v < vocab)
    factor *= scale
    if factor_ptr is not None:
        factor *= tl.load(factor_ptr)
    tl.store(loss_ptr + row, tl.where(fits, hit * log_sum + z_loss * lse * lse, 0.0))
    tl.store(lse_parts_ptr + 2 * row, tl.where(fits, z_t, 0.0))
    tl.store(lse_parts_ptr + 2 * row + 1, tl.where(fits, log_sum, 0.0))
    tl.store(multiplier_ptr + row, tl.where(fits, tl.div_rn(b, 1.0 + others) * factor, 0.0))
    tl.store(rough_ptr + row, ((fits | ignored) == 0).to(tl.uint8))


def row_exponentials(
    logits: Tensor,
    target: Tensor,
    options: CrossEntropyOptions,
    *,
    factor: Factor = WHOLE,
    bias: Tensor | None = None,
    w: Tensor | None = None,
) -> ExponentialRows:
    """Overwrites bfloat16 ``logits [rows, V]``; losses, multipliers and marks are new."""
    vocab, rows, device = _row_of(logits), logits.shape[0], logits.device
    expect(torch.bfloat16, logits=logits)
    expect(torch.int64, target=target)
    expect_float32(bias=bias, w=w, factor=factor.tensor, row_scale=options.row_scale)
    if options.label_smoothing:
        raise ValueError("label_smoothing: expected 0: a probability is rounded before it is taken off")
    rough = torch.empty(rows, dtype=torch.uint8, device=device)
    loss, parts, multiplier, residue = (floats(n, device) for n in (rows, 2 * rows, rows, rows))
    out = ExponentialRows(loss, parts.view(rows, 2), multiplier, residue, rough)
    if rows:
        with on_device_of(logits):
            exponentials_kernel[(rows,)](
                logits, logits.stride(0), vocab, target, options.ignore_index, bias, float(options.scale), options.row_scale,
                float(options.softcap), w, float(options.z_loss), float(factor.value), factor.tensor, *out,
                RAW=is_raw(logits, options, bias), HAS_SOFTCAP=options.softcap > 0,
                **options_of(launch_shape(vocab, options.softcap > 0, logits.element_size()), device),
            )  # fmt: skip
    return out
