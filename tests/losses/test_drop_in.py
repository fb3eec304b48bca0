"""Details in which a drop-in shows: what PyTorch and TRL take, and give back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import ALL, DEVICE, need
from torch import Tensor

import fastloss


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def logits_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator()).to(DEVICE)


def test_targets_in_uint8() -> None:
    target = torch.tensor([1, 0, 6, 3], dtype=torch.uint8, device=DEVICE)
    logits, weight = logits_of(4, 7), logits_of(7, 5)
    torch.testing.assert_close(fastloss.cross_entropy(logits, target), F.cross_entropy(logits, target))
    hidden = logits_of(4, 5)
    got = fastloss.linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(got, F.cross_entropy(hidden @ weight.t(), target.long()))
    with pytest.raises(IndexError, match="7"):
        fastloss.validate_targets(True)
        try:
            fastloss.cross_entropy(logits, torch.full_like(target, 7))
        finally:
            fastloss.validate_targets(False)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("offset", [0.0, 8192.0])
def test_several_indices_of_a_row(backend: str, offset: float) -> None:
    need(backend)
    exact = (logits_of(2, 3, 50) * 1024).round().double() / 1024
    exact[0, 0, 4] = -torch.inf
    z = (exact.float() + offset).requires_grad_()
    exact.requires_grad_()
    index = torch.randint(0, 50, (2, 3, 6), generator=generator()).to(DEVICE)
    index[0, 0, :2] = 4  # log-prob -inf; of a row of nothing else too
    index[1, 1] = index[1, 1, 0]
    got = fastloss.selective_log_softmax(z, index, 0.5, backend=backend)
    want = (exact / 0.5).log_softmax(-1).gather(-1, index)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    upstream = torch.randn(got.shape, generator=generator()).to(DEVICE).masked_fill(want == -torch.inf, 0)
    (mine,) = torch.autograd.grad(got, z, upstream)
    (theirs,) = torch.autograd.grad(want, exact, upstream.double())
    torch.testing.assert_close(mine.double(), theirs.nan_to_num(), rtol=1e-5, atol=2e-6)
    with pytest.raises(IndexError):
        fastloss.validate_targets(True)
        try:
            fastloss.selective_log_softmax(z, index + 50, backend=backend)
        finally:
            fastloss.validate_targets(False)


@pytest.mark.parametrize("backend", ALL)
def test_rows_that_are_masked(backend: str) -> None:
    need(backend)
    logits, index = logits_of(4, 9), torch.tensor([0, 8, 3, 3], device=DEVICE)
    mask = torch.tensor([1, 0, 1, 0], device=DEVICE)
    logits[1] = torch.nan
    z = logits.clone().requires_grad_()
    got = fastloss.selective_log_softmax(z, index, row_mask=mask, backend=backend)
    several = fastloss.selective_log_softmax(z, index[:, None].expand(4, 2), row_mask=mask, backend=backend)
    both, entropy = fastloss.selective_log_softmax_and_entropy(z, index, True, 1.0, mask, backend=backend)
    want = logits.log_softmax(-1).gather(-1, index[:, None])[:, 0]
    for out in (got, several[:, 0], several[:, 1], both):
        torch.testing.assert_close(out[mask == 1], want[mask == 1])
        assert (out[mask == 0] == 0).all()
    assert (entropy[mask == 0] == 0).all() and (entropy[mask == 1] > 0).all()
    for out in (got.sum(), both.sum() + entropy.sum()):
        (grad,) = torch.autograd.grad(out, z, retain_graph=True)
        assert (grad[mask == 0] == 0).all() and grad[mask == 1].any()
    assert not fastloss.selective_log_softmax_and_entropy(z, index, False)[1].requires_grad
    with pytest.raises(ValueError, match="row_mask"):
        fastloss.selective_log_softmax(z, index, row_mask=mask[:2], backend=backend)


@pytest.mark.parametrize("backend", ALL)
def test_a_returned_entropy_may_be_changed_in_place(backend: str) -> None:
    need(backend)
    weight, target = logits_of(9, 5), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    z, hidden = logits_of(4, 9).requires_grad_(), logits_of(4, 5).requires_grad_()
    for leaf, call in (
        (z, lambda: fastloss.entropy_from_logits(z, 2, backend=backend)),
        (
            hidden,
            lambda: (
                fastloss.linear_token_stats(
                    hidden, weight, target, outputs=("entropy",), backend=backend
                ).entropy
            ),
        ),
    ):
        (once,) = torch.autograd.grad(call().sum(), leaf)
        (twice,) = torch.autograd.grad(call().mul_(2).sum(), leaf)
        torch.testing.assert_close(twice, 2 * once)


TRACED: dict[str, tuple[Any, ...]] = {
    "policy_loss": ((2, 3), (2, 3), (2,)),
    "value_loss": ((2, 3), (2, 3), (2, 3)),
    "gae": ((2, 3), (2, 3)),
    "whiten": ((2, 3),),
}


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("ignore")
def test_jit_trace(name: str) -> None:
    function = getattr(fastloss, name)

    def call(*tensors: Tensor) -> Tensor:
        out = function(*tensors)
        return out if isinstance(out, Tensor) else out[0]

    tensors = (*(logits_of(*shape) for shape in TRACED[name]), torch.ones(2, 3, device=DEVICE))
    traced = torch.jit.trace(call, tensors, check_trace=False)
    other = (*(x * 0.5 for x in tensors[:-1]), tensors[-1])
    torch.testing.assert_close(traced(*other), call(*other))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("whole", [True, False])
def test_k_dimensional_loss(backend: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call over all places, and, where the logits are large, one per place."""
    need(backend)
    module = pytest.importorskip("fastloss.losses.linear_cross_entropy")
    if not whole:
        monkeypatch.setattr(module, "WHOLE_LOGITS", 0)
    hidden, weight, bias = logits_of(6, 8), logits_of(11, 2, 3, 8), logits_of(11, 2, 3)
    target = torch.randint(0, 11, (6, 2, 3), generator=generator()).to(DEVICE)
    target[0, 1, 2] = -100
    logits = torch.einsum("nd,cijd->ncij", hidden.double(), weight.double()) + bias.double()
    for options in (
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"normalizer": 5},
    ):
        kept = {k: v for k, v in options.items() if k != "normalizer"}
        want = F.cross_entropy(logits, target, **({"reduction": "sum"} if "normalizer" in options else kept))
        want = want / 5 if "normalizer" in options else want
        got = fastloss.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, backend=backend, **options
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    stats = fastloss.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, backend=backend, return_stats=True
    )[1]
    assert stats.logprobs.shape == target.shape


