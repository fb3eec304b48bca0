"""The row kernels of the contract, called as the tests of the CPU want them, and the formulas of docs/engine.md in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from backends_under_test import contract
from instruction_sets import ISAS, forced, threads_of

from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import Factor
from fastloss.tables import DTYPE_CODES as CODES
from fastloss.tables import STATS, STATS_WITHOUT_TARGET, CrossEntropyOptions, RowOptions

try:
    cpu = importlib.import_module("fastloss._cpu")
except ImportError as error:
    pytest.skip(f"the native CPU module is not built ({error})", allow_module_level=True)
DTYPES = list(CODES)
# Rounding of the output dtype, relative; the statistics are float32 (float64) whatever the logits.
EPS = {torch.float32: 6e-8, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1.2e-16}


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with forced(request.param):
        yield request.param


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats(x, target, want=STATS, threads=1, bias=None, **opt):
    with threads_of(threads):
        return contract("cpu").row_stats(x, target, RowOptions(**opt), want=want, bias=bias)


def cross_entropy(
    x,
    target,
    grad=None,
    w=None,
    eps=0.0,
    zeta=0.0,
    gs=1.0,
    gs_tensor=None,
    want=STATS,
    threads=1,
    bias=None,
    **opt,
):
    if target is None:
        want = tuple(name for name in want if name in STATS_WITHOUT_TARGET)
    options = CrossEntropyOptions(label_smoothing=eps, z_loss=zeta, **opt)
    with threads_of(threads):
        return contract("cpu").row_cross_entropy(
            x, target, options, factor=Factor(gs, gs_tensor), grad=grad, want=want, bias=bias, w=w
        )


def row_grad(x, target, out, lse, a=None, b=None, c=None, d=None, w=None, threads=1, bias=None, **opt):
    with threads_of(threads):
        contract("cpu").row_grad(
            x,
            target,
            RowOptions(**opt),
            lse_parts=torch.stack([lse, torch.zeros_like(lse)], -1),
            coefficients=Coefficients(a, b, c, d),
            out=out,
            bias=bias,
            w=w,
        )
    return out


def effective(x, bias=None, scale=1.0, softcap=0.0):
    """z and dz/dx in float64."""
    u = x.double() + (0 if bias is None else bias.double())
    slope = torch.full_like(u, scale)
    if softcap:
        t = torch.tanh(u / softcap)
        u, slope = softcap * t, slope * (1 - t * t)
    return scale * u, slope


def expect_stats(x, target, ignore_index=-100, **opt):
    z, _ = effective(x, **opt)
    lse = z.logsumexp(-1)
    logp = z - lse[:, None]
    p = logp.exp()
    out = {
        "logsumexp": lse,
        "entropy": -torch.where(p > 0, p * logp, 0.0).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "mean_logits": z.mean(-1),
    }
    if target is not None:
        ignored = target == ignore_index
        t = target.clamp(0, x.shape[1] - 1)[:, None]
        out["logprobs"] = logp.gather(1, t)[:, 0]
        out["is_top1"] = (z.gather(1, t)[:, 0] >= z.amax(-1)).double()
        out = {k: v.masked_fill(ignored, 0) for k, v in out.items()}
    return out


def expect_ce(x, target, w=None, eps=0.0, zeta=0.0, gs=1.0, ignore_index=-100, **opt):
    """loss and gradient by autograd in float64, from the definition."""
    leaf = x.double().detach().requires_grad_()
    z, _ = effective(leaf, **opt)
    lse = z.logsumexp(-1)
    ww = torch.ones_like(z) if w is None else w.double().expand_as(z)
    total = zeta * lse**2
    if target is None:
        total = total + (ww * (lse[:, None] - z)).sum(-1)
    else:
        t = target.clamp(0, x.shape[1] - 1)[:, None]
        total = total + (1 - eps) * (ww.gather(1, t) * (lse[:, None] - z.gather(1, t)))[:, 0]
        if eps:
            total = total + eps / x.shape[1] * (ww * (lse[:, None] - z)).sum(-1)
        total = torch.where(target == ignore_index, torch.zeros_like(total), total)
    (grad,) = torch.autograd.grad(total.sum(), leaf)
    return total.detach(), grad * gs


def make(rows, vocab, dtype, seed=0, spread=4.0, pad=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab + pad, generator=gen, dtype=torch.float64) * spread
    target = torch.randint(0, vocab, (rows,), generator=gen)
    return x.to(dtype)[:, :vocab], target


def close(got, want, dtype, extra=0.0, what=""):
    """Half an ulp of the output's dtype and a few of the accumulation's."""
    got, want = got.double(), want.double()
    rel = EPS[dtype] + 16 * EPS[acc(dtype)]
    tiny = {torch.float16: 6e-8, torch.bfloat16: 1e-38, torch.float32: 1e-38, torch.float64: 1e-300}[dtype]
    bound = rel * want.abs() + tiny + extra
    assert got.shape == want.shape
    assert (got.isnan() == want.isnan()).all(), what
    worst = ((got - want).abs() - bound).nan_to_num(nan=0.0, posinf=0.0)
    infinite = want.isinf() | got.isinf()
    assert (got[infinite] == want[infinite]).all(), what
    assert (worst <= 0).all(), f"{what}: off by {float((got - want).abs()[worst > 0].max())}"


def check_stats(got, want, x):
    unit = EPS[acc(x.dtype)]
    size = float(want["logsumexp"].abs().nan_to_num(0, 0, 0).max()) + 10
    for name, value in got.items():
        if value is not None and name in want:
            close(value, want[name], acc(x.dtype), 8 * unit * size, name)
