"""preference_loss and reward_model_loss on the CPU in one native call are what the long way gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import need
from torch import Tensor

import fastloss
from fastloss.engine.direct import DirectPairs
from fastloss.tables import PAIR_TERMS

B = 7
LONG = ("ipo", "sft", "sigmoid_norm", "simpo", "orpo", "center", "simper")
OPTIONS: list[dict[str, Any]] = [
    *({"loss_type": name, "label_smoothing": 0.1} for name in PAIR_TERMS if name not in LONG),
    {"loss_type": ["sigmoid", "hinge", "apo_zero"], "loss_weights": [0.8, 0.2, 1], "beta": 1},
    {"loss_type": "sigmoid", "margin": 0.4, "f_divergence_type": "js_divergence"},
    {"loss_type": "hinge", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    {"loss_type": "bco_pair", "bco_delta": 0.3},
    {"loss_type": "sigmoid", "reference_free": True},
]
NAMES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    values = -20 + 3 * torch.randn(4, B, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {name: x.clone() for name, x in zip(NAMES, values.to(dtype))}


def preference(data: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    leaves = {k: data[k].clone().requires_grad_() for k in NAMES[:2]}
    out = fastloss.preference_loss(**{**data, **leaves}, **options)
    upstream = torch.linspace(-1, 2, B).to(out.loss.dtype) if out.loss.dim() else torch.tensor(-1.7)
    (out.loss * upstream).sum().backward()
    fields = out._asdict()
    return {**fields.pop("metrics"), **fields, **{f"d_{k}": x.grad for k, x in leaves.items()}}


def reward(chosen: Tensor, rejected: Tensor, **options: Any) -> dict[str, Tensor]:
    c, r = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    out = fastloss.reward_model_loss(c, r, **options)
    out.loss.sum().backward()
    return {**out.metrics, "loss": out.loss, "d_c": c.grad, "d_r": r.grad}


def assert_equal(got: dict[str, Tensor], long: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert list(got) == list(long) == list(exact)
    for name, value in got.items():
        eps = 1e-6 if value.dtype == torch.float32 else 1e-13
        assert value.dtype == long[name].dtype and value.shape == long[name].shape, name
        assert value.requires_grad == long[name].requires_grad, name
        size = max(1e-3, float(exact[name].detach().abs().max()))
        assert (value - long[name]).abs().max() <= eps * size, name
        assert (value - exact[name]).abs().max() <= 4 * eps * size, name


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with each native call of the short way."""
    need("cpu")
    calls: list[None] = []
    run = DirectPairs.run

    def counted(self: DirectPairs, *arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return run(self, *arguments, **options)

    monkeypatch.setattr(DirectPairs, "run", counted)
    return calls


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_preference(options: dict[str, Any], dtype: torch.dtype, reduction: str, taken: list[None]) -> None:
    data, options = batch(dtype), {**options, "reduction": reduction}
    got = preference(data, **options)
    assert len(taken) == 1
    long = preference(data, weights=torch.ones(B, dtype=dtype), **options)
    exact = preference({k: v.double() for k, v in data.items()}, backend="reference", **options)
    assert len(taken) == 1
    assert_equal(got, long, exact)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"margin": 0.3, "center_coefficient": 0.1, "label_smoothing": 0.2}], ids=str
)
def test_reward_model(options: dict[str, Any], dtype: torch.dtype, reduction: str, taken: list[None]) -> None:
    options = {**options, "reduction": reduction}
    c, r = (x.to(dtype) for x in torch.randn(2, B, generator=torch.Generator().manual_seed(1)))
    got = reward(c, r, **options)
    assert len(taken) == 1
    long = reward(c, r, weights=torch.ones(B, dtype=dtype), **options)
    exact = reward(c.double(), r.double(), backend="reference", **options)
    assert len(taken) == 1
    assert_equal(got, long, exact)
    broken = fastloss.reward_model_loss(torch.where(torch.arange(B) == 3, float("nan"), c), r).metrics
    assert broken["min_reward"].isnan() and broken["max_reward"].isnan()


