"""reward_model_loss and process_reward_loss against the same in PyTorch, edges, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import ALL, DEVICE, need
from preference_inputs import numbers

import fastloss

TWO = torch.tensor([-1.0, -2.0])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": "margin"},
        {"center_coefficient": 0.05, "margin": 0.3},
        {"label_smoothing": "smoothing", "weights": "weights"},
    ],
    ids=str,
)
def test_reward_model(backend: str, options: dict[str, Any]) -> None:
    need(backend)
    x = numbers(9, torch.float32)
    given = {k: x[v] if isinstance(v, str) else v for k, v in options.items()}
    leaves = [x[k].clone().requires_grad_() for k in ("c", "r")]
    out = fastloss.reward_model_loss(leaves[0][:, None], leaves[1][:, None], backend=backend, **given)
    grads = torch.autograd.grad(2 * out.loss, leaves)
    c, r = (v.detach().double().requires_grad_() for v in leaves)
    smoothing, margin = given.get("label_smoothing", 0.0), given.get("margin", 0.0)
    u = c - r - margin
    each = -(1 - smoothing) * F.logsigmoid(u) - smoothing * F.logsigmoid(-u)
    each = (each + given.get("center_coefficient", 0.0) * (c + r) ** 2) * given.get("weights", 1.0)
    torch.testing.assert_close(out.loss.double(), each.mean())
    for got, want in zip(grads, torch.autograd.grad(2 * each.mean(), (c, r)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)
    m = out.metrics
    assert m["rewards/accuracies"].item() == pytest.approx((c > r).double().mean().item())
    assert m["rewards/margins"].item() == pytest.approx((c - r).mean().item(), rel=1e-5)
    assert m["mean_reward"].item() == pytest.approx(torch.cat([c, r]).mean().item(), rel=1e-5)
    assert (m["min_reward"], m["max_reward"]) == (torch.cat(leaves).min(), torch.cat(leaves).max())


def test_reward_model_edges() -> None:
    far = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    fastloss.reward_model_loss(far, -far.detach(), center_coefficient=0.1).loss.backward()
    assert far.grad is not None and far.grad.isfinite().all()
    none = fastloss.nn.RewardModelLoss(margin=1.0)(torch.zeros(0), torch.zeros(0))
    assert none.loss.item() == 0.0 and all(v.item() == 0.0 for v in none.metrics.values())
    with pytest.raises(ValueError, match="center_coefficient"):
        fastloss.reward_model_loss(TWO, TWO, center_coefficient=-1.0)
    with pytest.raises(ValueError, match=r"chosen_rewards: expected shape \[B\]"):
        fastloss.reward_model_loss(torch.zeros(2, 2), torch.zeros(2, 2))


@pytest.mark.parametrize("backend", ALL)
def test_process_reward(backend: str) -> None:
    need(backend)
    logits = torch.randn(2, 5, 2, device=DEVICE, requires_grad=True)
    labels = torch.tensor([[-100, 1, -100, 0, -100], [1, -100, -100, -100, -100]], device=DEVICE)
    out = fastloss.process_reward_loss(logits, labels, backend=backend)
    want = F.cross_entropy(logits.reshape(-1, 2), labels.reshape(-1))
    torch.testing.assert_close(out.loss, want)
    kept = labels != -100
    assert out.metrics["accuracy"].item() == pytest.approx(
        (logits.argmax(-1) == labels)[kept].float().mean().item()
    )
    (a,), (b,) = torch.autograd.grad(out.loss, logits), torch.autograd.grad(want, logits)
    torch.testing.assert_close(a, b)
    none = fastloss.process_reward_loss(logits, torch.full_like(labels, -100), backend=backend)
    assert none.loss.isnan() and none.metrics["accuracy"].item() == 0.0
    assert fastloss.process_reward_loss(logits, labels, reduction="none", backend=backend).loss.shape == (
        2,
        5,
    )