def outcome(compute: Any, *args: Any, **options: Any) -> Any:
    """A result, or the type of what is raised."""
    try:
        return compute(*args, **options)
    except (RuntimeError, IndexError) as error:
        return IndexError if isinstance(error, IndexError) else RuntimeError


def both(theirs: Any, mine: Any) -> None:
    if isinstance(theirs, type):
        assert theirs is mine
        return
    assert isinstance(mine, Tensor) and mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2, equal_nan=True)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy", "module", "head module"])
def test_class_weights_of_each_dtype(function: str, probabilities: bool, autocast: bool) -> None:
    """PyTorch's RuntimeError where its kernels refuse the pair, its widest dtype where class probabilities take it."""
    if function in ("linear_cross_entropy", "head module") and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    hidden, weight, target = logits_of(5, 4), logits_of(7, 4), torch.tensor([1, 0, 6, -100, 3], device=DEVICE)
    for dtype in FLOATS:
        x = ((hidden @ weight.t()).to(dtype),)
        if "linear" in function:
            x = (hidden.to(dtype), weight.to(dtype))
        for given in FLOATS:
            w = torch.linspace(0.5, 2.0, 7, device=DEVICE).to(given)
            aim = logits_of(5, 7).softmax(-1) if probabilities else target
            theirs, mine = getattr(F, function, None), getattr(fastloss, function, None)
            if function == "module":
                theirs, mine = torch.nn.CrossEntropyLoss(weight=w), fastloss.nn.CrossEntropyLoss(weight=w)
            elif function == "head module":
                theirs, mine = (m(4, 7, weight=w) for m in (torch.nn.LinearCrossEntropyLoss, fastloss.nn.LinearCrossEntropyLoss))  # fmt: skip
                mine.load_state_dict(theirs.state_dict())
                theirs, mine = theirs.to(DEVICE, dtype), mine.to(DEVICE, dtype)
                for module in (theirs, mine):
                    module.weight = w  # .to() took it along
                x = (hidden.to(dtype),)
            options = {} if "module" in function else {"weight": w}
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                want = outcome(theirs, *x, aim, **options)
                got = outcome(mine, *x, aim, **options)
            both(want, got)


