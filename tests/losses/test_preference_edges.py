"""Preference losses at the edges: extreme ratios, nothing to read, upstream gradients, bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, need
from preference_inputs import DIVERGENCES, SORTED, TYPES, WITH_DIVERGENCE, call, evaluate, needed, numbers

import fastloss


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", [*TYPES, *SORTED])
def test_extreme_inputs_are_finite(backend: str, name: str) -> None:
    """Bugs 24, 33: log-ratio ±1e4, equal pairs, log-probs of 0, no tokens, one pair, no pair."""
    need(backend)
    c = torch.tensor([-1e4, -1.0, -5.0, 0.0, -1e4, -1e-9], device=DEVICE)
    r = torch.tensor([-1.0, -1e4, -5.0, 0.0, -1e4, -3.0], device=DEVICE)
    lengths = torch.tensor([3, 3, 3, 0, 3, 1], device=DEVICE)
    for rows in (slice(None), slice(3, 4), slice(0, 0)):
        for reduction in ("mean", "none"):
            leaves = [v[rows].clone().requires_grad_() for v in (c, r)]
            out = fastloss.preference_loss(
                *leaves,
                torch.zeros_like(leaves[0]),
                torch.zeros_like(leaves[1]),
                loss_type=name,
                chosen_lengths=lengths[rows],
                rejected_lengths=lengths[rows],
                reduction=reduction,
                backend=backend,
                **needed(name),
            )
            out.loss.sum().backward()
            numbers_out = [
                out.loss,
                *out[1:5],
                *out.metrics.values(),
                *(v.grad for v in leaves if v.grad is not None),
            ]
            assert all(v.isfinite().all() for v in numbers_out), (rows, reduction)
    assert out.loss.shape == (0,)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", [n for n in TYPES if n in WITH_DIVERGENCE])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_divergences_of_extreme_ratios_are_finite(
    backend: str, name: str, divergence: dict[str, Any]
) -> None:
    need(backend)
    c = torch.tensor([-1e4, -1.0, -1e4], device=DEVICE, requires_grad=True)
    r = torch.tensor([-1.0, -1e4, -1e4], device=DEVICE, requires_grad=True)
    n = torch.tensor([3, 3, 3], device=DEVICE)
    out = fastloss.preference_loss(
        c,
        r,
        torch.zeros(3, device=DEVICE),
        torch.zeros(3, device=DEVICE),
        loss_type=name,
        chosen_lengths=n,
        rejected_lengths=n,
        backend=backend,
        **divergence,
        **needed(name),
    )
    out.loss.backward()
    assert out.loss.isfinite() and all(v.grad is None or v.grad.isfinite().all() for v in (c, r))


@pytest.mark.parametrize("backend", ALL)
def test_all_masked(backend: str) -> None:
    """Bug 33: a batch without a token: DPO's log 2, likelihood 0, and gradients of 0."""
    need(backend)
    tokens = torch.full((2, 3), math.nan, device=DEVICE, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    out = fastloss.preference_loss(
        tokens,
        tokens,
        loss_type=["sigmoid", "sft", "simpo"],
        simpo_gamma=0.0,
        reference_free=True,
        chosen_mask=mask,
        rejected_mask=mask,
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert out.metrics["nll_loss"].item() == 0.0
    assert tokens.grad is not None and (tokens.grad == 0).all()


def test_reference_in_another_dtype_is_no_bias() -> None:
    """Bug 25."""
    c = torch.tensor([-100.25], requires_grad=True)
    low, high = (
        fastloss.preference_loss(c, c, v, v)
        for v in (torch.tensor([-100.0]).bfloat16(), torch.tensor([-100.0]))
    )
    assert low.chosen_rewards.dtype == torch.float32
    assert torch.equal(low.chosen_rewards, high.chosen_rewards)
    double_ref = fastloss.preference_loss(
        c, c, torch.tensor([-100.0]).double(), torch.tensor([-100.0]).double()
    )
    assert double_ref.loss.dtype == torch.float32


@pytest.mark.parametrize("backend", ALL)
def test_sft_is_a_mean_over_tokens(backend: str) -> None:
    """Bug 26: -Σ log p / Σ tokens, not the mean of the responses' means."""
    need(backend)
    c, r = torch.tensor([-2.0, -30.0], device=DEVICE), torch.tensor([-1.0, -1.0], device=DEVICE)
    n = torch.tensor([1, 9], device=DEVICE)
    out = fastloss.preference_loss(c, r, loss_type="sft", chosen_lengths=n, backend=backend)
    assert out.loss.item() == pytest.approx(32 / 10) and out.metrics["nll_loss"].item() == pytest.approx(3.2)


@pytest.mark.parametrize("backend", ALL)
def test_same_inputs_same_bits(backend: str) -> None:
    """Bug 27."""
    need(backend)
    x = numbers(301, torch.float32)
    options = {"loss_type": ["sigmoid", "ipo"], "beta": 0.3}
    first, second = evaluate(x, options, backend), evaluate(x, options, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_upstream_and_retain_graph() -> None:
    """Bugs 1 to 3."""
    x = numbers(6, torch.float32)
    c = x["c"].clone().requires_grad_()
    loss = call({**x, "c": c}, {}, "cpu" if DEVICE == "cpu" else "auto").loss
    (once,) = torch.autograd.grad(loss, c, retain_graph=True)
    (again,) = torch.autograd.grad(loss, c, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, c, retain_graph=True)
    assert torch.equal(once, again)
    torch.testing.assert_close(thrice, 3 * once)
