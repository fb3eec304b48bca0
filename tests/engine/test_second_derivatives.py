"""A gradient can be differentiated again, vectorised and taken forward: the kernels hand these to the definition (bugs 3 and 45)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, need
from torch import Tensor
from torch.autograd.functional import jacobian

import fastloss

ROWS, VOCAB, DIM = 4, 6, 3
TARGET = torch.tensor([0, 2, -100, 5])
PAIRS = torch.tensor([[0, 2, 5], [1, 1, -100], [3, 4, 0], [5, -100, 2]])
KEPT = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


TEACHER, TEACHER_WEIGHT = _numbers(ROWS, VOCAB).flip(-1), _numbers(VOCAB, 2)


def _policy(logprobs: Tensor, entropy: Tensor, backend: str) -> Tensor:
    old = -torch.ones(2, 3, dtype=logprobs.dtype, device=logprobs.device)
    advantages = torch.tensor([1.0, -0.5], dtype=logprobs.dtype, device=logprobs.device)
    return fastloss.policy_loss(
        logprobs, old, advantages, KEPT.to(logprobs.device), loss_type="sapo", ref_logprobs=old - 0.1, beta=0.1,
        entropy=entropy, entropy_coef=0.1, backend=backend,
    ).loss  # fmt: skip


def _linear_policy(hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
    target = PAIRS[::2].clamp(min=0).to(hidden.device)
    old = -1.5 * torch.ones(2, 3, dtype=hidden.dtype, device=hidden.device)
    advantages = torch.tensor([1.0, -0.5], dtype=hidden.dtype, device=hidden.device)
    return fastloss.linear_policy_loss(
        hidden, weight, target, old, advantages, KEPT.to(hidden.device), entropy_coef=0.1, backend=backend
    ).loss


# name -> (function of float tensors and a backend, shapes of its arguments)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "cross_entropy": (lambda x, backend: fastloss.cross_entropy(x, TARGET.to(x.device), backend=backend), ((ROWS, VOCAB),)),
    "cross_entropy, options": (
        lambda x, backend: fastloss.cross_entropy(
            x, TARGET.to(x.device), label_smoothing=0.1, z_loss=0.1, softcap=3.0, reduction="none", backend=backend
        ).square().sum(),
        ((ROWS, VOCAB),),
    ),
    "token_stats": (
        lambda x, backend: sum(
            s.square().sum() for s in fastloss.token_stats(
                x, TARGET.to(x.device), outputs=("logprobs", "entropy", "logsumexp"), backend=backend
            )[:3]
        ),
        ((ROWS, VOCAB),),
    ),
    "linear_cross_entropy": (
        lambda h, w, backend: fastloss.linear_cross_entropy(h, w, TARGET.to(h.device), backend=backend),
        ((ROWS, DIM), (VOCAB, DIM)),
    ),
    "linear_token_stats": (
        lambda h, w, backend: fastloss.linear_token_stats(
            h, w, TARGET.to(h.device), outputs=("entropy",), backend=backend
        ).entropy.square().sum(),
        ((ROWS, DIM), (VOCAB, DIM)),
    ),
    "dpo_loss": (lambda c, r, backend: fastloss.dpo_loss(c, r, c.detach() * 0, r.detach() * 0, backend=backend).loss, ((5,), (5,))),
    "dpo_loss, tokens": (
        lambda c, r, backend: fastloss.preference_loss(
            c, r, reference_free=True, chosen_mask=KEPT.to(c.device), rejected_mask=KEPT.to(c.device), backend=backend
        ).loss,
        ((2, 3), (2, 3)),
    ),
    "kto_loss": (
        lambda c, backend: fastloss.kto_loss(c, None, torch.tensor([True, False, True], device=c.device), kl=0.1, backend=backend).loss,
        ((3,),),
    ),
    "policy_loss": (_policy, ((2, 3), (2, 3))),
    "distillation_loss": (
        lambda x, backend: fastloss.distillation_loss(
            x, TEACHER.to(x), TARGET.to(x.device), divergence="jsd", hard_loss_coef=0.1, temperature=1.5, backend=backend
        ).loss,
        ((ROWS, VOCAB),),
    ),
    "linear_distillation_loss": (
        lambda h, w, backend: fastloss.linear_distillation_loss(
            h, w, TEACHER[:, :2].to(h), TEACHER_WEIGHT.to(h), TARGET.to(h.device), divergence="reverse_kl", backend=backend
        ).loss,
        ((ROWS, DIM), (VOCAB, DIM)),
    ),
    "supervised_loss": (
        lambda x, backend: fastloss.supervised_loss(
            x, TARGET.to(x.device), loss_type="focal", token_weight=torch.ones(ROWS).to(x), backend=backend
        ).loss,
        ((ROWS, VOCAB),),
    ),
    "linear_supervised_loss": (
        lambda h, w, backend: fastloss.linear_supervised_loss(
            h, w, TARGET.to(h.device), loss_type="power", backend=backend
        ).loss,
        ((ROWS, DIM), (VOCAB, DIM)),
    ),
    "linear_preference_loss": (
        lambda h, w, backend: fastloss.linear_preference_loss(
            h, w, PAIRS.to(h.device), reference_free=True, backend=backend
        ).loss,
        ((4, 3, DIM), (VOCAB, DIM)),
    ),
    "linear_policy_loss": (_linear_policy, ((2, 3, DIM), (VOCAB, DIM))),
}  # fmt: skip


def _second(function: Callable[..., Tensor], arguments: list[Tensor], backend: str) -> list[Tensor | None]:
    leaves = [x.clone().requires_grad_() for x in arguments]
    first = torch.autograd.grad(function(*leaves, backend), leaves, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return list(torch.autograd.grad(penalty, leaves, allow_unused=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_penalty(name: str, backend: str) -> None:
    need(backend)
    function, shapes = FUNCTIONS[name]
    dtype = torch.float64 if backend == "cpu" else torch.float32
    arguments = [_numbers(*shape).to(DEVICE, dtype) for shape in shapes]
    want = _second(function, [x.double() for x in arguments], "reference")
    for got, right in zip(_second(function, arguments, backend), want, strict=True):
        assert (got is None) == (right is None)  # an entropy bonus is linear
        if got is not None:
            torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradgradcheck(name: str) -> None:
    if DEVICE != "cpu":
        pytest.skip("float64 has kernels on the CPU alone")
    function, shapes = FUNCTIONS[name]
    if name == "dpo_loss":  # its constants are made of the leaves, which numerical differences would move
        pytest.skip("test_gradient_penalty has it")
    leaves = [_numbers(*shape).requires_grad_() for shape in shapes]
    assert torch.autograd.gradgradcheck(lambda *x: function(*x, "auto"), leaves)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobian(name: str, strategy: str) -> None:
    """Batched upstream gradients, and forward-mode derivatives under vmap."""
    function, shapes = FUNCTIONS[name]
    arguments = tuple(_numbers(*shape).to(DEVICE).float() for shape in shapes)
    got = jacobian(lambda *x: function(*x, "auto"), arguments, vectorize=True, strategy=strategy)
    want = jacobian(lambda *x: function(*x, "reference"), tuple(x.double() for x in arguments))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dual_input_without_requires_grad(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    arguments = [_numbers(*shape).to(DEVICE).float() for shape in shapes]
    tangents = [torch.ones_like(x) for x in arguments]
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(arguments, tangents, strict=True)]
        out = torch.autograd.forward_ad.unpack_dual(function(*duals, "auto")).tangent
    leaves = [x.double().requires_grad_() for x in arguments]
    grads = torch.autograd.grad(function(*leaves, "reference"), leaves)
    assert out is not None
    torch.testing.assert_close(out.double(), sum(g.sum() for g in grads), rtol=1e-4, atol=1e-5)


def test_in_place_says_that_it_cannot() -> None:
    x = _numbers(ROWS, VOCAB).to(DEVICE).float().requires_grad_()
    loss = fastloss.cross_entropy(x * 1, TARGET.to(DEVICE), inplace=True)
    with pytest.raises(RuntimeError, match="inplace: expected False"):
        torch.autograd.grad(loss, x, create_graph=True)
