"""policy_loss of docs/sequences.md: a token's loss and its derivative, and the sums of out[16]. Names: csrc/common/policy_terms.h.

Bytes per token: 4 for each input that is given (8 where its sequence has a weight of its own), 4 for the gradient.
One program per sequence; a second, tiny launch adds up the sequences' sums in order: two launches, nothing is atomic.

A pointer that is None is a compile-time constant, and so are the codes: a loss compiles to its own formula.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.engine.contract import PolicyInputs, PolicyResult
from fastloss.tables import (
    AGGREGATIONS,
    CORRECTIONS,
    KL_KINDS,
    LEVELS,
    MAX_LOG_RATIO,
    POLICY_OUT,
    POLICY_PLACE,
    SURROGATES,
    PolicyOptions,
)

from .arguments import as_bytes, code, expect, expect_float32, floats, on_device_of, options_of
from .exact import at_most, exp, exp_parts
from .pairs import bounds
from .shapes import SHAPES

LIMIT = tl.constexpr(MAX_LOG_RATIO)
LOG_TINY = tl.constexpr(-18.420680743952367)  # log 1e-8

# A code is the position of its name in fastloss/tables.py; one without a formula here does not compile.
CLIP = tl.constexpr(SURROGATES.index("clip"))
LOGPROB = tl.constexpr(SURROGATES.index("logprob"))
CISPO = tl.constexpr(SURROGATES.index("cispo"))
SAPO = tl.constexpr(SURROGATES.index("sapo"))
VESPO = tl.constexpr(SURROGATES.index("vespo"))
RATIO = tl.constexpr(SURROGATES.index("ratio"))
TOKEN = tl.constexpr(LEVELS.index("token"))
SEQUENCE = tl.constexpr(LEVELS.index("sequence"))
SEQUENCE_SUM = tl.constexpr(LEVELS.index("sequence_sum"))
GEOMETRIC = tl.constexpr(LEVELS.index("geometric"))
TOKEN_MEAN = tl.constexpr(AGGREGATIONS.index("token-mean"))
SEQ_MEAN_TOKEN_SUM = tl.constexpr(AGGREGATIONS.index("seq-mean-token-sum"))
SEQ_MEAN_TOKEN_MEAN = tl.constexpr(AGGREGATIONS.index("seq-mean-token-mean"))
SEQ_MEAN_TOKEN_SUM_NORM = tl.constexpr(AGGREGATIONS.index("seq-mean-token-sum-norm"))
K1 = tl.constexpr(KL_KINDS.index("k1"))
K2 = tl.constexpr(KL_KINDS.index("k2"))
K3 = tl.constexpr(KL_KINDS.index("k3"))
ABS = tl.constexpr(KL_KINDS.index("abs"))
LOW_VAR_KL = tl.constexpr(KL_KINDS.index("low_var_kl"))
NO_CORRECTION = tl.constexpr(CORRECTIONS.index("none"))
TOKEN_TRUNCATE = tl.constexpr(CORRECTIONS.index("token_truncate"))
TOKEN_MASK = tl.constexpr(CORRECTIONS.index("token_mask"))
SEQUENCE_TRUNCATE = tl.constexpr(CORRECTIONS.index("sequence_truncate"))
SEQUENCE_MASK = tl.constexpr(CORRECTIONS.index("sequence_mask"))
OUT = tl.constexpr(len(POLICY_OUT))
(
    LOSS, SCALE, TOKENS, LOW_CLIPPED, HIGH_CLIPPED, DUAL_CLIPPED, SUM_OF_K1, SUM_OF_K3, SUM_OF_KL, ENTROPY, MIN_RATIO,
    MAX_RATIO, SUM_OF_RATIO, SUM_OF_RATIO_SQUARED, CUT, POLICY,
) = (
    tl.constexpr(POLICY_PLACE[name])
    for name in (
        "loss", "scale", "tokens", "low_clipped", "high_clipped", "dual_clipped", "k1", "k3", "kl", "entropy", "min_ratio",
        "max_ratio", "ratio", "ratio_squared", "cut", "policy",
    )
)  # fmt: skip


@triton.jit
def clamped(x, low, high):
    return at_most(tl.where(x < low, low, x), high)  # a NaN stays


@triton.jit
def exp_and_k3(x):
    """e^x, and e^x - 1 - x with its digits near 0."""
    r, q, scale = exp_parts(x)
    beyond = r * r * q
    return (beyond + r + 1.0) * scale, beyond * scale + ((r * scale - x) + (scale - 1.0))


@triton.jit
def correct(e, floor, cap, CORRECTION: tl.constexpr):
    """The sampler correction of e^d, and whether it is 0 or truncated."""
    cut = (e < floor) | (e > cap)
    if CORRECTION == TOKEN_TRUNCATE or CORRECTION == SEQUENCE_TRUNCATE:
        return clamped(e, floor, cap), cut
    else:
        tl.static_assert(
            CORRECTION == TOKEN_MASK or CORRECTION == SEQUENCE_MASK, "a correction without a formula here"
        )
        return tl.where(cut, 0.0, e), cut


@triton.jit
def log_correction(d, log_floor, log_cap, CORRECTION: tl.constexpr):
    if CORRECTION == TOKEN_TRUNCATE or CORRECTION == SEQUENCE_TRUNCATE:
        log_c = clamped(d, log_floor, log_cap)
    else:
        tl.static_assert(
            CORRECTION == TOKEN_MASK or CORRECTION == SEQUENCE_MASK, "a correction without a formula here"
        )
        log_c = tl.where((d >= log_floor) & (d <= log_cap), d, LOG_TINY)
    return clamped(log_c, LOG_TINY, LIMIT)


@triton.jit
def one_sided(lr, advantage, log_low, log_high):
    """geometric's one-sided clamp of a log-ratio, and whether it lets the gradient through."""
    positive = advantage > 0.0
    outside = tl.where(positive, lr > log_high, lr < -log_low)
    return tl.where(outside, tl.where(positive, log_high, -log_low), lr), outside == 0


