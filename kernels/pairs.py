"""Σ w v per sequence, its backward, and the contrasts of pairs and of single sequences: docs/sequences.md.

Bytes: 4 per token (8 with weights) and direction; per pair 4 for each array that is given and each that is written.
One program per sequence (a long one's backward is cut); pairs: one program walks over all, so that sums need no second launch.

A pointer that is None is a compile-time constant; so are the terms: a loss compiles to its own formula. Names are those of
csrc/common/pair_terms.h. Sums are kept in float64: one number per thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.engine.contract import PairResult, UnpairedResult
from fastloss.engine.sequences import Sequences
from fastloss.tables import (
    DIVERGENCES,
    MAX_TERMS,
    PAIR_SUMS,
    PAIR_TERMS,
    UNPAIRED_SUMS,
    UNPAIRED_TERMS,
    Number,
    PairConstants,
    PairOptions,
    UnpairedConstants,
    UnpairedOptions,
)

from .arguments import as_bytes, code, expect, expect_float32, floats, on_device_of
from .exact import at_most, exp, expm1, log, log1p, logistic
from .shapes import SHAPES

LARGEST_EXPONENT = tl.constexpr(80.0)
LARGEST_MARGIN = tl.constexpr(1e16)  # its square, summed over a batch, is finite

# A code is the position of its name in fastloss/tables.py; one without a formula here does not compile.
SIGMOID = tl.constexpr(PAIR_TERMS.index("sigmoid"))
HINGE = tl.constexpr(PAIR_TERMS.index("hinge"))
IPO = tl.constexpr(PAIR_TERMS.index("ipo"))
EXO_PAIR = tl.constexpr(PAIR_TERMS.index("exo_pair"))
NCA_PAIR = tl.constexpr(PAIR_TERMS.index("nca_pair"))
ROBUST = tl.constexpr(PAIR_TERMS.index("robust"))
BCO_PAIR = tl.constexpr(PAIR_TERMS.index("bco_pair"))
SPPO_HARD = tl.constexpr(PAIR_TERMS.index("sppo_hard"))
APO_ZERO = tl.constexpr(PAIR_TERMS.index("apo_zero"))
APO_DOWN = tl.constexpr(PAIR_TERMS.index("apo_down"))
DISCOPOP = tl.constexpr(PAIR_TERMS.index("discopop"))
SFT = tl.constexpr(PAIR_TERMS.index("sft"))
SIGMOID_NORM = tl.constexpr(PAIR_TERMS.index("sigmoid_norm"))
SIMPO = tl.constexpr(PAIR_TERMS.index("simpo"))
ORPO = tl.constexpr(PAIR_TERMS.index("orpo"))
CENTER = tl.constexpr(PAIR_TERMS.index("center"))
SIMPER = tl.constexpr(PAIR_TERMS.index("simper"))
KTO = tl.constexpr(UNPAIRED_TERMS.index("kto"))
APO_ZERO_UNPAIRED = tl.constexpr(UNPAIRED_TERMS.index("apo_zero_unpaired"))
BCO = tl.constexpr(UNPAIRED_TERMS.index("bco"))
REVERSE_KL = tl.constexpr(DIVERGENCES.index("reverse_kl"))
FORWARD_KL = tl.constexpr(DIVERGENCES.index("forward_kl"))
JS_DIVERGENCE = tl.constexpr(DIVERGENCES.index("js_divergence"))
ALPHA_DIVERGENCE = tl.constexpr(DIVERGENCES.index("alpha_divergence"))
(
    LOSS_SUM, CHOSEN_REWARD_SUM, REJECTED_REWARD_SUM, ACCURACY_SUM, MARGIN_SUM, CHOSEN_LOGPS_SUM, REJECTED_LOGPS_SUM,
) = (
    tl.constexpr(PAIR_SUMS.index(name))
    for name in ("loss", "chosen_reward", "rejected_reward", "accuracy", "margin", "chosen_logps", "rejected_logps")
)  # fmt: skip
(
    UNPAIRED_LOSS_SUM, DESIRABLE_SUM, DESIRABLE_REWARD_SUM, UNDESIRABLE_REWARD_SUM, DESIRABLE_LOGPS_SUM,
    UNDESIRABLE_LOGPS_SUM, UNUSED_SUM,
) = (
    tl.constexpr(UNPAIRED_SUMS.index(name))
    for name in (
        "loss", "desirable", "desirable_reward", "undesirable_reward", "desirable_logps", "undesirable_logps", "unused",
    )
)  # fmt: skip


@triton.jit
def bounds(offsets_ptr, s, length):
    """[begin, end) of sequence ``s``."""
    if offsets_ptr is None:
        return s * length, s * length + length
    else:
        return tl.load(offsets_ptr + s), tl.load(offsets_ptr + s + 1)


@triton.jit
def segment_sum_kernel(values_ptr, weights_ptr, offsets_ptr, length, out_ptr, BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    begin, end = bounds(offsets_ptr, s, length)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = tl.load(values_ptr + i, mask=i < end, other=0.0).to(tl.float64)
        if weights_ptr is not None:
            w = tl.load(weights_ptr + i, mask=i < end, other=0.0).to(tl.float64)
            v = tl.where(w == 0.0, 0.0, w * v)  # a NaN in the padding stays there
        total += v
    tl.store(out_ptr + s, tl.sum(total, 0).to(tl.float32))


@triton.jit
def segment_expand_kernel(
    upstream_ptr, weights_ptr, offsets_ptr, length, count, n, out_ptr, chunks, BLOCK: tl.constexpr
):
    s = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    if s < count:
        begin, end = bounds(offsets_ptr, s, length)
        g = tl.load(upstream_ptr + s)
        for start in range(begin + first, end, chunks * BLOCK):
            i = start + tl.arange(0, BLOCK)
            d = tl.full([BLOCK], 1.0, tl.float32) * g
            if weights_ptr is not None:
                w = tl.load(weights_ptr + i, mask=i < end, other=0.0)
                d = tl.where(w == 0.0, 0.0, w * d)
            tl.store(out_ptr + i, d, mask=i < end)
    elif offsets_ptr is not None:  # sequence `count` is what lies outside all others
        head = tl.load(offsets_ptr)
        tail = tl.load(offsets_ptr + count)
        zero = tl.zeros([BLOCK], tl.float32)
        for start in range(first, head, chunks * BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + i, zero, mask=i < head)
        for start in range(tail + first, n, chunks * BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + i, zero, mask=i < n)


@triton.jit
def given(ptr, number, i, mask, other):
    """The numbers at ``i``, or ``number`` for each where there is no pointer."""
    if ptr is not None:
        return tl.load(ptr + i, mask=mask, other=other)
    else:
        return tl.full(i.shape, 0.0, tl.float32) + number


@triton.jit
def divergence_of(KIND: tl.constexpr, x, alpha_minus_1):
    """f of a log-ratio, and its slope."""
    if KIND == FORWARD_KL:
        e = exp(at_most(-x, LARGEST_EXPONENT))
        return 1.0 - e, tl.where(-x > LARGEST_EXPONENT, 0.0, e)
    elif KIND == JS_DIVERGENCE:
        _, q, log_p, _ = logistic(x)
        return 0.6931471805599453 + log_p, q
    elif KIND == ALPHA_DIVERGENCE:
        y = alpha_minus_1 * x
        clamped = at_most(y, LARGEST_EXPONENT)
        slope = tl.where(y > clamped, 0.0, exp(clamped))
        limit = alpha_minus_1 == 0.0  # alpha = 1
        value = tl.div_rn(expm1(clamped), 0.0 * x + tl.where(limit, 1.0, alpha_minus_1))
        return tl.where(limit, x, value), tl.where(limit, 1.0, slope)
    else:
        tl.static_assert(KIND == REVERSE_KL, "a divergence without a formula here")
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def smoothed(u, smoothing):
    p, q, log_p, log_q = logistic(u)
    keep = 1.0 - smoothing
    return -keep * log_p - smoothing * log_q, smoothing * p - keep * q


@triton.jit
def contrast(CODE: tl.constexpr, u, smoothing, tau):
    """Value and slope of a term of u alone."""
    if CODE == SIGMOID:
        return smoothed(u, smoothing)
    elif CODE == HINGE:
        above = 1.0 - u
        return tl.where(above <= 0.0, 0.0, above), tl.where(above <= 0.0, 0.0, -1.0)
    elif CODE == EXO_PAIR:
        p, q, log_p, log_q = logistic(u)
        log_keep = tl.where(smoothing > 0.5, log(1.0 - smoothing), log1p(-at_most(smoothing, 0.5)))
        log_smoothing = log(smoothing)
        return (
            p * (log_p - log_keep) + q * (log_q - log_smoothing),
            p * q * (u - (log_keep - log_smoothing)),  # log σ(u) - log σ(-u) = u
        )
    elif CODE == ROBUST:
        p, q, log_p, log_q = logistic(u)
        keep = 1.0 - smoothing
        scale = 1.0 - 2.0 * smoothing
        return (
            tl.div_rn(smoothing * log_q - keep * log_p, scale),
            tl.div_rn(-(smoothing * p + keep * q), scale),
        )
    else:
        tl.static_assert(CODE == DISCOPOP, "a term without a formula here")
        _, q, log_p, _ = logistic(u)
        tau = tl.full(u.shape, 0.0, tl.float32) + tau
        m, not_m, _, _ = logistic(tl.div_rn(u, tau))
        e = exp(at_most(-u, LARGEST_EXPONENT))
        e_slope = tl.where(-u > LARGEST_EXPONENT, 0.0, -e)
        return e * m - log_p * not_m, tl.div_rn(m * not_m, tau) * (log_p + e) - q * not_m + e_slope * m


@triton.jit
def log1mexp(x):
    """log(1 - e^x), and the slope 1 / (1 - e^x) of x - log(1 - e^x)."""
    y = at_most(x, -1e-7)
    minus_expm1 = -expm1(y)
    near = y > -0.6931471805599453
    value = tl.where(near, log(minus_expm1), log1p(-tl.where(near, 0.0, exp(y))))
    return value, tl.where(x > -1e-7, 1.0, tl.div_rn(1.0 + 0.0 * y, minus_expm1))


@triton.jit
def pair_term(
    CODE: tl.constexpr, c, r, xc, xr, sc, sc_slope, sr, sr_slope, lc, lr, nll, beta, smoothing, margin, delta, tau, sft_scale
):  # fmt: skip
    """Value of a term and its derivatives for c, r and nll."""
    zero = 0.0 * c
    if CODE == IPO:
        d = tl.div_rn(sc, lc) - tl.div_rn(sr, lr) - tl.div_rn(0.5 + 0.0 * beta, beta)
        inside = tl.abs(d) <= LARGEST_MARGIN
        slope = tl.where(inside, 2.0 * d, 0.0)
        d = tl.where(d > LARGEST_MARGIN, LARGEST_MARGIN, tl.where(d < -LARGEST_MARGIN, -LARGEST_MARGIN, d))
        return d * d, tl.div_rn(slope * sc_slope, lc), -tl.div_rn(slope * sr_slope, lr), zero
    elif CODE == NCA_PAIR:
        p, q, log_p, log_q = logistic(beta * xc)
        r_p, _, _, r_log_q = logistic(beta * xr)
        return -log_p - 0.5 * log_q - 0.5 * r_log_q, beta * (0.5 * p - q), beta * 0.5 * r_p, zero
    elif CODE == BCO_PAIR:
        _, q, log_p, _ = logistic(beta * xc - delta)
        r_p, _, _, r_log_q = logistic(beta * xr - delta)
        return -log_p - r_log_q, -beta * q, beta * r_p, zero
    elif CODE == SPPO_HARD:
        half = tl.div_rn(0.5 + 0.0 * beta, beta)
        return (
            (xc - half) * (xc - half) + (xr + half) * (xr + half),
            2.0 * (xc - half),
            2.0 * (xr + half),
            zero,
        )
    elif CODE == APO_ZERO:
        p, q, _, _ = logistic(beta * xc)
        r_p, r_q, _, _ = logistic(beta * xr)
        return q + r_p, -beta * p * q, beta * r_p * r_q, zero
    elif CODE == APO_DOWN:
        p, q, _, _ = logistic(beta * xc)
        u_p, u_q, _, _ = logistic(beta * (xc - xr))
        slope = beta * u_p * u_q
        return p + u_q, beta * p * q - slope, slope, zero
    elif CODE == SFT:
        return -nll * sft_scale, zero, zero, zero - sft_scale
    elif CODE == SIGMOID_NORM:
        value, slope = smoothed(beta * (tl.div_rn(sc, lc) - tl.div_rn(sr, lr)) - margin, smoothing)
        return value, tl.div_rn(slope * beta * sc_slope, lc), -tl.div_rn(slope * beta * sr_slope, lr), zero
    elif CODE == SIMPO:
        value, slope = smoothed(beta * (tl.div_rn(c, lc) - tl.div_rn(r, lr)) - margin, smoothing)
        return value, tl.div_rn(slope * beta, lc), -tl.div_rn(slope * beta, lr), zero
    elif CODE == ORPO:
        each_c = tl.div_rn(c, lc)
        each_r = tl.div_rn(r, lr)
        not_c, c_slope = log1mexp(each_c)
        not_r, r_slope = log1mexp(each_r)
        _, q, log_p, _ = logistic((each_c - each_r) - (not_c - not_r))
        return -beta * log_p, tl.div_rn(-beta * q * c_slope, lc), tl.div_rn(beta * q * r_slope, lr), zero
    elif CODE == CENTER:
        return (c + r) * (c + r), 2.0 * (c + r), 2.0 * (c + r), zero
    elif CODE == SIMPER:
        each_c = exp(tl.div_rn(c, lc))
        each_r = exp(tl.div_rn(r, lr))
        return each_r - each_c, -tl.div_rn(each_c, lc), tl.div_rn(each_r, lr), zero
    else:
        value, slope = contrast(CODE, beta * (sc - sr) - margin, smoothing, tau)
        return value, slope * beta * sc_slope, -slope * beta * sr_slope, zero


@triton.jit
def pair_loss_kernel(
    c_ptr, r_ptr, pairs, rc_ptr, rr_ptr, lc_ptr, lr_ptr, nll_ptr, w0, w1, w2, w3, w4, w5, w6, w7, alpha_minus_1,
    beta, beta_ptr, smoothing, smoothing_ptr, margin, margin_ptr, weight_ptr, delta, tau,
    loss_ptr, d_c_ptr, d_r_ptr, d_nll_ptr, chosen_reward_ptr, rejected_reward_ptr, sums_ptr,
    TERMS: tl.constexpr, NEEDS_TOKENS: tl.constexpr, DIVERGENCE: tl.constexpr, AVERAGE_REWARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    term_weights = (w0, w1, w2, w3, w4, w5, w6, w7)
    sft_scale = 1.0
    if NEEDS_TOKENS:
        count = tl.zeros([BLOCK], tl.float64)
        for start in range(0, pairs, BLOCK):
            i = start + tl.arange(0, BLOCK)
            count += tl.load(lc_ptr + i, mask=i < pairs, other=0.0).to(tl.float64)
        tokens = tl.sum(count, 0)
        scale = tl.where(tokens > 0.0, pairs, 0).to(tl.float64) / tl.where(tokens > 0.0, tokens, 1.0)
        sft_scale = scale.to(tl.float32)

    zero = tl.zeros([BLOCK], tl.float64)
    loss_sum, chosen_sum, rejected_sum, wins, margins, c_sum, r_sum = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, pairs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < pairs
        c = tl.load(c_ptr + i, mask=mask, other=0.0)
        r = tl.load(r_ptr + i, mask=mask, other=0.0)
        xc = c - given(rc_ptr, 0.0, i, mask, 0.0)
        xr = r - given(rr_ptr, 0.0, i, mask, 0.0)
        lc = given(lc_ptr, 1.0, i, mask, 1.0)
        lr = given(lr_ptr, 1.0, i, mask, 1.0)
        lc = tl.where(lc == 0.0, 1.0, lc)
        lr = tl.where(lr == 0.0, 1.0, lr)
        nll = c
        if nll_ptr is not None:
            nll = tl.load(nll_ptr + i, mask=mask, other=0.0)
        b = given(beta_ptr, beta, i, mask, 1.0)
        eps = given(smoothing_ptr, smoothing, i, mask, 0.25)
        gamma = given(margin_ptr, margin, i, mask, 0.0)
        sc, sc_slope = divergence_of(DIVERGENCE, xc, alpha_minus_1)
        sr, sr_slope = divergence_of(DIVERGENCE, xr, alpha_minus_1)

        loss = tl.zeros([BLOCK], tl.float32)
        d_c, d_r, d_nll = loss, loss, loss
        for k in tl.static_range(len(TERMS)):
            value, v_c, v_r, v_nll = pair_term(
                TERMS[k], c, r, xc, xr, sc, sc_slope, sr, sr_slope, lc, lr, nll, b, eps, gamma, delta, tau, sft_scale
            )  # fmt: skip
            loss += term_weights[k] * value
            d_c += term_weights[k] * v_c
            d_r += term_weights[k] * v_r
            d_nll += term_weights[k] * v_nll

        weight = given(weight_ptr, 1.0, i, mask, 0.0)
        loss *= weight
        if nll_ptr is None:
            d_c += d_nll
        else:
            tl.store(d_nll_ptr + i, weight * d_nll, mask=mask)
        tl.store(d_c_ptr + i, weight * d_c, mask=mask)
        tl.store(d_r_ptr + i, weight * d_r, mask=mask)
        chosen = b * xc
        rejected = b * xr
        if AVERAGE_REWARDS:
            chosen = tl.div_rn(chosen, lc)
            rejected = tl.div_rn(rejected, lr)
        tl.store(loss_ptr + i, loss, mask=mask)
        tl.store(chosen_reward_ptr + i, chosen, mask=mask)
        tl.store(rejected_reward_ptr + i, rejected, mask=mask)

        loss_sum += tl.where(mask, loss, 0.0).to(tl.float64)
        chosen_sum += tl.where(mask, chosen, 0.0).to(tl.float64)
        rejected_sum += tl.where(mask, rejected, 0.0).to(tl.float64)
        wins += tl.where(mask & (chosen > rejected), 1.0, 0.0).to(tl.float64)
        margins += tl.where(mask, chosen.to(tl.float64) - rejected.to(tl.float64), 0.0)
        c_sum += c.to(tl.float64)
        r_sum += r.to(tl.float64)
    tl.store(sums_ptr + LOSS_SUM, tl.sum(loss_sum, 0).to(tl.float32))
    tl.store(sums_ptr + CHOSEN_REWARD_SUM, tl.sum(chosen_sum, 0).to(tl.float32))
    tl.store(sums_ptr + REJECTED_REWARD_SUM, tl.sum(rejected_sum, 0).to(tl.float32))
    tl.store(sums_ptr + ACCURACY_SUM, tl.sum(wins, 0).to(tl.float32))
    tl.store(sums_ptr + MARGIN_SUM, tl.sum(margins, 0).to(tl.float32))
    tl.store(sums_ptr + CHOSEN_LOGPS_SUM, tl.sum(c_sum, 0).to(tl.float32))
    tl.store(sums_ptr + REJECTED_LOGPS_SUM, tl.sum(r_sum, 0).to(tl.float32))


@triton.jit
def unpaired_loss_kernel(
    logps_ptr, sequences, ref_ptr, desirable_ptr, weight_ptr, kl_ptr, beta, desirable_weight, undesirable_weight,
    loss_ptr, d_ptr, reward_ptr, sums_ptr, CODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    kl = 0.0
    if kl_ptr is not None:
        kl = tl.load(kl_ptr)
    zero = tl.zeros([BLOCK], tl.float64)
    loss_sum, goods, good_reward, bad_reward, good_logps, bad_logps = zero, zero, zero, zero, zero, zero
    for start in range(0, sequences, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < sequences
        logps = tl.load(logps_ptr + i, mask=mask, other=0.0)
        x = logps - given(ref_ptr, 0.0, i, mask, 0.0)
        good = tl.load(desirable_ptr + i, mask=mask, other=0) != 0
        sign = tl.where(good, -1.0, 1.0)
        weight = given(weight_ptr, 1.0, i, mask, 0.0) * tl.where(good, desirable_weight, undesirable_weight)
        reward = beta * x
        if CODE == BCO:
            p, _, _, log_q = logistic(sign * (reward - kl))
            value = -log_q
            slope = sign * beta * p
        else:
            tl.static_assert(CODE == KTO or CODE == APO_ZERO_UNPAIRED, "a term without a formula here")
            if CODE == KTO:
                x -= kl
            p, q, _, _ = logistic(sign * beta * x)
            value = p
            slope = sign * beta * p * q
        loss = weight * value
        tl.store(loss_ptr + i, loss, mask=mask)
        tl.store(d_ptr + i, weight * slope, mask=mask)
        tl.store(reward_ptr + i, reward, mask=mask)

        good = good & mask
        bad = mask & (good == 0)
        loss_sum += tl.where(mask, loss, 0.0).to(tl.float64)
        goods += tl.where(good, 1.0, 0.0).to(tl.float64)
        good_reward += tl.where(good, reward, 0.0).to(tl.float64)
        bad_reward += tl.where(bad, reward, 0.0).to(tl.float64)
        good_logps += tl.where(good, logps, 0.0).to(tl.float64)
        bad_logps += tl.where(bad, logps, 0.0).to(tl.float64)
    tl.store(sums_ptr + UNPAIRED_LOSS_SUM, tl.sum(loss_sum, 0).to(tl.float32))
    tl.store(sums_ptr + DESIRABLE_SUM, tl.sum(goods, 0).to(tl.float32))
    tl.store(sums_ptr + DESIRABLE_REWARD_SUM, tl.sum(good_reward, 0).to(tl.float32))
    tl.store(sums_ptr + UNDESIRABLE_REWARD_SUM, tl.sum(bad_reward, 0).to(tl.float32))
    tl.store(sums_ptr + DESIRABLE_LOGPS_SUM, tl.sum(good_logps, 0).to(tl.float32))
    tl.store(sums_ptr + UNDESIRABLE_LOGPS_SUM, tl.sum(bad_logps, 0).to(tl.float32))
    tl.store(sums_ptr + UNUSED_SUM, 0.0)


def segment_sum(values: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
    """Σ w·v over each sequence, float32 ``[count]``. A position of weight 0 adds nothing, NaN or not."""
    expect_float32(values=values, weights=weights)
    expect(torch.int64, offsets=layout.offsets)
    out = floats(layout.count, values.device)
    if layout.count:
        with on_device_of(values):
            segment_sum_kernel[(layout.count,)](
                values, weights, layout.offsets, layout.length, out, **SHAPES["segment"]
            )
    return out


def segment_expand(upstream: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
    """The gradient of :func:`segment_sum`, float32 ``[N]``."""
    expect_float32(upstream=upstream, weights=weights)
    expect(torch.int64, offsets=layout.offsets)
    n, count = layout.n, layout.count
    out = floats(n, upstream.device)
    if n:
        # A long sequence is cut, each program doing about four blocks of it.
        chunks = min(max(n // (count + 1) // (4 * SHAPES["segment"]["BLOCK"]), 1), 64)
        with on_device_of(out):
            segment_expand_kernel[(count + 1, chunks)](
                upstream, weights, layout.offsets, layout.length, count, n, out, chunks, **SHAPES["segment"]
            )
    return out


def pair_loss(
    chosen: Tensor, rejected: Tensor, nll: Tensor | None, constants: PairConstants, options: PairOptions
) -> PairResult:
    """The contrast of pairs of Σ log p (or of rewards), float32 ``[B]``, with its gradients; ``nll`` is what sft takes."""
    k, o = constants, options
    expect_float32(
        chosen=chosen, rejected=rejected, nll=nll, ref_chosen=k.ref_chosen, ref_rejected=k.ref_rejected,
        chosen_lengths=k.chosen_lengths, rejected_lengths=k.rejected_lengths, weight=k.weight,
    )  # fmt: skip
    if len(o.terms) > MAX_TERMS:
        raise ValueError(f"terms: expected at most {MAX_TERMS}, got {len(o.terms)}")
    codes = tuple(code("terms", term, PAIR_TERMS) for term, _ in o.terms)
    weights = [float(weight) for _, weight in o.terms] + [0.0] * (MAX_TERMS - len(codes))
    alpha_minus_1 = 0.0 if abs(o.alpha - 1) < 1e-6 else o.alpha - 1
    n, device = chosen.numel(), chosen.device
    result = PairResult(
        loss=floats(n, device),
        chosen_reward=floats(n, device),
        rejected_reward=floats(n, device),
        sums=floats(len(PAIR_SUMS), device),
        d_chosen=floats(n, device),
        d_rejected=floats(n, device),
        d_nll=None if nll is None else floats(n, device),
    )
    with on_device_of(chosen):
        pair_loss_kernel[(1,)](
            chosen, rejected, chosen.numel(), k.ref_chosen, k.ref_rejected, k.chosen_lengths, k.rejected_lengths, nll,
            *weights, float(alpha_minus_1), *_number("beta", o.beta), *_number("smoothing", o.smoothing),
            *_number("margin", o.margin), k.weight, float(o.delta), float(o.tau),
            result.loss, result.d_chosen, result.d_rejected, result.d_nll, result.chosen_reward, result.rejected_reward,
            result.sums,
            TERMS=codes, NEEDS_TOKENS=SFT.value in codes and k.chosen_lengths is not None,
            DIVERGENCE=code("divergence", o.divergence, DIVERGENCES), AVERAGE_REWARDS=bool(o.average_rewards), **SHAPES["pair"],
        )  # fmt: skip
    return result


def unpaired_loss(logps: Tensor, constants: UnpairedConstants, options: UnpairedOptions) -> UnpairedResult:
    """The term of single responses of Σ log p, float32 ``[B]``, with its gradient."""
    k, o = constants, options
    expect_float32(logps=logps, ref=k.ref, weight=k.weight, kl=k.kl)
    n, device = logps.numel(), logps.device
    result = UnpairedResult(
        loss=floats(n, device),
        reward=floats(n, device),
        sums=floats(len(UNPAIRED_SUMS), device),
        d_logps=floats(n, device),
    )
    with on_device_of(logps):
        unpaired_loss_kernel[(1,)](
            logps, logps.numel(), k.ref, as_bytes("desirable", k.desirable), k.weight, k.kl, float(o.beta),
            float(o.desirable_weight), float(o.undesirable_weight), result.loss, result.d_logps, result.reward, result.sums,
            CODE=code("term", o.term, UNPAIRED_TERMS), **SHAPES["pair"],
        )  # fmt: skip
    return result


def _number(name: str, value: Number) -> tuple[float, Tensor | None]:
    """One number for all pairs, or one for each."""
    if isinstance(value, Tensor):
        expect_float32(**{name: value})
        return 0.0, value
    return float(value), None
