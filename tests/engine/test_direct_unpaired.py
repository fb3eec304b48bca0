"""kto_loss and bco_loss on the CPU in one native call are what the long way gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import need
from torch import Tensor

import fastloss
from fastloss.engine.direct import DirectUnpaired

B = 7
GOOD = torch.tensor([True, False, True, True, False, False, True])


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (-20 + 3 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)


def calls(dtype: torch.dtype) -> dict[str, tuple[Any, dict[str, Any]]]:
    kl, ref_kl = drawn(2, 5, dtype=dtype, seed=3)
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    return {
        "kl": (fastloss.kto_loss, {"kl": 0.25, **weights}),
        "integers": (fastloss.kto_loss, {"kl": 1, "beta": 1}),
        "kl tensor": (fastloss.kto_loss, {"kl": torch.tensor(0.25, dtype=dtype)}),
        "mismatched": (fastloss.kto_loss, {"kl_logps": kl, "ref_kl_logps": ref_kl, **weights}),
        "mismatched, the other way": (fastloss.kto_loss, {"kl_logps": ref_kl, "ref_kl_logps": kl}),
        "no mismatched": (fastloss.kto_loss, {"kl_logps": kl[:0], "ref_kl_logps": kl[:0]}),
        "apo": (fastloss.kto_loss, {"loss_type": "apo_zero_unpaired", **weights}),
        "bco": (fastloss.bco_loss, weights),
        "bco delta": (fastloss.bco_loss, {"delta": -0.5, **weights}),
        "bco delta tensor": (fastloss.bco_loss, {"delta": torch.tensor([-0.5], dtype=dtype)}),
    }


def results(
    function: Any, logps: Tensor, ref: Tensor | None, good: Tensor, **options: Any
) -> dict[str, Tensor]:
    leaf = logps.clone().requires_grad_()
    out = function(leaf, ref, good, **options)
    upstream = torch.linspace(-1, 2, len(good)).to(out.loss.dtype) if out.loss.dim() else torch.tensor(-1.7)
    (out.loss * upstream).sum().backward()
    fields = out._asdict()
    return {**fields.pop("metrics"), **fields, "d_logps": leaf.grad}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with each native call of the short way."""
    need("cpu")
    made: list[None] = []
    run = DirectUnpaired.run

    def counted(self: DirectUnpaired, *arguments: Any) -> Any:
        made.append(None)
        return run(self, *arguments)

    monkeypatch.setattr(DirectUnpaired, "run", counted)
    return made


@pytest.mark.parametrize(
    "good", [GOOD, torch.ones_like(GOOD), torch.zeros_like(GOOD)], ids=["both", "good", "bad"]
)
@pytest.mark.parametrize("with_ref", [True, False], ids=["ref", "uniform"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_gives_what_the_long_way_gives(
    dtype: torch.dtype, reduction: str, with_ref: bool, good: Tensor, taken: list[None]
) -> None:
    logps, ref = drawn(2, B, dtype=dtype)
    for name, (function, options) in calls(dtype).items():
        options, reference = {**options, "reduction": reduction}, ref if with_ref else None
        before = len(taken)
        got = results(function, logps, reference, good, **options)
        assert len(taken) == before + 1, name
        long = results(function, logps, reference, good, **options, weights=torch.ones(B, dtype=dtype))
        exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        right = results(
            function, logps.double(), None if reference is None else reference.double(), good, **exact, backend="reference"
        )  # fmt: skip
        assert len(taken) == before + 1 and list(got) == list(long) == list(right), name
        eps = 1e-6 if dtype == torch.float32 else 1e-13
        for key, value in got.items():
            assert value.dtype == long[key].dtype and value.shape == long[key].shape, (name, key)
            assert value.requires_grad == long[key].requires_grad, (name, key)
            size = max(1e-3, float(right[key].detach().abs().max()))
            assert (value - long[key]).abs().max() <= eps * size, (name, key)
            assert (value - right[key]).abs().max() <= 4 * eps * size, (name, key)


def test_what_it_cannot_take_goes_the_long_way(taken: list[None]) -> None:
    logps, ref = drawn(2, B, dtype=torch.float32)
    ways: list[dict[str, Any]] = [
        {"logps": logps.bfloat16(), "ref": ref.bfloat16()},
        {"ref": ref.double()},
        {"ref": torch.stack([ref, ref], 1)[:, 0]},
        {"kl": torch.tensor(0.25, dtype=torch.float64)},
        {"backend": "reference"},
        {"weights": torch.ones(B)},
    ]
    for changed in ways:
        given = {"logps": logps, "ref": ref, "good": GOOD, "kl": 0.25, **changed}
        results(fastloss.kto_loss, given.pop("logps"), given.pop("ref"), given.pop("good"), **given)
    assert not taken


def test_wrong_options_are_named(taken: list[None]) -> None:
    logps, ref = drawn(2, B, dtype=torch.float32)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"beta": 0.0, "kl": 0.1}, "beta"),
        ({"beta": float("nan"), "kl": 0.1}, "beta"),
        ({"kl": float("nan")}, "kl"),
        ({"loss_type": "bco", "kl": 0.1}, "loss_type"),
        ({"loss_type": "sft", "kl": 0.1}, "loss_type"),
        ({"loss_type": "apo_zero_unpaired", "kl": 0.1}, "kl"),
        ({}, "kl"),
        ({"kl": 0.1, "kl_logps": logps, "ref_kl_logps": ref}, "kl"),
        ({"reduction": "average", "kl": 0.1}, "reduction"),
        ({"desirable_weight": -1.0, "kl": 0.1}, "desirable_weight"),
    ]
    for options, name in wrong:
        with pytest.raises(ValueError, match=name):
            fastloss.kto_loss(logps, ref, GOOD, **options)
    assert not taken


def test_it_can_be_differentiated_twice_and_backward_again(taken: list[None]) -> None:
    logps, ref = drawn(2, B, dtype=torch.float64)
    for name, (function, options) in calls(torch.float64).items():
        leaf = logps.clone().requires_grad_()
        loss = function(leaf, ref, GOOD, **options).loss
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (again,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert torch.equal(first, again), name
        (twice,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(twice.square().sum(), leaf)
        (right,) = torch.autograd.grad(
            torch.autograd.grad(
                function(leaf, ref, GOOD, **options, backend="reference").loss, leaf, create_graph=True
            )[0].square().sum(), leaf,
        )  # fmt: skip
        torch.testing.assert_close(second, right)
