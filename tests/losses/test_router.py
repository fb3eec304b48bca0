"""The routers' losses against transformers' own functions and formulas written out here, and their edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import DEVICE, KERNELS, need
from torch import Tensor

import fastloss

LAYERS, BATCH, LENGTH, EXPERTS, TOP = 3, 2, 7, 8, 2


def batch(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Each layer's router logits ``[B T, E]``, and a mask ``[B, T]``."""
    g = torch.Generator().manual_seed(0)
    shape = (BATCH * LENGTH, EXPERTS)
    layers = [torch.randn(shape, generator=g).to(DEVICE, dtype).requires_grad_() for _ in range(LAYERS)]
    return layers, (torch.rand(BATCH, LENGTH, generator=g) > 0.3).to(DEVICE)


def close(got: Tensor, right: Tensor, leaves: list[Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(got.double(), right.double(), **tolerance)
    grads = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(right, leaves), strict=True)
    for a, b in grads:
        torch.testing.assert_close(a.double(), b.double(), **tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_transformers(masked: bool) -> None:
    """Mixtral's function, which computes in float32."""
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers, mask = batch()
    given = mask if masked else None
    right = load_balancing_loss_func(tuple(layers), EXPERTS, TOP, given)
    out = fastloss.moe_load_balancing_loss(layers, TOP, mask=given)
    close(out.loss, right, layers, rtol=1e-5, atol=1e-7)
    stacked = torch.stack(layers)
    torch.testing.assert_close(fastloss.moe_load_balancing_loss(stacked, TOP, mask=given).loss, out.loss)


def test_switch() -> None:
    """Switch Transformer's, of which transformers has the code: a mean over sequences for one choice a token; and its z-loss."""
    pytest.importorskip("transformers")
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    layers, _ = batch()
    logits = [x.view(BATCH, LENGTH, EXPERTS) for x in layers]
    each = [switch.load_balancing_loss_func(x.softmax(-1), x.argmax(-1)) for x in logits]
    right = torch.stack(each).mean()
    out = fastloss.moe_load_balancing_loss(logits, 1, scope="sequence")
    close(out.loss, right, layers, rtol=1e-6, atol=1e-9)
    z_right = torch.stack([switch.router_z_loss_func(x) for x in logits]).mean()
    close(fastloss.router_z_loss(logits), z_right, layers)


def by_hand(x: list[Tensor], mask: Tensor, selected: list[Tensor], scope: str, scores: str) -> Tensor:
    """E / K Σ f P of every scope, token by token."""
    parts: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for layer, (logits, ids) in enumerate(zip(x, selected, strict=True)):
        s = logits.sigmoid() if scores == "sigmoid" else logits.exp()
        p = s / s.sum(-1, keepdim=True)
        for n, kept in enumerate(mask.flatten().tolist()):
            if kept:
                key = {"batch": 0, "layer": layer, "sequence": (layer, n // LENGTH)}[scope]
                parts.setdefault(key, []).append((F.one_hot(ids[n], EXPERTS).sum(0), p[n]))
    losses = []
    for tokens in parts.values():
        f = torch.stack([f for f, _ in tokens]).double().mean(0) / TOP
        losses.append(EXPERTS * (f * torch.stack([p for _, p in tokens]).mean(0)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", ["batch", "layer", "sequence"])
def test_by_hand(scope: str, scores: str) -> None:
    """DeepSeek-V3's choice: the largest scores after a bias was added."""
    layers, mask = batch()
    bias = torch.linspace(-1, 1, EXPERTS, dtype=torch.float64, device=DEVICE)
    selected = [(x.detach() + bias).topk(TOP, -1).indices for x in layers]
    out = fastloss.moe_load_balancing_loss(
        layers, TOP, mask=mask, selected=selected, scope=scope, scores=scores, per_choice=True
    )
    close(out.loss, by_hand(layers, mask, selected, scope, scores), layers)
    assert (
        out.load.shape
        == {
            "batch": (EXPERTS,),
            "layer": (LAYERS, EXPERTS),
            "sequence": (LAYERS, BATCH, EXPERTS),
        }[scope]
    )
    torch.testing.assert_close(out.load.sum(-1), torch.ones_like(out.load.sum(-1)))
    # The loads of two halves of a batch, averaged, are those of the whole.
    again = fastloss.moe_load_balancing_loss(
        layers, TOP, mask=mask, scope=scope, scores=scores, load=out.load
    )
    torch.testing.assert_close(again.loss, out.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    layers, mask = batch(dtype)
    right = [x.detach().double().requires_grad_() for x in layers]
    out = fastloss.moe_load_balancing_loss(layers, TOP, mask=mask, scope="layer")
    expected = fastloss.moe_load_balancing_loss(right, TOP, mask=mask, scope="layer", backend="reference")
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=0.0)
    for a, b in zip(torch.autograd.grad(out.loss, layers), torch.autograd.grad(expected.loss, right)):
        assert (a.double() - b).abs().max() <= max(torch.finfo(dtype).eps, 1e-6) * b.abs().max()


@pytest.mark.parametrize("backend", KERNELS)
def test_z_loss_on_every_backend(backend: str) -> None:
    need(backend)
    layers, mask = batch(torch.float32)
    right = torch.stack([x.logsumexp(-1).square()[mask.flatten()].sum() for x in layers]).sum()
    right = right / (LAYERS * mask.sum())
    close(fastloss.router_z_loss(layers, mask=mask, backend=backend), right, layers, rtol=1e-5, atol=1e-7)


def test_gradients() -> None:
    """Of z-loss by finite differences; f is a constant in the other's gradient, whose second derivative is the definition's."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=g).double().to(DEVICE).requires_grad_()
    mask = torch.tensor([1, 0, 1], device=DEVICE)
    load = torch.rand(2, 4, generator=g).double().to(DEVICE)
    assert torch.autograd.gradcheck(lambda x: fastloss.router_z_loss(x, mask=mask), x)

    def balance(x: Tensor) -> Tensor:
        return fastloss.moe_load_balancing_loss(x, 2, mask=mask, scope="layer", load=load).loss

    assert torch.autograd.gradcheck(balance, x)
    assert torch.autograd.gradgradcheck(balance, x)


def test_compiled() -> None:
    layers, mask = batch(torch.float32)

    def run(*layers: Tensor) -> Tensor:
        out = fastloss.moe_load_balancing_loss(layers, TOP, mask=mask)
        return out.loss + out.metrics["max_violation"] + fastloss.router_z_loss(layers, mask=mask)

    torch._dynamo.reset()
    close(torch.compile(run, fullgraph=True, backend="eager")(*layers), run(*layers), layers)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_counts(backend: str) -> None:
    nan = torch.full((2, 1, 4, EXPERTS), math.nan, device=DEVICE).requires_grad_()
    empty = torch.zeros(2, 0, 4, EXPERTS, device=DEVICE).requires_grad_()
    for logits, mask in ((nan, torch.zeros(1, 4, device=DEVICE)), (empty, None)):
        for scope in ("batch", "layer", "sequence"):
            out = fastloss.moe_load_balancing_loss(logits, TOP, mask=mask, scope=scope, backend=backend)
            assert out.loss == 0 and not out.load.any()
            assert not torch.autograd.grad(out.loss, logits)[0].any()
        z = fastloss.router_z_loss(logits, mask=mask, backend=backend)
        assert z == 0 and not torch.autograd.grad(z, logits)[0].any()


def test_metrics() -> None:
    """All tokens to the first two of 8 experts: 6 of 8 idle, and the fullest has 4 times the mean."""
    logits = torch.zeros(1, 5, EXPERTS, device=DEVICE)
    logits[..., :2] = 3.0
    out = fastloss.moe_load_balancing_loss(logits, 2)
    assert out.metrics["idle"] == 0.75 and out.metrics["max_violation"] == 3.0
    even = torch.eye(EXPERTS, device=DEVICE)[None]
    assert fastloss.moe_load_balancing_loss(even, 1).loss.item() == pytest.approx(1.0)


def test_errors() -> None:
    layers, mask = batch(torch.float32)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "router_logits: expected a tensor for each layer", {"router_logits": layers[0]}),
        (ValueError, "router_logits: expected a tensor for each layer", {"router_logits": []}),
        (ValueError, "router_logits: expected shape", {"router_logits": [layers[0], layers[1][1:]]}),
        (TypeError, "router_logits: expected torch.float32", {"router_logits": [layers[0], layers[1].double()]}),
        (ValueError, "top_k: expected an int from 1 to 8, got 9", {"top_k": 9}),
        (ValueError, "scope: expected one of", {"scope": "global"}),
        (ValueError, "scope: expected router_logits", {"scope": "sequence"}),
        (ValueError, "scores: expected one of", {"scores": "tanh"}),
        (ValueError, "mask: expected shape", {"mask": mask[:1]}),
        (ValueError, "load: expected shape", {"load": torch.ones(3, device=DEVICE)}),
        (ValueError, "selected: expected shape", {"selected": torch.zeros(LAYERS, 14, 1, dtype=torch.long, device=DEVICE)}),
        (ValueError, "selected: expected 3 layers", {"selected": torch.zeros(1, 14, 2, dtype=torch.long, device=DEVICE)}),
        (TypeError, "selected: expected int64", {"selected": torch.zeros(LAYERS, 14, 2, device=DEVICE)}),
    ]  # fmt: skip
    for error, message, options in wrong:
        with pytest.raises(error, match=message):
            fastloss.moe_load_balancing_loss(**{"router_logits": layers, "top_k": TOP, **options})
    if DEVICE == "cpu":
        bad = torch.full((LAYERS, 14, 2), EXPERTS)
        with pytest.raises(IndexError):
            fastloss.moe_load_balancing_loss(layers, TOP, selected=bad)
