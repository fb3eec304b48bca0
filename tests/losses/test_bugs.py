"""Ways in which a fused loss has been silently wrong somewhere; each test is named after its line."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import DEVICE, KERNELS, contract, need

import fastloss
from fastloss.engine.coefficients import Coefficients
from fastloss.tables import CrossEntropyOptions, RowOptions


@pytest.fixture(params=KERNELS)
def backend(request) -> str:
    return need(request.param)


def _logits(rows: int = 5, vocab: int = 37, dtype: torch.dtype = torch.float32, leaf: bool = True):
    torch.manual_seed(3)
    x = torch.randn(rows, vocab, device=DEVICE).to(dtype).requires_grad_(leaf)
    return x, torch.randint(0, vocab, (rows,), device=DEVICE)


def _grad(f, x, upstream=None):
    return torch.autograd.grad(f(x), x, upstream)[0]


def _same_gradient(ours, theirs, x, upstream=None, **tolerance):
    torch.testing.assert_close(_grad(ours, x, upstream), _grad(theirs, x, upstream), **tolerance)


def test_upstream_gradient_is_not_1(backend: str) -> None:
    x, t = _logits()
    _same_gradient(
        lambda v: fastloss.cross_entropy(v, t, backend=backend) * 1024.0,
        lambda v: F.cross_entropy(v, t) * 1024.0,
        x,
    )
    expanded = torch.tensor(0.37, device=DEVICE).expand(5)
    _same_gradient(
        lambda v: fastloss.cross_entropy(v, t, reduction="none", backend=backend),
        lambda v: F.cross_entropy(v, t, reduction="none"),
        x,
        expanded,
    )


def test_backward_twice_with_retain_graph(backend: str) -> None:
    x, t = _logits()
    w = torch.randn(37, 8, device=DEVICE, requires_grad=True)
    h = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    for loss, leaf in (
        (fastloss.cross_entropy(x, t, backend=backend) * 3, x),
        (fastloss.linear_cross_entropy(h, w, t, backend=backend) * 3, h),
    ):
        first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
        second = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
        third = torch.autograd.grad(loss, leaf)[0]
        assert torch.equal(first, second) and torch.equal(first, third)


def test_accumulating_into_grad_does_not_touch_the_graph(backend: str) -> None:
    x, t = _logits()
    loss = fastloss.cross_entropy(x, t, backend=backend)
    loss.backward(retain_graph=True)
    one = x.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(x.grad, one * 3)


def test_inplace_refuses_what_autograd_needs(backend: str) -> None:
    leaf, t = _logits()
    with pytest.raises(ValueError, match="leaf"):
        fastloss.cross_entropy(leaf, t, inplace=True, backend=backend)
    with pytest.raises(ValueError, match="own backward"):
        fastloss.cross_entropy(torch.tanh(leaf), t, inplace=True, backend=backend)
    with pytest.raises(ValueError, match="expanded"):
        fastloss.cross_entropy((leaf[:1] * 1).expand(5, 37), t, inplace=True, backend=backend)
    logits = leaf * 1
    square = (logits * logits).sum()  # saves logits
    loss = fastloss.cross_entropy(logits, t, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square).backward()
    loss = fastloss.cross_entropy(leaf * 1, t, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_inplace_overwrites_and_nothing_else_does(backend: str) -> None:
    leaf, t = _logits()
    logits = leaf * 1
    before = logits.detach().clone()
    fastloss.cross_entropy(logits, t, backend=backend).backward()
    assert torch.equal(logits.detach(), before)
    logits = leaf * 1
    fastloss.cross_entropy(logits, t, inplace=True, backend=backend).backward()
    torch.testing.assert_close(logits.detach(), _grad(lambda v: F.cross_entropy(v, t), leaf))
    with torch.no_grad():
        logits = leaf * 1
        fastloss.cross_entropy(logits, t, inplace=True, backend=backend)
        assert torch.equal(logits, before)


def test_mean_counts_what_is_not_ignored(backend: str) -> None:
    x, t = _logits()
    t[1:] = -100
    torch.testing.assert_close(fastloss.cross_entropy(x, t, backend=backend), F.cross_entropy(x, t))
    x, t = _logits(2051, 2, torch.float16)  # a count that float16 holds only roughly
    torch.testing.assert_close(
        fastloss.cross_entropy(x, t, backend=backend).double(),
        F.cross_entropy(x.double(), t),
        rtol=1e-3,
        atol=0,
    )


def test_all_tokens_ignored(backend: str) -> None:
    x, t = _logits()
    t[:] = -100
    assert math.isnan(fastloss.cross_entropy(x, t, backend=backend).item())
    assert fastloss.cross_entropy(x, t, reduction="sum", backend=backend).item() == 0
    for reduction in ("mean", "sum"):
        assert (
            _grad(lambda v, r=reduction: fastloss.cross_entropy(v, t, reduction=r, backend=backend), x)
            .abs()
            .max()
            == 0
        )


@pytest.mark.parametrize("ignore_index", [0, 36, -1, -100])
def test_ignore_index_of_any_sign(backend: str, ignore_index: int) -> None:
    x, t = _logits()
    t[0], t[3] = ignore_index, ignore_index
    options = {
        "weight": torch.rand(37, device=DEVICE) + 0.1,
        "label_smoothing": 0.1,
        "ignore_index": ignore_index,
    }
    torch.testing.assert_close(
        fastloss.cross_entropy(x, t, backend=backend, **options), F.cross_entropy(x, t, **options)
    )
    _same_gradient(
        lambda v: fastloss.cross_entropy(v, t, backend=backend, **options),
        lambda v: F.cross_entropy(v, t, **options),
        x,
    )


def test_z_loss_has_the_mean_s_count_and_a_gradient(backend: str) -> None:
    x, t = _logits()
    t[0] = -100
    eager = lambda v: F.cross_entropy(v, t) + 0.1 * v.logsumexp(-1)[1:].square().mean()
    ours = lambda v: fastloss.cross_entropy(v, t, z_loss=0.1, backend=backend)
    torch.testing.assert_close(ours(x), eager(x))
    _same_gradient(ours, eager, x)


def test_softcap_before_scale_with_its_derivative(backend: str) -> None:
    x, t = _logits()
    eager = lambda v: F.cross_entropy(3.0 * 2.0 * torch.tanh(v / 2.0), t)
    ours = lambda v: fastloss.cross_entropy(v, t, softcap=2.0, logit_scale=3.0, backend=backend)
    torch.testing.assert_close(ours(x), eager(x))
    _same_gradient(ours, eager, x)


def test_weight_gradient_is_accumulated_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 16).bfloat16(), torch.randn(50, 16).bfloat16().requires_grad_()
    target = torch.randint(0, 50, (512,))
    fine = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ fine.t(), target).backward()
    errors = []
    for chunk in (512, 4):
        weight.grad = None
        fastloss.linear_cross_entropy(hidden, weight, target, chunk_size=chunk).backward()
        errors.append((weight.grad.double() - fine.grad).abs().max().item())
    assert errors[1] <= errors[0] * 1.5 + 1e-6


def test_tied_and_frozen_and_bias() -> None:
    table = torch.randn(11, 6, requires_grad=True)
    target = torch.tensor([1, 2, 3])
    tokens = torch.tensor([4, 5, 6])
    run = lambda f: torch.autograd.grad(f(table[tokens], table, target), table)[0]
    torch.testing.assert_close(
        run(fastloss.linear_cross_entropy), run(lambda h, w, t: F.cross_entropy(h @ w.t(), t))
    )
    h = torch.randn(3, 6, requires_grad=True)
    frozen = torch.randn(11, 6)
    fastloss.linear_cross_entropy(h, frozen, target).backward()
    assert frozen.grad is None and h.grad is not None
    bias = torch.zeros(11, requires_grad=True)
    fastloss.linear_cross_entropy(h.detach(), frozen, target, linear_bias=bias).backward()
    torch.testing.assert_close(
        bias.grad, _grad(lambda b: F.cross_entropy(h.detach() @ frozen.t() + b, target), bias)
    )


@pytest.mark.parametrize("vocab", [1, 2, 3, 31, 33, 1025])
def test_vocabulary_tail_is_masked(backend: str, vocab: int) -> None:
    x = (
        torch.rand(3, vocab, device=DEVICE) - 50
    ).requires_grad_()  # all negative: a masked 0 would be the maximum
    t = torch.tensor([0, vocab - 1, vocab // 2], device=DEVICE)
    ours = fastloss.token_stats(
        x, t, outputs=("logprobs", "mean_logits", "is_top1", "entropy"), backend=backend
    )
    torch.testing.assert_close(
        ours.logprobs, x.log_softmax(-1).gather(1, t[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.mean_logits, x.mean(-1))
    assert torch.equal(ours.is_top1, x.argmax(-1) == t)
    _same_gradient(
        lambda v: fastloss.cross_entropy(v, t, label_smoothing=0.3, backend=backend),
        lambda v: F.cross_entropy(v, t, label_smoothing=0.3),
        x,
    )


def test_minus_infinity_logits(backend: str) -> None:
    x, t = _logits()
    x = x.detach().clone()
    x[:, 5:] = -torch.inf
    t.clamp_(max=4)
    x.requires_grad_()
    torch.testing.assert_close(fastloss.cross_entropy(x, t, backend=backend), F.cross_entropy(x, t))
    grad = _grad(lambda v: fastloss.cross_entropy(v, t, backend=backend), x)
    assert grad.isfinite().all() and (grad[:, 5:] == 0).all()
    entropy = fastloss.entropy_from_logits(x, backend=backend)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=x[:, :5]).entropy())
    assert _grad(lambda v: fastloss.entropy_from_logits(v, backend=backend).sum(), x).isfinite().all()


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_not_finite_rows_stay_their_own(backend: str, value: float) -> None:
    x, t = _logits()
    x = x.detach().clone()
    if value == -math.inf:
        x[1] = value
    else:
        x[1, 4] = value
    x.requires_grad_()
    ours = fastloss.cross_entropy(x, t, reduction="none", backend=backend)
    torch.testing.assert_close(ours, F.cross_entropy(x, t, reduction="none"), equal_nan=True)
    grad = _grad(lambda v: fastloss.cross_entropy(v, t, reduction="sum", backend=backend), x)
    assert grad[1].isnan().any() and grad[[0, 2, 3, 4]].isfinite().all()
    t[1] = -100  # an ignored row takes no part whatever it holds
    grad = _grad(lambda v: fastloss.cross_entropy(v, t, backend=backend), x)
    assert grad.isfinite().all() and (grad[1] == 0).all()


def test_strides(backend: str) -> None:
    base = torch.randn(2, 6, 9, device=DEVICE, requires_grad=True)
    t = torch.randint(0, 9, (2, 5), device=DEVICE)
    for view in (lambda b: b[..., :-1, :], lambda b: b[:, 1:, :]):
        _same_gradient(
            lambda b, v=view: fastloss.cross_entropy(v(b).reshape(-1, 9), t.reshape(-1), backend=backend),
            lambda b, v=view: F.cross_entropy(v(b).reshape(-1, 9), t.reshape(-1)),
            base,
        )
        _same_gradient(
            lambda b, v=view: fastloss.cross_entropy(v(b).transpose(1, 2), t, backend=backend),
            lambda b, v=view: F.cross_entropy(v(b).transpose(1, 2), t),
            base,
        )
    wide = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    t = torch.randint(0, 37, (5,), device=DEVICE)
    _same_gradient(
        lambda b: fastloss.cross_entropy(b[:, 3:], t, backend=backend),
        lambda b: F.cross_entropy(b[:, 3:], t),
        wide,
    )
    row = torch.randn(1, 37, device=DEVICE, requires_grad=True)
    _same_gradient(
        lambda b: fastloss.cross_entropy(b.expand(5, 37), t, backend=backend),
        lambda b: F.cross_entropy(b.expand(5, 37), t),
        row,
    )
    transposed = torch.randn(37, 5, device=DEVICE, requires_grad=True)
    _same_gradient(
        lambda b: fastloss.cross_entropy(b.t(), t, backend=backend),
        lambda b: F.cross_entropy(b.t(), t),
        transposed,
    )


def test_targets_of_the_wrong_kind() -> None:
    x, t = _logits()
    for bad in (t.int(), t[:, None], t[:3], t.float()):
        with pytest.raises(ValueError, match="target"):
            fastloss.cross_entropy(x, bad.cpu() if bad is not t else bad)
    with pytest.raises(ValueError, match="device"):
        fastloss.cross_entropy(x, t.to("meta"))
    with pytest.raises(TypeError, match="target"):
        fastloss.cross_entropy(x, [0, 1, 2, 3, 4])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [37, 10**12, -1, -101])
def test_out_of_range_target(backend: str, value: int) -> None:
    x, t = _logits()
    t[2] = value
    if DEVICE == "cpu":
        for call in (
            lambda: fastloss.cross_entropy(x, t, backend=backend),
            lambda: fastloss.token_stats(x, t, backend=backend),
            lambda: fastloss.linear_cross_entropy(torch.zeros(5, 3), torch.zeros(37, 3), t, backend=backend),
        ):
            with pytest.raises(IndexError, match=rf"Target {value} is out of bounds at position \[2\]"):
                call()
        return
    loss = fastloss.cross_entropy(x, t, reduction="none", backend=backend)
    assert loss[2].isnan() and loss[[0, 1, 3, 4]].isfinite().all()
    fastloss.validate_targets(True)
    try:
        with pytest.raises(IndexError):
            fastloss.cross_entropy(x, t, backend=backend)
    finally:
        fastloss.validate_targets(False)


def test_float16_does_not_overflow_or_underflow(backend: str) -> None:
    x, t = _logits(4096, 8, torch.float16)
    scale = 32768.0  # of GradScaler's size
    ours = _grad(lambda v: fastloss.cross_entropy(v, t, backend=backend).float() * scale, x)
    exact = _grad(lambda v: F.cross_entropy(v, t) * scale, x.detach().double().requires_grad_())
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=1e-6)
    big = torch.full((2, 9), 60000.0, dtype=torch.float16, device=DEVICE)
    out = fastloss.cross_entropy(big, torch.tensor([0, 1], device=DEVICE), reduction="none", backend=backend)
    torch.testing.assert_close(
        out.double(), torch.full((2,), math.log(9), dtype=torch.float64, device=DEVICE), rtol=1e-3, atol=0
    )


def test_statistics_of_bfloat16_are_float32(backend: str) -> None:
    x, t = _logits(dtype=torch.bfloat16)
    stats = fastloss.token_stats(x, t, temperature=0.7, outputs=("logprobs", "entropy"), backend=backend)
    exact = (x.double() / 0.7).log_softmax(-1)
    assert stats.logprobs.dtype == torch.float32
    torch.testing.assert_close(
        stats.logprobs.double(), exact.gather(1, t[:, None])[:, 0], rtol=2e-6, atol=2e-6
    )
    torch.testing.assert_close(stats.entropy.double(), -(exact.exp() * exact).sum(-1), rtol=2e-6, atol=2e-6)


def test_old_logprobs_give_a_ratio_of_exactly_1(backend: str) -> None:
    hidden, weight = (
        torch.randn(7, 8, device=DEVICE, requires_grad=True),
        torch.randn(37, 8, device=DEVICE, requires_grad=True),
    )
    t = torch.randint(0, 37, (7,), device=DEVICE)
    new = fastloss.linear_token_stats(hidden, weight, t, backend=backend).logprobs
    with torch.no_grad():
        old = fastloss.linear_token_stats(hidden, weight, t, backend=backend).logprobs
    assert torch.equal((new - old).exp(), torch.ones_like(old))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["linear_cross_entropy", "linear_supervised_loss", "linear_distillation_loss", "cross_entropy"]
)
def test_compiled_gradients_are_0_where_every_label_is_ignored(name: str, dtype: torch.dtype) -> None:
    """A mean over no row: float16's gradients, kept unscaled, were 0 times one over 0."""
    hidden, weight = (torch.randn(rows, 16, device=DEVICE).to(dtype) for rows in (6, 40))
    target = torch.full((6,), -100, device=DEVICE)
    calls = {
        "linear_cross_entropy": lambda h, w: fastloss.linear_cross_entropy(h, w, target),
        "linear_supervised_loss": lambda h, w: fastloss.linear_supervised_loss(h, w, target)[0],
        "linear_distillation_loss": lambda h, w: fastloss.linear_distillation_loss(
            h, w, h.detach(), w.detach() * 2, target=target
        )[0],
        "cross_entropy": lambda h, w: fastloss.cross_entropy(h @ w.T, target),
    }
    torch._dynamo.reset()
    compiled = torch.compile(calls[name], fullgraph=True, backend="aot_eager")
    for call in (calls[name], compiled):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        (call(*leaves) * 3).backward()
        assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def test_empty_batch(backend: str) -> None:
    x = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    t = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert math.isnan(fastloss.cross_entropy(x, t, backend=backend).item())
    assert fastloss.cross_entropy(x, t, reduction="sum", backend=backend).item() == 0
    assert fastloss.cross_entropy(x, t, reduction="none", backend=backend).shape == (0,)
    assert _grad(lambda v: fastloss.cross_entropy(v, t, backend=backend), x).shape == (0, 5)
    w = torch.zeros(7, 5, device=DEVICE, requires_grad=True)
    loss = fastloss.linear_cross_entropy(x, w, t, reduction="sum", backend=backend)
    loss.backward()
    assert loss.item() == 0 and (w.grad == 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("z_loss", -1.0),
        ("z_loss", math.nan),
        ("label_smoothing", 1.5),
        ("softcap", 0.0),
        ("softcap", -3.0),
        ("logit_scale", math.inf),
        ("reduction", "avg"),
        ("backend", "cuda13"),
        ("normalizer", -1.0),
        ("weight", torch.ones(3)),
    ],
)
def test_wrong_options_are_named(name: str, value) -> None:
    x, t = _logits()
    before = x.detach().clone()
    with pytest.raises(ValueError, match=name):
        fastloss.cross_entropy(x, t, **{name: value})
    assert torch.equal(x.detach(), before)
    with pytest.raises(ValueError, match="normalizer"):
        fastloss.cross_entropy(x, t, reduction="none", normalizer=3)
    with pytest.raises(ValueError, match="chunk_size"):
        fastloss.linear_cross_entropy(torch.zeros(5, 2), torch.zeros(37, 2), t, chunk_size=0)
    with pytest.raises(ValueError, match="outputs"):
        fastloss.token_stats(x, t, outputs=("logprob",))
    with pytest.raises(ValueError, match="temperature"):
        fastloss.token_stats(x, t, temperature=0.0)
    with pytest.raises(TypeError, match="input"):
        fastloss.cross_entropy(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]))


