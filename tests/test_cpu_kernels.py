"""fastloss._cpu against the formulas of docs/engine.md in float64: dtypes, options, odd shapes, in place, every ISA.

FASTLOSS_CPU_MODULE=<path of a .so> tests another build (tools/sanitize.sh).
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os

import pytest
import torch


def _load():
    path = os.environ.get("FASTLOSS_CPU_MODULE")
    if not path:
        try:
            return importlib.import_module("fastloss._cpu")
        except ImportError as error:
            pytest.skip(f"the native CPU module is not built ({error})", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cpu = _load()
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
DTYPES = list(CODES)
STATS = ("logsumexp", "logprob", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
ISAS = cpu.supported_isas()
# Rounding of the output dtype, relative; the statistics are float32 (float64) whatever the logits.
EPS = {torch.float32: 6e-8, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1.2e-16}


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def ptr(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def head(x, target, ignore_index=-100, bias=None, scale=1.0, softcap=0.0):
    rows, vocab = x.shape
    return (
        x.data_ptr(),
        CODES[x.dtype],
        rows,
        vocab,
        x.stride(0),
        ptr(target),
        ignore_index,
        ptr(bias),
        scale,
        softcap,
    )


def new_stats(x, want=STATS):
    return {
        k: torch.full((x.shape[0],), 77, dtype=torch.uint8 if k == "is_top1" else acc(x.dtype))
        if k in want
        else None
        for k in STATS
    }


def stats(x, target, want=STATS, threads=1, **opt):
    out = new_stats(x, want)
    cpu.row_stats(*head(x, target, **opt), *map(ptr, out.values()), threads)
    return out


def cross_entropy(
    x, target, grad=None, w=None, eps=0.0, zeta=0.0, gs=1.0, gs_tensor=None, want=STATS, threads=1, **opt
):
    out = new_stats(x, want)
    loss = torch.full((x.shape[0],), 77, dtype=acc(x.dtype))
    cpu.row_cross_entropy(
        *head(x, target, **opt),
        ptr(w),
        w.stride(0) if w is not None and w.dim() == 2 else 0,
        eps,
        zeta,
        gs,
        ptr(gs_tensor),
        ptr(grad),
        0 if grad is None else grad.stride(0),
        loss.data_ptr(),
        *map(ptr, out.values()),
        threads,
    )
    return {"loss": loss, **out}


def row_grad(x, target, out, lse, a=None, b=None, c=None, d=None, w=None, threads=1, **opt):
    stride = w.stride(0) if w is not None and w.dim() == 2 else 0
    cpu.row_grad(
        *head(x, target, **opt),
        ptr(lse),
        ptr(a),
        ptr(b),
        ptr(c),
        ptr(d),
        ptr(w),
        stride,
        out.data_ptr(),
        out.stride(0),
        threads,
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
        "mean_logit": z.mean(-1),
    }
    if target is not None:
        ignored = target == ignore_index
        t = target.clamp(0, x.shape[1] - 1)[:, None]
        out["logprob"] = logp.gather(1, t)[:, 0]
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
        few = stats(x, target, want=("logprob",), **o)["logprob"]
        assert torch.equal(few, stats(x, target, **o)["logprob"])
        no_target = stats(x, None, want=("logsumexp", "entropy", "mean_logit"), **o)
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
        check_stats({n: got[n] for n in STATS}, expect_stats(x, target, **o), x)
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
    check_stats({"logsumexp": got["logsumexp"], "logprob": got["logprob"]}, {
        "logsumexp": z.logsumexp(-1) if softcap else torch.where(torch.arange(3) == 2, math.nan, z.logsumexp(-1)),
        "logprob": z.log_softmax(-1)[:, 0]}, x)  # fmt: skip
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
    for name in ("loss", "logprob"):
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


def test_exp_error_in_ulps(isa):
    # lse = 0 and b = 1: row_grad returns exp(x) itself
    x = torch.cat([torch.linspace(-87, 0, 200_001), -torch.logspace(-30, 0, 50_000, base=2)])[None]
    one = torch.ones(1)
    got = row_grad(x, None, torch.empty_like(x), torch.zeros(1), b=one).double()
    want = x.double().exp()
    ulp = 2.0 ** (want.log2().floor() - 23)
    assert float(((got - want).abs() / ulp).max()) < (1.1 if isa != "generic" else 1.5)  # generic has no FMA
    far = torch.tensor([[-88.1, -1e4, -3e38, -math.inf, math.nan, 0.0, -0.0]])
    got = row_grad(far, None, torch.empty_like(far), torch.zeros(1), b=one)[0]
    assert (got[:4] == 0).all() and got[4].isnan() and (got[5:] == 1).all()
    x = torch.linspace(-708, 0, 100_001, dtype=torch.float64)[None]
    got = row_grad(x, None, torch.empty_like(x), torch.zeros(1).double(), b=one.double())
    assert float(((got - x.exp()) / x.exp()).abs().max()) < 4.5e-16


def test_tanh_error_in_ulps():
    # V = 1, softcap = 1, scale = 1: the mean logit is tanh(x)
    x = torch.cat(
        [
            torch.linspace(-12, 12, 30_001),
            torch.logspace(-30, 0, 5000, base=2),
            torch.tensor([math.inf, -math.inf]),
        ]
    )
    got = stats(x[:, None], None, want=("mean_logit",), softcap=1.0)["mean_logit"].double()
    want = x.double().tanh()
    ulp = 2.0 ** (want.abs().clamp(min=1e-30).log2().floor() - 23)
    assert float(((got - want).abs() / ulp).max()) < 3
    assert (got.abs() <= 1).all()
    zero = torch.tensor([[0.0], [math.nan]])
    got = stats(zero, None, want=("mean_logit",), softcap=1.0)["mean_logit"]
    assert got[0] == 0 and got[1].isnan()
    # the slope 1 - tanh², where the subtraction would lose everything
    x = torch.linspace(0, 40, 4001)[:, None]
    zeros, ones = torch.zeros(len(x)), torch.ones(len(x))
    got = row_grad(x, None, torch.empty_like(x), zeros, d=ones, softcap=1.0).double()
    want = x.double().cosh() ** -2
    assert float(((got - want).abs() / want).max()) < 8e-7


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_convert_is_torchs(half):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(half)
    wide = torch.empty(65536)
    cpu.convert(every.data_ptr(), CODES[half], wide.data_ptr(), 0, 65536, 2)
    assert torch.equal(wide.nan_to_num(-1.5), every.float().nan_to_num(-1.5))
    assert torch.equal(wide.isnan(), every.isnan())
    gen = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_003,), generator=gen).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), every.float(), wide * (1 + 2**-11), wide * (1 + 2**-8), wide * (1 - 2**-11),
                   torch.tensor([65519.9, 65520.0, 65536.0, -65520.0, 2**-25, 2**-24 * 1.5, 1e-45])])  # fmt: skip
    for n in (0, 1, 17, len(x)):
        out = torch.full((n + 1,), 3, dtype=half)
        cpu.convert(x.data_ptr(), 0, out.data_ptr(), CODES[half], n, 2)
        want = x[:n].to(half)
        assert torch.equal(out[:n].nan_to_num(-1.5), want.nan_to_num(-1.5))
        assert torch.equal(out[:n].isnan(), want.isnan()) and out[n] == 3
    with pytest.raises(ValueError, match="convert"):
        cpu.convert(0, 1, 0, 2, 0, 1)


def test_small_functions():
    target = torch.tensor([3, -100, 0, 5, -1, -100])
    assert cpu.count_targets(target.data_ptr(), 6, 5, -100) == (2, 3)
    assert cpu.count_targets(target.data_ptr(), 3, 5, -100) == (2, -1)
    assert cpu.count_targets(target.data_ptr(), 0, 5, -100) == (0, -1)
    for dtype in (torch.float32, torch.float64):
        values, out = torch.rand(1001, dtype=dtype), torch.zeros((), dtype=dtype)
        cpu.sum_rows(values.data_ptr(), CODES[dtype], 1001, 0.5, out.data_ptr())
        assert math.isclose(float(out), 0.5 * float(values.double().sum()), rel_tol=1e-7)
    with pytest.raises(ValueError, match="isa"):
        cpu.set_isa("mmx")
    empty = torch.empty(0, 9)
    assert stats(empty, torch.empty(0, dtype=torch.long))["logsumexp"].shape == (0,)


def test_floating_point_state_is_left_alone():
    cross_entropy(*make(64, 3000, torch.float32), threads=2)
    denormal = torch.tensor([1e-40])
    assert float(denormal * 0.5) > 0


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


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (7, 70, 9), (97, 130, 33), (200, 513, 64)])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_gemm_bf16(m, n, k, column_major, accumulate):
    if not cpu.supports_gemm_bf16():
        pytest.skip("AVX512_BF16 alone has it")
    generator = torch.Generator().manual_seed(m)
    a = torch.randn(m, k, generator=generator).bfloat16()
    b = torch.randn(k, n + 3, generator=generator).bfloat16()[:, :n]  # a view: its rows are further apart
    c = torch.randn(m, n, generator=generator)
    stored = a.t().contiguous().t() if column_major else a
    exact = a.double() @ b.double() + (c.double() if accumulate else 0)
    once = None
    for threads in (1, 3):
        out = c.clone()
        cpu.gemm_bf16(
            stored.data_ptr(), *stored.stride(), b.data_ptr(), b.stride(0), out.data_ptr(), n, m, n, k, accumulate, threads,
        )  # fmt: skip
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5 * k**0.5)
        assert once is None or torch.equal(out, once)
        once = out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(5,), (3, 2), (1, 1, 3), (2048, 300, 7), (320, 320, 320, 40)])
@pytest.mark.parametrize("opt", [{}, {"softcap": 4.0, "scale": 0.7}, {"eps": 0.2, "zeta": 1e-2}])
def test_blocks_of_the_vocabulary_give_the_rows_numbers(dtype, widths, opt):
    vocab = sum(widths)
    generator = torch.Generator().manual_seed(vocab)
    x = (4 * torch.randn(6, vocab, generator=generator)).to(dtype)
    x[1, 0] = float("-inf")
    target = torch.tensor([0, vocab - 1, vocab // 2, -100, 1, vocab - 1])
    if opt.get("eps"):
        x[1, 0] = 0
    grad = torch.empty_like(x)
    whole = cross_entropy(x, target, grad=grad, gs=0.3, **opt)
    out = new_stats(x)
    loss = torch.empty(6, dtype=acc(dtype))
    state = torch.empty(6, cpu.ROW_STATE_DOUBLES, dtype=torch.float64)
    call = cpu.vocab_call(
        CODES[dtype], 6, vocab, target.data_ptr(), -100, 0, opt.get("scale", 1.0), opt.get("softcap", 0.0), 0, 0,
        opt.get("eps", 0.0), opt.get("zeta", 0.0), 0.3, loss.data_ptr(), *map(ptr, out.values()), state.data_ptr(), 2,
    )  # fmt: skip
    blocks = [part.contiguous() for part in x.split(widths, 1)]
    starts = [sum(widths[:k]) for k in range(len(widths))]
    for block, start, width in zip(blocks, starts, widths, strict=True):
        call.forward(block.data_ptr(), 0, 2, width, start, width)
        call.forward(block[2:].data_ptr(), 2, 6, width, start, width)
    call.finish()
    for block, start, width in zip(blocks, starts, widths, strict=True):
        call.backward(block.data_ptr(), block.data_ptr(), 0, 6, width, start, width)
    tight = {
        "rtol": 1e-12 if dtype == torch.float64 else 3e-6,
        "atol": 1e-12 if dtype == torch.float64 else 3e-6,
    }
    torch.testing.assert_close(loss, whole["loss"], **tight)
    for name, value in out.items():
        torch.testing.assert_close(value, whole[name], **tight, msg=name)
    torch.testing.assert_close(
        torch.cat(blocks, 1), grad, rtol=4 * EPS[dtype] + 3e-6 * (dtype != torch.float64), atol=1e-9
    )
