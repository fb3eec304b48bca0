"""What a block of a row goes through before a loss sees it: load, bias, soft-cap, scale; and the online softmax."""

import triton
import triton.language as tl


@triton.jit
def tanh(y):
    # exp is the only primitive (the interpreter has no libdevice); a polynomial keeps the relative accuracy near 0.
    magnitude = tl.abs(y)
    square = y * y
    near = -5.70498872745e-3
    near = near * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * y + y
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    far = tl.where(y < 0, -far, far)
    return tl.where(magnitude < 0.625, near, far)


@triton.jit
def load_logits(
    row_ptr, bias_ptr, v, mask, softcap, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """(z, slope): the logits that a loss sees, -inf outside the vocabulary, and dz/dx."""
    x = tl.load(row_ptr + v, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + v, mask=mask, other=0.0)
    slope = tl.full(x.shape, 1.0, tl.float32) * scale
    if HAS_SOFTCAP:
        t = tanh(x / softcap)
        x = softcap * t
        slope *= 1.0 - t * t
    return tl.where(mask, x * scale, float("-inf")), slope


@triton.jit
def safe_maximum(m):
    """What is subtracted before exp: a maximum of -inf would make -inf - -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def load_weight(w_ptr, w_row, v, mask, HAS_W: tl.constexpr):
    """The vocabulary weight, 1 where there is none, 0 outside the vocabulary."""
    if HAS_W:
        return tl.load(w_ptr + w_row + v, mask=mask, other=0.0)
    return tl.where(mask, 1.0, 0.0)