def test_normalizer_of_every_kind(backend: str) -> None:  # the Trainer's num_items_in_batch
    x, t = _logits()
    expected = F.cross_entropy(x, t, reduction="sum") / 11
    for normalizer in (11, 11.0, torch.tensor(11), torch.tensor(11.0), torch.tensor([11])):
        for reduction in ("mean", "sum"):
            loss = fastloss.cross_entropy(x, t, normalizer=normalizer, reduction=reduction, backend=backend)
            torch.testing.assert_close(loss, expected)
    halves = sum(
        fastloss.cross_entropy(a, b, normalizer=5, backend=backend)
        for a, b in ((x[:2], t[:2]), (x[2:], t[2:]))
    )
    torch.testing.assert_close(halves, F.cross_entropy(x, t))


def test_more_than_2_to_the_31_elements() -> None:
    """Row offsets past 2³¹ elements: an expanded row stride reaches them without the memory."""
    if DEVICE != "cpu":
        pytest.skip("the address trick below needs pages that are mapped lazily")
    vocab, rows = (
        70_000,
        31_000,
    )  # 2.17e9 elements of bfloat16, 4.3 GB of address space, touched in three rows only
    x = torch.empty(rows, vocab, dtype=torch.bfloat16)
    t = torch.full((rows,), -100)
    for i in (0, rows // 2, rows - 1):
        x[i].normal_()
        t[i] = i % vocab
    lp = fastloss.token_stats(x, t, backend="cpu").logprobs
    assert lp is not None
    for i in (0, rows // 2, rows - 1):
        torch.testing.assert_close(lp[i], x[i].float().log_softmax(-1)[i % vocab], rtol=1e-4, atol=1e-4)
    assert lp.count_nonzero() == 3


def test_rows_further_apart_than_32_bits(backend: str) -> None:
    """Read, written in place and differentiated through a row stride of 2³¹ + 1 elements."""
    kernels, stride = contract(backend), 2**31 + 1
    memory = torch.empty(stride + 64, dtype=torch.bfloat16, device=DEVICE)  # most pages are never touched
    x, t = memory.as_strided((2, 50), (stride, 1)), torch.tensor([3, 49], device=DEVICE)
    exact = torch.randn(2, 50, device=DEVICE).bfloat16().double().requires_grad_()
    F.cross_entropy(exact, t, reduction="sum").backward()
    for function in ("row_cross_entropy", "row_grad"):
        x.copy_(exact)
        stats = kernels.row_stats(x, t, RowOptions(), want=("logprobs", "lse_parts"))
        torch.testing.assert_close(
            stats["logprobs"].double(), exact.log_softmax(-1)[[0, 1], t].detach(), rtol=1e-5, atol=1e-5
        )
        if function == "row_grad":
            one = torch.ones(2, device=DEVICE)
            k = Coefficients(a=-one, b=one)
            kernels.row_grad(x, t, RowOptions(), lse_parts=stats["lse_parts"], coefficients=k, out=x)
        else:
            kernels.row_cross_entropy(x, t, CrossEntropyOptions(), grad=x)
        torch.testing.assert_close(x.double(), exact.grad, rtol=8e-3, atol=1e-6)
