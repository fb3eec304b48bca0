"""A divergence of each row of the student's logits from the same row of the teacher's: its sums, and the gradient by the student's.

Bytes per row: both rows are read for the sums, and both once more for the gradient, which is written once, over the student's
logits if asked. The second reading comes from L2 only where all rows in flight, two each, fit there: not at V = 128k. One program per row, a loop over vocabulary blocks in which a thread keeps
the sums of its own entries; they meet once, after the loop. Not tuned on a GPU. docs/distillation.md has the formulas.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.tables import DISTILLATION_DIVERGENCES, DISTILLATION_SUMS, DistillationOptions

from .arguments import code, expect, expect_float32, on_device_of, options_of
from .rows import LOG2E, _row_of, exp, load, read_target, store_rounded
from .shapes import SHAPES

INF = tl.constexpr(float("inf"))
SUMS = tl.constexpr(len(DISTILLATION_SUMS))
FORWARD_KL = tl.constexpr(DISTILLATION_DIVERGENCES.index("forward_kl"))
REVERSE_KL = tl.constexpr(DISTILLATION_DIVERGENCES.index("reverse_kl"))
JSD = tl.constexpr(DISTILLATION_DIVERGENCES.index("jsd"))
TVD = tl.constexpr(DISTILLATION_DIVERGENCES.index("tvd"))
SKEWED_FORWARD_KL = tl.constexpr(DISTILLATION_DIVERGENCES.index("skewed_forward_kl"))
SKEWED_REVERSE_KL = tl.constexpr(DISTILLATION_DIVERGENCES.index("skewed_reverse_kl"))
ALPHA = tl.constexpr(DISTILLATION_DIVERGENCES.index("alpha"))


@triton.jit
def expm1_nonpositive(x):
    """e^x - 1 for x <= 0, with its digits near 0."""
    near = x * (1.0 / 5040)
    near = x * (near + 1.0 / 720)
    near = x * (near + 1.0 / 120)
    near = x * (near + 1.0 / 24)
    near = x * (near + 1.0 / 6)
    near = x * (near + 0.5)
    near = x * (near + 1.0)
    return tl.where(x > -0.35, near, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def log_of_sum(u, x):
    """log u of u = 1 + x in (0, 1], with the digits of x near 0."""
    s = x / (2.0 + x)  # log(1 + x) = 2 artanh(x / (2 + x))
    s2 = s * s
    series = s2 * (1.0 / 9) + 1.0 / 7
    series = series * s2 + 1.0 / 5
    series = series * s2 + 1.0 / 3
    return tl.where(x > -0.3, 2.0 * s + 2.0 * s * s2 * series, tl.log(u))


@triton.jit
def mixture(d, a, b):
    """log(m / p), log(m / q) and (q - p) / m of the mixture m = a p + b q with a + b = 1, from d = log q - log p."""
    up = d > 0
    e = expm1_nonpositive(tl.where(up, -d, d))  # the smaller of p and q over the larger, less 1
    x = e * tl.where(up, a, b)
    # Rounding must not take u, the mixture over the larger, below the larger's own part.
    lowest = tl.maximum(tl.where(up, b, a), 2e-38)
    u = 1.0 + x
    u = tl.where(u < lowest, lowest, u)
    log_u = log_of_sum(u, x)
    return tl.where(up, d + log_u, log_u), tl.where(up, log_u, log_u - d), tl.where(up, -e, e) / u


@triton.jit
def divergence_term(p, q, d, w, rest, KIND: tl.constexpr):
    """A class's share of the value, and its derivative by log q: both 0 at q = p."""
    if KIND == FORWARD_KL:
        return q - p - p * d, q - p
    elif KIND == REVERSE_KL:
        return (p - q) + q * d, q * d
    elif KIND == JSD:
        over_p, over_q, _ = mixture(d, w, rest)
        of_student = rest * (q * over_q)
        return -w * (p * over_p) - of_student, -of_student
    elif KIND == TVD:
        more = q - p
        half = 0.5 * q
        return 0.5 * tl.abs(more), tl.where(more > 0, half, tl.where(more < 0, -half, 0.0))
    elif KIND == SKEWED_FORWARD_KL:
        over_p, _, excess = mixture(d, w, rest)
        return rest * (q - p) - p * over_p, rest * rest * (q * excess)
    elif KIND == SKEWED_REVERSE_KL:
        _, over_q, excess = mixture(d, rest, w)
        return rest * (p - q) - q * over_q, -(q * over_q) - w * rest * (q * excess)
    elif KIND == ALPHA:
        up = d > 0
        fall = tl.where(up, -d, d)
        e = expm1_nonpositive(fall)
        k = tl.where(up, w, rest)
        part = expm1_nonpositive(k * fall)
        larger = tl.where(up, q, p)
        return larger * (k * e - part) / (w * rest), tl.where(up, -(q * part), p * (e - part)) / w
    else:
        tl.static_assert(False, "a divergence without a formula here")


