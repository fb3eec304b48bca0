"""z = scale · softcap · tanh((x + bias) / softcap); lse = log Σ e^z and its company; dx from (a, b, c, d) · slope.

Bytes per row: row_stats reads V·size; row_grad reads and writes V·size; row_cross_entropy with a gradient reads V·size twice
and writes it once. The second reading comes from L2 where the rows in flight fit there (two on each multiprocessor: in
bfloat16 up to V of about 64k on an H100, so not at V = 128k), else from memory: few programs of many threads, so that few rows
are in flight.
One program per row, a loop over vocabulary blocks in which a thread keeps the maximum and the sums of its own entries; they
meet once, after the loop. A row's numbers depend on that row alone, nothing is atomic.

A pointer that is None is a compile-time constant: its loads, stores and sums are not compiled. docs/engine.md has the
formulas; names here are those of that page.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import WHOLE, Factor
from fastloss.tables import LSE_PARTS, STATS, CrossEntropyOptions, RowOptions

from .arguments import expect, expect_float32, on_device_of, options_of
from .shapes import ROWS, WARP

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_VOCAB = 1 << 30  # indices within a row are 32-bit, with room for one block more

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROUNDING = tl.constexpr(
    12582912.0 + 127.0
)  # 1.5 · 2^23: a sum with it has the nearest whole number, and float32's bias, in its last bits


@triton.jit
def exp(x, x_row):
    """e^x, for float32 logits within 3 ulp.

    2^t of the rounded t = x log2 e is 2 + 1.2 |x| ulp off. Near 0 that is little, so x = n log 2 + r. The other dtypes'
    rounding hides it. tl.exp2 is one instruction, whose smallest results are 0; tl.exp takes four.
    """
    if x_row.dtype.element_ty == tl.float32:
        near = tl.minimum(tl.maximum(x, -88.0), 88.0)  # n from -127, whose power is 0, to 127
        shifted = near * LOG2E + ROUNDING
        n = shifted - ROUNDING
        power_of_n = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        r = x - n * 0.693145751953125  # the high digits of log 2: n times them is exact. A NaN stays
        return tl.exp2((r - n * 1.42860677e-6) * LOG2E) * power_of_n
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def power(exponent, x_row):
    """e^exponent for float32 logits, else 2^exponent: exponents are in the unit that costs less (rate_of)."""
    if x_row.dtype.element_ty == tl.float32:
        return exp(exponent, x_row)
    else:
        return tl.exp2(exponent)


@triton.jit
def in_e(exponent, x_row):
    """An exponent of ``power`` as one of e."""
    if x_row.dtype.element_ty == tl.float32:
        return exponent
    else:
        return exponent * LN2


@triton.jit
def unit_of(scale, RAW: tl.constexpr):
    """z of a value of 1 (load_values)."""
    if RAW:
        return scale
    else:
        return 1.0


@triton.jit
def rate_of(unit, x_row):
    """Exponents of ``power`` of a value of 1."""
    if x_row.dtype.element_ty == tl.float32:
        return unit
    else:
        return unit * LOG2E


@triton.jit
def nearest_logit(x, x_row):
    """A float32 number as a logit would hold it."""
    if x_row.dtype.element_ty == tl.bfloat16:  # by its bits: the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(x_row.dtype.element_ty).to(tl.float32)


@triton.jit
def fma(x, y, z):
    """x y + z, rounded once; numpy, which the interpreter has, rounds twice."""
    if INTERPRETED:
        return (tl.cast(x, tl.float64) * tl.cast(y, tl.float64) + tl.cast(z, tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def tanh_and_slope(y):
    """tanh(y) within 3 ulp and 1 - tanh(y)^2, from one exponential."""
    # 1 - 2q/(1+q) with q = e^(-2|y|) loses its digits near 0: there y + y^3 P(y^2), the polynomial of
    # csrc/cuda/transform.h, fitted on [0, 0.6]. 4q/(1+q)^2 keeps its digits far out, where 1 - tanh^2 has none.
    magnitude = tl.abs(y)
    q = tl.exp2(magnitude * (-2.0 * LOG2E))
    r = 1.0 / (1.0 + q)
    far = 1.0 - 2.0 * q * r
    y2 = y * y
    poly = -6.276389118e-3 * y2 + 2.111621574e-2
    poly = poly * y2 - 5.387513712e-2
    poly = poly * y2 + 1.333292425e-1
    poly = poly * y2 - 3.333333135e-1
    near = magnitude + magnitude * y2 * poly
    is_near = magnitude < 0.6
    slope = tl.where(is_near, 1.0 - near * near, 4.0 * q * r * r)
    t = tl.where(is_near, near, far)
    return tl.where(y < 0, -t, t), slope


@triton.jit
def load(ptr, mask, EVICT: tl.constexpr):
    """What is at ``ptr``; 0 outside the mask, where there is one."""
    if mask is None:
        return tl.load(ptr, eviction_policy=EVICT)
    else:
        return tl.load(ptr, mask=mask, other=0.0, eviction_policy=EVICT)


@triton.jit
def load_logits(x_row, bias_ptr, v, mask, scale, softcap, HAS_SOFTCAP: tl.constexpr, EVICT: tl.constexpr):
    """z at v (a block or one number) and the soft-cap's slope there."""
    u = load(x_row + v, mask, EVICT).to(tl.float32)
    if bias_ptr is not None:
        u += load(bias_ptr + v, mask, "")
    slope = 1.0
    if HAS_SOFTCAP:
        t, slope = tanh_and_slope(tl.div_rn(u, softcap))  # `/` is 2 ulp off on a GPU
        u = softcap * t
    return scale * u, slope


