"""The arithmetic under the CPU kernels: exp, tanh, conversions, small functions, the bfloat16 GEMM."""

from __future__ import annotations

import math

import pytest
import torch
from backends_under_test import contract
from cpu_kernel_calls import (
    CODES,
    cpu,
    cross_entropy,
    isa,  # noqa: F401 - every test runs on every instruction set
    make,
    row_grad,
    stats,
)

from fastloss.engine.contract import Factor


def test_exp_error_in_ulps():
    # lse = 0 and b = 1: row_grad returns exp(x) itself
    x = torch.cat([torch.linspace(-87, 0, 200_001), -torch.logspace(-30, 0, 50_000, base=2)])[None]
    one = torch.ones(1)
    got = row_grad(x, None, torch.empty_like(x), torch.zeros(1), b=one).double()
    want = x.double().exp()
    ulp = 2.0 ** (want.log2().floor() - 23)
    assert float(((got - want).abs() / ulp).max()) < (
        1.1 if cpu.isa() != "generic" else 1.5
    )  # generic has no FMA
    far = torch.tensor([[-88.1, -1e4, -3e38, -math.inf, math.nan, 0.0, -0.0]])
    got = row_grad(far, None, torch.empty_like(far), torch.zeros(1), b=one)[0]
    assert (got[:4] == 0).all() and got[4].isnan() and (got[5:] == 1).all()
    x = torch.linspace(-708, 0, 100_001, dtype=torch.float64)[None]
    got = row_grad(x, None, torch.empty_like(x), torch.zeros(1).double(), b=one.double())
    assert float(((got - x.exp()) / x.exp()).abs().max()) < 4.5e-16


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16))
def test_exp_of_halves_over_all_inputs(half):
    # as above; their exponential is as exact as the rounding of the output asks for, and no more
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(half)
    x = every[(every.float() <= 0) & (every.float() >= -80)][None]
    got = row_grad(x, None, torch.empty_like(x), torch.zeros(1), b=torch.ones(1)).double()
    want = x.double().exp()
    digits, least = (8, -126) if half == torch.bfloat16 else (11, -14)
    ulp = 2.0 ** (want.log2().floor().clamp(min=least) - digits + 1)
    # the rounding, and before it what csrc/cpu/math.h says of exp_short (without FMA a little more)
    bound = 0.5 * ulp + want * (1.6e-7 + 2.8e-9 * -x.double()) * (1 if cpu.isa() != "generic" else 1.6)
    assert x.shape[1] > 10_000
    assert bool(((got - want).abs() <= bound).all())


def test_tanh_error_in_ulps():
    # V = 1, softcap = 1, scale = 1: the mean logit is tanh(x)
    x = torch.cat(
        [
            torch.linspace(-12, 12, 30_001),
            torch.logspace(-30, 0, 5000, base=2),
            torch.tensor([math.inf, -math.inf]),
        ]
    )
    got = stats(x[:, None], None, want=("mean_logits",), softcap=1.0)["mean_logits"].double()
    want = x.double().tanh()
    ulp = 2.0 ** (want.abs().clamp(min=1e-30).log2().floor() - 23)
    assert float(((got - want).abs() / ulp).max()) < 3
    assert (got.abs() <= 1).all()
    zero = torch.tensor([[0.0], [math.nan]])
    got = stats(zero, None, want=("mean_logits",), softcap=1.0)["mean_logits"]
    assert got[0] == 0 and got[1].isnan()
    # the slope 1 - tanh², where the subtraction would lose everything
    x = torch.linspace(0, 40, 4001)[:, None]
    zeros, ones = torch.zeros(len(x)), torch.ones(len(x))
    got = row_grad(x, None, torch.empty_like(x), zeros, d=ones, softcap=1.0).double()
    want = x.double().cosh() ** -2
    assert float(((got - want).abs() / want).max()) < 8e-7


HALVES = (torch.bfloat16, torch.float16)


def convert(source, out, n):
    cpu.convert(
        src=source.data_ptr(),
        src_dtype=CODES[source.dtype],
        dst=out.data_ptr(),
        dst_dtype=CODES[out.dtype],
        n=n,
        threads=2,
    )


@pytest.mark.parametrize("half", HALVES)
def test_convert_is_torchs(half):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(half)
    wide = torch.empty(65536)
    convert(every, wide, 65536)
    assert torch.equal(wide.nan_to_num(-1.5), every.float().nan_to_num(-1.5))
    assert torch.equal(wide.isnan(), every.isnan())
    gen = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_003,), generator=gen).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), every.float(), wide * (1 + 2**-11), wide * (1 + 2**-8), wide * (1 - 2**-11),
                   torch.tensor([65519.9, 65520.0, 65536.0, -65520.0, 2**-25, 2**-24 * 1.5, 1e-45])])  # fmt: skip
    for n in (0, 1, 17, len(x)):
        out = torch.full((n + 1,), 3, dtype=half)
        convert(x, out, n)
        want = x[:n].to(half)
        assert torch.equal(out[:n].nan_to_num(-1.5), want.nan_to_num(-1.5))
        assert torch.equal(out[:n].isnan(), want.isnan()) and out[n] == 3
    with pytest.raises(ValueError, match="convert"):
        convert(every, torch.empty(65536, dtype=next(h for h in HALVES if h != half)), 1)


def test_small_functions():
    target = torch.tensor([3, -100, 0, 5, -1, -100])
    kernels = contract("cpu")
    assert kernels.count_targets(target, 5, -100) == (2, 3)
    assert kernels.count_targets(target[:3], 5, -100) == (2, -1)
    assert kernels.count_targets(target[:0], 5, -100) == (0, -1)
    for dtype in (torch.float32, torch.float64):
        values = torch.rand(1001, dtype=dtype)
        out = kernels.sum_rows(values, Factor(0.5))
        assert math.isclose(float(out), 0.5 * float(values.double().sum()), rel_tol=1e-7)
    with pytest.raises(ValueError, match="isa"):
        cpu.set_isa("mmx")
    empty = torch.empty(0, 9)
    assert stats(empty, torch.empty(0, dtype=torch.long))["logsumexp"].shape == (0,)


def test_floating_point_state_is_left_alone():
    cross_entropy(*make(64, 3000, torch.float32), threads=2)
    denormal = torch.tensor([1e-40])
    assert float(denormal * 0.5) > 0
