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


@triton.jit
def exp(x, x_row):
    """e^x, for float32 logits within 3 ulp.

    tl.exp is a GPU's 2^t of the rounded t = x log2 e: 2 + 1.2 |x| ulp off. Near 0 that is little, so x = n log 2 + r. The
    other dtypes' rounding hides it.
    """
    if x_row.dtype.element_ty == tl.float32:
        x = tl.where(x > 150.0, 150.0, tl.where(x < -150.0, -150.0, x))  # inf and 0 all the same; a NaN stays
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = x - n * 0.693145751953125  # the high digits of log 2: n times them is exact
        return tl.exp(r - n * 1.42860677e-6) * tl.exp2(n)
    else:
        return tl.exp(x)


@triton.jit
def tanh_and_slope(y):
    """tanh(y) within 3 ulp and 1 - tanh(y)^2, from one exponential."""
    # 1 - 2q/(1+q) with q = e^(-2|y|) loses its digits near 0: there y + y^3 P(y^2), the polynomial of
    # csrc/cuda/transform.h, fitted on [0, 0.6]. 4q/(1+q)^2 keeps its digits far out, where 1 - tanh^2 has none.
    magnitude = tl.abs(y)
    q = tl.exp(-2.0 * magnitude)
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
def base_of(m):
    """What sums are relative to: the maximum so far, or 0 while that is infinite."""
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
    m, s, sz, sq, d_sum, w_sum, wz, before, x_row, bias_ptr, w_row, v, mask, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, SPREAD: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """The maximum and the sums of read_row, of each lane, with those of the entries v; a lane has had ``before`` others."""
    z, _ = load_logits(x_row, bias_ptr, v, mask, scale, softcap, HAS_SOFTCAP, EVICT)
    if mask is not None:
        z = tl.where(mask, z, -INF)
    # A maximum may drop a NaN, but the NaN's exponential stays in the sum.
    new_m = tl.maximum(m, tl.max(z, 1))
    base = base_of(new_m)
    shift = base_of(m) - base
    factor = exp(m - base, x_row)
    d = z - base[:, None]
    e = exp(d, x_row)
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
    x_row, bias_ptr, w_row, end, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, SPREAD: tl.constexpr,
    EVICT: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Online softmax over v < end. With base = base_of(m) and e = e^(z - base):
    m, Σ e, Σ e (z - base), Σ e^2, Σ z - base, Σ w, Σ w (z - base)."""
    zero = tl.zeros([BLOCK // WIDTH], tl.float32)
    m, s, sz, sq, d_sum, w_sum, wz = zero - INF, zero, zero, zero, zero, zero, zero
    whole = end // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        before = tl.cast(start // BLOCK * WIDTH, tl.float32)
        m, s, sz, sq, d_sum, w_sum, wz = add_block(
            m, s, sz, sq, d_sum, w_sum, wz, before, x_row, bias_ptr, w_row, places(start, ALIGNED, WIDTH, BLOCK), None, scale, softcap,
            HAS_SOFTCAP, ENTROPY, SQUARES, MEAN, SPREAD, EVICT,
        )  # fmt: skip
    if whole < end:
        v = places(whole, ALIGNED, WIDTH, BLOCK)
        before = tl.cast(whole // BLOCK * WIDTH, tl.float32)
        m, s, sz, sq, d_sum, w_sum, wz = add_block(
            m, s, sz, sq, d_sum, w_sum, wz, before, x_row, bias_ptr, w_row, v, v < end, scale, softcap,
            HAS_SOFTCAP, ENTROPY, SQUARES, MEAN, SPREAD, EVICT,
        )  # fmt: skip
    row_m = tl.max(m, 0)
    base = base_of(row_m)
    shift = base_of(m) - base
    factor = exp(m - base, x_row)
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
    row, ignored, has_target, z_t, m, s, log_s, sz, sq, d_sum, vocab,
    logsumexp_ptr, logprobs_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logits_ptr, is_top1_ptr, lse_parts_ptr,
):  # fmt: skip
    """Row statistics from the sums of read_row; ``log_s`` is NaN where the row is."""
    base = base_of(m)
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + row, tl.where(ignored, 0.0, base + log_s))
    if logprobs_ptr is not None:
        tl.store(
            logprobs_ptr + row,
            tl.where(ignored, 0.0, tl.where(has_target, (z_t - base) - log_s, float("nan"))),
        )
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(ignored, 0.0, log_s - sz / s))
    if log_sum_sq_probs_ptr is not None:
        tl.store(log_sum_sq_probs_ptr + row, tl.where(ignored, 0.0, tl.log(sq) - 2.0 * log_s))
    if mean_logits_ptr is not None:
        tl.store(mean_logits_ptr + row, tl.where(ignored, 0.0, base + d_sum / vocab))
    if is_top1_ptr is not None:
        tl.store(
            is_top1_ptr + row, (has_target & (z_t >= m) & (s == s)).to(tl.uint8)
        )  # s == s: no NaN in the row
    if lse_parts_ptr is not None:
        tl.store(lse_parts_ptr + 2 * row, tl.where(ignored, 0.0, base))
        tl.store(lse_parts_ptr + 2 * row + 1, tl.where(ignored, 0.0, log_s))


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
    HAS_SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(scale, row_scale_ptr, row)
    x_row = x_ptr + row * row_stride
    ignored = row < 0  # no row is
    has_target = row < 0
    z_t = 0.0
    if target_ptr is not None:
        t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
        z_t, _ = load_logits(x_row, bias_ptr, t, has_target, scale, softcap, HAS_SOFTCAP, "")
    end = tl.where(ignored, 0, vocab)  # an ignored row is not read
    m, s, sz, sq, d_sum, _, _ = read_row(
        x_row, bias_ptr, None, end, scale, softcap, HAS_SOFTCAP,
        entropy_ptr is not None, log_sum_sq_probs_ptr is not None, mean_logits_ptr is not None, False,
        "evict_first", ALIGNED, WIDTH, BLOCK,
    )  # fmt: skip
    log_s = tl.where(tl.abs(m) == INF, float("nan"), tl.log(s))
    write_stats(
        row, ignored, has_target, z_t, m, s, log_s, sz, sq, d_sum, vocab,
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
def write_block(
    x_row, out_row, bias_ptr, w_row, v, mask, t, scale, softcap, shift, a, b, c, d,
    HAS_SOFTCAP: tl.constexpr, HAS_A: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    # Every element is read and written in one step of one program: x and out may be the same row.
    z, slope = load_logits(x_row, bias_ptr, v, mask, scale, softcap, HAS_SOFTCAP, "evict_first")
    log_p = z - shift
    p = exp(log_p, x_row)
    if HAS_C:
        g = p * (b + c * tl.maximum(log_p, -200.0))  # p · log p = 0 where p = 0
    else:
        g = p * b
    if HAS_D:
        if w_row is not None:
            g += d * load(w_row + v, mask, "")
        else:
            g += d
    if HAS_A:
        g += tl.where(v == t, a, 0.0)
    if HAS_SOFTCAP:
        g *= slope
    store_rounded(out_row + v, g, mask)


@triton.jit
def write_gradient(
    x_row, out_row, bias_ptr, w_row, vocab, ignored, t, scale, softcap, shift, a, b, c, d,
    HAS_SOFTCAP: tl.constexpr, HAS_A: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a row; p_v = e^(z_v - shift) up to a factor that b and c contain, and all four contain the scale."""
    t = tl.cast(t, tl.int32)  # compared with every entry
    if ignored:  # the row is not read
        for start in range(0, vocab, BLOCK):
            v = start + tl.arange(0, BLOCK)
            store_rounded(out_row + v, tl.zeros([BLOCK], tl.float32), v < vocab)
    else:
        whole = vocab // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            v = start + tl.arange(0, BLOCK)
            write_block(
                x_row, out_row, bias_ptr, w_row, v, None, t, scale, softcap, shift, a, b, c, d,
                HAS_SOFTCAP, HAS_A, HAS_C, HAS_D,
            )  # fmt: skip
        if whole < vocab:
            v = whole + tl.arange(0, BLOCK)
            write_block(
                x_row, out_row, bias_ptr, w_row, v, v < vocab, t, scale, softcap, shift, a, b, c, d,
                HAS_SOFTCAP, HAS_A, HAS_C, HAS_D,
            )  # fmt: skip


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
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(scale, row_scale_ptr, row)
    ignored = row < 0  # no row is
    t = -1
    # p = e^(z - largest) / sum, with log p = (z - largest) - log sum: b and c take in what is constant.
    log_s = tl.load(lse_parts_ptr + 2 * row + 1)
    over_s = tl.exp(-log_s)
    b = load_coefficient(b_ptr, row, scale)
    c = load_coefficient(c_ptr, row, scale)
    b = (b - c * log_s) * over_s
    if target_ptr is not None:
        t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
        b = tl.where(has_target, b, float("nan"))
    w_row = w_ptr
    if w_ptr is not None:
        w_row = w_ptr + row * w_row_stride
    write_gradient(
        x_ptr + row * row_stride, out_ptr + row * out_row_stride, bias_ptr, w_row, vocab, ignored, t, scale, softcap,
        tl.load(lse_parts_ptr + 2 * row), load_coefficient(a_ptr, row, scale), b, c * over_s,
        load_coefficient(d_ptr, row, scale),
        HAS_SOFTCAP, a_ptr is not None and target_ptr is not None, c_ptr is not None, d_ptr is not None, BLOCK,
    )  # fmt: skip


