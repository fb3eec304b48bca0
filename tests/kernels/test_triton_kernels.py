"""kernels/ against the formulas of docs/engine.md in float64 of the same inputs.

On the CPU the kernels run in Triton's interpreter; with FASTLOSS_TEST_DEVICE=cuda on the GPU.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloss import tables
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import Factor, PolicyInputs
from fastloss.engine.sequences import Sequences
from fastloss.tables import STATS, CrossEntropyOptions, RowOptions

DEVICE = os.environ.get("FASTLOSS_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

pytest.importorskip("triton")
fastloss_kernels = importlib.import_module("fastloss.kernels")
kernels = importlib.import_module("fastloss.kernels.rows")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABS = (1, 2, 33, 1000, 4097)
IGNORE = -100
INF, NAN = float("inf"), float("nan")
ROWS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "scale": 1.3},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "softcap": 3.0, "scale": -1.7},
}


@pytest.fixture(autouse=True)
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter blocks of 1024, so that 4097 is five of them; test_strides_and_in_place has the real ones."""
    if DEVICE == "cpu" and "in_place" not in request.node.name:
        whole = kernels.launch_shape
        monkeypatch.setattr(
            kernels, "launch_shape", lambda *a: whole(*a) | {"BLOCK": min(whole(*a)["BLOCK"], 1024)}
        )


def row_stats(
    logits: Tensor, target: Tensor | None, *, want: Any, bias: Any = None, **options: Any
) -> dict[str, Tensor]:
    return kernels.row_stats(logits, target, RowOptions(**options), want=want, bias=bias)


def row_grad(
    logits: Tensor, target: Tensor | None, *, lse: Tensor, out: Tensor, bias: Any = None, w: Any = None, **given: Any
) -> None:  # fmt: skip
    coefficients = Coefficients(**{name: given.pop(name) for name in "abcd" if name in given})
    options = RowOptions(**given)
    kernels.row_grad(
        logits,
        target,
        options,
        lse_parts=torch.stack([lse, torch.zeros_like(lse)], -1),
        coefficients=coefficients,
        out=out,
        bias=bias,
        w=w,
    )