@triton.jit
def times_mass(limit, mass):
    return tl.where(mass > 0, limit * mass, 0.0)  # 0 · inf = 0


@triton.jit
def class_pair(x_row, y_row, bias_ptr, y_bias_ptr, v, mask, scale, y_scale, m, log_s, y_m, y_log_s):
    """The student's raw logit, z, y, log q, log p of the classes v; -inf outside the mask."""
    raw = load(x_row + v, mask, "").to(tl.float32)
    y = load(y_row + v, mask, "").to(tl.float32)
    if bias_ptr is not None:
        raw += load(bias_ptr + v, mask, "")
    if y_bias_ptr is not None:
        y += load(y_bias_ptr + v, mask, "")
    if mask is not None:
        raw = tl.where(mask, raw, -INF)
        y = tl.where(mask, y, -INF)
    z = scale * raw
    y = y_scale * y
    return raw, z, y, (z - m) - log_s, (y - y_m) - y_log_s


@triton.jit
def class_terms(log_q, log_p, x_row, w, rest, value_no_p, slope_no_p, value_no_q, KIND: tl.constexpr):
    """p, q, value, slope, KL and reverse KL of classes whose log-probabilities may be -inf."""
    no_q = log_q == -INF
    no_p = log_p == -INF
    q = exp(log_q, x_row)
    p = exp(log_p, x_row)
    d = tl.where(no_p | no_q, 0.0, log_q - log_p)
    value, slope = divergence_term(p, q, d, w, rest, KIND)
    value = tl.where(no_p, times_mass(value_no_p, q), value)
    slope = tl.where(no_p, slope_no_p * q, slope)
    value = tl.where(no_q, times_mass(value_no_q, p), value)
    slope = tl.where(no_q, 0.0, slope)
    kl = tl.where(no_q, times_mass(INF, p), q - p - p * d)
    reverse = tl.where(no_p, times_mass(INF, q), (p - q) + q * d)
    return p, q, value, slope, kl, reverse