@triton.jit
def row_cross_entropy_kernel(
    x_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, row_scale_ptr, softcap,
    w_ptr, w_row_stride, keep, smooth, z_loss, grad_scale, grad_scale_ptr, grad_ptr, grad_row_stride,
    loss_ptr, logsumexp_ptr, logprobs_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logits_ptr, is_top1_ptr, lse_parts_ptr,
    HAS_SOFTCAP: tl.constexpr, SPREAD: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
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
    z_t = 0.0
    w_t = 1.0
    t = -1
    if target_ptr is not None:
        t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
        # Before the gradient may overwrite it: the reductions below are a barrier between this load and any store.
        z_t, _ = load_logits(x_row, bias_ptr, t, has_target, scale, softcap, HAS_SOFTCAP, "")
        if w_ptr is not None:
            w_t = tl.load(w_row + t, mask=has_target, other=1.0)
    end = tl.where(ignored, 0, vocab)  # an ignored row is not read
    m, s, sz, sq, d_sum, w_sum, wz = read_row(
        x_row, bias_ptr, w_row, end, scale, softcap, HAS_SOFTCAP,
        entropy_ptr is not None, log_sum_sq_probs_ptr is not None, mean_logits_ptr is not None, SPREAD,
        "evict_first" if grad_ptr is None else "evict_last", ALIGNED, WIDTH, BLOCK,
    )  # fmt: skip
    base = base_of(m)
    row_is_nan = tl.abs(m) == INF  # only -inf, or a +inf; a NaN is in s already
    log_s = tl.where(row_is_nan, float("nan"), tl.log(s))
    lse = base + log_s

    # W (lse - base) - Σ w (z - base): no difference of large numbers where all logits are large.
    spread = w_sum * log_s - wz
    if target_ptr is not None:
        loss = -keep * w_t * tl.where(has_target, (z_t - base) - log_s, float("nan"))
        if SPREAD:
            loss += smooth * spread
    else:
        loss = spread
    loss += z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))
    write_stats(
        row, ignored, has_target, z_t, m, s, log_s, sz, sq, d_sum, vocab,
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
            x_row, grad_ptr + row * grad_row_stride, bias_ptr, w_row, vocab, ignored, t, scale, softcap, base,
            a, b / tl.where(row_is_nan, float("nan"), s) * factor, 0.0, d,
            HAS_SOFTCAP, target_ptr is not None, False, SPREAD, BLOCK,
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
                options.row_scale, float(options.softcap), *[out.get(name) for name in (*STATS, LSE_PARTS)], HAS_SOFTCAP=options.softcap > 0,
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
    shape = options_of(launch_shape(vocab, options.softcap > 0, logits.element_size()), logits.device)
    del shape["WIDTH"], shape["ALIGNED"]
    if logits.shape[0]:
        with on_device_of(logits):
            row_grad_kernel[(logits.shape[0],)](
                logits, logits.stride(0), vocab, target, options.ignore_index, bias, float(options.scale),
                options.row_scale, float(options.softcap), lse_parts, a, b, c, d, w, _w_stride(w), out, out.stride(0),
                HAS_SOFTCAP=options.softcap > 0, **shape,
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
                HAS_SOFTCAP=o.softcap > 0, SPREAD=spread,
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
