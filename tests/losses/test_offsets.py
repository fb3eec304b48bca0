"""An offset that all logits of a row share costs no digits: losses, statistics and every gradient against float64 without it.

The offsets are multiples of 2^-10 that float32 holds beside logits of 2^-10 steps, so that the inputs are the same logits
exactly and what differs is the arithmetic alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, need
from torch import Tensor

import fastloss

ROWS, VOCAB, DIM = 9, 300, 16
OFFSETS = (0.0, 1e3, 8192.0)
GENERATOR = torch.Generator().manual_seed(5)
LOGITS = (torch.randn(ROWS, VOCAB, generator=GENERATOR) * 2 * 1024).round() / 1024
TARGET = torch.randint(0, VOCAB, (ROWS,), generator=GENERATOR)
UPSTREAM = torch.randn(ROWS, generator=GENERATOR)
OLD = -6 + torch.randn(ROWS, generator=GENERATOR)


def cross_entropy(z: Tensor, **options: Any) -> Tensor:
    return fastloss.cross_entropy(z, TARGET.to(z.device), **options)


def statistic(name: str) -> Any:
    def call(z: Tensor, **options: Any) -> Tensor:
        return getattr(fastloss.token_stats(z, TARGET.to(z.device), outputs=(name,), **options), name)

    return call


FROM_LOGITS: dict[str, Any] = {
    "cross-entropy": (cross_entropy, {}),
    "unreduced": (cross_entropy, {"reduction": "none"}),
    "smoothed": (cross_entropy, {"reduction": "none", "label_smoothing": 0.1}),
    "log-probs": (statistic("logprobs"), {}),
    "entropy": (statistic("entropy"), {}),
    "entropy_from_logits": (fastloss.entropy_from_logits, {}),
    "selective": (lambda z, **o: fastloss.selective_log_softmax(z, TARGET.to(z.device), **o), {}),
}


def gradient(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    upstream = UPSTREAM.to(value) if value.dim() else torch.ones_like(value)
    return list(torch.autograd.grad(value, leaves, upstream))


def agree(got: list[Tensor], exact: list[Tensor], what: str) -> None:
    for x, y in zip(got, exact, strict=True):
        error, size = (x.double().cpu() - y).abs().max().item(), y.abs().max().item()
        assert error <= 2e-6 * max(size, 1e-3), (what, error, size)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", FROM_LOGITS)
@pytest.mark.parametrize("backend", ALL)
def test_from_logits(backend: str, name: str, offset: float) -> None:
    need(backend)
    call, options = FROM_LOGITS[name]
    exact = LOGITS.double().requires_grad_()
    want = call(exact, backend="reference", **options)
    z = (LOGITS + offset).to(DEVICE).requires_grad_()
    assert torch.equal(z.detach().cpu().double() - offset, LOGITS.double())
    got = call(z, backend=backend, **options)
    agree([got.detach(), *gradient(got, z)], [want.detach(), *gradient(want, exact)], name)


def policy(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    ones = torch.ones(1, ROWS, dtype=torch.bool, device=hidden.device)
    advantages = torch.ones(1, device=hidden.device, dtype=hidden.dtype)
    old, target = OLD.to(hidden)[None], TARGET.to(hidden.device)[None]
    out = fastloss.linear_policy_loss(
        hidden[None], weight, target, old, advantages, ones, linear_bias=bias, entropy_coef=0.3, **options
    )
    return out.loss


def linear_statistic(name: str) -> Any:
    def call(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        out = fastloss.linear_token_stats(
            hidden, weight, TARGET.to(hidden.device), linear_bias=bias, outputs=(name,), **options
        )
        return getattr(out, name)

    return call


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return fastloss.linear_cross_entropy(
        hidden, weight, TARGET.to(hidden.device), linear_bias=bias, **options
    )


def linear_dpo(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    rows = ROWS // 2 * 2
    pairs = hidden[:rows].reshape(2, rows // 2, -1)
    target = TARGET[:rows].to(hidden.device).reshape(2, -1)
    out = fastloss.linear_dpo_loss(pairs, weight, target, linear_bias=bias, reference_free=True, **options)
    return out.loss


FROM_HIDDEN: dict[str, Any] = {
    "cross-entropy": (linear_cross_entropy, {}),
    "unreduced": (linear_cross_entropy, {"reduction": "none"}),
    "log-probs": (linear_statistic("logprobs"), {}),
    "entropy": (linear_statistic("entropy"), {}),
    "policy": (policy, {}),
    "dpo": (linear_dpo, {}),
}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", FROM_HIDDEN)
@pytest.mark.parametrize("backend", ALL)
def test_from_hidden_states(backend: str, name: str, offset: float) -> None:
    """The offset is the bias, and products are exact: hidden states and weights of few bits."""
    need(backend)
    call, options = FROM_HIDDEN[name]
    generator = torch.Generator().manual_seed(7)
    hidden = (torch.randn(ROWS, DIM, generator=generator) * 16).round() / 16
    weight = (torch.randn(VOCAB, DIM, generator=generator) * 16).round() / 64
    bias = torch.zeros(VOCAB)
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    want = call(*exact, backend="reference", **options)
    leaves = [x.to(DEVICE).requires_grad_() for x in (hidden, weight, bias + offset)]
    got = call(*leaves, backend=backend, **options)
    agree([got.detach(), *gradient(got, *leaves)], [want.detach(), *gradient(want, *exact)], name)


@pytest.mark.parametrize("temperature", [1.0, 7.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_low_precision(backend: str, dtype: torch.dtype, temperature: float) -> None:
    """Logits of the steps that their dtype has at the offset; a temperature may cost the rounding of the largest of them."""
    need(backend)
    offset, step = (1024.0, 8.0) if dtype == torch.bfloat16 else (4096.0, 4.0)
    steps = LOGITS.round() * step
    z = (steps + offset).to(DEVICE, dtype).requires_grad_()
    assert torch.equal(z.detach().cpu().double() - offset, steps.double())
    exact = steps.double().requires_grad_()
    allowed = 2e-6 if temperature == 1.0 else 2**-24 * 2 * offset / temperature
    for output in ("logprobs", "entropy"):
        call = statistic(output)
        want = call(exact, backend="reference", temperature=temperature)
        got = call(z, backend=backend, temperature=temperature)
        error = (got.detach().cpu().double() - want.detach()).abs().max().item()
        assert error <= allowed + 2e-7 * want.detach().abs().max().item(), (output, error)
        for x, y in zip(gradient(got, z), gradient(want, exact), strict=True):
            torch.testing.assert_close(
                x.cpu().double(), y, rtol=0.502 * torch.finfo(dtype).eps + allowed, atol=1e-7
            )


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(dtype, t) for dtype in (torch.float32, torch.bfloat16) for t in (1.0, 0.7, -1.3)],
    ids=str,
)
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_logits_at_minus_1e30(
    backend: str, smoothing: float, dtype: torch.dtype, temperature: float
) -> None:
    """As masks make them: equal, so that their exponents are 0 and no difference of two roundings."""
    need(backend)
    z = torch.full((3, 33), -1e30, device=DEVICE, dtype=dtype, requires_grad=True)
    target = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    loss = fastloss.cross_entropy(
        z, target, reduction="none", label_smoothing=smoothing, logit_scale=1 / temperature, backend=backend
    )
    (grad,) = torch.autograd.grad(loss.sum(), z)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(loss.float().cpu(), torch.full((3,), 33.0).log(), rtol=rtol, atol=0)
    expected = torch.full((3, 33), (1 - smoothing) / 33)
    expected[:, 0] -= 1 - smoothing
    torch.testing.assert_close(grad.float().cpu(), expected / temperature, rtol=max(rtol, 1e-4), atol=1e-7)
