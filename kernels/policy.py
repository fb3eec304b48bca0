"""policy_loss of docs/sequences.md, 7: a token's loss and its derivative, and the sums of out[16]. Names are those of csrc/policy.h.

Bytes per token: 4 for each input that is given (8 where its sequence has a weight of its own), 4 for the gradient.
One program per sequence; a second, tiny launch adds up the sequences' sums in order: two launches, nothing is atomic.

A pointer that is None is a compile-time constant, and so are the codes: a loss compiles to its own formula.
"""

import triton
import triton.language as tl

from .exact import at_most, exp, exp_parts
from .pairs import bounds

LIMIT = tl.constexpr(20.0)
LOG_TINY = tl.constexpr(-18.420680743952367)  # log 1e-8
LARGEST = tl.constexpr(3.4028234e38)
CLIP, LOGPROB, CISPO, SAPO, VESPO = (tl.constexpr(code) for code in range(5))
TOKEN, SEQUENCE, SEQUENCE_SUM, GEOMETRIC = (tl.constexpr(code) for code in range(4))
K1, K2, K3, ABS, LOW_VAR = (tl.constexpr(code) for code in range(5))
SUMS = tl.constexpr(16)
MIN_RATIO, MAX_RATIO = tl.constexpr(10), tl.constexpr(11)


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
    if CORRECTION % 2 == 1:
        return clamped(e, floor, cap), cut
    else:
        return tl.where(cut, 0.0, e), cut


@triton.jit
def log_correction(d, log_floor, log_cap, CORRECTION: tl.constexpr):
    if CORRECTION % 2 == 1:
        log_c = clamped(d, log_floor, log_cap)
    else:
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
        _, kl = exp_and_k3(t)
        d = -(kl + t)
        if KIND == LOW_VAR:
            d = tl.where(kl > 10.0, 0.0, d)
            kl = at_most(kl, 10.0)
    return kl, tl.where((raw >= -LIMIT) & (raw <= LIMIT), d, 0.0)


@triton.jit
def policy_loss_kernel(
    logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, ref_ptr, entropy_ptr, sampler_ptr, token_weight_ptr, select_ptr,
    agg_ptr, offsets_ptr, n, length,
    ratio_low, ratio_high, log_low, log_high, delta, dual_clip, cispo_low, cispo_high, sapo_pos, sapo_neg,
    vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, kl_cov_coef, beta, entropy_coef,
    cap, floor, log_cap, log_floor, off_policy_threshold,
    grad_ptr, grad_entropy_ptr, sums_ptr,
    SURROGATE: tl.constexpr, LEVEL: tl.constexpr, KL_KIND: tl.constexpr, KL_UNBIASED: tl.constexpr,
    CORRECTION: tl.constexpr, SEQ_MEAN: tl.constexpr, OF_SEQUENCE: tl.constexpr, DUAL: tl.constexpr,
    OFF_POLICY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    begin, end = bounds(offsets_ptr, s, length)
    end = tl.minimum(end, n)
    zero = tl.zeros([BLOCK], tl.float32)

    # What all tokens of the sequence share.
    share = 1.0
    rho_seq = 1.0
    w_slope = 0.0
    c_seq = 1.0
    cut_seq = 0.0
    keep = 1.0
    phi_pos = 0.0
    phi_neg = 0.0
    if SEQ_MEAN or LEVEL != TOKEN or CORRECTION > 2 or OFF_POLICY or SURROGATE == VESPO:
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
            if CORRECTION > 0:
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
        if CORRECTION > 2:
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
            if CORRECTION > 2:
                log_w += log_correction(total_d, log_floor, log_cap, CORRECTION)
            elif CORRECTION > 0:
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
        if CORRECTION > 0:
            if CORRECTION < 3:
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
        if agg_ptr is not None:
            shares = tl.load(agg_ptr + i, mask=live, other=0.0)
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

    row = sums_ptr + s * SUMS
    tl.store(row + 0, tl.sum(loss_sum, 0))
    tl.store(row + 1, 0.0)
    tl.store(row + 2, tl.sum(token_sum, 0))
    tl.store(row + 3, tl.sum(low_sum, 0))
    tl.store(row + 4, tl.sum(high_sum, 0))
    tl.store(row + 5, tl.sum(dual_sum, 0))
    tl.store(row + 6, tl.sum(k1_sum, 0))
    tl.store(row + 7, tl.sum(k3_sum, 0))
    tl.store(row + 8, tl.sum(kl_sum, 0))
    tl.store(row + 9, tl.sum(entropy_sum, 0))
    tl.store(row + MIN_RATIO, tl.min(least, 0))
    tl.store(row + MAX_RATIO, tl.max(most, 0))
    tl.store(row + 12, tl.sum(rho_sum, 0))
    tl.store(row + 13, tl.sum(square_sum, 0))
    tl.store(row + 14, tl.sum(cut_sum, 0))
    tl.store(row + 15, tl.sum(policy_sum, 0))

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
    sums_ptr, count, normalizer_ptr, normalizer, normalizer_factor, divisor, out_ptr,
    HAS_NORMALIZER: tl.constexpr, BY_TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[16] from the sequences' sums ``[count, 16]``, in float64."""
    k = tl.arange(0, SUMS)
    total = tl.zeros([ROWS, SUMS], tl.float64)
    least = tl.zeros([ROWS, SUMS], tl.float32) + float("inf")
    most = tl.zeros([ROWS, SUMS], tl.float32) - float("inf")
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (k < SUMS)[None, :]
        part = tl.load(sums_ptr + row.to(tl.int64)[:, None] * SUMS + k[None, :], mask=inside, other=0.0)
        total += part.to(tl.float64)
        least = tl.minimum(least, tl.where(inside, part, float("inf")))
        most = tl.maximum(most, tl.where(inside, part, -float("inf")))
    sums = tl.sum(total, 0)
    tokens = tl.sum(tl.where(k == 2, sums, 0.0), 0)
    if HAS_NORMALIZER:
        if normalizer_ptr is not None:
            normalizer = tl.load(normalizer_ptr)
        by = tokens * 0.0 + normalizer * normalizer_factor
    elif BY_TOKENS:
        by = tl.maximum(tokens, 1.0)
    else:
        by = tokens * 0.0 + divisor
    out = tl.where(k == 0, sums / by, tl.where(k == 1, 1.0 / by, sums)).to(tl.float32)
    out = tl.where(k == MIN_RATIO, tl.where(tokens > 0.0, tl.min(least, 0), 1.0), out)
    out = tl.where(k == MAX_RATIO, tl.where(tokens > 0.0, tl.max(most, 0), 1.0), out)
    tl.store(out_ptr + k, out)