@triton.jit
def vespo_phi(log_w, w, k, lam):
    phi = exp(lam + k * log_w - lam * w)
    return tl.where(lam + k * log_w - lam * w < 88.0, phi, 0.0)


@triton.jit
def load_or_zero(ptr, i, live):
    if ptr is not None:
        return tl.load(ptr + i, mask=live, other=0.0)
    else:
        return tl.zeros(i.shape, tl.float32)


@triton.jit
def load_token(logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, s, i, end, OF_SEQUENCE: tl.constexpr):
    """live, logprob, old, advantage: zeros where the token is masked."""
    live = tl.load(mask_ptr + i, mask=i < end, other=0) != 0
    logprob = tl.load(logprobs_ptr + i, mask=live, other=0.0)
    old = logprob
    if old_ptr is not None:
        old = tl.load(old_ptr + i, mask=live, other=0.0)
    if OF_SEQUENCE:
        advantage = tl.where(live, tl.load(advantages_ptr + s), 0.0)
    else:
        advantage = tl.load(advantages_ptr + i, mask=live, other=0.0)
    return live, logprob, old, advantage


@triton.jit
def zero_nan(x):
    return tl.where(x == x, x, 0.0)


@triton.jit
def surrogate(
    rho, a, logprob, phi_pos, phi_neg,
    ratio_low, ratio_high, delta, dual_clip, cispo_low, cispo_high, sapo_pos, sapo_neg,
    SURROGATE: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """Its value, its derivatives for the log weight and for the log-prob beside it, and where the dual clip acts."""
    zero = tl.zeros_like(a)
    dw = zero
    dlogprob = zero
    dual = zero > zero
    if SURROGATE == CLIP:
        clipped = clamped(rho, ratio_low, ratio_high)
        first = at_most(rho, delta) * a
        second = clipped * a
        d_first = tl.where(rho > delta, 0.0, rho)
        d_second = tl.where(clipped == rho, rho, rho - rho)
        # As PyTorch's minimum: equal ones share the gradient.
        slope = tl.where(
            first < second, d_first, tl.where(second < first, d_second, 0.5 * (d_first + d_second))
        )
        value = -tl.where(first < second, first, second)
        dw = -a * slope
        if DUAL:
            limit = -dual_clip * a
            dual = (a < 0.0) & (value > limit)
            value = tl.where(dual, limit, value)
            dw = tl.where(dual, 0.0, dw)
    elif SURROGATE == SAPO:
        tau = tl.where(a > 0.0, sapo_pos, sapo_neg)
        y = tau * (rho - 1.0)
        e = exp(tl.where(y < 0.0, y, -y))
        inverse = tl.div_rn(zero + 1.0, e + 1.0)
        value = -a * tl.where(y < 0.0, e * inverse, inverse) * tl.div_rn(zero + 4.0, tau)
        dw = -a * (4.0 * e * inverse * inverse) * rho
    elif SURROGATE == CISPO:
        dlogprob = -clamped(rho, cispo_low, cispo_high) * a
        value = dlogprob * logprob
    elif SURROGATE == VESPO:
        dlogprob = -tl.where(a >= 0.0, phi_pos, phi_neg) * a
        value = dlogprob * logprob
    elif SURROGATE == LOGPROB:
        dlogprob = -a
        value = dlogprob * logprob
    else:
        tl.static_assert(SURROGATE == RATIO, "a surrogate without a formula here")
        dw = -rho * a
        value = dw
    return value, dw, dlogprob, dual


@triton.jit
def kl_and_slope(raw, KIND: tl.constexpr):
    """KL to the reference from ref - logprob, and its derivative for the log-prob."""
    t = clamped(raw, -LIMIT, LIMIT)
    if KIND == K1:
        kl = -t
        d = tl.zeros_like(t) + 1.0
    elif KIND == K2:
        kl = 0.5 * t * t
        d = -t
    elif KIND == ABS:
        kl = tl.abs(t)
        d = tl.where(t < 0.0, 1.0, tl.where(t > 0.0, -1.0, 0.0))
    else:
        tl.static_assert(KIND == K3 or KIND == LOW_VAR_KL, "a kind of KL without a formula here")
        _, kl = exp_and_k3(t)
        d = -(kl + t)
        if KIND == LOW_VAR_KL:
            d = tl.where(kl > 10.0, 0.0, d)
            kl = at_most(kl, 10.0)
    return kl, tl.where((raw >= -LIMIT) & (raw <= LIMIT), d, 0.0)


@triton.jit
def policy_loss_kernel(
    logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, ref_ptr, entropy_ptr, sampler_ptr, token_weight_ptr, select_ptr,
    share_ptr, offsets_ptr, n, length,
    ratio_low, ratio_high, log_low, log_high, delta, dual_clip, cispo_low, cispo_high, sapo_pos, sapo_neg,
    vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, kl_cov_coef, beta, entropy_coef,
    cap, floor, log_cap, log_floor, off_policy_threshold,
    grad_ptr, grad_entropy_ptr, sums_ptr,
    SURROGATE: tl.constexpr, LEVEL: tl.constexpr, KL_KIND: tl.constexpr, KL_UNBIASED: tl.constexpr,
    CORRECTION: tl.constexpr, AGGREGATION: tl.constexpr, OF_SEQUENCE: tl.constexpr, DUAL: tl.constexpr,
    OFF_POLICY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    begin, end = bounds(offsets_ptr, s, length)
    end = tl.minimum(end, n)
    zero = tl.zeros([BLOCK], tl.float32)

    tl.static_assert(
        AGGREGATION == TOKEN_MEAN
        or AGGREGATION == SEQ_MEAN_TOKEN_SUM
        or AGGREGATION == SEQ_MEAN_TOKEN_MEAN
        or AGGREGATION == SEQ_MEAN_TOKEN_SUM_NORM,
        "an aggregation without a formula here",
    )
    SEQ_MEAN: tl.constexpr = AGGREGATION == SEQ_MEAN_TOKEN_MEAN and share_ptr is None
    CORRECTS_SEQUENCES: tl.constexpr = CORRECTION == SEQUENCE_TRUNCATE or CORRECTION == SEQUENCE_MASK

    # What all tokens of the sequence share.
    share = 1.0
    rho_seq = 1.0
    w_slope = 0.0
    c_seq = 1.0
    cut_seq = 0.0
    keep = 1.0
    phi_pos = 0.0
    phi_neg = 0.0
    if SEQ_MEAN or LEVEL != TOKEN or CORRECTS_SEQUENCES or OFF_POLICY or SURROGATE == VESPO:
        tokens = zero
        lr_sum = zero
        w_sum = zero
        d_sum = zero
        log_c_sum = zero
        drift = zero
        first = tl.full([BLOCK], 0, tl.int64) + end
        for start in range(begin, end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            live, logprob, old, a = load_token(
                logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, s, i, end, OF_SEQUENCE
            )
            tokens += tl.where(live, 1.0, 0.0)
            lr = clamped(logprob - old, -LIMIT, LIMIT)
            lr_sum += lr
            if LEVEL == GEOMETRIC:
                bounded, _ = one_sided(lr, a, log_low, log_high)
                w_sum += bounded
            if CORRECTION != NO_CORRECTION:
                d = zero_nan(old - tl.load(sampler_ptr + i, mask=live, other=0.0))
                d_sum += d
                log_c_sum += tl.where(live, log_correction(d, log_floor, log_cap, CORRECTION), 0.0)
            if OFF_POLICY:
                was = old
                if sampler_ptr is not None:
                    was = tl.load(sampler_ptr + i, mask=live, other=0.0)
                drift += zero_nan(was - logprob)
                first = tl.minimum(first, tl.where(live, i, end))
        count = tl.maximum(tl.sum(tokens, 0), 1.0)
        if SEQ_MEAN:
            share = tl.div_rn(1.0, count)
        total = tl.sum(lr_sum, 0)
        if LEVEL == SEQUENCE_SUM:
            rho_seq = exp(clamped(total, -LIMIT, LIMIT))
            w_slope = tl.where((total >= -LIMIT) & (total <= LIMIT), 1.0, 0.0)
        elif LEVEL == GEOMETRIC:
            rho_seq = exp(tl.div_rn(tl.sum(w_sum, 0), count))
            w_slope = tl.div_rn(1.0, count)
        elif LEVEL == SEQUENCE:
            rho_seq = exp(tl.div_rn(total, count))
            w_slope = tl.div_rn(1.0, count)
        else:
            tl.static_assert(LEVEL == TOKEN, "a level without a formula here")
        if CORRECTS_SEQUENCES:
            total_d = tl.sum(d_sum, 0)
            c_seq, is_cut = correct(exp(total_d), floor, cap, CORRECTION)
            cut_seq = tl.where(is_cut, 1.0, 0.0)
        if OFF_POLICY:
            place = tl.min(first, 0)
            if OF_SEQUENCE:
                first_advantage = tl.load(advantages_ptr + s)
            else:
                first_advantage = tl.load(advantages_ptr + place, mask=place < end, other=0.0)
            stale = (first_advantage < 0.0) & (tl.div_rn(tl.sum(drift, 0), count) > off_policy_threshold)
            keep = tl.where(stale, 0.0, 1.0)
        if SURROGATE == VESPO:
            log_w = total
            if CORRECTS_SEQUENCES:
                log_w += log_correction(total_d, log_floor, log_cap, CORRECTION)
            elif CORRECTION != NO_CORRECTION:
                log_w += tl.sum(log_c_sum, 0)
            log_w = clamped(log_w, LOG_TINY, LIMIT)
            w = exp(log_w)
            phi_pos = vespo_phi(log_w, w, vespo_k_pos, vespo_lambda_pos)
            phi_neg = vespo_phi(log_w, w, vespo_k_neg, vespo_lambda_neg)

    loss_sum = zero
    policy_sum = zero
    token_sum = zero
    low_sum = zero
    high_sum = zero
    dual_sum = zero
    cut_sum = zero
    k1_sum = zero
    k3_sum = zero
    kl_sum = zero
    entropy_sum = zero
    rho_sum = zero
    square_sum = zero
    common = zero
    least = zero + float("inf")
    most = zero - float("inf")
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        live, logprob, old, a = load_token(
            logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, s, i, end, OF_SEQUENCE
        )
        raw = logprob - old
        lr = clamped(raw, -LIMIT, LIMIT)
        lr_slope = (raw >= -LIMIT) & (raw <= LIMIT)
        ratio, k3 = exp_and_k3(lr)
        rho = ratio
        if LEVEL != TOKEN:
            rho = zero + rho_seq
        value, dw, dlogprob, dual = surrogate(
            rho, a, logprob, phi_pos, phi_neg, ratio_low, ratio_high, delta, dual_clip, cispo_low, cispo_high,
            sapo_pos, sapo_neg, SURROGATE, DUAL,
        )  # fmt: skip
        if select_ptr is not None:
            selected = tl.load(select_ptr + i, mask=live, other=0) != 0
            sign = tl.where(lr < 0.0, -1.0, tl.where(lr > 0.0, 1.0, 0.0))
            value += tl.where(selected, kl_cov_coef * sign * lr, 0.0)
            dlogprob += tl.where(selected & lr_slope, kl_cov_coef * sign, 0.0)

        factor = zero + keep
        if token_weight_ptr is not None:
            factor *= tl.load(token_weight_ptr + i, mask=live, other=0.0)
        if CORRECTION != NO_CORRECTION:
            if not CORRECTS_SEQUENCES:
                d = zero_nan(old - tl.load(sampler_ptr + i, mask=live, other=0.0))
                c, is_cut = correct(exp(d), floor, cap, CORRECTION)
                cut_sum += tl.where(is_cut & live, 1.0, 0.0)
            else:
                c = zero + c_seq
                cut_sum += tl.where(live, cut_seq, 0.0)
            if SURROGATE != VESPO:
                factor *= c
        policy = factor * value
        loss = policy
        dw *= factor
        dlogprob *= factor

        if ref_ptr is not None:
            kl, slope = kl_and_slope(tl.load(ref_ptr + i, mask=live, other=0.0) - logprob, KL_KIND)
            kl_sum += kl
            if beta != 0.0:
                weight = zero + beta
                if KL_UNBIASED:
                    weight = beta * rho
                    dw += weight * kl
                loss += weight * kl
                dlogprob += weight * slope
        entropy = load_or_zero(entropy_ptr, i, live)
        if entropy_coef != 0.0:
            loss -= entropy_coef * entropy

        shares = tl.where(live, share, 0.0)
        if share_ptr is not None:
            shares = tl.load(share_ptr + i, mask=live, other=0.0)
        if LEVEL == TOKEN:
            dlogprob += tl.where(lr_slope, dw, 0.0)
        else:
            common += shares * dw
        tl.store(grad_ptr + i, tl.where(live, shares * dlogprob, 0.0), mask=i < end)
        if grad_entropy_ptr is not None:
            tl.store(grad_entropy_ptr + i, -entropy_coef * shares, mask=i < end)

        if LEVEL == GEOMETRIC:
            low = lr < -log_low
            high = lr > log_high
        else:
            low = rho < ratio_low
            if SURROGATE == CISPO:
                high = rho > cispo_high
            else:
                high = rho > ratio_high
        loss_sum += shares * loss
        policy_sum += shares * policy
        token_sum += tl.where(live, 1.0, 0.0)
        low_sum += tl.where(low & (a < 0.0), 1.0, 0.0)
        high_sum += tl.where(high & (a > 0.0), 1.0, 0.0)
        dual_sum += tl.where(dual, 1.0, 0.0)
        k1_sum -= lr
        k3_sum += k3
        entropy_sum += entropy
        rho_sum += tl.where(live, rho, 0.0)
        square_sum += tl.where(live, rho * rho, 0.0)
        least = tl.where(live & (rho < least), rho, least)
        most = tl.where(live & (rho > most), rho, most)

    row = sums_ptr + s * OUT
    tl.store(row + LOSS, tl.sum(loss_sum, 0))
    tl.store(row + SCALE, 0.0)
    tl.store(row + TOKENS, tl.sum(token_sum, 0))
    tl.store(row + LOW_CLIPPED, tl.sum(low_sum, 0))
    tl.store(row + HIGH_CLIPPED, tl.sum(high_sum, 0))
    tl.store(row + DUAL_CLIPPED, tl.sum(dual_sum, 0))
    tl.store(row + SUM_OF_K1, tl.sum(k1_sum, 0))
    tl.store(row + SUM_OF_K3, tl.sum(k3_sum, 0))
    tl.store(row + SUM_OF_KL, tl.sum(kl_sum, 0))
    tl.store(row + ENTROPY, tl.sum(entropy_sum, 0))
    tl.store(row + MIN_RATIO, tl.min(least, 0))
    tl.store(row + MAX_RATIO, tl.max(most, 0))
    tl.store(row + SUM_OF_RATIO, tl.sum(rho_sum, 0))
    tl.store(row + SUM_OF_RATIO_SQUARED, tl.sum(square_sum, 0))
    tl.store(row + CUT, tl.sum(cut_sum, 0))
    tl.store(row + POLICY, tl.sum(policy_sum, 0))

    if LEVEL != TOKEN:  # what the weight shared by all tokens passes on to each
        passed = tl.sum(common, 0) * w_slope
        tl.debug_barrier()  # another thread may have stored the gradient
        for start in range(begin, end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            live, logprob, old, a = load_token(
                logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, s, i, end, OF_SEQUENCE
            )
            raw = logprob - old
            through = live & (raw >= -LIMIT) & (raw <= LIMIT)
            if LEVEL == GEOMETRIC:
                _, inside = one_sided(clamped(raw, -LIMIT, LIMIT), a, log_low, log_high)
                through = through & inside
            grad = tl.load(grad_ptr + i, mask=through, other=0.0)
            tl.store(grad_ptr + i, grad + passed, mask=through)


@triton.jit
def policy_total_kernel(
    sums_ptr, count, normalizer_ptr, normalizer, normalizer_factor, divisor, out_ptr, loss_ptr,
    HAS_NORMALIZER: tl.constexpr, HAS_SHARES: tl.constexpr, AGGREGATION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[16] from the sequences' sums ``[count, 16]``, in float64; the loss once more, as a tensor of its own."""
    k = tl.arange(0, OUT)
    total = tl.zeros([ROWS, OUT], tl.float64)
    least = tl.zeros([ROWS, OUT], tl.float32) + float("inf")
    most = tl.zeros([ROWS, OUT], tl.float32) - float("inf")
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (k < OUT)[None, :]
        part = tl.load(sums_ptr + row.to(tl.int64)[:, None] * OUT + k[None, :], mask=inside, other=0.0)
        total += part.to(tl.float64)
        least = tl.minimum(least, tl.where(inside, part, float("inf")))
        most = tl.maximum(most, tl.where(inside, part, -float("inf")))
    sums = tl.sum(total, 0)
    tokens = tl.sum(tl.where(k == TOKENS, sums, 0.0), 0)
    if HAS_NORMALIZER:
        if normalizer_ptr is not None:
            normalizer = tl.load(normalizer_ptr)
        by = tokens * 0.0 + normalizer * normalizer_factor
    elif HAS_SHARES or AGGREGATION == TOKEN_MEAN:
        by = tl.maximum(tokens, 1.0)
    else:
        tl.static_assert(
            AGGREGATION == SEQ_MEAN_TOKEN_SUM
            or AGGREGATION == SEQ_MEAN_TOKEN_MEAN
            or AGGREGATION == SEQ_MEAN_TOKEN_SUM_NORM,
            "an aggregation without a formula here",
        )
        by = tokens * 0.0 + divisor
    out = tl.where(k == LOSS, sums / by, tl.where(k == SCALE, 1.0 / by, sums)).to(tl.float32)
    out = tl.where(k == MIN_RATIO, tl.where(tokens > 0.0, tl.min(least, 0), 1.0), out)
    out = tl.where(k == MAX_RATIO, tl.where(tokens > 0.0, tl.max(most, 0), 1.0), out)
    # Comparisons pass over a NaN, sums keep it: ratios are bounded, so only a NaN ratio makes their sum one.
    lost = tl.max(tl.where((k == SUM_OF_RATIO) & (sums != sums), 1, 0), 0)
    out = tl.where((k == MIN_RATIO) | (k == MAX_RATIO), tl.where(lost > 0, float("nan"), out), out)
    tl.store(out_ptr + k, out)
    tl.store(loss_ptr + k * 0, out, mask=k == LOSS)


RUN = 4096  # tokens in a run, where sequences mean nothing


class Runs(NamedTuple):
    """What policy_loss_kernel takes for sequences."""

    offsets: Tensor | None
    length: int
    number: int
    advantage_of_sequence: bool


def policy_loss(
    logprobs: Tensor, entropy: Tensor | None, inputs: PolicyInputs, options: PolicyOptions
) -> PolicyResult:
    """The policy-gradient loss of flat float32 log-probs ``[N]``, its sums and its gradients."""
    x, o = inputs, options
    expect_float32(
        logprobs=logprobs, entropy=entropy, advantages=x.advantages, old=x.old, ref=x.ref, sampler=x.sampler,
        token_weight=x.token_weight, share=x.share,
    )  # fmt: skip
    expect(torch.int64, offsets=x.layout.offsets)
    constants = constants_of(o, x.share is not None, x.sampler is not None)
    runs = runs_of(x, o)
    n, device = logprobs.numel(), logprobs.device
    grad = zeros_or_empty(n, device, runs.offsets)
    grad_entropy = None
    if entropy is not None and o.entropy_coef != 0:
        grad_entropy = zeros_or_empty(n, device, runs.offsets)
    out = floats(len(POLICY_OUT), device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    sums = floats(runs.number * len(POLICY_OUT), device)
    by_length = x.share is None and constants["AGGREGATION"] == SEQ_MEAN_TOKEN_SUM_NORM.value
    factor = float(o.max_length) if by_length else 1.0
    normalizer, number = x.normalizer, 0.0
    if isinstance(normalizer, Tensor):
        expect_float32(normalizer=normalizer)
    elif normalizer is not None:
        number = float(normalizer)
    with on_device_of(logprobs):
        if runs.number and n:
            policy_loss_kernel[(runs.number,)](
                logprobs, x.old, x.advantages, as_bytes("mask", x.mask), x.ref, entropy, x.sampler, x.token_weight,
                as_bytes("select", x.select), x.share, runs.offsets, n, runs.length, *numbers_of(o), grad, grad_entropy,
                sums, OF_SEQUENCE=runs.advantage_of_sequence, **constants,
                **options_of(SHAPES["policy"], device),
            )  # fmt: skip
        policy_total_kernel[(1,)](
            sums, runs.number if n else 0, normalizer if isinstance(normalizer, Tensor) else None, number, factor,
            max(runs.number, 1) * factor, out, loss, HAS_NORMALIZER=normalizer is not None, HAS_SHARES=x.share is not None,
            AGGREGATION=constants["AGGREGATION"], **SHAPES["policy_total"],
        )  # fmt: skip
    return PolicyResult(loss, out, grad, grad_entropy)


def constants_of(o: PolicyOptions, with_shares: bool, with_sampler: bool) -> dict[str, Any]:
    """The compile-time options of policy_loss_kernel but OF_SEQUENCE; ValueError for a code that does not exist."""
    correction = code("correction", o.correction, CORRECTIONS)
    return {
        "SURROGATE": code("surrogate", o.surrogate, SURROGATES),
        "LEVEL": code("level", o.level, LEVELS),
        "KL_KIND": code("kl_kind", o.kl_kind, KL_KINDS),
        "KL_UNBIASED": bool(o.kl_unbiased),
        "CORRECTION": correction if with_sampler else NO_CORRECTION.value,
        "AGGREGATION": code("aggregation", o.aggregation, AGGREGATIONS),
        "DUAL": o.dual_clip != math.inf,
        "OFF_POLICY": o.off_policy_threshold != math.inf,
    }


def numbers_of(o: PolicyOptions) -> tuple[float, ...]:
    """The numbers of policy_loss_kernel, in its order."""
    numbers = (
        1.0 - o.clip_low, 1.0 + o.clip_high, o.clip_low, o.clip_high, o.delta, o.dual_clip, o.cispo_low, o.cispo_high,
        o.sapo_pos, o.sapo_neg, o.vespo_k_pos, o.vespo_lambda_pos, o.vespo_k_neg, o.vespo_lambda_neg, o.kl_cov_coef,
        o.beta, o.entropy_coef, o.cap, o.floor, math.log(o.cap) if o.cap > 0 else -math.inf,
        math.log(o.floor) if o.floor > 0 else -math.inf, o.off_policy_threshold,
    )  # fmt: skip
    return tuple(map(float, numbers))


def runs_of(inputs: PolicyInputs, options: PolicyOptions) -> Runs:
    """The sequences; or, where a token's share is given and nothing else asks for its sequence, runs of equal size."""
    layout = inputs.layout
    of_sequence = inputs.advantages.numel() != layout.n
    if inputs.share is not None and not of_sequence and is_token_level(options):
        return Runs(None, RUN, math.ceil(layout.n / RUN), False)
    return Runs(layout.offsets, layout.length, layout.count, of_sequence)


def is_token_level(options: PolicyOptions) -> bool:
    """Whether a token's term can be made without having seen the rest of its sequence."""
    return (
        options.level == TOKEN.value
        and options.surrogate != VESPO.value
        and options.off_policy_threshold == math.inf
        and options.correction not in (SEQUENCE_TRUNCATE.value, SEQUENCE_MASK.value)
    )


def zeros_or_empty(n: int, device: torch.device, offsets: Tensor | None) -> Tensor:
    """float32 ``[n]`` that a launch fills: what no packed sequence covers is 0; padded sequences cover everything."""
    make = torch.empty if offsets is None else torch.zeros
    return make(n, dtype=torch.float32, device=device)
