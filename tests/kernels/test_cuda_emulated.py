"""The CUDA source compiled by g++ against tests/helpers/cuda_emulation, against float64, and under ThreadSanitizer."""

from __future__ import annotations

import contextlib
import subprocess
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from backends_under_test import need
from cuda_emulation.build import (
    build_cluster_check,
    build_emulated,
    build_limits_check,
    build_race_check,
    build_tickets_check,
    compiler,
)
from torch import Tensor

import fastloss
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import WHOLE, Backend, Factor
from fastloss.engine.definition import ReferenceBackend
from fastloss.engine.native import CudaContext, NativeBackend, emulated_cuda
from fastloss.tables import (
    DISTILLATION_DIVERGENCES,
    STATS,
    CrossEntropyOptions,
    DistillationOptions,
    RowOptions,
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ for the CUDA emulation")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABS = [1, 2, 3, 31, 32, 33, 1000, 1031]
IGNORE, BAD = -100, 1 << 40
NAN, INF = float("nan"), float("inf")


def make_rows(rows: int, vocab: int, dtype: torch.dtype, stride: int | None = None, shift: int = 0) -> Tensor:
    """[rows, vocab] of random logits, ``stride`` elements apart, ``shift`` elements past a 16-byte boundary."""
    generator = torch.Generator().manual_seed(vocab)
    stride = vocab if stride is None else stride
    memory = torch.full((rows * stride + shift + 16,), NAN, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    x = memory.as_strided((rows, vocab), (stride, 1), shift)
    return x.copy_(4 * torch.randn(rows, vocab, generator=generator))


def make_targets(rows: int, vocab: int) -> Tensor:
    target = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    target[0], target[-1] = vocab - 1, 0
    return target


class Row:
    """docs/engine.md in float64 over all rows."""

    def __init__(self, x: Tensor, target: Tensor | None, bias: Tensor | None, scale: float, softcap: float):
        u = x.double() + (0 if bias is None else bias.double())
        self.slope = torch.ones_like(u)
        if softcap:
            tanh = (u / softcap).tanh()
            u, self.slope = softcap * tanh, 1 - tanh**2
        self.z = scale * u
        self.slope = self.slope * scale
        self.target, self.vocab = target, x.shape[1]
        self.ignored = torch.zeros(len(x), dtype=torch.bool) if target is None else target == IGNORE
        outside = self.ignored if target is None else (target < 0) | (target >= self.vocab)
        self.bad = outside & ~self.ignored
        self.hot = torch.zeros_like(u)
        self.safe = (
            torch.zeros(len(x), dtype=torch.long) if target is None else target.masked_fill(outside, 0)
        )
        if target is not None:
            self.hot.scatter_(1, self.safe[:, None], 1)
        self.logp = self.z.log_softmax(-1)
        self.p = self.logp.exp()
        self.lse = torch.where(self.p.isnan().any(-1), NAN, self.z.logsumexp(-1))

    def finish(self, value: Tensor, bad: float = NAN) -> Tensor:
        shape = (-1,) + (1,) * (value.dim() - 1)
        return value.masked_fill(self.bad.view(shape), bad).masked_fill(self.ignored.view(shape), 0)

    def at_target(self, values: Tensor) -> Tensor:
        return values.gather(-1, self.safe[:, None])[:, 0]

    def stats(self) -> dict[str, Tensor]:
        p_logp = torch.where(self.p == 0, 0, self.p * self.logp)
        keep = {
            "logsumexp": self.lse,
            "entropy": -p_logp.sum(-1),
            "log_sum_sq_probs": self.p.square().sum(-1).log(),
            "mean_logits": self.z.mean(-1),
        }
        out = {name: value.masked_fill(self.ignored, 0) for name, value in keep.items()}
        if self.target is not None:
            out["logprobs"] = self.finish(self.at_target(self.logp))
            out["is_top1"] = self.finish((self.at_target(self.z) >= self.z.amax(-1)).double(), 0)
        return out

    def gradient(self, a: Any, b: Any, c: Any, d: Any, w: Tensor | float = 1.0) -> Tensor:
        p_logp = torch.where(self.p == 0, 0, self.p * self.logp)
        columns = [torch.as_tensor(k).double().reshape(-1, 1) for k in (a, b, c, d)]
        dz = columns[0] * self.hot + columns[1] * self.p + columns[2] * p_logp
        if bool((columns[3] != 0).any()):
            dz = dz + columns[3] * w
        return self.finish(dz * self.slope)

    def cross_entropy(
        self, w: Tensor | None, eps: float, zeta: float, grad_scale: float
    ) -> tuple[Tensor, Tensor]:
        every = torch.ones_like(self.z) if w is None else w.double().expand_as(self.z)
        w_sum = every.sum(-1)
        spread = -(every * self.logp).sum(-1)
        z_loss = zeta * self.lse**2 if zeta else 0 * self.lse
        if self.target is None:
            loss, a, b, d = spread + z_loss, 0.0, w_sum + 2 * zeta * self.lse, -1.0
        else:
            w_t = self.at_target(every)
            loss = -(1 - eps) * w_t * self.at_target(self.logp) + z_loss
            loss = loss + (eps / self.vocab * spread if eps else 0)
            a, d = -(1 - eps) * w_t, -eps / self.vocab
            b = (1 - eps) * w_t + eps / self.vocab * w_sum + 2 * zeta * self.lse
        return self.finish(loss), self.gradient(a, b, 0.0, d, every) * grad_scale


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    rtol, atol = {torch.float32: (4e-6, 4e-6), torch.bfloat16: (8e-3, 1e-6), torch.float16: (1e-3, 1e-6)}[
        dtype
    ]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol, equal_nan=True)


def kernels() -> Backend:
    return emulated_cuda(build_emulated())


def run_stats(
    x: Tensor,
    target: Tensor | None,
    bias: Tensor | None = None,
    want: tuple[str, ...] = STATS,
    **options: float,
) -> dict[str, Tensor]:
    return kernels().row_stats(x, target, RowOptions(**options), want=want, bias=bias)


def run_cross_entropy(
    x: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None = None,
    w: Tensor | None = None,
    eps: float = 0.0,
    zeta: float = 0.0,
    factor: Factor = WHOLE,
    grad: Tensor | None = None,
    want: tuple[str, ...] = (),
    **options: float,
) -> dict[str, Tensor]:
    given = CrossEntropyOptions(label_smoothing=eps, z_loss=zeta, **options)
    return kernels().row_cross_entropy(x, target, given, factor=factor, grad=grad, want=want, bias=bias, w=w)


def run_grad(
    x: Tensor,
    target: Tensor | None,
    lse: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    w: Tensor | None = None,
    **k: Tensor,
) -> None:
    options, coefficients = RowOptions(scale=scale, softcap=softcap), Coefficients(**k)
    kernels().row_grad(
        x,
        target,
        options,
        lse_parts=torch.stack([lse, torch.zeros_like(lse)], -1),
        coefficients=coefficients,
        out=out,
        bias=bias,
        w=w,
    )


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [
        pytest.param(v, t, marks=[] if t == torch.float32 or v in (3, 1031) else pytest.mark.slow)
        for v in VOCABS
        for t in DTYPES
    ],
)
def test_all_functions(vocab: int, dtype: torch.dtype) -> None:
    rows = 4
    x, target = make_rows(rows, vocab, dtype), make_targets(rows, vocab)
    target[1], target[2] = IGNORE, BAD
    generator = torch.Generator().manual_seed(1)
    bias, w = torch.randn(vocab, generator=generator), torch.rand(vocab, generator=generator) + 0.5
    for softcap, use_bias, scale in [
        (0.0, False, 1.0),
        (5.0, False, 0.7),
        (0.0, True, 1.3),
        (5.0, True, 1.0),
    ]:
        options: dict[str, Any] = {"bias": bias if use_bias else None, "scale": scale, "softcap": softcap}
        row = Row(x, target, **options)
        for name, got in run_stats(x, target, **options).items():
            close(got, row.stats()[name])

        for use_w, eps, zeta in product([False, True], [0.0, 0.1], [0.0, 1e-3]):
            weights = w if use_w else None
            grad = torch.full_like(x, 77)
            out = run_cross_entropy(
                x,
                target,
                **options,
                w=weights,
                eps=eps,
                zeta=zeta,
                factor=Factor(2.0, torch.tensor(0.75)),
                grad=grad,
            )
            loss, want = row.cross_entropy(weights, eps, zeta, 1.5)
            close(out["loss"], loss)
            close(grad, want, dtype)

        lse = run_stats(x, None, **options, want=("logsumexp",))["logsumexp"]
        k = {name: torch.randn(rows, generator=generator) for name in "abcd"}
        for use_w in (False, True):
            grad = torch.full_like(x, 77)
            run_grad(x, target, lse, grad, **options, w=w if use_w else None, **k)
            close(grad, row.gradient(*k.values(), w.double() if use_w else 1.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_probabilities(dtype: torch.dtype) -> None:
    x = make_rows(3, 1031, dtype)
    w = torch.rand(3, 1031, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for weights in (w, w.repeat(1, 2)[:, 1031:], torch.nn.functional.pad(w, (0, 5))[:, :1031]):
        row, grad = Row(x, None, None, 1.0, 0.0), torch.full_like(x, 77)
        out = run_cross_entropy(x, None, w=weights, zeta=1e-3, grad=grad)
        loss, want = row.cross_entropy(weights, 0.0, 1e-3, 1.0)
        close(out["loss"], loss)
        close(grad, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stride", "shift"), [(1031, 0), (1032, 0), (1040, 1), (1033, 3), (2062, 5)])
def test_layouts_and_in_place_give_the_same_bits(stride: int, shift: int, dtype: torch.dtype) -> None:
    rows, vocab = 3, 1031
    aligned, x = make_rows(rows, vocab, dtype, 1040), make_rows(rows, vocab, dtype, stride, shift)
    target, grad = make_targets(rows, vocab), torch.full((rows, 1040), 77, dtype=dtype)[:, :vocab]
    want = run_cross_entropy(aligned, target, softcap=9.0, eps=0.1, grad=grad, want=STATS)
    plain = run_stats(x, target, softcap=9.0)
    lse, b = plain["logsumexp"], torch.ones(rows)
    want_row_grad = torch.empty_like(grad)
    run_grad(aligned, target, lse, want_row_grad, softcap=9.0, b=b)

    other = torch.full((rows, vocab + 3), 77, dtype=dtype)[:, 1 : vocab + 1]
    out = run_cross_entropy(x, target, softcap=9.0, eps=0.1, grad=other, want=STATS)
    assert torch.equal(other, grad)
    run_grad(x, target, lse, other, softcap=9.0, b=b)
    assert torch.equal(other, want_row_grad)
    copy = make_rows(rows, vocab, dtype, stride, shift)
    run_grad(copy, target, lse, copy, softcap=9.0, b=b)
    assert torch.equal(copy, want_row_grad)

    between = torch.ones(x.untyped_storage().size() // x.element_size(), dtype=torch.bool)
    between.as_strided((rows, vocab), (stride, 1), shift).fill_(False)
    run_cross_entropy(x, target, softcap=9.0, eps=0.1, grad=x)
    assert torch.equal(x, grad)
    memory = x.as_strided((len(between),), (1,), 0)
    assert memory[between].isnan().all()  # nothing beside the rows was written
    for name in STATS:
        assert torch.equal(out[name], want[name])
        assert torch.equal(plain[name], want[name])


@pytest.mark.parametrize("divergence", range(len(DISTILLATION_DIVERGENCES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergences_of_rows_in_packs_and_beside_them(dtype: torch.dtype, divergence: int) -> None:
    """Every class in a pack, some behind the last, rows that begin between two packs, in place: the same numbers, those of
    the definition in float64."""
    vocab, generator = 1031, torch.Generator().manual_seed(1)
    target = make_targets(3, vocab)
    bias, of_teacher, factors = (torch.randn(n, generator=generator) for n in (vocab, vocab, 3))
    options = DistillationOptions(
        divergence=divergence, interpolation=0.3, teacher_scale=0.5, hard_loss_coef=0.25, scale=0.75
    )
    results = []
    for student, teacher, out in [(0, 0, 0), (0, 0, 1), (1, 0, 1), (0, 3, 0)]:
        x, grad = (make_rows(3, vocab, dtype, 1040, shift) for shift in (student, out))
        y = make_rows(3, vocab, dtype, 1040, teacher).copy_(make_rows(3, vocab, dtype).flip(1))
        if student == out:
            grad = x
        lse = [
            kernels().row_stats(z, None, RowOptions(scale=scale), want=("lse_parts",), bias=b)["lse_parts"]
            for z, scale, b in ((x, 0.75, bias), (y, 0.5, of_teacher), (x, 1.0, bias))
        ]
        names = ("lse_parts", "teacher_lse_parts", "hard_lse_parts")
        given = dict(zip(names, lse, strict=True)) | {"bias": bias, "teacher_bias": of_teacher}
        exact = x.double()
        right = ReferenceBackend().row_divergence(
            exact, y.double(), target, options, factors=factors.double(), grad=exact,
            **{name: value.double() for name, value in given.items()},
        )  # fmt: skip
        sums = kernels().row_divergence(x, y, target, options, factors=factors, grad=grad, **given)
        close(grad, exact, dtype)
        close(sums[:, :-1], right[:, :-1])
        results.append((sums, grad))
    for sums, grad in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [3, 1000])
def test_infinite_and_nan_logits(vocab: int, dtype: torch.dtype) -> None:
    x, target = make_rows(7, vocab, dtype), make_targets(7, vocab)
    x[0, : vocab - 1] = -INF  # only the target is left
    x[1, 1:] = -INF
    target[1] = vocab - 1  # the target is masked: the loss is inf
    x[2], x[3, 1], x[4, vocab - 1] = -INF, NAN, INF
    x[5, 0], x[6], target[6] = NAN, NAN, IGNORE
    row = Row(x, target, None, 1.0, 0.0)
    stats = run_stats(x, target)
    for name in STATS:
        if name != "is_top1":
            close(stats[name], row.stats()[name])
    assert stats["is_top1"].tolist()[:3] == [1, 0, 1]
    assert stats["is_top1"].tolist()[3:] == [0, int(target[4] == vocab - 1), 0, 0]
    for zeta in (0.0, 1e-3):
        grad = torch.full_like(x, 77)
        out = run_cross_entropy(x, target, zeta=zeta, grad=grad)
        loss, want = row.cross_entropy(None, 0.0, zeta, 1.0)
        close(out["loss"], loss)
        close(grad, want, dtype)
    grad = torch.full_like(x, 77)
    k = {name: torch.full((7,), 0.5) for name in "abc"}
    run_grad(x, target, stats["logsumexp"], grad, **k)
    close(grad, row.gradient(*k.values(), 0.0), dtype)


def test_large_offset_keeps_its_digits() -> None:
    x, target = make_rows(3, 1000, torch.float32) + 10000, make_targets(3, 1000)
    row, grad = Row(x, target, None, 1.0, 0.0), torch.empty_like(x)
    out = run_cross_entropy(x, target, eps=0.1, grad=grad, want=("entropy", "log_sum_sq_probs", "logprobs"))
    loss, want = row.cross_entropy(None, 0.1, 0.0, 1.0)
    close(out["loss"], loss)
    close(grad, want)
    for name in ("entropy", "log_sum_sq_probs", "logprobs"):
        close(out[name], row.stats()[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 3.0, 0.75])
@pytest.mark.parametrize("clusters", ["0", "1"])
def test_common_offset_costs_no_digits(
    clusters: str, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a log-probability and of the gradient, in one kernel and in two that share ``lse_parts``. Logits near 2000 in steps
    of 8 are exact in every dtype; times log2 e they are rounded by up to 1e-4."""
    monkeypatch.setenv("FASTLOSS_CLUSTER_ROWS", clusters)
    steps = torch.randint(-6, 1, (6, 1032), generator=torch.Generator().manual_seed(0))
    steps[3:] = -10
    steps[3:, :4] = -1  # these rows' targets have a probability of 0.999
    largest = torch.tensor([[2000], [1800], [1600]]).repeat(2, 1)
    x, target = (largest + 8 * steps).to(dtype), torch.full((6,), 7)
    x[:, 7] = largest[:, 0]
    row, grad = Row(x, target, None, scale, 0.0), torch.empty_like(x)
    out = run_cross_entropy(x, target, grad=grad, scale=scale, want=("logprobs", "lse_parts"))
    loss, want = row.cross_entropy(None, 0.0, 0.0, 1.0)
    close(out["loss"], loss)
    close(out["logprobs"], row.stats()["logprobs"])
    close(grad, want, dtype)
    base, log_sum = out["lse_parts"].unbind(-1)
    if scale == 1.0:  # others round scale * log2 e, and their base
        close(base, row.z.amax(-1))
        close(log_sum, (row.z - row.z.amax(-1, keepdim=True)).exp().sum(-1).log())
    late, ones = torch.empty_like(x), torch.ones(6)
    coefficients = Coefficients(a=-ones, b=ones)
    kernels().row_grad(
        x, target, RowOptions(scale=scale), lse_parts=out["lse_parts"], coefficients=coefficients, out=late
    )
    close(late, want, dtype)
    extra = run_stats(x, target, scale=scale)
    for name in ("entropy", "log_sum_sq_probs", "logprobs"):
        close(extra[name], row.stats()[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_below_zero(dtype: torch.dtype) -> None:
    """One of all rows is a scale like any other; a row's own would be a negative temperature, and gives NaN."""
    x, target = make_rows(3, 1032, dtype), make_targets(3, 1032)
    row, grad = Row(x, target, None, -2.0, 0.0), torch.empty_like(x)
    loss, want = row.cross_entropy(None, 0.0, 0.0, 1.0)
    close(run_cross_entropy(x, target, grad=grad, scale=-2.0)["loss"], loss)
    close(grad, want, dtype)
    of_rows = torch.tensor([1.0, -1.0, 1.0])
    own = run_cross_entropy(x, target, grad=grad, scale=1.0, row_scale=of_rows)["loss"]
    loss, want = Row(x, target, None, 1.0, 0.0).cross_entropy(None, 0.0, 0.0, 1.0)
    loss[1], want[1] = NAN, NAN
    close(own, loss)
    close(grad, want, dtype)


def test_error_is_not_larger_than_eager() -> None:
    x, target = make_rows(16, 1031, torch.float32), make_targets(16, 1031)
    exact, eager = (v.clone().requires_grad_() for v in (x.double(), x))
    losses = [torch.nn.functional.cross_entropy(v, target, reduction="none") for v in (exact, eager)]
    for loss in losses:
        loss.sum().backward()
    grad = torch.empty_like(x)
    got = run_cross_entropy(x, target, grad=grad)["loss"]
    assert (got - losses[0]).abs().max() <= (losses[1] - losses[0]).abs().max() + 1e-7
    assert exact.grad is not None and eager.grad is not None
    assert (grad - exact.grad).norm() <= (eager.grad - exact.grad).norm() * 1.05


def test_bad_arguments_are_errors() -> None:
    x = make_rows(1, 4, torch.float32)
    with pytest.raises(ValueError, match="dtype"):
        run_stats(x.double(), None)
    with pytest.raises(ValueError, match="logits: expected an address, got 0"):  # no memory behind them
        run_stats(x[:, :0], None)
    assert run_stats(x[:0], None)["logsumexp"].shape == (0,)


def test_device_that_cannot_run_the_kernels_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old GPU or an old driver: a reason, which lets `auto` go on to triton, and no failing launch."""
    tensor: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:1"))
    devices = []

    def guard(device: torch.device) -> contextlib.AbstractContextManager[None]:
        devices.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", guard)
    for answer in ("no kernel image is available", ""):
        module: Any = ModuleType("fastloss._cuda")
        module.tables, module.why_not = build_emulated().tables, lambda answer=answer: answer
        backend = NativeBackend("cuda", module, CudaContext())
        reason = backend.why_not_for(tensor)
        assert answer in reason and bool(reason) == bool(answer)
        assert backend.why_not_for(tensor) == reason
    assert devices == [tensor.device] * 2  # asked on the tensor's own device, once for each answer
    assert build_emulated().why_not() == ""


def test_full_memory_is_no_answer_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA loads the kernels when they are first asked for: where that fails the call does, and the next one asks again."""
    tensor: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    answers = iter(["out of memory", ""])
    module: Any = ModuleType("fastloss._cuda")
    module.tables, module.why_not = build_emulated().tables, lambda: next(answers)
    backend = NativeBackend("cuda", module, CudaContext())
    with pytest.raises(RuntimeError, match="fastloss CUDA kernel: out of memory"):
        backend.why_not_for(tensor)
    assert backend.why_not_for(tensor) == backend.why_not_for(tensor) == ""


def test_module_of_another_version_is_refused() -> None:
    """Its codes would mean other losses."""
    tables = {name: list(names) for name, names in build_emulated().tables().items()}
    tables["surrogates"][1:3] = reversed(tables["surrogates"][1:3])
    module: Any = SimpleNamespace(__name__="other", tables=lambda: tables)
    with pytest.raises(
        ImportError, match=r"other: expected 'logprob' as code 1 of 'surrogates', got 'cispo'"
    ):
        NativeBackend("cuda", module, CudaContext())
    with pytest.raises(ImportError, match="built from an older version"):
        NativeBackend("cuda", cast(Any, SimpleNamespace(__name__="old")), CudaContext())


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what the module says without a GPU")
def test_module_says_why_it_cannot_run() -> None:
    module = pytest.importorskip("fastloss._cuda")
    assert module.why_not() != ""


CLUSTER_VOCABS = (3, 256, 800, 1031, 3500)  # float32: clusters of 1, 1, 2, 4 and 8 blocks


@pytest.mark.parametrize(
    ("vocab", "dtype"), [*product(CLUSTER_VOCABS, DTYPES[:1]), (4102, DTYPES[1]), (4102, DTYPES[2])]
)
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_of_clusters(
    vocab: int, dtype: torch.dtype, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, stride = 7, (vocab + 7) // 8 * 8
    x, target = make_rows(rows, vocab, dtype, stride), make_targets(rows, vocab)
    target[2], target[4] = IGNORE, BAD
    # A scale of one half: no rounding of scale * x, whose offset is large, is among the errors.
    x[5] += 8192 if dtype == torch.float32 else 64
    w = torch.rand(vocab, generator=torch.Generator().manual_seed(1)) + 0.5
    factor = Factor(0.25)
    row = Row(x, target, None, 0.5, 0.0)
    loss, gradient = row.cross_entropy(w, 0.0, 1e-3, 0.25)
    results = []
    for clusters in ("0", "1", "1"):
        monkeypatch.setenv("FASTLOSS_CLUSTER_ROWS", clusters)
        logits = make_rows(rows, vocab, dtype, stride).copy_(x)
        grad = logits if in_place else make_rows(rows, vocab, dtype, stride)
        before = build_emulated().cluster_launches()
        want = ("logsumexp", "logprobs", "is_top1")
        got = run_cross_entropy(
            logits, target, w=w, zeta=1e-3, factor=factor, grad=grad, want=want, scale=0.5
        )
        assert build_emulated().cluster_launches() - before == int(clusters)
        results.append({**got, "grad": grad})
    _, one_read, again = results
    for name, value in one_read.items():
        assert torch.equal(value.nan_to_num(7.0), again[name].nan_to_num(7.0)), name
    close(one_read["loss"], loss)
    close(one_read["grad"], gradient, dtype)
    for name in ("logsumexp", "logprobs"):
        close(one_read[name], row.stats()[name])
    assert torch.equal(one_read["is_top1"], results[0]["is_top1"])


@pytest.mark.parametrize(
    "row", [[-INF] * 600, [INF, *[0.0] * 599], [NAN, *[0.0] * 599], [*[-INF] * 599, -300.0]]
)
def test_infinities_in_rows_of_clusters(row: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into two pieces, one of which may have no finite logit."""
    monkeypatch.setenv("FASTLOSS_CLUSTER_ROWS", "1")
    x = torch.tensor([row + [-INF] * 400])
    target = torch.tensor([599])
    grad = torch.empty_like(x)
    got = run_cross_entropy(x, target, grad=grad)
    want, gradient = Row(x, target, None, 1.0, 0.0).cross_entropy(None, 0.0, 0.0, 1.0)
    close(got["loss"], want)
    close(grad, gradient)


def test_what_clusters_leave_to_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOSS_CLUSTER_ROWS", "1")
    before = build_emulated().cluster_launches()
    target = make_targets(3, 100)
    even, odd = make_rows(3, 100, torch.float32), make_rows(3, 100, torch.float32, 101)
    shifted, long = make_rows(3, 100, torch.float32, 100, 1), make_rows(3, 8000, torch.float32)
    for x in (odd, shifted, long):
        run_cross_entropy(x, target, grad=torch.empty(x.shape))
    run_cross_entropy(even, target, grad=make_rows(3, 100, torch.float32, 101))
    run_cross_entropy(even, target, grad=torch.empty(3, 100), eps=0.1)
    run_cross_entropy(even, target, grad=torch.empty(3, 100), softcap=5.0)
    run_cross_entropy(even, target, grad=torch.empty(3, 100), bias=torch.zeros(100))
    run_cross_entropy(even, target, grad=torch.empty(3, 100), want=("entropy",))
    run_cross_entropy(even, target)
    run_cross_entropy(even, None, w=torch.rand(3, 100), grad=torch.empty(3, 100))
    assert build_emulated().cluster_launches() == before
    run_cross_entropy(even, target, grad=torch.empty(3, 100))
    assert build_emulated().cluster_launches() == before + 1


def test_explain_names_the_row_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher's own decision: what it says is what is launched."""
    monkeypatch.setenv("FASTLOSS_CLUSTER_ROWS", "1")
    need("cuda")
    target = make_targets(3, 100)

    def told(x: Tensor, **options: Any) -> str:
        leaf = x.requires_grad_(x.is_floating_point() and not options.pop("frozen", False))
        given: dict[str, Any] = {"backend": "cuda", **options}
        plan = fastloss.explain(fastloss.cross_entropy, leaf, target, **given)
        before = build_emulated().cluster_launches()
        fastloss.cross_entropy(leaf, target, **given)
        by_clusters = build_emulated().cluster_launches() - before
        row_kernel: str = plan["row_kernel"]
        assert (row_kernel == "a cluster of blocks a row, one read") == bool(by_clusters), row_kernel
        return row_kernel

    even = lambda: make_rows(3, 100, torch.float32).clone()
    assert "one read" in told(even())
    assert "one read" in told(even(), temperature=0.5, z_loss=1e-3)
    assert "no gradient" in told(even(), frozen=True)
    assert "no gradient" in told(even(), reduction="none")
    assert "no gradient" in told(even(), token_weight=torch.ones(3))
    assert "smoothing" in told(even(), label_smoothing=0.1)
    assert "soft-cap" in told(even(), softcap=5.0)
    assert "statistics" in told(even(), return_stats=True)
    assert "16 bytes" in told(make_rows(3, 100, torch.float32, 101))
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    head = (fastloss.linear_cross_entropy, hidden, weight, make_targets(6, 100))
    assert "one read" in fastloss.explain(*head, backend="cuda")["row_kernel"]
    bias = fastloss.explain(*head, linear_bias=torch.randn(100), backend="cuda")["row_kernel"]
    assert "no bias" in bias
    monkeypatch.setenv("FASTLOSS_CLUSTER_ROWS", "0")
    assert "FASTLOSS_CLUSTER_ROWS=1" in told(even())
    assert "row_kernel" not in fastloss.explain(fastloss.cross_entropy, even(), target, backend="cpu")


@pytest.mark.slow
def test_blocks_of_a_cluster_do_not_race() -> None:
    done = subprocess.run([build_cluster_check()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["cluster barriers", "arrivals", "gifts", "block barrier"])
def test_the_emulation_notices_what_a_cluster_leaves_out(left_out: str) -> None:
    done = subprocess.run([build_cluster_check(), left_out], capture_output=True, text=True)
    assert done.returncode != 0
    assert "wrong" in done.stdout or "data race" in done.stderr or "emulated CUDA: " in done.stderr


@pytest.mark.slow
def test_no_race_between_the_threads_of_a_block() -> None:
    done = subprocess.run([build_race_check()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.slow
def test_a_device_is_asked_about_itself_once() -> None:
    """And the answers of several devices, and of threads that ask at once, are not mixed up."""
    done = subprocess.run([build_limits_check()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]


@pytest.mark.slow
@pytest.mark.parametrize("barrier", [0, 1, 2])
def test_race_check_notices_a_missing_barrier(barrier: int) -> None:
    done = subprocess.run([build_race_check(), str(barrier)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.mark.slow
def test_blocks_that_run_at_once_do_not_race() -> None:
    """Kernels whose last block finishes: tickets and fences order what the blocks wrote before what the last one reads."""
    done = subprocess.run([build_tickets_check()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    without_fences = subprocess.run([build_tickets_check(), "no fences"], capture_output=True, text=True)
    assert without_fences.returncode != 0
    assert "data race" in without_fences.stderr
