"""kto_loss and bco_loss: on every backend against the definition in float64, edges, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, KERNELS, need
from preference_inputs import assert_close, double, numbers
from torch import Tensor

import fastloss

TWO = torch.tensor([-1.0, -2.0])
UNPAIRED: list[tuple[str, dict[str, Any]]] = [
    ("kto_loss", {"kl": 0.4}),
    (
        "kto_loss",
        {"kl": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.7, "reduction": "none"},
    ),
    ("kto_loss", {"kl_pair": True, "weights": "weights"}),
    ("kto_loss", {"loss_type": "apo_zero_unpaired", "reduction": "sum"}),
    ("bco_loss", {}),
    ("bco_loss", {"delta": 0.2, "weights": "weights", "beta": 0.5, "reduction": "none"}),
    ("bco_loss", {"no_ref": True}),
]


def unpaired(name: str, options: dict[str, Any], x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    options = {k: x[v] if isinstance(v, str) and v in x else v for k, v in options.items()}
    if options.pop("kl_pair", False):
        options |= {"kl_logps": x["rc"], "ref_kl_logps": x["rr"]}
    ref = None if options.pop("no_ref", False) else x["rc"]
    leaf = x["c"].clone().requires_grad_()
    good = torch.arange(leaf.shape[0], device=leaf.device) % 3 != 0
    out = getattr(fastloss, name)(leaf, ref, good, backend=backend, **options)
    (out.loss * (x["upstream"].to(out.loss.dtype) if out.loss.dim() else 1.5)).sum().backward()
    result = {"loss": out.loss, "rewards": out.rewards, "d logps": leaf.grad, **out.metrics}
    assert not any(v.requires_grad for k, v in result.items() if k != "loss")
    return {k: v.detach().double().cpu() for k, v in result.items()}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("name", "options"), UNPAIRED, ids=str)
def test_unpaired(backend: str, name: str, options: dict[str, Any]) -> None:
    need(backend)
    x = numbers(13, torch.float32)
    exact = unpaired(name, options, double(x), "reference")
    assert_close(
        unpaired(name, options, x, backend),
        exact,
        unpaired(name, options, x, "reference"),
        torch.finfo(torch.float32).eps,
    )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["kto_loss", "bco_loss"])
def test_unpaired_edges(backend: str, name: str) -> None:
    """Log-ratio ±1e4, one kind alone, one response, none: finite, and a mean over none is 0."""
    need(backend)
    options: dict[str, Any] = {"kl": 0.0} if name == "kto_loss" else {}
    for values, good in (
        ([-1e4, 0.0, -3.0], [True] * 3),
        ([-1e4, 0.0], [False] * 2),
        ([-2.0], [True]),
        ([], []),
    ):
        leaf = torch.tensor(values, device=DEVICE, requires_grad=True)
        labels = torch.tensor(good, dtype=torch.bool, device=DEVICE)
        out = getattr(fastloss, name)(leaf, torch.zeros_like(leaf), labels, backend=backend, **options)
        out.loss.backward()
        assert all(v.isfinite().all() for v in (out.loss, leaf.grad, *out.metrics.values()))
        assert out.metrics["rewards/margins"].item() == 0.0
    assert out.loss.item() == 0.0


def test_unpaired_tokens_kl_and_errors() -> None:
    tokens = -torch.rand(3, 4, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    ref, good = tokens + 0.1, torch.tensor([True, False, True])
    sums, ref_sums = (tokens * mask).sum(1), (ref * mask).sum(1)
    whole = fastloss.kto_loss(sums, ref_sums, good, kl_logps=TWO.double(), ref_kl_logps=TWO.double() + 1)
    assert whole.metrics["kl"].item() == 0.0  # a negative estimate counts as none
    split = fastloss.kto_loss(tokens, ref, good, mask=mask, kl=0.0)
    torch.testing.assert_close(split.loss, whole.loss)
    flat = fastloss.kto_loss(
        tokens.reshape(-1),
        ref.reshape(-1),
        good,
        mask=mask.reshape(-1),
        cu_seqlens=torch.tensor([0, 4, 8, 12]),
        kl=0.0,
    )
    torch.testing.assert_close(flat.loss, whole.loss)
    shift = fastloss.bco_loss(sums, ref_sums, good).metrics["delta"]
    torch.testing.assert_close(shift, 0.1 * (sums - ref_sums).mean())
    for message, options in (
        ("kl: expected either", {}),
        ("kl: expected either", {"kl": 0.1, "kl_logps": TWO, "ref_kl_logps": TWO}),
        ("kl: expected None", {"kl": 0.1, "loss_type": "apo_zero_unpaired"}),
        ("loss_type: expected one of", {"kl": 0.1, "loss_type": "bco"}),
        ("desirable_weight: expected", {"kl": 0.1, "desirable_weight": -1.0}),
        ("mask: expected token", {"kl": 0.1, "mask": mask}),
    ):
        with pytest.raises(ValueError, match=message):
            fastloss.kto_loss(sums, ref_sums, good, **options)
    with pytest.raises(ValueError, match="desirable: expected bool"):
        fastloss.kto_loss(sums, ref_sums, torch.ones(3), kl=0.0)
