"""z = scale · softcap · tanh((x + bias) / softcap); lse = log Σ e^z and its company; dx from (a, b, c, d) · slope.

Bytes per row: row_stats reads V·size; row_grad and row_cross_entropy read V·size and write V·size (the second reading of
row_cross_entropy comes from L2).
One program per row, a loop over vocabulary blocks: a row's numbers depend on that row alone, nothing is atomic.

A pointer that is None is a compile-time constant: its loads, stores and sums are not compiled. docs/engine.md has the
formulas; names here are those of that page.
"""

import triton
import triton.language as tl
from triton import knobs

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
def load_logits(x_row, bias_ptr, v, mask, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z at v (a block or one number) and the soft-cap's slope there."""
    u = tl.load(x_row + v, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + v, mask=mask, other=0.0)
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
def read_row(
    x_row, bias_ptr, w_row, end, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Online softmax over v < end. With base = base_of(m) and e = e^(z - base):
    m, Σ e, Σ e (z - base), Σ e^2, Σ z, Σ w, Σ w (z - base)."""
    m = -INF
    s = 0.0
    sz = 0.0
    sq = 0.0
    z_sum = 0.0
    w_sum = 0.0
    wz = 0.0
    for start in range(0, end, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = v < end
        z, _ = load_logits(x_row, bias_ptr, v, mask, scale, softcap, HAS_SOFTCAP)
        z = tl.where(mask, z, -INF)
        # A maximum may drop a NaN, but the NaN's exponential stays in the sum.
        new_m = tl.maximum(m, tl.max(z, 0))
        base = base_of(new_m)
        shift = base_of(m) - base
        factor = exp(m - base, x_row)
        d = z - base
        e = exp(d, x_row)
        if ENTROPY:
            sz = factor * (sz + shift * s) + tl.sum(e * tl.maximum(d, -200.0), 0)  # 0 · (-inf) = 0
        if SQUARES:
            sq = factor * factor * sq + tl.sum(e * e, 0)
        if MEAN:
            z_sum += tl.sum(tl.where(mask, z, 0.0), 0)
        if SPREAD:
            wz += shift * w_sum
            if w_row is not None:
                w = tl.load(w_row + v, mask=mask, other=0.0)
                wz += tl.sum(tl.where(mask, w * d, 0.0), 0)
                w_sum += tl.sum(w, 0)
            else:
                wz += tl.sum(tl.where(mask, d, 0.0), 0)
                w_sum += tl.minimum(end - start, BLOCK).to(tl.float32)
        s = factor * s + tl.sum(e, 0)
        m = new_m
    return m, s, sz, sq, z_sum, w_sum, wz


@triton.jit
def write_stats(
    row, ignored, has_target, z_t, m, s, log_s, sz, sq, z_sum, vocab,
    logsumexp_ptr, logprob_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logit_ptr, is_top1_ptr,
):  # fmt: skip
    """Row statistics from the sums of read_row; ``log_s`` is NaN where the row is."""
    base = base_of(m)
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + row, tl.where(ignored, 0.0, base + log_s))
    if logprob_ptr is not None:
        tl.store(
            logprob_ptr + row,
            tl.where(ignored, 0.0, tl.where(has_target, (z_t - base) - log_s, float("nan"))),
        )
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(ignored, 0.0, log_s - sz / s))
    if log_sum_sq_probs_ptr is not None:
        tl.store(log_sum_sq_probs_ptr + row, tl.where(ignored, 0.0, tl.log(sq) - 2.0 * log_s))
    if mean_logit_ptr is not None:
        tl.store(mean_logit_ptr + row, tl.where(ignored, 0.0, z_sum / vocab))
    if is_top1_ptr is not None:
        tl.store(
            is_top1_ptr + row, (has_target & (z_t >= m) & (s == s)).to(tl.uint8)
        )  # s == s: no NaN in the row


@triton.jit
def read_target(target_ptr, row, vocab, ignore_index):
    """The target, 0 where there is none to read; whether the row is ignored; whether the target is in the vocabulary."""
    t = tl.load(target_ptr + row)
    ignored = t == ignore_index
    has_target = (t >= 0) & (t < vocab) & (t != ignore_index)
    return tl.where(has_target, t, 0), ignored, has_target


@triton.jit
def row_stats_kernel(
    x_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, softcap,
    logsumexp_ptr, logprob_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logit_ptr, is_top1_ptr,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * row_stride
    ignored = row < 0  # no row is
    has_target = row < 0
    z_t = 0.0
    if target_ptr is not None:
        t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
        z_t, _ = load_logits(x_row, bias_ptr, t, has_target, scale, softcap, HAS_SOFTCAP)
    end = tl.where(ignored, 0, vocab)  # an ignored row is not read
    m, s, sz, sq, z_sum, _, _ = read_row(
        x_row, bias_ptr, None, end, scale, softcap, HAS_SOFTCAP,
        entropy_ptr is not None, log_sum_sq_probs_ptr is not None, mean_logit_ptr is not None, False, BLOCK,
    )  # fmt: skip
    log_s = tl.where(tl.abs(m) == INF, float("nan"), tl.log(s))
    write_stats(
        row, ignored, has_target, z_t, m, s, log_s, sz, sq, z_sum, vocab,
        logsumexp_ptr, logprob_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logit_ptr, is_top1_ptr,
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
def write_gradient(
    x_row, out_row, bias_ptr, w_row, vocab, ignored, t, scale, softcap, shift, a, b, c, d,
    HAS_SOFTCAP: tl.constexpr, HAS_A: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a row; p_v = e^(z_v - shift) up to a factor that b and c contain, and all four contain the scale."""
    end = tl.where(ignored, 0, vocab)
    for start in range(0, vocab, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = v < end
        # Every element is read and written in one step of one program: x and out may be the same row.
        z, slope = load_logits(x_row, bias_ptr, v, mask, scale, softcap, HAS_SOFTCAP)
        log_p = z - shift
        p = exp(log_p, x_row)
        if HAS_C:
            g = p * (b + c * tl.maximum(log_p, -200.0))  # p · log p = 0 where p = 0
        else:
            g = p * b
        if HAS_D:
            if w_row is not None:
                g += d * tl.load(w_row + v, mask=mask, other=0.0)
            else:
                g += d
        if HAS_A:
            g += tl.where(v == t, a, 0.0)
        if HAS_SOFTCAP:
            g *= slope
        store_rounded(out_row + v, tl.where(ignored, 0.0, g), v < vocab)


@triton.jit
def load_coefficient(ptr, row, factor):
    value = 0.0
    if ptr is not None:
        value = tl.load(ptr + row) * factor
    return value


@triton.jit
def row_grad_kernel(
    x_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, softcap,
    lse_ptr, a_ptr, b_ptr, c_ptr, d_ptr, w_ptr, w_row_stride, out_ptr, out_row_stride,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ignored = row < 0  # no row is
    t = -1
    b = load_coefficient(b_ptr, row, scale)
    if target_ptr is not None:
        t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
        b = tl.where(has_target, b, float("nan"))
    w_row = w_ptr
    if w_ptr is not None:
        w_row = w_ptr + row * w_row_stride
    write_gradient(
        x_ptr + row * row_stride, out_ptr + row * out_row_stride, bias_ptr, w_row, vocab, ignored, t, scale, softcap,
        tl.load(lse_ptr + row), load_coefficient(a_ptr, row, scale), b, load_coefficient(c_ptr, row, scale),
        load_coefficient(d_ptr, row, scale),
        HAS_SOFTCAP, a_ptr is not None and target_ptr is not None, c_ptr is not None, d_ptr is not None, BLOCK,
    )  # fmt: skip


@triton.jit
def row_cross_entropy_kernel(
    x_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, softcap,
    w_ptr, w_row_stride, keep, smooth, z_loss, grad_scale, grad_scale_ptr, grad_ptr, grad_row_stride,
    loss_ptr, logsumexp_ptr, logprob_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logit_ptr, is_top1_ptr,
    HAS_SOFTCAP: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # keep = 1 - eps, smooth = eps / V, grad_scale contains the scale. SPREAD: Σ w z is needed (eps > 0, probabilities).
    row = tl.program_id(0).to(tl.int64)
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
        z_t, _ = load_logits(x_row, bias_ptr, t, has_target, scale, softcap, HAS_SOFTCAP)
        if w_ptr is not None:
            w_t = tl.load(w_row + t, mask=has_target, other=1.0)
    end = tl.where(ignored, 0, vocab)  # an ignored row is not read
    m, s, sz, sq, z_sum, w_sum, wz = read_row(
        x_row, bias_ptr, w_row, end, scale, softcap, HAS_SOFTCAP,
        entropy_ptr is not None, log_sum_sq_probs_ptr is not None, mean_logit_ptr is not None, SPREAD, BLOCK,
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
        row, ignored, has_target, z_t, m, s, log_s, sz, sq, z_sum, vocab,
        logsumexp_ptr, logprob_ptr, entropy_ptr, log_sum_sq_probs_ptr, mean_logit_ptr, is_top1_ptr,
    )  # fmt: skip

    if grad_ptr is not None:
        factor = grad_scale
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
