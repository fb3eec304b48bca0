"""Properties that hold for any logits, found or refuted by hypothesis."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import DEVICE, need

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import fastloss

BACKEND = "cpu" if DEVICE == "cpu" else "cuda"
shapes = st.tuples(st.integers(1, 6), st.integers(1, 2100))
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def _backend() -> None:
    need(BACKEND)


def _problem(
    shape: tuple[int, int], seed: int, size: float, ignored: float
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * size
    target = torch.randint(0, shape[1], (shape[0],), generator=generator)
    target[torch.rand(shape[0], generator=generator) < ignored] = -100
    return x.to(DEVICE), target.to(DEVICE)


options = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "reduction": st.sampled_from(["sum", "none"]),
        "ignore_index": st.sampled_from([-100, 0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, st.sampled_from([0.01, 1.0, 10.0]), st.sampled_from([0.0, 0.5, 1.0]), options)
def test_equals_pytorch(shape, seed, size, ignored, kwargs) -> None:
    x, target = _problem(shape, seed, size, ignored)
    target[target == -100] = kwargs["ignore_index"]
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = fastloss.cross_entropy(ours, target, backend=BACKEND, **kwargs)
    exact = F.cross_entropy(theirs, target, **kwargs)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(shapes, seeds, st.floats(0.5, 30.0), st.floats(0.2, 3.0))
def test_statistics_have_their_bounds(shape, seed, softcap, temperature) -> None:
    x, target = _problem(shape, seed, 5.0, 0.0)
    names = ("logprobs", "entropy", "log_sum_sq_probs", "logsumexp")
    s = fastloss.token_stats(
        x, target, softcap=softcap, temperature=temperature, outputs=names, backend=BACKEND
    )
    top = torch.log(torch.tensor(float(shape[1])))
    assert (s.logprobs <= 1e-5).all()
    assert (s.entropy >= -1e-5).all() and (s.entropy <= top + 1e-4).all()
    # Rényi: 2-entropy is at most the Shannon entropy
    assert (-s.log_sum_sq_probs <= s.entropy + 1e-4).all()
    assert (s.logsumexp <= softcap / temperature + top + 1e-3).all()


@settings(max_examples=40, deadline=None)
@given(shapes, seeds)
def test_gradient_of_a_row_sums_to_zero_and_a_shift_changes_nothing(shape, seed) -> None:
    x, target = _problem(shape, seed, 3.0, 0.3)
    leaf = x.clone().requires_grad_()
    loss = fastloss.cross_entropy(leaf, target, reduction="none", backend=BACKEND)
    loss.sum().backward()
    torch.testing.assert_close(leaf.grad.sum(1), torch.zeros(shape[0], device=DEVICE), rtol=0, atol=2e-5)
    shifted = fastloss.cross_entropy(x + 7.0, target, reduction="none", backend=BACKEND)
    torch.testing.assert_close(shifted, loss.detach(), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 70), st.integers(1, 95), seeds)
def test_chunk_size_does_not_change_the_head(rows, dim, vocab, chunk, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator).to(DEVICE).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=generator).to(DEVICE)
    run = lambda **k: fastloss.linear_cross_entropy(hidden, weight, target, backend=BACKEND, **k)
    a, b = run(chunk_size=chunk), run(chunk_size=rows)
    torch.testing.assert_close(a, b)
    for x, y in zip(
        torch.autograd.grad(a, (hidden, weight)), torch.autograd.grad(b, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
