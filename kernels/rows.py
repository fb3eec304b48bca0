"""row_stats, row_grad and row_cross_entropy (docs/engine.md): one program a row, a loop over vocabulary blocks.

Reads a row once (row_cross_entropy with a gradient: twice, the second time from L2), writes its gradient once.
A program owns its row, so the gradient may overwrite the logits; offsets are 64-bit.
"""

import triton
import triton.language as tl

from .blocks import load_logits, load_weight, safe_maximum


@triton.jit
def _statistics(
    row_ptr, bias_ptr, w_ptr, w_row, vocab, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_W: tl.constexpr, WANT_ENTROPY: tl.constexpr,
    WANT_SUM_SQ: tl.constexpr, WANT_MEAN: tl.constexpr, WANT_W: tl.constexpr, BLOCK: tl.constexpr,
):
    """max, Σ e, Σ e·(z - max), Σ e², Σ z, Σ w·z, Σ w over a row, with e = exp(z - max) rescaled as max grows.

    The maximum is the row's, the sums are kept per lane of the block and added at the end.
    """
    zero = tl.zeros([BLOCK], tl.float32)
    m = float("-inf")
    s, sz, sq, mean, wz, wsum, poison = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, vocab, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = v < vocab
        z, _ = load_logits(row_ptr, bias_ptr, v, mask, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        # NaN and +inf make the row NaN, whatever the maximum does with them
        poison += tl.where(mask & ((z != z) | (z == float("inf"))), float("nan"), 0.0)
        grown = tl.maximum(m, tl.max(z, 0))
        base = safe_maximum(grown)
        e = tl.exp(z - base)
        old = tl.exp(m - base)
        if WANT_ENTROPY:
            # Σ e·(z - max): every old term moves by the maximum's growth
            moved = tl.where(old == 0.0, 0.0, old * (sz + s * (m - base)))
            sz = moved + tl.where(e == 0.0, 0.0, e * (z - base))
        s = s * old + e
        if WANT_SUM_SQ:
            sq = sq * (old * old) + e * e
        if WANT_MEAN:
            mean += tl.where(mask, z, 0.0)
        if WANT_W:
            w = load_weight(w_ptr, w_row, v, mask, HAS_W)
            wz += tl.where(mask, w * z, 0.0)
            wsum += w
        m = grown
    poisoned = tl.sum(poison, 0) + tl.where(m == float("-inf"), float("nan"), 0.0)
    return (
        safe_maximum(m) + poisoned, tl.sum(s, 0), tl.sum(sz, 0), tl.sum(sq, 0), tl.sum(mean, 0), tl.sum(wz, 0),
        tl.sum(wsum, 0),
    )


@triton.jit
def _target_logit(
    row_ptr, bias_ptr, t, inside, softcap, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    z, _ = load_logits(row_ptr, bias_ptr, t + tl.arange(0, 1), inside, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    return tl.where(inside, tl.sum(z, 0), float("nan"))


@triton.jit
def _store_statistics(
    row, lse_ptr, logprob_ptr, entropy_ptr, sum_sq_ptr, mean_ptr, top1_ptr, m, s, sz, sq, mean, z_t, vocab, keep,
    WANT_LOGPROB: tl.constexpr, WANT_ENTROPY: tl.constexpr, WANT_SUM_SQ: tl.constexpr, WANT_MEAN: tl.constexpr,
    WANT_TOP1: tl.constexpr,
):
    log_s = tl.log(s)
    tl.store(lse_ptr + row, tl.where(keep, m + log_s, 0.0))
    if WANT_LOGPROB:
        tl.store(logprob_ptr + row, tl.where(keep, (z_t - m) - log_s, 0.0))
    if WANT_ENTROPY:
        tl.store(entropy_ptr + row, tl.where(keep, log_s - sz / s + (m - m), 0.0))
    if WANT_SUM_SQ:
        tl.store(sum_sq_ptr + row, tl.where(keep, tl.log(sq) - 2.0 * log_s + (m - m), 0.0))
    if WANT_MEAN:
        tl.store(mean_ptr + row, tl.where(keep, mean / vocab, 0.0))
    if WANT_TOP1:
        tl.store(top1_ptr + row, (keep & (z_t >= m)).to(tl.uint8))


@triton.jit
def row_stats(
    logits_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, softcap,
    lse_ptr, logprob_ptr, entropy_ptr, sum_sq_ptr, mean_ptr, top1_ptr,
    HAS_TARGET: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WANT_LOGPROB: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, WANT_SUM_SQ: tl.constexpr, WANT_MEAN: tl.constexpr, WANT_TOP1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    keep = row >= 0
    z_t = 0.0
    if HAS_TARGET:
        t = tl.load(target_ptr + row)
        keep = t != ignore_index
        inside = (t >= 0) & (t < vocab)
        z_t = _target_logit(row_ptr, bias_ptr, tl.where(inside, t, 0), inside, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    m, s, sz, sq, mean, _, _ = _statistics(
        row_ptr, bias_ptr, bias_ptr, 0, vocab, softcap, scale, HAS_BIAS, HAS_SOFTCAP, False, WANT_ENTROPY, WANT_SUM_SQ,
        WANT_MEAN, False, BLOCK)
    _store_statistics(
        row, lse_ptr, logprob_ptr, entropy_ptr, sum_sq_ptr, mean_ptr, top1_ptr, m, s, sz, sq, mean, z_t, vocab, keep,
        WANT_LOGPROB, WANT_ENTROPY, WANT_SUM_SQ, WANT_MEAN, WANT_TOP1)


@triton.jit
def _write_gradient(
    row_ptr, out_ptr, bias_ptr, w_ptr, w_row, vocab, t, keep, softcap, scale, lse, a, b, c, d,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_W: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for start in range(0, vocab, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = v < vocab
        z, slope = load_logits(row_ptr, bias_ptr, v, mask, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        p = tl.exp(z - lse)
        g = b * p + tl.where(v == t, a, 0.0)
        if HAS_C:
            g += c * tl.where(p == 0.0, 0.0, p * (z - lse))
        if HAS_D:
            g += d * load_weight(w_ptr, w_row, v, mask, HAS_W)
        g = tl.where(keep, g * slope, 0.0)
        tl.store(out_ptr + v, g.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_grad(
    logits_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, softcap, lse_ptr, a_ptr, b_ptr, c_ptr,
    d_ptr, w_ptr, w_row_stride, out_ptr, out_row_stride,
    HAS_TARGET: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_A: tl.constexpr,
    HAS_B: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr, HAS_W: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    keep = row >= 0
    t = (row * 0 - 1).to(tl.int64)
    bad = 0.0
    if HAS_TARGET:
        t = tl.load(target_ptr + row)
        keep = t != ignore_index
        bad = tl.where(keep & ((t < 0) | (t >= vocab)), float("nan"), 0.0)
    lse = tl.load(lse_ptr + row)
    a = 0.0
    b = 0.0
    c = 0.0
    d = 0.0
    if HAS_A:
        a = tl.load(a_ptr + row)
    if HAS_B:
        b = tl.load(b_ptr + row)
    if HAS_C:
        c = tl.load(c_ptr + row)
    if HAS_D:
        d = tl.load(d_ptr + row)
    _write_gradient(
        logits_ptr + row * row_stride, out_ptr + row * out_row_stride, bias_ptr, w_ptr, row * w_row_stride, vocab, t,
        keep, softcap, scale, lse, a, b + bad, c, d, HAS_BIAS, HAS_SOFTCAP, HAS_W, HAS_C, HAS_D, BLOCK)


@triton.jit
def row_cross_entropy(
    logits_ptr, row_stride, vocab, target_ptr, ignore_index, bias_ptr, scale, softcap, w_ptr, w_row_stride,
    label_smoothing, z_loss, grad_scale, grad_scale_ptr, grad_ptr, grad_row_stride,
    loss_ptr, lse_ptr, logprob_ptr, entropy_ptr, sum_sq_ptr, mean_ptr, top1_ptr,
    HAS_TARGET: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_W: tl.constexpr,
    SMOOTH: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_SCALE_PTR: tl.constexpr, WANT_LOGPROB: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, WANT_SUM_SQ: tl.constexpr, WANT_MEAN: tl.constexpr, WANT_TOP1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    w_row = row * w_row_stride
    keep = row >= 0
    t = (row * 0 - 1).to(tl.int64)
    z_t = 0.0
    w_t = 1.0
    if HAS_TARGET:
        t = tl.load(target_ptr + row)
        keep = t != ignore_index
        inside = (t >= 0) & (t < vocab)
        z_t = _target_logit(row_ptr, bias_ptr, tl.where(inside, t, 0), inside, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        if HAS_W:
            w_t = tl.load(w_ptr + w_row + tl.where(inside, t, 0))
    m, s, sz, sq, mean, wz, w_sum = _statistics(
        row_ptr, bias_ptr, w_ptr, w_row, vocab, softcap, scale, HAS_BIAS, HAS_SOFTCAP, HAS_W, WANT_ENTROPY, WANT_SUM_SQ,
        WANT_MEAN, SMOOTH or not HAS_TARGET, BLOCK)
    log_s = tl.log(s)
    lse = m + log_s
    a = 0.0
    d = 0.0
    if HAS_TARGET:
        own = (1.0 - label_smoothing) * w_t
        loss = own * (log_s - (z_t - m))
        a = -own
        b = own + tl.where(z_t != z_t, float("nan"), 0.0)  # a bad target is NaN, also in the gradient
        if SMOOTH:
            loss += label_smoothing / vocab * (w_sum * lse - wz)
            b += label_smoothing / vocab * w_sum
            d = -label_smoothing / vocab
    else:
        loss = w_sum * lse - wz
        b = w_sum
        d = -1.0
    loss += z_loss * lse * lse
    b += 2.0 * z_loss * lse
    tl.store(loss_ptr + row, tl.where(keep, loss, 0.0))
    _store_statistics(
        row, lse_ptr, logprob_ptr, entropy_ptr, sum_sq_ptr, mean_ptr, top1_ptr, m, s, sz, sq, mean, z_t, vocab, keep,
        WANT_LOGPROB, WANT_ENTROPY, WANT_SUM_SQ, WANT_MEAN, WANT_TOP1)
    if HAS_GRAD:
        g = grad_scale
        if HAS_SCALE_PTR:
            g = g * tl.load(grad_scale_ptr)
        # every warp has read the target's logit and the row before any overwrites them
        tl.debug_barrier()
        _write_gradient(
            row_ptr, grad_ptr + row * grad_row_stride, bias_ptr, w_ptr, w_row, vocab, t, keep, softcap, scale, lse,
            a * g, b * g, 0.0, d * g, HAS_BIAS, HAS_SOFTCAP, HAS_W, False, SMOOTH or not HAS_TARGET, BLOCK)
