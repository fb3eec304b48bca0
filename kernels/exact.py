"""exp, expm1, log and log1p in float32, from additions, multiplications and divisions alone; 2 ulp or less.

Reads and writes registers. tl.exp and tl.log are the hardware's approximations on some targets, the interpreter has no
libdevice: these give the same digits everywhere.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def at_most(x, limit):
    return tl.where(x > limit, limit, x)  # a NaN stays


@triton.jit
def exp_parts(x):
    """(r, q, 2^n): e^x = 2^n (1 + r + r² q), |r| <= ln2 / 2; x between -87 and 88 (0 below, the last value above)."""
    clamped = tl.where(x < -87.0, -87.0, at_most(x, 88.0))
    n = tl.floor(clamped * 1.4426950408889634 + 0.5)
    r = clamped - n * 0.693145751953125  # the high digits of ln 2: n times them is exact
    r = r - n * 1.42860677e-6
    # Minimax of (e^r - 1 - r) / r², as in csrc/cpu/math.h.
    q = r * 1.3926213e-3 + 8.3632031e-3
    q = q * r + 4.16665569e-2
    q = q * r + 1.66665763e-1
    q = q * r + 0.5
    bits = (n.to(tl.int32) + 127) << 23
    return r, q, bits.to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    r, q, scale = exp_parts(x)
    return tl.where(x < -87.0, 0.0, (r * r * q + r + 1.0) * scale)


@triton.jit
def expm1(x):
    r, q, scale = exp_parts(x)
    return (r * r * q + r) * scale + (scale - 1.0)


@triton.jit
def log_of_ratio(s):
    """2 atanh(s) = log((1 + s) / (1 - s)), |s| <= 1/3; (2 atanh(s) - 2s) / s³ fitted in s² (mpmath.chebyfit, 4e-10)."""
    z = s * s
    p = z * 0.23224329224 + 0.217065758009
    p = p * z + 0.285923579943
    p = p * z + 0.399997063319
    p = p * z + 0.666666673205
    return 2.0 * s + s * z * p


@triton.jit
def log1p(y):
    """log(1 + y), -1/2 <= y <= 1."""
    return log_of_ratio(tl.div_rn(y, 2.0 + y))


@triton.jit
def log(x):
    """log of a normal positive number; log 0 = -inf."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23  # x = 2^n m, m between sqrt(1/2) and sqrt(2)
    m = (bits - (n << 23)).to(tl.float32, bitcast=True)
    value = n.to(tl.float32) * LN2 + log_of_ratio(tl.div_rn(m - 1.0, m + 1.0))
    return tl.where(x == 0.0, -float("inf"), tl.where(x > 0.0, value, float("nan")))


@triton.jit
def logistic(x):
    """σ(x), σ(-x), log σ(x), log σ(-x) from one exponential."""
    e = exp(-tl.abs(x))
    large = tl.div_rn(1.0 + 0.0 * e, 1.0 + e)
    small = e * large
    t = log1p(e)
    negative = x < 0.0
    return (
        tl.where(negative, small, large),
        tl.where(negative, large, small),
        at_most(x, 0.0) - t,
        at_most(-x, 0.0) - t,
    )
