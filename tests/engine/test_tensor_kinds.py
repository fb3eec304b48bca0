"""Every kind of tensor that PyTorch can hand over: what the definition gives, or an error that says what to do (bug 41)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss


class Wrapped(torch.Tensor):
    """A subclass of the kind that trainers have."""


def _negative(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag  # a negative view that holds x


def _async(x: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor(x)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _dual_free(x: Tensor) -> Tensor:
    return x.unsqueeze(0).expand(2, *x.shape)[0]


# kind -> the same numbers as another tensor
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "negative view": _negative,
    "subclass": lambda x: x.as_subclass(Wrapped),
    "asynchronous collective": _async,
    "strided": _strided,
    "expanded": _dual_free,
    "parameter": lambda x: torch.nn.Parameter(x),
    "transposed": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}

TARGET = torch.tensor([0, 2, 5, -100, 1])
PAIRS = torch.tensor([[0, 2, 5], [1, 1, -100], [3, 4, 0], [5, -100, 2]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
GOOD = torch.tensor([True, False, True, True])


def _stats(stats: Any) -> Tensor:
    return stats.logprobs


# name -> (function of float tensors, their shapes)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "cross_entropy": (lambda x: fastloss.cross_entropy(x, TARGET), ((5, 6),)),
    "cross_entropy, options": (
        lambda x: fastloss.cross_entropy(x, TARGET, label_smoothing=0.1, z_loss=0.1), ((5, 6),)
    ),
    "cross_entropy, none": (lambda x: fastloss.cross_entropy(x, TARGET, reduction="none").sum(), ((5, 6),)),
    "token_stats": (lambda x: _stats(fastloss.token_stats(x, TARGET)).sum(), ((5, 6),)),
    "entropy_from_logits": (lambda x: fastloss.entropy_from_logits(x).sum(), ((5, 6),)),
    "selective_log_softmax": (
        lambda x: fastloss.selective_log_softmax(x, TARGET.clamp(min=0)).sum(), ((5, 6),)
    ),
    "linear_cross_entropy": (lambda h, w: fastloss.linear_cross_entropy(h, w, TARGET), ((5, 4), (6, 4))),
    "linear_token_stats": (
        lambda h, w: _stats(fastloss.linear_token_stats(h, w, TARGET)).sum(), ((5, 4), (6, 4))
    ),
    "linear_preference_loss": (
        lambda h, w: fastloss.linear_preference_loss(h, w, PAIRS, reference_free=True).loss,
        ((4, 3, 4), (6, 4)),
    ),
    "linear_kto_loss": (
        lambda h, w: fastloss.linear_kto_loss(h, w, PAIRS, GOOD, kl=0.0).loss, ((4, 3, 4), (6, 4))
    ),
    "linear_policy_loss": (
        lambda h, w, a: fastloss.linear_policy_loss(h, w, PAIRS[::2].clamp(min=0), None, a, MASK).loss,
        ((2, 3, 4), (6, 4), (2,)),
    ),
    "dpo_loss": (lambda c, r, rc, rr: fastloss.dpo_loss(c, r, rc, rr).loss, ((4,), (4,), (4,), (4,))),
    "preference_loss, tokens": (
        lambda c, r: fastloss.preference_loss(
            c, r, reference_free=True, chosen_mask=MASK, rejected_mask=MASK
        ).loss,
        ((2, 3), (2, 3)),
    ),
    "kto_loss": (lambda c: fastloss.kto_loss(c, None, GOOD, kl=0.0).loss, ((4,),)),
    "bco_loss": (lambda c: fastloss.bco_loss(c, None, GOOD).loss, ((4,),)),
    "reward_model_loss": (lambda c, r: fastloss.reward_model_loss(c, r).loss, ((4,), (4,))),
    "policy_loss": (
        lambda lp, old, a: fastloss.policy_loss(lp, old, a, MASK).loss, ((2, 3), (2, 3), (2,))
    ),
    "value_loss": (lambda v, r: fastloss.value_loss(v, None, r, MASK).loss, ((2, 3), (2, 3))),
    "kl_estimate": (lambda a, b: fastloss.kl_estimate(a, b).sum(), ((2, 3), (2, 3))),
    "gae": (lambda r, v: fastloss.gae(r, v, MASK)[0].sum(), ((2, 3), (2, 3))),
    "discounted_returns": (lambda r: fastloss.discounted_returns(r, MASK, gamma=0.9).sum(), ((2, 3),)),
    "group_advantages": (lambda r: fastloss.group_advantages(r, 2).square().sum(), ((4,),)),
    "whiten": (lambda x: fastloss.whiten(x, MASK).square().sum(), ((2, 3),)),
}  # fmt: skip
WITHOUT_GRADIENT = ("gae", "discounted_returns", "group_advantages", "whiten")


def _numbers(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def _run(name: str, kind: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Value and gradients with respect to the plain tensors."""
    function, shapes = FUNCTIONS[name]
    leaves = [x.requires_grad_() for x in _numbers(shapes)]
    value = function(*map(kind, leaves))
    if name in WITHOUT_GRADIENT:
        return [value.detach()]
    if kind is SAME["parameter"]:  # a leaf of its own
        return [value.detach()]
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", SAME)
def test_the_same_numbers_in_another_tensor(name: str, kind: str) -> None:
    with fastloss.use_backend("reference"):
        want = _run(name, lambda x: x)
    got = _run(name, SAME[kind])
    for a, b in zip(got, want, strict=False):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_freed_storage_is_an_error(name: str) -> None:
    """FSDP1 after a forward: the shape is there, the memory is not."""
    function, shapes = FUNCTIONS[name]
    for freed in range(len(shapes)):
        arguments = [x * 1 for x in _numbers(shapes)]
        arguments[freed].untyped_storage().resize_(0)
        with pytest.raises((ValueError, RuntimeError), match=r"storage|freed"):
            function(*arguments)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_and_fake_tensors(name: str) -> None:
    """Shapes come back without numbers, as from PyTorch's own functions; never an address of what is not there."""
    function, shapes = FUNCTIONS[name]
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        arguments = [torch.empty(shape) for shape in shapes]
        assert function(*arguments).shape == ()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_make_fx_records_numbers(name: str) -> None:
    """A trace, run on other numbers, gives theirs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    function, shapes = FUNCTIONS[name]
    first = _numbers(shapes)
    other = [x * 0.5 + 0.1 for x in first]
    recorded = make_fx(function)(*first)
    torch.testing.assert_close(recorded(*other), function(*other), rtol=1e-5, atol=1e-6)


def test_meta_tensors() -> None:
    """Of the losses that torch.nn.functional has: a shape, a dtype and no number."""
    target = torch.zeros(5, dtype=torch.int64, device="meta")
    x, hidden, weight = (
        torch.empty(*shape, device="meta", requires_grad=True) for shape in ((5, 6), (5, 4), (6, 4))
    )
    for loss in (fastloss.cross_entropy(x, target), fastloss.linear_cross_entropy(hidden, weight, target)):
        assert loss.shape == () and loss.is_meta and loss.dtype == torch.float32
        loss.backward()
    assert x.grad.is_meta and weight.grad.shape == (6, 4)