@triton.jit
def divergence_kernel(
    x_ptr, row_stride, y_ptr, y_row_stride, vocab, target_ptr, ignore_index, bias_ptr, y_bias_ptr,
    scale, y_scale, factor, hard_coef, w, rest, value_no_p, slope_no_p, value_no_q,
    lse_parts_ptr, y_lse_parts_ptr, hard_lse_parts_ptr, factors_ptr, slopes_ptr, row_scale_ptr, y_row_scale_ptr,
    row_factor_ptr, sums_ptr, grad_ptr, grad_row_stride,
    KIND: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # SAME: the student's temperature is 1, and the hard loss has the same probabilities.
    row = tl.program_id(0).to(tl.int64)
    if row_scale_ptr is not None:
        scale = scale * tl.load(row_scale_ptr + row)
    if y_row_scale_ptr is not None:
        y_scale = y_scale * tl.load(y_row_scale_ptr + row)
    if row_factor_ptr is not None:
        factor = factor * tl.load(row_factor_ptr + row)
    x_row = x_ptr + row * row_stride
    y_row = y_ptr + row * y_row_stride
    ignored = row < 0  # no row is
    has_target = row >= 0
    t = row * 0
    if target_ptr is not None:
        t, ignored, has_target = read_target(target_ptr, row, vocab, ignore_index)
    m = tl.load(lse_parts_ptr + 2 * row)
    log_s = tl.load(lse_parts_ptr + 2 * row + 1)
    y_m = tl.load(y_lse_parts_ptr + 2 * row)
    y_log_s = tl.load(y_lse_parts_ptr + 2 * row + 1)
    hard_m = 0.0
    hard_log_s = 0.0
    hard_loss = 0.0
    if hard_lse_parts_ptr is not None:
        hard_m = tl.load(hard_lse_parts_ptr + 2 * row)
        hard_log_s = tl.load(hard_lse_parts_ptr + 2 * row + 1)
        # Before the gradient may overwrite it.
        raw_t = tl.load(x_row + t).to(tl.float32)
        if bias_ptr is not None:
            raw_t += tl.load(bias_ptr + t)
        hard_loss = hard_log_s - (raw_t - hard_m)
    end = tl.where(ignored, 0, vocab)  # an ignored row is not read
    if slopes_ptr is not None:
        total_slope = tl.load(slopes_ptr + row)
    else:
        zero = tl.zeros([BLOCK], tl.float32)
        values, slopes, kls, reverses, agrees, entropies, y_entropies = (
            zero,
            zero,
            zero,
            zero,
            zero,
            zero,
            zero,
        )
        for start in range(0, end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            mask = v < vocab
            _, z, y, log_q, log_p = class_pair(
                x_row, y_row, bias_ptr, y_bias_ptr, v, mask, scale, y_scale, m, log_s, y_m, y_log_s
            )
            p, q, value, slope, kl, reverse = class_terms(
                log_q, log_p, x_row, w, rest, value_no_p, slope_no_p, value_no_q, KIND
            )
            values += value
            slopes += slope
            kls += kl
            reverses += reverse
            agrees = tl.where((z == m) & (y == y_m), 1.0, agrees)
            entropies += q * tl.maximum(log_q, -200.0)  # 0 · (-inf) = 0
            y_entropies += p * tl.maximum(log_p, -200.0)
        total_slope = tl.sum(slopes, 0)
        out = sums_ptr + row * SUMS
        bad = tl.where(ignored, 0.0, tl.where(has_target, 0.0, float("nan")))
        hard_loss = tl.where(ignored, 0.0, hard_loss)
        tl.store(out + 0, factor * tl.sum(values, 0) + hard_coef * hard_loss + bad)
        tl.store(out + 1, tl.sum(kls, 0) + bad)
        tl.store(out + 2, tl.sum(reverses, 0) + bad)
        tl.store(out + 3, tl.max(agrees, 0) + bad)
        tl.store(out + 4, bad - tl.sum(entropies, 0))
        tl.store(out + 5, bad - tl.sum(y_entropies, 0))
        tl.store(out + 6, hard_loss + bad)
        tl.store(out + 7, total_slope + bad)
    if grad_ptr is not None:
        out_row = grad_ptr + row * grad_row_stride
        upstream = 1.0
        if factors_ptr is not None:
            upstream = tl.load(factors_ptr + row)
        upstream = tl.where(has_target, upstream, float("nan"))
        soft = upstream * factor * scale
        of_hard = upstream * hard_coef
        # Every element is read and written in one step of one program: x and grad may be the same row.
        for start in range(0, vocab, BLOCK):
            v = start + tl.arange(0, BLOCK)
            mask = v < vocab
            if ignored:
                store_rounded(out_row + v, tl.zeros([BLOCK], tl.float32), mask)
            else:
                raw, _, _, log_q, log_p = class_pair(
                    x_row, y_row, bias_ptr, y_bias_ptr, v, mask, scale, y_scale, m, log_s, y_m, y_log_s
                )
                _, q, _, slope, _, _ = class_terms(
                    log_q, log_p, x_row, w, rest, value_no_p, slope_no_p, value_no_q, KIND
                )
                g = soft * (slope - q * total_slope)
                if hard_lse_parts_ptr is not None:
                    if SAME:
                        g += of_hard * q
                    else:
                        g += of_hard * exp((raw - hard_m) - hard_log_s, x_row)
                    g -= tl.where(v == t, of_hard, 0.0)
                store_rounded(out_row + v, g, mask)


def limits(kind: str, w: float) -> tuple[float, float, float]:
    """(value where p is 0, per q; slope there; value where q is 0, per p): the terms' limits at a logit of -inf."""
    rest, inf = 1.0 - w, math.inf
    no_p, no_q = {
        "forward_kl": lambda: (1.0, inf),
        "reverse_kl": lambda: (inf, 1.0),
        "jsd": lambda: (-rest * math.log1p(-w), -w * math.log(w)),
        "tvd": lambda: (0.5, 0.5),
        "skewed_forward_kl": lambda: (rest, -rest - math.log(w)),
        "skewed_reverse_kl": lambda: (-rest - math.log(w), rest),
        "alpha": lambda: (1.0 / w, 1.0 / rest),
    }[kind]()
    # The slope of what is infinite has no value: 0, so that it stays out of the other classes' gradients.
    return no_p, 0.0 if no_p == inf else no_p, no_q


def row_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    options: DistillationOptions,
    *,
    lse_parts: Tensor,
    teacher_lse_parts: Tensor,
    hard_lse_parts: Tensor | None = None,
    factors: Tensor | None = None,
    grad: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Tensor:
    """The sums, float32 ``[rows, 8]``; the gradient times ``factors`` into ``grad [rows, V]`` (may be ``logits``)."""
    shape = (logits.shape[0], len(DISTILLATION_SUMS))
    sums = torch.empty(shape, dtype=torch.float32, device=logits.device)
    parts = lse_parts, teacher_lse_parts, hard_lse_parts
    _launch(logits, teacher_logits, target, options, parts, (bias, teacher_bias), factors, None, sums, grad)
    return sums


def row_divergence_grad(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    options: DistillationOptions,
    *,
    lse_parts: Tensor,
    teacher_lse_parts: Tensor,
    slopes: Tensor,
    factors: Tensor,
    out: Tensor,
    hard_lse_parts: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> None:
    """Writes the gradient alone to ``out [rows, V]``, which may be ``logits``."""
    parts = lse_parts, teacher_lse_parts, hard_lse_parts
    _launch(logits, teacher_logits, target, options, parts, (bias, teacher_bias), factors, slopes, None, out)


def _launch(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    o: DistillationOptions,
    parts: tuple[Tensor, Tensor, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    factors: Tensor | None,
    slopes: Tensor | None,
    sums: Tensor | None,
    grad: Tensor | None,
) -> None:
    vocab = _row_of(logits)
    kind = code("divergence", o.divergence, DISTILLATION_DIVERGENCES)
    expect(logits.dtype, teacher_logits=teacher, grad=grad)
    expect(torch.int64, target=target)
    expect_float32(lse_parts=parts[0], teacher_lse_parts=parts[1], hard_lse_parts=parts[2], bias=biases[0],
                   teacher_bias=biases[1], factors=factors, slopes=slopes, row_scale=o.row_scale,
                   teacher_row_scale=o.teacher_row_scale, row_factor=o.row_factor)  # fmt: skip
    if not logits.shape[0]:
        return
    per_row = o.row_scale, o.teacher_row_scale, o.row_factor
    with on_device_of(logits):
        divergence_kernel[(logits.shape[0],)](
            logits, logits.stride(0), teacher, teacher.stride(0), vocab, target, o.ignore_index, *biases,
            float(o.scale), float(o.teacher_scale), float(o.factor), float(o.hard_loss_coef), float(o.interpolation),
            1.0 - o.interpolation, *limits(DISTILLATION_DIVERGENCES[kind], o.interpolation), *parts, factors, slopes, *per_row, sums,
            grad, 0 if grad is None else grad.stride(0), KIND=kind, SAME=o.scale == 1.0 and o.row_scale is None,
            **options_of(SHAPES["divergence"], logits.device),
        )  # fmt: skip
