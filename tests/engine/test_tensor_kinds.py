"""Every kind of tensor that PyTorch can hand over: what the definition gives, or an error that says what to do (bug 41)."""

from __future__ import annotations

import math
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
    """Between its numbers lie others: who reads them as if they were dense has another result."""
    return torch.stack([x, torch.full_like(x, 5)], -1)[..., 0]


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
    "copy-on-write": torch._lazy_clone,
    "transposed": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}

TARGET = torch.tensor([0, 2, 5, -100, 1])
PAIRS = torch.tensor([[0, 2, 5], [1, 1, -100], [3, 4, 0], [5, -100, 2]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
GOOD = torch.tensor([True, False, True, True])


def _own_loss(part: fastloss.SequencePart) -> Tensor:
    return -(part.logps / part.lengths.clamp(min=1)).sum()


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
    "linear_cross_entropy, lora": (
        lambda h, w, a, b: fastloss.linear_cross_entropy(h, w, TARGET, lora=(a, b, 0.5)), ((5, 4), (6, 4), (2, 4), (6, 2)),
    ),
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
    "linear_sequence_loss": (
        lambda h, w: fastloss.linear_sequence_loss(h, w, PAIRS, _own_loss), ((4, 3, 4), (6, 4))
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


# --- constants: masks, targets, references, weights, borders. No gradient flows to them, and kernels read them too -------------

_LABELS = torch.tensor([[0, 2, 5], [1, 1, -100], [3, 4, 0], [5, -100, 2]])


def _seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights(*shape: int) -> Tensor:
    """No two the same: of equal ones it does not matter in which order they are read."""
    return torch.linspace(0.5, 1.5, math.prod(shape)).reshape(shape)


# name -> (the call's constants, everything else, what is read of the result)
CONSTANTS: dict[str, tuple[str, dict[str, Tensor], dict[str, Any]]] = {
    "cross_entropy": ("cross_entropy", {"target": TARGET, "weight": _weights(6)}, {"input": _seeded(5, 6)}),
    "token_stats": ("token_stats", {"target": TARGET}, {"logits": _seeded(5, 6)}),
    "linear_cross_entropy": (
        "linear_cross_entropy",
        {"target": TARGET, "weight": _weights(6), "token_weight": _weights(5)},
        {"input": _seeded(5, 4), "linear_weight": _seeded(6, 4)},
    ),
    "linear_token_stats": (
        "linear_token_stats", {"target": TARGET}, {"input": _seeded(5, 4), "linear_weight": _seeded(6, 4)}
    ),
    "policy_loss": (
        "policy_loss",
        {"old_logprobs": _seeded(2, 3, seed=1), "advantages": _seeded(2), "mask": MASK, "ref_logprobs": _seeded(2, 3, seed=2),
         "sampler_logprobs": _seeded(2, 3, seed=3), "weights": _weights(2, 3), "normalizer": torch.tensor(4.0)},
        {"logprobs": _seeded(2, 3), "beta": 0.1},
    ),
    "policy_loss, packed": (
        "policy_loss",
        {"old_logprobs": _seeded(6, seed=1), "advantages": _seeded(2), "mask": MASK.reshape(-1),
         "cu_seqlens": torch.tensor([0, 3, 6])},
        {"logprobs": _seeded(6), "loss_type": "grpo"},
    ),
    "linear_policy_loss": (
        "linear_policy_loss",
        {"target": _LABELS[:2].clamp(min=0), "old_logprobs": _seeded(2, 3, seed=1) - 2, "advantages": _seeded(2), "mask": MASK,
         "ref_logprobs": _seeded(2, 3, seed=2) - 2, "weights": _weights(2, 3)},
        {"input": _seeded(2, 3, 4), "linear_weight": _seeded(6, 4), "beta": 0.1},
    ),
    "linear_policy_loss, sequences": (
        "linear_policy_loss",
        {"target": _LABELS[:2].clamp(min=0), "old_logprobs": _seeded(2, 3, seed=1) - 2, "advantages": _seeded(2), "mask": MASK},
        {"input": _seeded(2, 3, 4), "linear_weight": _seeded(6, 4), "loss_type": "vespo"},
    ),
    "preference_loss": (
        "preference_loss",
        {"ref_chosen_logps": _seeded(4, seed=2), "ref_rejected_logps": _seeded(4, seed=3), "weights": _weights(4),
         "beta": torch.full((4,), 0.1), "label_smoothing": torch.full((4,), 0.1), "chosen_lengths": torch.tensor([1, 2, 3, 4]),
         "rejected_lengths": torch.tensor([1, 2, 3, 4])},
        {"chosen_logps": _seeded(4), "rejected_logps": _seeded(4, seed=1), "loss_type": ["sigmoid", "sft"]},
    ),
    "preference_loss, packed": (
        "preference_loss",
        {"chosen_cu_seqlens": torch.tensor([0, 3, 6]), "rejected_cu_seqlens": torch.tensor([0, 1, 6]),
         "chosen_mask": MASK.reshape(-1), "rejected_mask": MASK.reshape(-1), "ref_chosen_logps": _seeded(6, seed=2),
         "ref_rejected_logps": _seeded(6, seed=3), "chosen_token_weight": _weights(6), "rejected_token_weight": _weights(6)},
        {"chosen_logps": _seeded(6), "rejected_logps": _seeded(6, seed=1)},
    ),
    "linear_preference_loss": (
        "linear_preference_loss",
        {"target": _LABELS, "ref_input": _seeded(4, 3, 4, seed=2), "ref_weight": _seeded(6, 4, seed=3), "weights": _weights(2),
         "token_weight": _weights(4, 3)},
        {"input": _seeded(4, 3, 4), "linear_weight": _seeded(6, 4)},
    ),
    "linear_preference_loss, log-probs": (
        "linear_preference_loss",
        {"ref_chosen_logps": _seeded(2, seed=2), "ref_rejected_logps": _seeded(2, seed=3), "beta": torch.full((2,), 0.1)},
        {"input": _seeded(4, 3, 4), "linear_weight": _seeded(6, 4), "target": _LABELS},
    ),
    "linear_kto_loss": (
        "linear_kto_loss",
        {"target": _LABELS, "desirable": GOOD, "ref_logps": _seeded(4, seed=2), "weights": _weights(4),
         "kl_logps": _seeded(3, seed=3), "ref_kl_logps": _seeded(3, seed=4), "token_weight": _weights(4, 3)},
        {"input": _seeded(4, 3, 4), "linear_weight": _seeded(6, 4)},
    ),
    "linear_sequence_loss": (
        "linear_sequence_loss",
        {"target": _LABELS},
        {"input": _seeded(4, 3, 4), "linear_weight": _seeded(6, 4), "loss_fn": _own_loss},
    ),
    "kto_loss": (
        "kto_loss",
        {"mask": MASK.repeat(2, 1).float(), "desirable": GOOD, "ref_logps": _seeded(4, 3, seed=2), "weights": _weights(4),
         "kl": torch.tensor(0.1), "token_weight": _weights(4, 3)},
        {"logps": _seeded(4, 3)},
    ),
    "kto_loss, packed": (
        "kto_loss",
        {"cu_seqlens": torch.tensor([0, 1, 2, 4, 6]), "desirable": GOOD, "ref_logps": _seeded(6, seed=2), "weights": _weights(4),
         "token_weight": _weights(6)},
        {"logps": _seeded(6), "kl": 0.1},
    ),
    "bco_loss, packed": (
        "bco_loss",
        {"cu_seqlens": torch.tensor([0, 1, 2, 4, 6]), "desirable": GOOD, "ref_logps": _seeded(4, seed=2),
         "delta": torch.tensor(0.1), "token_weight": _weights(6)},
        {"logps": _seeded(6)},
    ),
    "reward_model_loss": (
        "reward_model_loss", {"margin": _weights(4), "weights": _weights(4)},
        {"chosen_rewards": _seeded(4), "rejected_rewards": _seeded(4, seed=1)},
    ),
    "gae": ("gae", {"values": _seeded(2, 3, seed=1), "mask": MASK}, {"rewards": _seeded(2, 3)}),
    "gae, packed": (
        "gae", {"values": _seeded(6, seed=1), "mask": None, "cu_seqlens": torch.tensor([0, 3, 6])}, {"rewards": _seeded(6)}
    ),
    "discounted_returns": ("discounted_returns", {"mask": MASK}, {"rewards": _seeded(2, 3)}),
    "value_loss": (
        "value_loss", {"old_values": _seeded(2, 3, seed=1), "returns": _seeded(2, 3, seed=2), "mask": MASK},
        {"values": _seeded(2, 3)},
    ),
    "supervised_loss": (
        "supervised_loss", {"target": TARGET, "token_weight": _weights(5), "unlikely": _weights(5)},
        {"logits": _seeded(5, 6), "loss_type": "dft"},
    ),
    "distillation_loss": (
        "distillation_loss", {"teacher_logits": _seeded(5, 6, seed=1), "target": TARGET, "token_weight": _weights(5)},
        {"logits": _seeded(5, 6), "hard_loss_coef": 0.3},
    ),
}  # fmt: skip


def _as(kind: str, x: Tensor) -> Tensor:
    if kind == "negative view":
        return torch._neg_view(-x) if x.is_floating_point() else x
    return x.clone().as_subclass(Wrapped) if kind == "subclass" else SAME[kind](x)


_READS_ALONE = pytest.mark.skipif(
    not hasattr(Tensor, "const_data_ptr"), reason="this torch has no address that is only read"
)


@_READS_ALONE
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_read_is_not_copied(name: str) -> None:
    """Copy-on-write inputs and upstream gradients stay so, forward and backward."""
    function, shapes = FUNCTIONS[name]
    leaves = [x.requires_grad_() for x in _numbers(shapes)]
    lazy = [torch._lazy_clone(x) for x in leaves]
    value = function(*lazy)
    assert all(map(torch._C._is_cow_tensor, lazy))
    if value.requires_grad:
        upstream = torch._lazy_clone(torch.full_like(value, 2.0))
        torch.autograd.grad(value, leaves, upstream, allow_unused=True)
        assert all(map(torch._C._is_cow_tensor, [*lazy, upstream]))


@_READS_ALONE
@pytest.mark.parametrize("name", CONSTANTS)
def test_no_constant_is_copied(name: str) -> None:
    function, constants, rest = CONSTANTS[name]
    given = {
        n: torch._lazy_clone(x) if isinstance(x, Tensor) else x for n, x in {**rest, **constants}.items()
    }
    getattr(fastloss, function)(**given)
    assert [n for n, x in given.items() if isinstance(x, Tensor) and not torch._C._is_cow_tensor(x)] == []


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_in_the_place_of_copy_on_write_logits(reduction: str) -> None:
    """The tensor that shares its memory keeps its numbers."""
    x = _seeded(5, 6)
    leaf, kept = x.clone().requires_grad_(), x.clone()
    whole = x.clone().requires_grad_()
    fastloss.cross_entropy(whole, TARGET, reduction=reduction).sum().backward()
    shared = leaf * 1
    other = torch._lazy_clone(shared.detach())
    fastloss.cross_entropy(shared, TARGET, reduction=reduction, inplace=True).sum().backward()
    assert torch.equal(other, kept)
    assert torch.equal(leaf.grad, whole.grad)


def _first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = out[0]
    return out.detach().as_subclass(Tensor)


@pytest.mark.parametrize(
    "kind", ["negative view", "subclass", "asynchronous collective", "strided", "transposed"]
)
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_in_another_tensor(name: str, kind: str) -> None:
    """Each constant alone: the kernels refused what resolve_call was not shown."""
    function, constants, rest = CONSTANTS[name]
    compute = getattr(fastloss, function)
    want = _first(compute(**rest, **constants, backend="reference"))
    for which, x in constants.items():
        if x is not None:
            got = _first(compute(**rest, **{**constants, which: _as(kind, x)}))
            torch.testing.assert_close(
                got, want, rtol=1e-5, atol=1e-6, msg=lambda text, w=which: f"{w}: {text}"
            )


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_negative_views_on_every_backend(name: str, backend: str) -> None:
    """One behaviour: the view's numbers, also where the call took no detour through a check."""
    function, constants, rest = CONSTANTS[name]
    compute = getattr(fastloss, function)
    want = _first(compute(**rest, **constants, backend=backend))
    viewed = {
        n: _as("negative view", x) if isinstance(x, Tensor) else x for n, x in {**rest, **constants}.items()
    }
    assert any(isinstance(x, Tensor) and x.is_neg() for x in viewed.values())
    torch.testing.assert_close(_first(compute(**viewed, backend=backend)), want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
def test_the_gradient_of_a_negative_view(backend: str) -> None:
    x = _seeded(5, 6)
    leaf, view = x.clone().requires_grad_(), torch._neg_view(-x).requires_grad_()
    assert view.is_neg()
    for z in (leaf, view):
        fastloss.cross_entropy(z, TARGET, backend=backend).backward()
    torch.testing.assert_close(view.grad, leaf.grad, rtol=0, atol=0)


def test_a_conjugate_is_of_no_dtype_that_a_loss_takes() -> None:
    x = torch.ones(5, 6, dtype=torch.complex64).conj()
    for backend in ("auto", "reference", "cpu"):
        with pytest.raises(TypeError, match="input: expected float32"):
            fastloss.cross_entropy(x, TARGET, backend=backend)


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_of_inference_mode_beside_a_gradient(name: str) -> None:
    """A reference model's numbers, targets or masks made under torch.inference_mode(), which autograd refuses to save."""
    function, constants, rest = CONSTANTS[name]
    compute = getattr(fastloss, function)

    def gradients(given: dict[str, Tensor], backend: str) -> list[Tensor]:
        leaves = {
            n: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for n, x in rest.items()
        }
        out = compute(**leaves, **given, backend=backend)
        while not isinstance(out, Tensor):
            out = out[0]
        if out.requires_grad:
            out.sum().backward()
        return [
            out.detach(),
            *(x.grad for x in leaves.values() if isinstance(x, Tensor) and x.grad is not None),
        ]

    for backend in ("auto", "reference"):
        want = gradients(constants, backend)
        with torch.inference_mode():
            made = {n: x if x is None else x.clone() for n, x in constants.items()}
        for which in constants:  # each alone, then all
            torch.testing.assert_close(gradients({**constants, which: made[which]}, backend), want)
        torch.testing.assert_close(gradients(made, backend), want)


@pytest.mark.parametrize("name", [name for name in CONSTANTS if "log-probs" not in name])
def test_a_call_on_the_meta_device(name: str) -> None:
    """Packed and padded: shapes without numbers, and gradients of the leaves' shapes."""
    function, constants, rest = CONSTANTS[name]
    leaves = {
        n: x.to("meta").requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in rest.items()
    }
    given = {n: x if x is None else x.to("meta") for n, x in constants.items()}
    out = getattr(fastloss, function)(**leaves, **given)
    want = getattr(fastloss, function)(**rest, **constants)
    while not isinstance(out, Tensor):
        out, want = out[0], want[0]
    assert out.is_meta and out.shape == want.shape and out.dtype == want.dtype
    if out.requires_grad:
        out.sum().backward()
        for x in leaves.values():
            assert not isinstance(x, Tensor) or (x.grad.is_meta and x.grad.shape == x.shape)