def test_backward_twice(taken: list[None]) -> None:
    """Bugs 1 and 2: the first backward gives its buffers away and may have scaled them."""
    data = batch()
    leaves = [data[name].requires_grad_() for name in NAMES[:2]]
    loss = fastloss.preference_loss(**data).loss
    first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    for x, y in zip(torch.autograd.grad(loss, leaves, retain_graph=True), kept):
        assert torch.allclose(3 * x, y, rtol=1e-6)
    with torch.no_grad():
        leaves[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    each = fastloss.preference_loss(**data, reduction="none").loss
    assert torch.autograd.grad(each.sum(), leaves)[0].shape == (B,)  # an expanded upstream
    assert len(taken) == 3  # a backward after the first runs the call again


def test_one_leaf_or_none(taken: list[None]) -> None:
    data = batch()
    with torch.no_grad():
        assert not fastloss.preference_loss(**data).loss.requires_grad
    assert not fastloss.preference_loss(**data).loss.requires_grad
    data["rejected_logps"].requires_grad_()
    fastloss.preference_loss(**data).loss.backward()
    assert data["rejected_logps"].grad is not None and data["chosen_logps"].grad is None
    same = data["rejected_logps"].detach().requires_grad_()
    fastloss.preference_loss(same, same, reference_free=True).loss.backward()
    assert not same.grad.any()
    assert len(taken) == 4


@pytest.mark.parametrize(
    "change",
    [
        *({"loss_type": name} for name in ("sft", "simpo", "orpo", "simper", "ipo", "aot")),
        {"loss_type": "sigmoid", "length_normalized": True},
        {"beta": torch.tensor(0.1)},
        {"margin": torch.zeros(B)},
        {"weights": torch.ones(B)},
        {"backend": "reference"},
        {"ref_chosen_logps": torch.zeros(B, dtype=torch.float64)},
        {"chosen_logps": torch.zeros(2 * B)[::2]},
        {name: torch.zeros(B, dtype=torch.bfloat16) for name in NAMES},
        {name: torch.zeros(0) for name in NAMES},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_takes_the_long_way(change: dict[str, Any], taken: list[None]) -> None:
    data = {**batch(), **change}
    if "loss_type" in change:
        data |= {"chosen_lengths": torch.ones(B), "rejected_lengths": torch.ones(B)}
    assert fastloss.preference_loss(**data).loss.isfinite()
    assert not taken


def test_errors_are_the_long_ways(taken: list[None]) -> None:
    """Remembered options: 1 and True are the same key to a cache, but not to us."""
    data = batch()
    fastloss.preference_loss(**data, beta=1, label_smoothing=0)
    for options, message in (
        ({"beta": True}, "beta: expected a number"),
        ({"label_smoothing": False}, "label_smoothing: expected a number"),
        ({"beta": 0.0}, "beta: expected a finite number"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a finite number"),
        ({"loss_type": "ipo"}, "chosen_lengths: expected"),
        ({"loss_type": "exo_pair"}, "label_smoothing: expected"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing: expected"),
        ({"loss_type": "dpo"}, "loss_type: expected"),
        ({"loss_type": ["hinge"], "loss_weights": [1.0, 2.0]}, "loss_weights: expected"),
        ({"ref_rejected_logps": None}, "ref_rejected_logps: expected"),
        ({"ref_chosen_logps": None, "ref_rejected_logps": None}, "ref_chosen_logps: expected"),
        ({"reduction": "avg"}, "reduction: expected"),
        ({"backend": "gpu"}, "backend: expected"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fastloss.preference_loss(**{**data, **options})
    assert len(taken) == 1
    for options, message in (
        ({"margin": float("nan")}, "margin: expected"),
        ({"label_smoothing": 2.0}, "label_smoothing: expected"),
        ({"center_coefficient": -1.0}, "center_coefficient: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            fastloss.reward_model_loss(data["chosen_logps"], data["rejected_logps"], **options)
    assert len(taken) == 1
