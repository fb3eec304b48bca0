"""gae and discounted_returns of docs/sequences.md: A_t = δ_t + γλ A_next, δ_t = r_t + γ V_next - V_t; G_t = r_t + γ G_next.

Bytes per token: 17 (9 without values): rewards, values, mask; advantages, returns.
One program per sequence, tiles of tokens from its end: x = b + a x_next is a pair (a, b) per token, and pairs compose, so
that a tile is one associative scan and the tile after it one more pair. A masked token passes on what follows: (1, 0).
The recurrence is in double: a float a^k is worse than the loop's k roundings, and memory bounds the kernel.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss.engine.sequences import Sequences

from .arguments import as_bytes, expect, expect_float32, on_device_of
from .pairs import bounds
from .policy import zeros_or_empty
from .shapes import SHAPES


@triton.jit
def after(next_a, next_b, a, b):
    """The pair of a token after that of what follows it; a = 0 takes nothing, not even a NaN."""
    return a * next_a, tl.where(a == 0.0, b, a * next_b + b)


@triton.jit
def backwards(a, b, carry):
    """x of each token of a tile from its pairs, ``carry`` the x of what follows the tile; and the new carry."""
    scanned_a, scanned_b = tl.associative_scan((a, b), 0, after, reverse=True)
    x = tl.where(scanned_a == 0.0, scanned_b, scanned_a * carry + scanned_b)
    place = tl.arange(0, x.shape[0])
    return x, tl.sum(tl.where(place == 0, x, 0.0), 0)


@triton.jit
def scan_kernel(
    rewards_ptr, values_ptr, mask_ptr, offsets_ptr, length, gamma_high, gamma_low, decay_high, decay_low,
    advantages_ptr, returns_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    begin, end = bounds(offsets_ptr, s, length)
    value_carry = 0.0
    carry = tl.full([], 0.0, tl.float64)
    # A float argument is float32: each comes as the sum of two.
    gamma = tl.cast(gamma_high, tl.float64) + tl.cast(gamma_low, tl.float64)
    decay = tl.cast(decay_high, tl.float64) + tl.cast(decay_low, tl.float64)
    for done in range(0, end - begin, BLOCK):
        t = end - done - BLOCK + tl.arange(0, BLOCK)
        live = tl.load(mask_ptr + t, mask=t >= begin, other=0) != 0
        x = tl.load(rewards_ptr + t, mask=live, other=0.0).to(tl.float64)
        value = tl.zeros([BLOCK], tl.float32)
        if values_ptr is not None:
            value = tl.load(values_ptr + t, mask=live, other=0.0)
            # V_next of t is that of t + 1, or what that one passes on.
            following = (t + 1 >= begin) & (t + 1 < end)
            passes = tl.load(mask_ptr + t + 1, mask=following, other=0) == 0
            next_value = tl.load(values_ptr + t + 1, mask=following & (passes == 0), other=0.0)
            next_value, value_carry = backwards(tl.where(passes, 1.0, 0.0), next_value, value_carry)
            x = x + gamma * next_value.to(tl.float64) - value.to(tl.float64)
        one = tl.full([BLOCK], 1.0, tl.float64)
        x, carry = backwards(tl.where(live, decay, one), tl.where(live, x, 0.0 * one), carry)
        if values_ptr is not None:
            tl.store(advantages_ptr + t, tl.where(live, x.to(tl.float32), 0.0), mask=t >= begin)
        tl.store(
            returns_ptr + t, tl.where(live, (x + value.to(tl.float64)).to(tl.float32), 0.0), mask=t >= begin
        )


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, layout: Sequences, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), float32 ``[N]``, 0 where masked."""
    advantages, returns = _scan(rewards, values, mask, layout, gamma, gamma * lam)
    assert advantages is not None
    return advantages, returns


def discounted_returns(rewards: Tensor, mask: Tensor, layout: Sequences, gamma: float) -> Tensor:
    """Returns, float32 ``[N]``, 0 where masked."""
    return _scan(rewards, None, mask, layout, gamma, gamma)[1]


def _scan(
    rewards: Tensor, values: Tensor | None, mask: Tensor, layout: Sequences, gamma: float, decay: float
) -> tuple[Tensor | None, Tensor]:
    expect_float32(rewards=rewards, values=values)
    expect(torch.int64, offsets=layout.offsets)
    n, device, offsets = rewards.numel(), rewards.device, layout.offsets
    advantages = None if values is None else zeros_or_empty(n, device, offsets)
    returns = zeros_or_empty(n, device, offsets)
    if layout.count and n:
        with on_device_of(rewards):
            scan_kernel[(layout.count,)](
                rewards, values, as_bytes("mask", mask), offsets, layout.length, *_halves(gamma), *_halves(decay),
                advantages, returns, **SHAPES["scan"],
            )  # fmt: skip
    return advantages, returns


def _halves(x: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is ``x`` to 48 bits: Triton takes no double by value."""
    (high,) = struct.unpack("f", struct.pack("f", x))
    return high, x - high