def row_cross_entropy(
    logits: Tensor, target: Tensor | None, *, grad_scale: float = 1.0, grad_scale_tensor: Any = None, grad: Any = None,
    want: Any = (), bias: Any = None, w: Any = None, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    factor = Factor(grad_scale, grad_scale_tensor)
    options = CrossEntropyOptions(**options)
    return kernels.row_cross_entropy(
        logits, target, options, factor=factor, grad=grad, want=want, bias=bias, w=w
    )


def options(name: str, vocab: int) -> dict[str, Any]:
    given = {"ignore_index": IGNORE, "bias": None, "scale": 1.0, "softcap": 0.0} | OPTIONS[name]
    if given["bias"]:
        given["bias"] = torch.randn(vocab, device=DEVICE)
    return given


def make(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(rows, vocab)).to(dtype).to(DEVICE)
    return logits, torch.randint(vocab, (rows,)).to(DEVICE)


def transformed(x: Tensor, o: dict[str, Any]) -> Tensor:
    u = x if o["bias"] is None else x + o["bias"].double()
    if o["softcap"]:
        u = o["softcap"] * torch.tanh(u / o["softcap"])
    return o["scale"] * u


def expected_stats(x: Tensor, target: Tensor, o: dict[str, Any]) -> dict[str, Tensor]:
    z = transformed(x.double(), o)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    z_t = z.gather(1, target.unsqueeze(1)).squeeze(1)
    return {
        "logsumexp": z.logsumexp(-1),
        "logprobs": log_p.gather(1, target.unsqueeze(1)).squeeze(1),
        "entropy": -torch.where(p == 0, 0.0, p * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": (z_t >= z.amax(-1)).to(torch.uint8),
    }


def close(actual: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    """Within ``tolerance`` of the larger of 1 and the value; low-precision results within half a unit more."""
    if actual.dtype in (torch.bfloat16, torch.float16):
        finfo = torch.finfo(actual.dtype)
        rtol, atol = 0.51 * finfo.eps, max(tolerance, finfo.tiny)
    else:
        rtol = atol = tolerance
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def check_stats(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in actual.items():
        if name == "lse_parts":
            name, value = "logsumexp", value.sum(-1)
        close(value, expected[name])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_stats(dtype: torch.dtype, vocab: int, name: str) -> None:
    logits, target = make(ROWS, vocab, dtype)
    o = options(name, vocab)
    target[0] = transformed(logits.double(), o)[0].argmax()
    stats = row_stats(logits, target, **o, want=STATS)
    check_stats(stats, expected_stats(logits, target, o))
    assert stats["is_top1"][0] == 1 and stats["is_top1"].dtype == torch.uint8


def test_only_what_is_wanted() -> None:
    logits, target = make(2, 33, torch.float32)
    o = options("plain", 33)
    for name in STATS:
        alone = row_stats(logits, target, **o, want=(name,))
        assert set(alone) == {name}
        check_stats(alone, expected_stats(logits, target, o))
    untargeted = row_stats(
        logits, None, **o, want=("logsumexp", "entropy", "log_sum_sq_probs", "mean_logits")
    )
    check_stats(untargeted, expected_stats(logits, target, o))
    assert set(row_cross_entropy(logits, target, **o, w=None, label_smoothing=0.0, z_loss=0.0)) == {
        "loss", "lse_parts"}  # fmt: skip


def w_of(kind: str, rows: int, vocab: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = (vocab,) if kind == "vector" else (rows, vocab)
    return torch.rand(shape, device=DEVICE) + 0.1


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_grad(dtype: torch.dtype, vocab: int, name: str) -> None:
    logits, target = make(2, vocab, dtype)
    o = options(name, vocab)
    a, b, c, d = torch.randn(4, 2, device=DEVICE)
    lse = row_stats(logits, target, **o, want=("logsumexp",))["logsumexp"]
    for given in (
        {"a": a, "b": b, "c": c, "d": d, "w": w_of("dense", 2, vocab)},
        {"b": b, "d": d, "w": w_of("vector", 2, vocab)},
        {"a": a, "d": d} if vocab == 33 else {"a": a, "b": b},
        {"c": c},
    ):
        out = torch.full_like(logits, NAN)
        row_grad(logits, target, **o, lse=lse, out=out, **given)
        close(out, expected_grad(logits, target, o, **given), 1e-5)


def expected_grad(
    logits: Tensor,
    target: Tensor,
    o: dict[str, Any],
    a: Any = 0,
    b: Any = 0,
    c: Any = 0,
    d: Any = 0,
    w: Any = None,
) -> Tensor:
    """The formula of row_grad, the factor dz/dx by autograd."""
    x = logits.double().requires_grad_()
    z = transformed(x, o)
    log_p = z.log_softmax(-1).detach()
    a, b, c, d = (k.double().unsqueeze(1) if isinstance(k, Tensor) else k for k in (a, b, c, d))
    hot = torch.zeros_like(x).scatter(1, target.unsqueeze(1), 1.0)
    p = log_p.exp()
    dz = a * hot + b * p + c * torch.where(p == 0, 0.0, p * log_p) + d * (1.0 if w is None else w.double())
    return torch.autograd.grad(z, x, dz.detach().expand_as(z))[0]


def expected_cross_entropy(
    logits: Tensor,
    target: Tensor | None,
    o: dict[str, Any],
    w: Tensor | None,
    eps: float,
    zeta: float,
    factor: float,
) -> tuple[Tensor, Tensor]:
    x = logits.double().requires_grad_()
    z = transformed(x, o)
    lse = z.logsumexp(-1)
    vocab = z.shape[1]
    weights = torch.ones_like(z) if w is None else w.double().expand_as(z)
    if target is None:
        loss = (weights * (lse.unsqueeze(1) - z)).sum(-1)
    else:
        at = target.unsqueeze(1)
        loss = (1 - eps) * weights.gather(1, at).squeeze(1) * (lse - z.gather(1, at).squeeze(1))
        if eps:
            loss = loss + eps / vocab * (weights * (lse.unsqueeze(1) - z)).sum(-1)
    loss = loss + zeta * lse * lse
    return loss.detach(), torch.autograd.grad(loss.sum() * factor, x)[0]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_cross_entropy(dtype: torch.dtype, vocab: int, name: str) -> None:
    logits, target = make(2, vocab, dtype)
    o = options(name, vocab)
    for w_kind, eps, zeta in (
        ("none", 0.0, 0.0),
        ("none", 0.1, 1e-2),
        ("vector", 0.0, 1e-2),
        ("vector", 0.1, 0.0),
    ):
        w = w_of(w_kind, 2, vocab)
        grad = torch.full_like(logits, NAN)
        out = row_cross_entropy(logits, target, **o, w=w, label_smoothing=eps, z_loss=zeta, grad=grad,
                                       grad_scale=0.5, grad_scale_tensor=torch.tensor(3.0, device=DEVICE),
                                       want=STATS)  # fmt: skip
        loss, expected = expected_cross_entropy(logits, target, o, w, eps, zeta, 1.5)
        close(out.pop("loss"), loss)
        close(grad, expected, 1e-5)
        check_stats(out, expected_stats(logits, target, o))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_probabilities(dtype: torch.dtype, vocab: int, name: str) -> None:
    logits, _ = make(2, vocab, dtype)
    o = options(name, vocab)
    w = torch.softmax(torch.randn(2, vocab, device=DEVICE), -1) * 0.7
    grad = torch.empty_like(logits)
    out = row_cross_entropy(logits, None, **o, w=w, label_smoothing=0.0, z_loss=1e-2, grad=grad)
    loss, expected = expected_cross_entropy(logits, None, o, w, 0.0, 1e-2, 1.0)
    close(out["loss"], loss)
    close(grad, expected, 1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_logits_of_low_precision(dtype: torch.dtype, sign: float) -> None:
    """lse_parts are those of the largest z as float32 rounds it, and statistics and gradients exact where that rounding is large."""
    step = 64.0 if dtype == torch.bfloat16 else 8.0
    logits = (torch.randn(4, 1000).mul(2).round() * step + 8192).to(dtype).to(DEVICE)
    target = torch.randint(1000, (4,)).to(DEVICE)
    per_row = torch.tensor([1.0, 0.7, 0.03, 3.1], device=DEVICE)
    o = {"scale": sign * 0.7 * 4 / step, "row_scale": per_row}
    z = logits.double() * (torch.tensor(o["scale"], dtype=torch.float32) * per_row).double()[:, None]
    stats = row_stats(logits, target, **o, want=(*STATS, "lse_parts"))
    base, log_sum = stats.pop("lse_parts").double().unbind(-1)
    assert torch.equal(base, z.amax(-1).float().double())
    if sign > 0:  # else z is rounded before its exponential
        close(log_sum, (z - base[:, None]).logsumexp(-1))
        check_stats(stats, expected_stats(z, target, {"bias": None, "softcap": 0.0, "scale": 1.0}))
    a, b, c, d = 1000 * torch.randn(4, 4, device=DEVICE)
    out = torch.empty_like(logits)
    kernels.row_grad(
        logits, target, RowOptions(**o), lse_parts=torch.stack([base, log_sum], -1).float(),
        coefficients=Coefficients(a=a, b=b, c=c, d=d), out=out,
    )  # fmt: skip
    scale = (z / logits.double())[:, :1]
    plain = {"bias": None, "softcap": 0.0, "scale": 1.0}
    expected = scale * expected_grad(z, target, plain, a, b, c, d)
    close(out, expected, 1e-5 if sign > 0 else 0.2)
    grad = torch.empty_like(logits)
    loss = row_cross_entropy(logits, target, **o, grad=grad)["loss"]
    log_p = z.log_softmax(-1)
    if sign > 0:
        close(loss, -log_p.gather(1, target[:, None])[:, 0])
    hot = torch.zeros_like(z).scatter(1, target[:, None], 1.0)
    close(grad, scale * (log_p.exp() - hot), 1e-5 if sign > 0 else 2e-4)


def test_equal_logits_that_are_huge() -> None:
    """p = 1 / V where z = scale x is rounded by more than any exponent may be; NaN where z is beyond float32."""
    huge = torch.finfo(torch.bfloat16).max
    x = torch.tensor([-1e30, 3.3e30, 1e9, -7e37, huge, -huge], device=DEVICE).bfloat16()
    logits = x.repeat_interleave(6)[:, None].repeat(1, 33)
    per_row = torch.tensor([1.0, 0.7, 0.3, 1.7, 0.009, 3.1], device=DEVICE).repeat(6)
    target = torch.zeros(36, dtype=torch.int64, device=DEVICE)
    parts = row_stats(logits, target, row_scale=per_row, want=("lse_parts",))["lse_parts"]
    out, grad = torch.empty_like(logits), torch.empty_like(logits)
    ones = torch.ones(36, device=DEVICE)
    kernels.row_grad(
        logits, target, RowOptions(row_scale=per_row), lse_parts=parts, coefficients=Coefficients(b=ones), out=out
    )  # fmt: skip
    loss = row_cross_entropy(logits, target, row_scale=per_row, grad=grad)["loss"]
    infinite = (x.float().repeat_interleave(6) * per_row).isinf()
    assert 0 < infinite.sum() < 9
    log_v = torch.tensor(33.0).log().to(DEVICE)
    close(loss, torch.where(infinite, NAN, log_v))
    close(out, torch.where(infinite, NAN, per_row.double() / 33)[:, None].expand(36, 33))
    close(grad[:, 1], torch.where(infinite, NAN, per_row.double() / 33))


@pytest.mark.parametrize("vocab", [33, 20000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_in_place(dtype: torch.dtype, vocab: int) -> None:
    """Rows apart, overlapping in memory order, odd offsets; a gradient over the logits is the same bits."""
    dense, target = make(3, vocab, dtype)
    o = options("all", vocab)
    room = torch.full((6, vocab + 9), NAN, dtype=dtype, device=DEVICE)
    logits = room[::2, 3 : vocab + 3]
    logits.copy_(dense)
    w = torch.rand(3, vocab + 5, device=DEVICE)[:, 2 : vocab + 2]
    a, b, c, d = torch.randn(4, 3, device=DEVICE)
    want = tuple(STATS)
    stats = row_stats(dense, target, **o, want=want)
    for name, value in row_stats(logits, target, **o, want=want).items():
        assert torch.equal(value, stats[name])

    separate = torch.empty_like(dense)
    row_grad(dense, target, **o, lse=stats["logsumexp"], a=a, b=b, c=c, d=d, w=w.contiguous(), out=separate)
    close(separate, expected_grad(dense, target, o, a, b, c, d, w), 1e-5)
    row_grad(logits, target, **o, lse=stats["logsumexp"], a=a, b=b, c=c, d=d, w=w, out=logits)
    assert torch.equal(logits, separate)

    for targets, weight in ((target, w[0]), (None, w)):
        logits.copy_(dense)
        ce = {"w": weight, "label_smoothing": 0.1, "z_loss": 1e-2, "want": want}
        first = row_cross_entropy(dense, targets, **o, **ce, grad=separate)
        second = row_cross_entropy(logits, targets, **o, **ce, grad=logits)
        assert torch.equal(logits, separate)
        # Without a target logprob is NaN and is_top1 0.
        assert all(torch.equal(first[k].nan_to_num(7), second[k].nan_to_num(7)) for k in first)
    assert room[:, :3].isnan().all() and room[:, vocab + 3 :].isnan().all() and room[1::2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_logits(dtype: torch.dtype) -> None:
    logits, target = make(1, 33, dtype)
    o = options("plain", 33)
    stats = row_stats(logits.expand(4, 33), target.expand(4).contiguous(), **o, want=("logprobs",))
    close(stats["logprobs"], expected_stats(logits, target, o)["logprobs"].expand(4))


@pytest.mark.parametrize("bad", [-1, 33, 34, -(2**40), 2**40, 2**31])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_and_ignored_targets(dtype: torch.dtype, bad: int) -> None:
    """A bad row is NaN, an ignored row 0 even if its logits are NaN, the others are as they would be alone."""
    logits, target = make(4, 33, dtype)
    o = options("plain", 33)
    target[1], target[2] = bad, IGNORE
    logits[2] = NAN
    good = [0, 3]
    w = torch.rand(33, device=DEVICE)
    grad = torch.full_like(logits, 7.0)
    out = row_cross_entropy(logits, target, **o, w=w, label_smoothing=0.1, z_loss=1e-2, grad=grad,
                                   want=STATS)  # fmt: skip
    loss, expected = expected_cross_entropy(logits[good], target[good], o, w, 0.1, 1e-2, 1.0)
    close(out["loss"][good], loss)
    close(grad[good], expected, 1e-5)
    assert out["loss"][1].isnan() and out["logprobs"][1].isnan() and out["is_top1"][1] == 0
    assert grad[1].isnan().all() and out["logsumexp"][1].isfinite()
    assert all((value[2] == 0).all() for value in out.values()) and (grad[2] == 0).all()

    again = row_stats(logits, target, **o, want=STATS)
    assert all(torch.equal(again[k].nan_to_num(7), out[k].nan_to_num(7)) for k in again)
    for given in ({"a": loss.new_ones(4).float()}, {"b": torch.ones(4, device=DEVICE)}):
        row_grad(logits, target, **o, lse=out["logsumexp"], out=grad, **given)
        assert grad[1].isnan().all() and (grad[2] == 0).all() and grad[good].isfinite().all()


@pytest.mark.parametrize("ignore", [0, -1, 32, 1])
def test_ignore_index_may_be_a_class(ignore: int) -> None:
    logits, target = make(4, 33, torch.float32)
    target[0], target[1:] = ignore, torch.tensor([2, 3, 4])
    o = options("plain", 33) | {"ignore_index": ignore}
    grad = torch.full_like(logits, 7.0)
    out = row_cross_entropy(logits, target, **o, w=None, label_smoothing=0.1, z_loss=0.0, grad=grad)
    assert out["loss"][0] == 0 and (grad[0] == 0).all()
    close(out["loss"][1:], expected_cross_entropy(logits[1:], target[1:], o, None, 0.1, 0.0, 1.0)[0])


@pytest.mark.parametrize("vocab", [33, 4097])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_vocabulary(dtype: torch.dtype, vocab: int) -> None:
    """-inf logits: p = 0, gradient 0, finite entropy; also where the first block is nothing else."""
    logits, target = make(3, vocab, dtype)
    o = options("plain", vocab)
    logits[0, ::2] = -INF
    logits[1, : vocab - 5] = -INF
    logits[2, 5:] = -INF
    target[:] = torch.tensor([1, vocab - 1, 0])
    out = row_stats(logits, target, **o, want=("logsumexp", "logprobs", "entropy", "log_sum_sq_probs"))
    check_stats(out, expected_stats(logits, target, o))
    c = torch.ones(3, device=DEVICE)
    grad = torch.empty_like(logits)
    row_grad(logits, target, **o, lse=out["logsumexp"], a=c, b=c, c=c, out=grad)
    close(grad, expected_grad(logits, target, o, c, c, c), 1e-5)
    loss = row_cross_entropy(logits, target, **o, w=None, label_smoothing=0.0, z_loss=0.1, grad=grad)["loss"]
    expected, expected_g = expected_cross_entropy(logits, target, o, None, 0.0, 0.1, 1.0)
    close(loss, expected)
    close(grad, expected_g, 1e-5)
    assert (grad[logits == -INF] == 0).all()
    smoothed = row_cross_entropy(logits, target, **o, w=None, label_smoothing=0.1, z_loss=0.0)["loss"]
    assert (smoothed == INF).all()


@pytest.mark.parametrize("place", [0, 17, 32])
@pytest.mark.parametrize("value", [NAN, INF, None])
def test_rows_that_are_nan(value: float | None, place: int) -> None:
    """A NaN, a +inf, or nothing but -inf: NaN in that row alone."""
    logits, target = make(3, 33, torch.float32)
    o = options("plain", 33)
    if value is None:
        logits[1] = -INF
    else:
        logits[1, place] = value
    grad = torch.zeros_like(logits)
    out = row_cross_entropy(logits, target, **o, w=None, label_smoothing=0.0, z_loss=0.0, grad=grad,
                                   want=("logprobs", "entropy", "log_sum_sq_probs", "is_top1"))  # fmt: skip
    is_top1 = out.pop("is_top1")
    assert all(v[1].isnan().any() and v[[0, 2]].isfinite().all() for v in out.values())
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()
    if value is NAN:
        assert is_top1[1] == 0
    row_grad(logits, target, **o, lse=out["lse_parts"].sum(-1), a=torch.ones(3, device=DEVICE), out=grad)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_large_logits_keep_their_differences() -> None:
    """A constant on all logits changes no probability: sums are relative to the maximum."""
    logits, target = make(3, 1000, torch.float32)
    logits = (logits * 64).round() / 64 + 4096  # exact in float32
    o = options("plain", 1000)
    out = row_cross_entropy(logits, target, **o, w=None, label_smoothing=0.1, z_loss=0.0,
                                   want=("logprobs", "entropy"))  # fmt: skip
    near = row_cross_entropy(logits - 4096, target, **o, w=None, label_smoothing=0.1, z_loss=0.0,
                                    want=("logprobs", "entropy"))  # fmt: skip
    for name in ("loss", "logprobs", "entropy"):
        close(out[name], near[name].double(), 1e-6)


def test_a_row_depends_on_itself_alone() -> None:
    logits, target = make(5, 4097, torch.bfloat16)
    o = options("all", 4097)
    together = row_stats(logits, target, **o, want=STATS)
    alone = row_stats(logits[3:4], target[3:4], **o, want=STATS)
    assert all(torch.equal(together[k][3:4], alone[k]) for k in alone)


def test_rounding_is_to_nearest_even() -> None:
    """The gradient is d, exactly: what is stored is what PyTorch's own conversion stores."""
    values = torch.randn(64) * torch.logspace(-30, 30, 64)
    values[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 0.0, 1.9999999, 3.4e38])
    values = values.to(DEVICE)
    zeros = torch.zeros(64, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(64, 1, dtype=dtype, device=DEVICE)
        row_grad(torch.zeros_like(out), None, **options("plain", 1), lse=zeros, d=values, out=out)
        assert torch.equal(out[:, 0], values.to(dtype))


def test_empty_and_refused() -> None:
    o = options("plain", 33)
    stats = row_stats(torch.empty(0, 33, device=DEVICE), None, **o, want=("logsumexp",))
    assert stats["logsumexp"].shape == (0,)
    with pytest.raises(TypeError, match="float64"):
        row_stats(torch.zeros(1, 3, dtype=torch.float64, device=DEVICE), None, **o, want=())
    with pytest.raises(ValueError, match="got 0"):
        row_stats(torch.zeros(1, 0, device=DEVICE), None, **o, want=())


def test_exp_of_float32_logits() -> None:
    """Within 3 ulp wherever it is normal (tl.exp alone is off by 1.2 |x| more on a GPU), and 0, inf, NaN as they should be."""
    functions = importlib.import_module("exact_functions")
    x = torch.cat([torch.linspace(-87, 88, 200_001), -torch.logspace(-30, 0, 1001)]).to(DEVICE)
    exact = x.double().exp()
    assert ((functions.run("exp of rows", x).double() - exact) / exact).abs().max() < 3 * 2**-23
    ends = torch.tensor([0.0, -100.0, -150.0, -1e30, -INF, 200.0, INF, NAN], device=DEVICE)
    torch.testing.assert_close(
        functions.run("exp of rows", ends), ends.exp(), rtol=0, atol=2.0**-126, equal_nan=True
    )


def unknown_codes() -> dict[str, Any]:
    """A call of each family with a code one past its table's end, by the option that has it."""
    x, off = torch.zeros(2, device=DEVICE), Sequences(None, 1, 2, 2, torch.device(DEVICE))
    ones = torch.ones(2, dtype=torch.uint8, device=DEVICE)
    inputs = PolicyInputs(off, x, ones, old=x, ref=x, sampler=x)

    def policy(**options: int) -> Any:
        return lambda: fastloss_kernels.policy_loss(x, None, inputs, tables.PolicyOptions(**options))

    def pairs(**options: Any) -> Any:
        constants = tables.PairConstants()
        return lambda: fastloss_kernels.pair_loss(x, x, None, constants, tables.PairOptions(**options))

    return {
        "terms": pairs(terms=((len(tables.PAIR_TERMS), 1.0),)),
        "divergence": pairs(terms=((0, 1.0),), divergence=len(tables.DIVERGENCES)),
        "term": lambda: fastloss_kernels.unpaired_loss(
            x, tables.UnpairedConstants(ones), tables.UnpairedOptions(term=len(tables.UNPAIRED_TERMS))
        ),
        "surrogate": policy(surrogate=len(tables.SURROGATES)),
        "level": policy(level=len(tables.LEVELS)),
        "aggregation": policy(aggregation=len(tables.AGGREGATIONS)),
        "kl_kind": policy(kl_kind=len(tables.KL_KINDS)),
        "correction": policy(correction=len(tables.CORRECTIONS)),
    }


@pytest.mark.parametrize("option", unknown_codes())
def test_unknown_codes(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ValueError before the launch; and no formula of another loss in a kernel that is launched all the same."""
    with pytest.raises(ValueError, match=f"{option}: expected the code of one of "):
        unknown_codes()[option]()
    for family in ("pairs", "policy"):
        module = importlib.import_module(f"fastloss.kernels.{family}")
        monkeypatch.setattr(module, "code", lambda name, value, names: value)
    with pytest.raises(Exception, match="without a formula here"):
        unknown_codes()[option]()


def test_unknown_statistic() -> None:
    logits, target = make(2, 33, torch.float32)
    with pytest.raises(ValueError, match=r"want: expected names of logsumexp, .* got 'perplexity'"):
        row_stats(logits, target, **options("plain", 33), want=("perplexity",))


@pytest.mark.parametrize("how", ["negative", "meta", "subclass"])
def test_what_is_not_memory_is_refused(how: str) -> None:
    logits, target = make(2, 33, torch.float32)
    if how == "negative":
        logits = torch.complex(logits, logits).conj().imag
    elif how == "meta":
        logits = logits.to("meta")
    else:
        logits = logits.as_subclass(type("Subclass", (Tensor,), {}))
    with pytest.raises(ValueError):
        row_stats(logits, target, **options("plain", 33), want=("logsumexp",))


def test_outputs_ignore_the_defaults() -> None:
    """bugs: scratch made without dtype or device."""
    logits, target = make(2, 33, torch.float32)
    x, layout = torch.rand(6, device=DEVICE), Sequences(None, 3, 2, 6, torch.device(DEVICE))
    ones = torch.ones(6, dtype=torch.uint8, device=DEVICE)

    def everything() -> list[Any]:
        o = options("plain", 33)
        out: list[Any] = list(row_cross_entropy(logits, target, **o, want=STATS).values())
        out += [
            fastloss_kernels.segment_sum(x, None, layout),
            fastloss_kernels.segment_expand(x[:2], x, layout),
        ]
        out += fastloss_kernels.pair_loss(
            x, x, x, tables.PairConstants(), tables.PairOptions(terms=((0, 1.0),))
        )
        out += fastloss_kernels.unpaired_loss(x, tables.UnpairedConstants(ones), tables.UnpairedOptions())
        out += fastloss_kernels.policy_loss(
            x, x, PolicyInputs(layout, x, ones), tables.PolicyOptions(entropy_coef=0.1)
        )
        out += fastloss_kernels.gae(x, x, ones, layout, 0.9, 0.95)
        return [*out, fastloss_kernels.discounted_returns(x, ones, layout, 0.9)]

    want = everything()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def test_nothing_to_do() -> None:
    """No pairs, no tokens: the sums of nothing, and empty results."""
    none = torch.empty(0, device=DEVICE)
    bytes_ = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    layout = Sequences(None, 0, 3, 0, torch.device(DEVICE))
    pair = fastloss_kernels.pair_loss(
        none, none, None, tables.PairConstants(), tables.PairOptions(terms=((0, 1.0),))
    )
    assert pair.loss.shape == (0,) and not pair.sums.any()
    unpaired = fastloss_kernels.unpaired_loss(
        none, tables.UnpairedConstants(bytes_), tables.UnpairedOptions()
    )
    assert unpaired.loss.shape == (0,) and not unpaired.sums.any()
    policy = fastloss_kernels.policy_loss(
        none, none, PolicyInputs(layout, none, bytes_), tables.PolicyOptions(entropy_coef=0.1)
    )
    assert policy.loss == 0 and policy.d_logprobs.shape == policy.d_entropy.shape == (0,)
    out = dict(zip(tables.POLICY_OUT, policy.out.tolist(), strict=True))
    assert out == dict.fromkeys(tables.POLICY_OUT, 0.0) | {"scale": 1.0, "min_ratio": 1.0, "max_ratio": 1.0}
    assert not fastloss_kernels.segment_sum(none, None, layout).any()
    assert fastloss_kernels.segment_expand(torch.ones(3, device=DEVICE), None, layout).shape == (0,)
    assert fastloss_kernels.gae(none, none, bytes_, layout, 0.9, 0.9)[0].shape == (0,)


def test_the_loss_is_the_first_sum() -> None:
    x = torch.rand(6, device=DEVICE)
    layout = Sequences(None, 3, 2, 6, torch.device(DEVICE))
    ones = torch.ones(6, dtype=torch.uint8, device=DEVICE)
    result = fastloss_kernels.policy_loss(
        x, None, PolicyInputs(layout, x - 0.5, ones), tables.PolicyOptions()
    )
    assert torch.equal(result.loss, result.out[0]) and result.loss.data_ptr() != result.out.data_ptr()


@pytest.mark.parametrize("vocab", [33, 4096, 4097])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_is_wanted(dtype: torch.dtype, vocab: int) -> None:
    """bugs 27: a logsumexp or a log-prob does not depend on what else the launch makes."""
    logits, target = make(3, vocab, dtype)
    o = options("bias", vocab)
    want = ("logsumexp", "logprobs")
    alone = row_stats(logits, target, **o, want=want)
    everything = row_stats(logits, target, **o, want=STATS)
    w = torch.rand(vocab, device=DEVICE)
    with_gradient = row_cross_entropy(
        logits, target, **o, w=w, label_smoothing=0.1, z_loss=0.1, grad=torch.empty_like(logits), want=want
    )
    for other in (everything, with_gradient):
        assert all(torch.equal(alone[name], other[name]) for name in want)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("vocab", [4096, 5001])
def test_threads_that_see_no_finite_logit(vocab: int, offset: float) -> None:
    """All but three logits are -inf, and those far from 0: an empty sum, relative to 0, must not overflow when it joins them."""
    logits = torch.full((1, vocab), -INF, device=DEVICE)
    places = [0, 1, vocab - 1]
    logits[0, places] = torch.tensor([offset, offset + 1, offset - 2], device=DEVICE)
    target = torch.tensor([vocab - 1], device=DEVICE)
    o = options("plain", vocab)
    stats = row_stats(logits, target, **o, want=("logsumexp", "logprobs", "entropy", "log_sum_sq_probs"))
    few = logits[:, places].double()
    expected = expected_stats(few, torch.tensor([2], device=DEVICE), o)
    for name, value in stats.items():
        close(value, expected[name], 1e-6)


def test_a_sweep_overwrites_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = make(2, 3000, torch.bfloat16)
    o = options("plain", 3000)
    before = row_stats(logits, target, **o, want=STATS)
    monkeypatch.setitem(kernels.ROWS, "odd", (64, 8))
    shape = kernels.launch_shape(3000, False, 2)
    assert (shape["BLOCK"], shape["WIDTH"]) == (256, 4)
    for name, value in row_stats(logits, target, **o, want=STATS).items():
        close(value, before[name].double())