@triton.jit
def load_values(
    x_row, bias_ptr, v, mask, scale, softcap, RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVICT: tl.constexpr
):  # fmt: skip
    """Numbers in the order of z and the soft-cap's slope: the raw logits where z is only a factor above 0 away, else z itself.

    Differences of raw logits are exact where they are large beside others, their product with one factor for both scale and
    log2 e is an exponent, and their maximum needs no product.
    """
    if RAW:
        return load(x_row + v, mask, EVICT).to(tl.float32), 1.0
    else:
        return load_logits(x_row, bias_ptr, v, mask, scale, softcap, HAS_SOFTCAP, EVICT)


@triton.jit
def base_of(m):
    """The value that sums are relative to: the maximum so far, or 0 while that is infinite."""
    return tl.where(tl.abs(m) == INF, 0.0, m)


@triton.jit
def places(start, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The entries of a block, [BLOCK / WIDTH, WIDTH], of which a thread has whole rows: neighbours, which it loads at once, or
    entries that are so far apart that neighbouring threads have neighbouring ones."""
    lanes = tl.arange(0, BLOCK // WIDTH)[:, None]
    own = tl.arange(0, WIDTH)[None, :]
    if ALIGNED:
        return start + lanes * WIDTH + own
    else:
        return start + own * (BLOCK // WIDTH) + lanes


@triton.jit
def add_block(
    m, s, sz, sq, d_sum, w_sum, wz, before, x_row, bias_ptr, w_row, v, mask, scale, softcap, rate,
    RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, SPREAD: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """The maximum and the sums of read_row, of each lane, with those of the entries v; a lane has had ``before`` others."""
    x, _ = load_values(x_row, bias_ptr, v, mask, scale, softcap, RAW, HAS_SOFTCAP, EVICT)
    if mask is not None:
        x = tl.where(mask, x, -INF)
    # A maximum may drop a NaN, but the NaN's exponential stays in the sum.
    new_m = tl.maximum(m, tl.max(x, 1))
    base = base_of(new_m)
    shift = (base_of(m) - base) * rate
    factor = power((m - base) * rate, x_row)
    d = (x - base[:, None]) * rate
    e = power(d, x_row)
    if ENTROPY:
        sz = factor * (sz + shift * s) + tl.sum(e * tl.maximum(d, -200.0), 1)  # 0 · (-inf) = 0
    if SQUARES:
        sq = factor * factor * sq + tl.sum(e * e, 1)
    if mask is not None:
        d = tl.where(mask, d, 0.0)
    if MEAN or (SPREAD and w_row is None):
        d_sum += shift * before + tl.sum(d, 1)
    if SPREAD and w_row is not None:
        w = load(w_row + v, mask, "")
        wz += shift * w_sum + tl.sum(w * d, 1)
        w_sum -= tl.sum(-w, 1)  # written as an addition, it fails an assertion of Triton 3.8's
    s = factor * s + tl.sum(e, 1)
    return new_m, s, sz, sq, d_sum, w_sum, wz


@triton.jit
def read_row(
    x_row, bias_ptr, w_row, end, scale, softcap, rate,
    RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, SPREAD: tl.constexpr,
    EVICT: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Online softmax over v < end. With the values' maximum m, exponents d of value - base_of(m) and e = power(d):
    m, Σ e, Σ e d, Σ e^2, Σ d, Σ w, Σ w d."""
    zero = tl.zeros([BLOCK // WIDTH], tl.float32)
    m, s, sz, sq, d_sum, w_sum, wz = zero - INF, zero, zero, zero, zero, zero, zero
    whole = end // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        before = tl.cast(start // BLOCK * WIDTH, tl.float32)
        m, s, sz, sq, d_sum, w_sum, wz = add_block(
            m, s, sz, sq, d_sum, w_sum, wz, before, x_row, bias_ptr, w_row, places(start, ALIGNED, WIDTH, BLOCK), None, scale, softcap, rate,
            RAW, HAS_SOFTCAP, ENTROPY, SQUARES, MEAN, SPREAD, EVICT,
        )  # fmt: skip
    if whole < end:
        v = places(whole, ALIGNED, WIDTH, BLOCK)
        before = tl.cast(whole // BLOCK * WIDTH, tl.float32)
        m, s, sz, sq, d_sum, w_sum, wz = add_block(
            m, s, sz, sq, d_sum, w_sum, wz, before, x_row, bias_ptr, w_row, v, v < end, scale, softcap, rate,
            RAW, HAS_SOFTCAP, ENTROPY, SQUARES, MEAN, SPREAD, EVICT,
        )  # fmt: skip
    row_m = tl.max(m, 0)
    base = base_of(row_m)
    shift = (base_of(m) - base) * rate
    factor = power((m - base) * rate, x_row)
    if ENTROPY:
        sz = tl.sum(factor * (sz + shift * s), 0)
    if SQUARES:
        sq = tl.sum(factor * factor * sq, 0)
    if MEAN or (SPREAD and w_row is None):
        mine = tl.sum(tl.where(places(0, ALIGNED, WIDTH, BLOCK) < end - whole, 1.0, 0.0), 1)
        d_sum = tl.sum(d_sum + shift * (mine + tl.cast(whole // BLOCK * WIDTH, tl.float32)), 0)
    if SPREAD:
        if w_row is not None:
            wz = tl.sum(wz + shift * w_sum, 0)
            w_sum = tl.sum(w_sum, 0)
        else:
            wz = d_sum
            w_sum = tl.cast(end, tl.float32)
    else:
        w_sum = 0.0
    return row_m, tl.sum(factor * s, 0), sz, sq, d_sum, w_sum, wz


@triton.jit
def write_stats(
    row, x_row, ignored, has_target, value_t, unit, m, s, log_s, sz, sq, d_sum, vocab,
    logsumexp_ptr, logprobs_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logits_ptr, is_top1_ptr, lse_parts_ptr,
):  # fmt: skip
    """Row statistics from the sums of read_row; ``log_s`` is NaN where the row is."""
    base, low = largest_z(m, unit)
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + row, tl.where(ignored, 0.0, base + (log_s + low)))
    if logprobs_ptr is not None:
        logprob = tl.where(has_target, unit * (value_t - base_of(m)) - log_s, float("nan"))
        tl.store(logprobs_ptr + row, tl.where(ignored, 0.0, logprob))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(ignored, 0.0, log_s - in_e(sz / s, x_row)))
    if log_sum_sq_probs_ptr is not None:
        tl.store(log_sum_sq_probs_ptr + row, tl.where(ignored, 0.0, tl.log(sq) - 2.0 * log_s))
    if mean_logits_ptr is not None:
        mean = base + (low + in_e(d_sum / vocab, x_row))
        tl.store(mean_logits_ptr + row, tl.where(ignored, 0.0, mean))
    if is_top1_ptr is not None:
        top = has_target & (value_t >= m) & (s == s)  # s == s: no NaN in the row
        tl.store(is_top1_ptr + row, top.to(tl.uint8))
    if lse_parts_ptr is not None:
        tl.store(lse_parts_ptr + 2 * row, tl.where(ignored, 0.0, base))
        tl.store(lse_parts_ptr + 2 * row + 1, tl.where(ignored, 0.0, log_s + low))


@triton.jit
def rounded_off(unit, value, z):
    """What the rounding of z = unit · value took off; 0 beyond 2^24, where it has no room for a logarithm of a sum beside it."""
    return tl.where(tl.abs(z) < 16777216.0, fma(unit, value, -z), 0.0)


@triton.jit
def largest_z(m, unit):
    """z of the largest value, and what its rounding took off."""
    z = unit * base_of(m)
    return z, rounded_off(unit, base_of(m), z)


@triton.jit
def read_target(target_ptr, row, vocab, ignore_index):
    """The target, 0 where there is none to read; whether the row is ignored; whether the target is in the vocabulary."""
    t = tl.load(target_ptr + row)
    ignored = t == ignore_index
    has_target = (t >= 0) & (t < vocab) & (t != ignore_index)
    return tl.where(has_target, t, 0), ignored, has_target


@triton.jit
def scale_of(scale, row_scale_ptr, row):
    """The factor of a row's logits."""
    if row_scale_ptr is not None:
        scale = scale * tl.load(row_scale_ptr + row)
    return scale


@triton.jit
def row_stats_kernel(
    x_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, row_scale_ptr, softcap,
    logsumexp_ptr, logprobs_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logits_ptr, is_top1_ptr, lse_parts_ptr,
    RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(scale, row_scale_ptr, row)
    x_row = x_ptr + row * row_stride
    ignored = row < 0  # no row is
    has_target = row < 0
    value_t = 0.0
    unit = unit_of(scale, RAW)
    if target_ptr is not None:
        t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
        value_t, _ = load_values(x_row, bias_ptr, t, has_target, scale, softcap, RAW, HAS_SOFTCAP, "")
    end = tl.where(ignored, 0, vocab)  # an ignored row is not read
    m, s, sz, sq, d_sum, _, _ = read_row(
        x_row, bias_ptr, None, end, scale, softcap, rate_of(unit, x_row), RAW, HAS_SOFTCAP,
        entropy_ptr is not None, log_sum_sq_probs_ptr is not None, mean_logits_ptr is not None, False,
        "evict_first", ALIGNED, WIDTH, BLOCK,
    )  # fmt: skip
    log_s = tl.where(tl.abs(unit * m) == INF, float("nan"), tl.log(s))
    write_stats(
        row, x_row, ignored, has_target, value_t, unit, m, s, log_s, sz, sq, d_sum, vocab,
        logsumexp_ptr, logprobs_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logits_ptr, is_top1_ptr, lse_parts_ptr,
    )  # fmt: skip


@triton.jit
def store_rounded(out, value, mask):
    # The interpreter truncates to bfloat16 where GPUs round to nearest even: there, and only there, round by hand.
    if INTERPRETED and out.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value == value, bits, 0x7FC0).to(tl.uint16)
        tl.store(out, bits.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(out, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def derivative(
    d, slope, w, a, b, c, x_row, HAS_SOFTCAP: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr
):  # fmt: skip
    """dx at an exponent d; ``w``: what does not depend on it, ``a``: what the target has besides."""
    p = power(d, x_row)
    if HAS_C:
        g = p * (b + c * tl.maximum(d, -200.0))  # p · log p = 0 where p = 0
    else:
        g = p * b
    if HAS_D:
        g += w
    if a is not None:
        g += a
    if HAS_SOFTCAP:
        g *= slope
    return g


@triton.jit
def write_block(
    x_row, out_row, bias_ptr, w_row, v, mask, scale, softcap, rate, base, b, c, d,
    RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    # Every element is read and written in one step of one program: x and out may be the same row.
    x, slope = load_values(x_row, bias_ptr, v, mask, scale, softcap, RAW, HAS_SOFTCAP, "evict_first")
    w = d
    if HAS_D and w_row is not None:
        w = d * load(w_row + v, mask, "")
    g = derivative((x - base) * rate, slope, w, None, b, c, x_row, HAS_SOFTCAP, HAS_C, HAS_D)
    store_rounded(out_row + v, g, mask)


@triton.jit
def write_gradient(
    x_row, out_row, bias_ptr, w_row, vocab, ignored, has_target, t, target_ptr, row, ignore_index, value_t, slope_t,
    scale, softcap, rate, base, a, b, c, d,
    RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_A: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a row; p_v = power of (value_v - base) rate up to a factor that b and c contain, and all four contain the scale.

    ``value_t`` and its slope were read, by every thread, before the first store.
    """
    if ignored:  # the row is not read
        for start in range(0, vocab, BLOCK):
            v = start + tl.arange(0, BLOCK)
            store_rounded(out_row + v, tl.zeros([BLOCK], tl.float32), v < vocab)
    else:
        g_t = 0.0
        if HAS_A:
            w = d
            if HAS_D and w_row is not None:
                w = d * load(w_row + t, has_target, "")
            g_t = derivative((value_t - base) * rate, slope_t, w, a, b, c, x_row, HAS_SOFTCAP, HAS_C, HAS_D)
        whole = vocab // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            v = start + tl.arange(0, BLOCK)
            write_block(
                x_row, out_row, bias_ptr, w_row, v, None, scale, softcap, rate, base, b, c, d,
                RAW, HAS_SOFTCAP, HAS_C, HAS_D,
            )  # fmt: skip
        if whole < vocab:
            v = whole + tl.arange(0, BLOCK)
            write_block(
                x_row, out_row, bias_ptr, w_row, v, v < vocab, scale, softcap, rate, base, b, c, d,
                RAW, HAS_SOFTCAP, HAS_C, HAS_D,
            )  # fmt: skip
        if HAS_A:  # once more, so that no other entry is asked whether it is the target
            tl.debug_barrier()  # another thread has written it
            # Read again rather than held through the loop, whose registers bias and class weights need.
            t, _, has_target = read_target(target_ptr, row, vocab, ignore_index)
            store_rounded(out_row + t, g_t, has_target)


@triton.jit
def load_coefficient(ptr, row, factor):
    value = 0.0
    if ptr is not None:
        value = tl.load(ptr + row) * factor
    return value


@triton.jit
def row_grad_kernel(
    x_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, row_scale_ptr, softcap,
    lse_parts_ptr, a_ptr, b_ptr, c_ptr, d_ptr, w_ptr, w_row_stride, out_ptr, out_row_stride,
    RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(scale, row_scale_ptr, row)
    x_row = x_ptr + row * row_stride
    unit = unit_of(scale, RAW)
    # The value whose z lse_parts has: of the logits' dtype, so that the division's rounding is undone.
    largest = tl.load(lse_parts_ptr + 2 * row)
    base = largest
    if RAW:
        base = nearest_logit(tl.div_rn(largest, unit), x_row)
    # p = e^(z - largest) / sum: b and c take in what is constant.
    log_s = tl.load(lse_parts_ptr + 2 * row + 1) - rounded_off(unit, base, largest)
    over_s = exp(-log_s, lse_parts_ptr)
    b = load_coefficient(b_ptr, row, scale)
    c = load_coefficient(c_ptr, row, scale)
    b = (b - c * log_s) * over_s
    ignored = row < 0  # no row is
    has_target = row < 0
    t = row * 0
    value_t = 0.0
    slope_t = 1.0
    if target_ptr is not None:
        t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
        b = tl.where(has_target, b, float("nan"))
        if a_ptr is not None:
            value_t, slope_t = load_values(
                x_row, bias_ptr, t, has_target, scale, softcap, RAW, HAS_SOFTCAP, ""
            )
            tl.debug_barrier()  # every thread has read the target's logit before one writes over it
    w_row = w_ptr
    if w_ptr is not None:
        w_row = w_ptr + row * w_row_stride
    write_gradient(
        x_row, out_ptr + row * out_row_stride, bias_ptr, w_row, vocab, ignored, has_target, t, target_ptr, row,
        ignore_index, value_t, slope_t, scale, softcap, rate_of(unit, x_row), base, load_coefficient(a_ptr, row, scale), b, in_e(c * over_s, x_row),
        load_coefficient(d_ptr, row, scale),
        RAW, HAS_SOFTCAP, a_ptr is not None and target_ptr is not None, c_ptr is not None, d_ptr is not None, BLOCK,
    )  # fmt: skip


@triton.jit
def row_cross_entropy_kernel(
    x_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, row_scale_ptr, softcap,
    w_ptr, w_row_stride, keep, smooth, z_loss, grad_scale, grad_scale_ptr, grad_ptr, grad_row_stride,
    loss_ptr, logsumexp_ptr, logprobs_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logits_ptr, is_top1_ptr, lse_parts_ptr,
    RAW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SPREAD: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # keep = 1 - eps, smooth = eps / V. SPREAD: Σ w z is needed (eps > 0, probabilities).
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(scale, row_scale_ptr, row)
    x_row = x_ptr + row * row_stride
    w_row = w_ptr
    if w_ptr is not None:
        w_row = w_ptr + row * w_row_stride
    ignored = row < 0  # no row is
    has_target = row < 0
    value_t = 0.0
    slope_t = 1.0
    w_t = 1.0
    t = row * 0
    unit = unit_of(scale, RAW)
    rate = rate_of(unit, x_row)
    if target_ptr is not None:
        t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
    end = tl.where(ignored, 0, vocab)  # an ignored row is not read
    m, s, sz, sq, d_sum, w_sum, wz = read_row(
        x_row, bias_ptr, w_row, end, scale, softcap, rate, RAW, HAS_SOFTCAP,
        entropy_ptr is not None, log_sum_sq_probs_ptr is not None, mean_logits_ptr is not None, SPREAD,
        "evict_first" if grad_ptr is None else "evict_last", ALIGNED, WIDTH, BLOCK,
    )  # fmt: skip
    if target_ptr is not None:  # here, after the loop, whose registers they would take
        value_t, slope_t = load_values(x_row, bias_ptr, t, has_target, scale, softcap, RAW, HAS_SOFTCAP, "")
        if w_ptr is not None:
            w_t = tl.load(w_row + t, mask=has_target, other=1.0)
        if grad_ptr is not None:
            tl.debug_barrier()  # every thread has read the target's logit before one writes over it
    row_is_nan = tl.abs(unit * m) == INF  # only -inf, or a +inf; a NaN is in s already
    log_s = tl.where(row_is_nan, float("nan"), tl.log(s))
    base, low = largest_z(m, unit)
    lse = base + (log_s + low)

    # W lse - Σ w z, both relative to the largest z: no difference of large numbers where all logits are large.
    spread = w_sum * log_s - in_e(wz, x_row)
    if target_ptr is not None:
        loss = -keep * w_t * tl.where(has_target, unit * (value_t - base_of(m)) - log_s, float("nan"))
        if SPREAD:
            loss += smooth * spread
    else:
        loss = spread
    loss += z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))
    write_stats(
        row, x_row, ignored, has_target, value_t, unit, m, s, log_s, sz, sq, d_sum, vocab,
        logsumexp_ptr, logprobs_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logits_ptr, is_top1_ptr, lse_parts_ptr,
    )  # fmt: skip

    if grad_ptr is not None:
        factor = grad_scale * scale
        if grad_scale_ptr is not None:
            factor *= tl.load(grad_scale_ptr)
        b = 2.0 * z_loss * lse
        a = 0.0
        d = -factor
        if target_ptr is not None:
            a = -keep * w_t * factor
            d = -smooth * factor
            b = tl.where(has_target, b + keep * w_t + smooth * w_sum, float("nan"))
        else:
            b += w_sum
        write_gradient(
            x_row, grad_ptr + row * grad_row_stride, bias_ptr, w_row, vocab, ignored, has_target, t, target_ptr, row,
            ignore_index, value_t, slope_t, scale, softcap, rate, base_of(m), a, b / tl.where(row_is_nan, float("nan"), s) * factor, 0.0, d,
            RAW, HAS_SOFTCAP, target_ptr is not None, False, SPREAD, BLOCK,
        )  # fmt: skip


VECTOR = 16  # bytes of one load
REGISTERS = 65536  # of a multiprocessor


def launch_shape(vocab: int, softcap: bool, size: int, warp: int = WARP) -> dict[str, Any]:
    """The blocks of a row of ``vocab`` logits of ``size`` bytes, and Triton's launch options."""
    aligned = (
        vocab % 16 == 0
    )  # by the vocabulary, so that the order of a row's sums does not depend on where the row lies
    threads, bytes_each = ROWS["softcap" if softcap else "plain" if aligned else "odd"]
    each = bytes_each // size
    block = min(max(triton.next_power_of_2(vocab), 128), threads * each)
    shape: dict[str, Any] = {
        "BLOCK": block,
        "WIDTH": min(VECTOR // size, each),
        "ALIGNED": aligned,
        "num_warps": max(1, block // each // warp),
        "enable_fp_fusion": True,  # Triton 3.10 turns it off where nobody asks for it
    }
    if (
        softcap or not aligned
    ):  # else ptxas spills 8 bytes on sm_80 rather than lose a program per multiprocessor
        shape["maxnreg"] = REGISTERS // threads
    return shape


def gradient_shape(vocab: int, softcap: bool, size: int, both: bool, warp: int = WARP) -> dict[str, Any]:
    """launch_shape of row_grad. ``both``, a bias and class weights, take more registers than half of a multiprocessor's threads have."""
    shape = launch_shape(vocab, softcap, size, warp)
    del shape["WIDTH"], shape["ALIGNED"]
    if both:
        shape.setdefault("maxnreg", REGISTERS // ROWS["plain"][0])
    return shape


def row_stats(
    logits: Tensor,
    target: Tensor | None,
    options: RowOptions,
    *,
    want: Sequence[str],
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """The statistics named in ``want`` (of fastloss.tables.STATS) of ``logits [rows, V]``, float32 ``[rows]`` (is_top1: uint8)."""
    vocab = _row_of(logits)
    expect(torch.int64, target=target)
    expect_float32(bias=bias, row_scale=options.row_scale)
    out = _empty_stats(logits, want)
    if logits.shape[0]:
        with on_device_of(logits):
            row_stats_kernel[(logits.shape[0],)](
                logits, logits.stride(0), vocab, target, options.ignore_index, bias, float(options.scale),
                options.row_scale, float(options.softcap), *[out.get(name) for name in (*STATS, LSE_PARTS)], RAW=is_raw(logits, options, bias), HAS_SOFTCAP=options.softcap > 0,
                **options_of(launch_shape(vocab, options.softcap > 0, logits.element_size()), logits.device),
            )  # fmt: skip
    return out


def row_grad(
    logits: Tensor,
    target: Tensor | None,
    options: RowOptions,
    *,
    lse_parts: Tensor,
    coefficients: Coefficients,
    out: Tensor,
    bias: Tensor | None = None,
    w: Tensor | None = None,
) -> None:
    """Writes the rows' gradient to ``out [rows, V]``, which may be ``logits``."""
    vocab = _row_of(logits)
    a, b, c, d = coefficients
    expect(torch.int64, target=target)
    expect_float32(lse_parts=lse_parts, bias=bias, row_scale=options.row_scale, a=a, b=b, c=c, d=d, w=w)
    expect(logits.dtype, out=out)
    both = bias is not None and w is not None
    shape = gradient_shape(vocab, options.softcap > 0, logits.element_size(), both)
    if logits.shape[0]:
        with on_device_of(logits):
            row_grad_kernel[(logits.shape[0],)](
                logits, logits.stride(0), vocab, target, options.ignore_index, bias, float(options.scale),
                options.row_scale, float(options.softcap), lse_parts, a, b, c, d, w, _w_stride(w), out, out.stride(0),
                RAW=is_raw(logits, options, bias), HAS_SOFTCAP=options.softcap > 0, **options_of(shape, logits.device),
            )  # fmt: skip


def row_cross_entropy(
    logits: Tensor,
    target: Tensor | None,
    options: CrossEntropyOptions,
    *,
    factor: Factor = WHOLE,
    grad: Tensor | None = None,
    want: Sequence[str] = (),
    bias: Tensor | None = None,
    w: Tensor | None = None,
) -> dict[str, Tensor]:
    """ "loss", "lse_parts" and the wanted statistics; the gradient times ``factor`` into ``grad [rows, V]`` (may be ``logits``)."""
    vocab = _row_of(logits)
    expect(torch.int64, target=target)
    expect_float32(bias=bias, w=w, factor=factor.tensor, row_scale=options.row_scale)
    expect(logits.dtype, grad=grad)
    o, spread = options, target is None or options.label_smoothing > 0
    out = _empty_stats(logits, [*want, *({LSE_PARTS} - set(want))])
    out["loss"] = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        with on_device_of(logits):
            row_cross_entropy_kernel[(logits.shape[0],)](
                logits, logits.stride(0), vocab, target, o.ignore_index, bias, float(o.scale), o.row_scale, float(o.softcap),
                w, _w_stride(w), 1.0 - o.label_smoothing, o.label_smoothing / vocab, float(o.z_loss),
                float(factor.value), factor.tensor, grad, 0 if grad is None else grad.stride(0),
                out["loss"], *[out.get(name) for name in (*STATS, LSE_PARTS)],
                RAW=is_raw(logits, o, bias), HAS_SOFTCAP=o.softcap > 0, SPREAD=spread,
                **options_of(launch_shape(vocab, o.softcap > 0, logits.element_size()), logits.device),
            )  # fmt: skip
    return out


def _row_of(logits: Tensor) -> int:
    """The vocabulary's size; what the kernels cannot take is refused."""
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits: expected float32, bfloat16 or float16, got {logits.dtype}")
    expect(logits.dtype, logits=logits)
    vocab = logits.shape[1]
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"logits: expected a vocabulary between 1 and 2^30, got {vocab}")
    return vocab


def is_raw(logits: Tensor, options: RowOptions | CrossEntropyOptions, bias: Tensor | None) -> bool:
    """Whether z is a factor above 0 times a low-precision logit (``row_scale`` is above 0)."""
    return logits.dtype != torch.float32 and bias is None and options.softcap <= 0 and options.scale > 0


def _empty_stats(logits: Tensor, want: Sequence[str]) -> dict[str, Tensor]:
    out = {}
    for name in want:
        if name not in (*STATS, LSE_PARTS):
            raise ValueError(f"want: expected names of {', '.join(STATS)}, got {name!r}")
        dtype = torch.uint8 if name == "is_top1" else torch.float32
        shape = (logits.shape[0], 2) if name == LSE_PARTS else (logits.shape[0],)
        out[name] = torch.empty(shape, dtype=dtype, device=logits.device)
    return out


def _w_stride(w: Tensor | None) -> int:
    return 0 if w is None or w.dim() == 1 else w.stride(0)
