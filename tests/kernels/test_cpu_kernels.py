"""The CPU row kernels against the formulas of docs/engine.md: dtypes, options, odd shapes, in place, every ISA."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cpu_kernel_calls import (
    DTYPES,
    EPS,
    STATS,
    acc,
    check_stats,
    close,
    cross_entropy,
    effective,
    expect_ce,
    expect_stats,
    isa,  # noqa: F401 - every test runs on every instruction set
    make,
    row_grad,
    stats,
)

VOCABS = [1, 2, 3, 7, 16, 31, 33, 100, 2047, 2048, 2049, 5003]
OPTIONS = [{}, {"scale": 0.7}, {"bias": True}, {"softcap": 5.0}, {"bias": True, "scale": 1.3, "softcap": 3.0}]


def options_for(opt, vocab, dtype):
    opt = dict(opt)
    if opt.get("bias"):
        opt["bias"] = torch.randn(vocab, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
            acc(dtype)
        )
    return opt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("opt", OPTIONS)
def test_row_stats(dtype, opt):
    for vocab, pad in zip(VOCABS, itertools.cycle((0, 3))):
        x, target = make(5, vocab, dtype, pad=pad)
        target[1] = -100
        o = options_for(opt, vocab, dtype)
        check_stats(stats(x, target, **o), expect_stats(x, target, **o), x)
        few = stats(x, target, want=("logprobs",), **o)["logprobs"]
        assert torch.equal(few, stats(x, target, **o)["logprobs"])
        no_target = stats(x, None, want=("logsumexp", "entropy", "mean_logits"), **o)
        check_stats(no_target, expect_stats(x, None, **o), x)


KINDS = [
    {},
    {"eps": 0.1},
    {"zeta": 1e-2},
    {"w": "class"},
    {"w": "class", "eps": 0.2, "zeta": 1e-2},
    {"w": "dense"},
    {"w": "dense", "zeta": 0.1},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("opt", OPTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_row_cross_entropy(dtype, opt, kind):
    for vocab, pad in ((1, 0), (2, 3), (33, 0), (2048, 0), (4101, 3)):
        x, target = make(4, vocab, dtype, pad=pad)
        target[1] = -100
        o, k = options_for(opt, vocab, dtype), dict(kind)
        gen = torch.Generator().manual_seed(9)
        if k.get("w") == "class":
            k["w"] = torch.rand(vocab, generator=gen, dtype=torch.float64).to(acc(dtype))
        elif k.get("w") == "dense":
            k["w"] = (
                torch.rand(4, vocab + 1, generator=gen, dtype=torch.float64).to(acc(dtype))[:, :vocab] / vocab
            )
            target = None
        want_loss, want_grad = expect_ce(x, target, gs=0.5, **k, **o)
        size = float(effective(x, **o)[0].abs().max()) * (
            1 + (vocab if kind.get("w") == "dense" else 0) / vocab
        )
        fresh = torch.full((4, vocab + 5), 9, dtype=dtype)[:, :vocab]
        got = cross_entropy(
            x, target, fresh, gs=0.25, gs_tensor=torch.tensor(2.0, dtype=acc(dtype)), **k, **o
        )
        unit = EPS[acc(dtype)]
        close(got["loss"], want_loss, acc(dtype), 8 * unit * (size + 10), "loss")
        check_stats({n: got[n] for n in STATS if n in got}, expect_stats(x, target, **o), x)
        # a gradient is a difference of terms of the size of b*p and d*w
        close(fresh, want_grad, dtype, 24 * unit * max(1.0, o.get("scale", 1.0)), "grad")
        plain = cross_entropy(x, target, gs=0.5, want=(), **k, **o)
        assert torch.equal(plain["loss"], got["loss"])
        storage = torch.full((4, vocab + pad), 3, dtype=dtype)
        inplace = storage[:, :vocab]
        inplace.copy_(x)
        again = cross_entropy(inplace, target, inplace, gs=0.5, **k, **o)
        assert torch.equal(inplace, fresh), "in place differs"
        assert all(torch.equal(again[n], got[n]) for n in again)
        assert (storage[:, vocab:] == 3).all(), "wrote past the row"
        if x.dtype in (torch.float32, torch.float64):  # the entropy needs z after exp has replaced it
            inplace.copy_(x)
            only = cross_entropy(inplace, target, inplace, gs=0.5, want=("entropy",), **k, **o)
            assert torch.equal(only["entropy"], got["entropy"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("opt", OPTIONS)
@pytest.mark.parametrize("coefs", ["a", "ab", "abc", "abcd", "bdw", "cD", "abcdD", "d"])
def test_row_grad(dtype, opt, coefs):
    for vocab, pad in ((1, 0), (2, 3), (33, 0), (2048, 0), (4101, 3)):
        x, target = make(4, vocab, dtype, pad=pad)
        target[2] = -100
        o = options_for(opt, vocab, dtype)
        gen = torch.Generator().manual_seed(3)
        value = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).to(acc(dtype))
        k = {name: value(4) for name in coefs if name in "abcd"}
        if "w" in coefs:
            k["w"] = value(vocab)
        if "D" in coefs:
            k["w"], k["d"] = value(4, vocab + 3)[:, :vocab], value(4)
        z, slope = effective(x, **o)
        lse = z.logsumexp(-1).to(acc(dtype))
        logp = z - lse.double()[:, None]
        p = logp.exp()
        col = lambda name: k[name].double()[:, None] if name in k else 0.0
        want = (
            col("b") * p
            + col("c") * p * logp
            + col("d") * (k["w"].double() if "w" in k else torch.ones_like(p))
        )
        if "a" in k:
            want[torch.arange(4), target.clamp(min=0)] += k["a"].double()
        want = want * slope
        want[2] = 0
        out = row_grad(x, target, torch.full((4, vocab + 2), 9, dtype=dtype)[:, :vocab], lse, **k, **o)
        size = float(logp.abs().max() + lse.abs().max()) + 4
        close(out, want, dtype, 8 * EPS[acc(dtype)] * size * 3, "dx")
        inplace = x.clone()
        assert torch.equal(row_grad(inplace, target, inplace, lse, **k, **o), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent_and_threads_change_nothing(dtype):
    x, target = make(37, 3001, dtype, pad=1)
    target[::5] = -100
    whole_grad = torch.empty_like(x)
    whole = cross_entropy(x, target, whole_grad, eps=0.1, zeta=1e-3)
    for threads in (2, 3):
        grad = torch.empty_like(x)
        got = cross_entropy(x, target, grad, eps=0.1, zeta=1e-3, threads=threads)
        assert torch.equal(grad, whole_grad)
        assert all(torch.equal(got[n], whole[n]) for n in got)
    for row in (0, 1, 36):
        grad = torch.empty(1, 3001, dtype=dtype)
        alone = cross_entropy(x[row : row + 1], target[row : row + 1], grad, eps=0.1, zeta=1e-3)
        assert torch.equal(grad[0], whole_grad[row])
        assert all(torch.equal(alone[n][0], whole[n][row]) for n in alone)
    both = stats(x, target, threads=2)
    assert all(torch.equal(both[n], whole[n]) for n in STATS)
    lse, b = whole["logsumexp"], torch.rand(37, dtype=acc(dtype))
    one, two = torch.empty_like(x), torch.empty_like(x)
    row_grad(x, target, one, lse, b=b, c=b)
    row_grad(x, target, two, lse, b=b, c=b, threads=2)
    assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("vocab", [1, 5, 40, 2100])
def test_masked_logits(dtype, vocab, softcap):
    x, target = make(3, vocab, dtype)
    x[:, 1::2] = -math.inf
    x[2] = -math.inf
    target[:] = 0
    got = cross_entropy(x, target, grad := torch.empty_like(x), softcap=softcap)
    z, slope = effective(x, softcap=softcap)
    p = z.softmax(-1)
    want = p.clone()
    want[:, 0] -= 1
    close(grad, want * slope, dtype, 1e-6 if dtype != torch.float64 else 1e-14)
    check_stats({"logsumexp": got["logsumexp"], "logprobs": got["logprobs"]}, {
        "logsumexp": z.logsumexp(-1) if softcap else torch.where(torch.arange(3) == 2, math.nan, z.logsumexp(-1)),
        "logprobs": z.log_softmax(-1)[:, 0]}, x)  # fmt: skip
    if not softcap:
        assert (grad[:2, 1::2] == 0).all() and got["entropy"][:2].isfinite().all()
        assert got["loss"][2].isnan() and grad[2].isnan().all() and got["entropy"][2].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, "payload"])
@pytest.mark.parametrize("opt", [{}, {"scale": 0.5}])
def test_nan_and_inf_spoil_their_row_and_no_other(dtype, value, opt):
    payload = value == "payload"
    if payload and dtype != torch.float32:
        pytest.skip("a NaN with payload bits in float32")
    for vocab in (1, 5, 40, 2100, 6000):
        for where in sorted({0, vocab // 2, vocab - 1}):
            x, target = make(3, vocab, dtype)
            clean, clean_grad = cross_entropy(x, target, g := torch.empty_like(x), **opt), g
            if payload:
                x.view(torch.int32)[1, where] = 0x7F800123
            else:
                x[1, where] = value
            grad = torch.empty_like(x)
            got = cross_entropy(x, target, grad, **opt)
            for name in ("loss", "logsumexp"):
                assert got[name][1].isnan()
                assert torch.equal(got[name][::2], clean[name][::2])
            assert grad[1].isnan().all()
            assert torch.equal(grad[::2], clean_grad[::2])
            if where == 0 and value != math.inf:
                assert not got["is_top1"][1]


def test_all_lowest_finite_is_uniform():
    x = torch.full((1, 70), torch.finfo(torch.float32).min)
    got = cross_entropy(x, torch.zeros(1, dtype=torch.long), grad := torch.empty_like(x))
    assert math.isclose(float(got["loss"]), math.log(70), rel_tol=1e-6)
    close(grad[:, 1:], torch.full((1, 69), 1 / 70), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 4])
def test_ignored_and_bad_targets(dtype, ignore_index):
    x, _ = make(5, 5, dtype)
    x[0] = math.nan
    target = torch.tensor([ignore_index, 7, -7, 2, ignore_index])
    grad = torch.full_like(x, 5)
    got = cross_entropy(
        x, target, grad, ignore_index=ignore_index, eps=0.1, w=torch.ones(5, dtype=acc(dtype))
    )
    for name, value in got.items():
        assert (value[[0, 4]] == 0).all(), name
    assert (grad[[0, 4]] == 0).all()
    for name in ("loss", "logprobs"):
        assert got[name][1:3].isnan().all() and got[name][3].isfinite()
    assert grad[1:3].isnan().all() and (got["is_top1"][1:3] == 0).all()
    check_stats({"logsumexp": got["logsumexp"][1:3]}, {"logsumexp": x[1:3].double().logsumexp(-1)}, x)
    out = row_grad(
        x,
        target,
        torch.full_like(x, 5),
        got["logsumexp"],
        b=torch.ones(5, dtype=acc(dtype)),
        ignore_index=ignore_index,
    )
    assert (out[[0, 4]] == 0).all() and out[1:3].isnan().all() and out[3].isfinite().all()


def test_gradient_of_a_confident_row_keeps_its_accuracy():
    x = torch.zeros(1, 1000)
    x[0, 3] = 30.0
    grad = torch.empty_like(x)
    cross_entropy(x, torch.tensor([3]), grad)
    _, want = expect_ce(x, torch.tensor([3]))
    assert float(((grad.double() - want) / want).abs().max()) < 1e-3


def test_rows_beyond_32_bit_offsets():
    # Two rows 2^32 elements apart over memory that is never touched between them.
    try:
        storage = torch.empty(2**32 + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space for 8 GB")
    x = storage.as_strided((2, 50), (2**32, 1))
    x[0], x[1] = torch.randn(50), torch.randn(50)
    want = expect_stats(x, None)["logsumexp"]
    close(stats(x, None, want=("logsumexp",))["logsumexp"], want, torch.float32, 1e-6)
    grad = x
    cross_entropy(x, torch.tensor([3, 4]), grad)
    assert abs(float(grad[1].double().sum())) < 1e-2