def test_the_words_for_class_weights() -> None:
    with pytest.raises(RuntimeError, match="expected scalar type BFloat16 but found Float"):
        fastloss.cross_entropy(
            logits_of(2, 3).bfloat16(), torch.tensor([0, 1], device=DEVICE), weight=logits_of(3)
        )


@pytest.mark.parametrize("backend", ["auto", *ALL])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_class(backend: str, reduction: str, smoothing: float) -> None:
    if backend != "auto":
        need(backend)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ignored = torch.full((5,), -100, device=DEVICE)
    for rows, target in (
        (5, ignored),
        (5, ignored * 0),
        (0, ignored[:0]),
        (5, None),
        (0, None),
        (None, None),
    ):
        x = torch.zeros((0,) if rows is None else (rows, 0), device=DEVICE)
        aim = x if target is None else target
        both(
            outcome(F.cross_entropy, x, aim, **options),
            outcome(fastloss.cross_entropy, x, aim, backend=backend, **options),
        )
        if rows is None:
            continue
        if target is None:
            places = torch.zeros(rows, 0, 3, device=DEVICE)
            want, got = (
                outcome(f, places, places, **options) for f in (F.cross_entropy, fastloss.cross_entropy)
            )
            both(want, got)
        hidden, weight = logits_of(5, 3)[:rows].requires_grad_(), logits_of(0, 3).requires_grad_()
        want = outcome(F.cross_entropy, hidden @ weight.t(), aim, **options)
        got = outcome(fastloss.linear_cross_entropy, hidden, weight, aim, backend=backend, **options)
        both(want, got)
        if isinstance(got, Tensor):
            got.sum().backward()
            assert hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_k_dimensional_loss_of_no_row(reduction: str, probabilities: bool) -> None:
    """One head after the other, as token weights and a loss dtype make it."""
    hidden, weight, bias = logits_of(0, 4), logits_of(5, 2, 3, 4), logits_of(5, 2, 3)
    target = torch.zeros((0, 5, 2, 3) if probabilities else (0, 2, 3), device=DEVICE)
    target = target if probabilities else target.long()
    want = torch.zeros((0, 2, 3) if reduction == "none" else ())
    for more in ({"loss_dtype": torch.float32}, {"token_weight": torch.zeros(0, 2, 3, device=DEVICE)}):
        got = fastloss.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction=reduction, **more
        )
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("backend", ALL)
def test_statistics_of_no_class(backend: str) -> None:
    need(backend)
    x, target, weight = torch.zeros(5, 0, device=DEVICE), torch.zeros(5, dtype=torch.int64, device=DEVICE), logits_of(0, 3)  # fmt: skip
    for call in (
        lambda: fastloss.token_stats(x, target, backend=backend),
        lambda: fastloss.entropy_from_logits(x, backend=backend),
        lambda: fastloss.linear_token_stats(logits_of(5, 3), weight, target, backend=backend),
        lambda: fastloss.cross_entropy(x, target - 100, return_stats=True, backend=backend),
    ):
        with pytest.raises(ValueError, match="expected at least one class"):
            call()
