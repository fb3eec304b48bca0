"""The modules of fastloss.nn are their functions, with options that the call may override."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE
from torch import Tensor

import fastloss
from fastloss import nn

ROWS, DIM, VOCAB = 6, 5, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


X, W, Z = normal(ROWS, DIM), normal(VOCAB, DIM, seed=1), normal(ROWS, VOCAB, seed=2)
TARGET = torch.tensor([0, 3, -100, 8, 2, 2], device=DEVICE)
IDS = torch.tensor([[1, 4], [0, -1], [2, 2], [8, 0], [3, 5], [7, 6]], device=DEVICE)
LOGPROBS = (0.8 * normal(ROWS, 2, seed=3).softmax(-1)).log()
SCORES, LABELS = normal(2, 3, seed=4), torch.tensor([[2.0, 0.0, 1.0], [1.0, 0.0, 0.0]], device=DEVICE)
TIES = torch.tensor([[1, 0, -1], [0, 0, 1]], device=DEVICE)
Given = tuple[Any, ...]

# module, its fixed options, what the call overrides, its function, the tensors
MODULES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any], Callable[..., Any], Given]] = {
    "distillation": (
        nn.LinearDistillationLoss, {"divergence": "jsd", "temperature": 2.0}, {"interpolation": 0.3},
        fastloss.linear_distillation_loss, (X, W, normal(ROWS, 4), normal(VOCAB, 4), TARGET),
    ),
    "top-k": (
        nn.TopKDistillationLoss, {"tail": "none"}, {"divergence": "tvd"}, fastloss.topk_distillation_loss, (Z, IDS, LOGPROBS),
    ),
    "linear top-k": (
        nn.LinearTopKDistillationLoss, {"tail": "renormalize", "temperature": 2.0}, {"temperature": 0.5},
        fastloss.linear_topk_distillation_loss, (X, W, IDS, LOGPROBS, TARGET),
    ),
    "supervised": (
        nn.SupervisedLoss, {"loss_type": "focal", "focal_gamma": 1.0}, {"focal_gamma": 3.0}, fastloss.supervised_loss, (Z, TARGET),
    ),
    "linear supervised": (
        nn.LinearSupervisedLoss, {"loss_type": "eaft"}, {"eaft_alpha": 2.0}, fastloss.linear_supervised_loss, (X, W, TARGET),
    ),
    "load": (
        nn.MoELoadBalancingLoss, {"top_k": 2}, {"scores": "sigmoid"}, fastloss.moe_load_balancing_loss, (normal(2, ROWS, 4),),
    ),
    "z": (nn.RouterZLoss, {}, {"backend": "reference"}, fastloss.router_z_loss, ([normal(ROWS, 4), normal(ROWS, 4, seed=5)],)),
    "ties": (
        nn.TiedRewardLoss, {"model": "davidson"}, {"tie_strength": 0.5}, fastloss.tied_reward_loss, (SCORES.view(-1), SCORES.flip(1).view(-1), TIES.view(-1)),
    ),
    "lists": (nn.ListwiseRewardLoss, {"loss_type": "softmax"}, {"top": None}, fastloss.listwise_reward_loss, (SCORES, LABELS)),
    "list preference": (
        nn.ListwisePreferenceLoss, {"loss_type": "plackett_luce", "beta": 0.3}, {"top": 1}, fastloss.listwise_preference_loss,
        (SCORES, LABELS, SCORES.flip(0)),
    ),
    "regression": (
        nn.RewardRegressionLoss, {"loss_type": "huber"}, {"huber_delta": 0.3}, fastloss.reward_regression_loss, (SCORES, LABELS),
    ),
}  # fmt: skip


def loss_of(out: Any) -> Tensor:
    value: Tensor = out if isinstance(out, Tensor) else out.loss
    return value


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_its_function(name: str) -> None:
    module, fixed, overridden, function, tensors = MODULES[name]
    made = module(**fixed)
    assert not list(made.parameters())
    for option, value in fixed.items():
        assert f"{option}={value!r}" in repr(made)
    for more in ({}, overridden):
        assert torch.equal(loss_of(made(*tensors, **more)), loss_of(function(*tensors, **{**fixed, **more})))


def test_many_targets_of_one_head() -> None:
    """The sum of the heads' weighted means, by one call of the plain loss a head; documents and overrides are passed on."""
    hidden = normal(2, 2, 7, DIM).requires_grad_()
    labels = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels[0, 2] = -1
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3], device=DEVICE).expand(2, 7)
    module = nn.LinearMultiTokenLoss(2, weights=[1.0, 0.25], ignore_index=-1, softcap=5.0)
    assert (
        repr(module)
        == "LinearMultiTokenLoss(heads=2, first=1, weights=(1.0, 0.25), ignore_index=-1, softcap=5.0)"
    )
    right = hidden.new_zeros(())
    for head, weight in enumerate((1.0, 0.25)):
        target = torch.full_like(labels, -1)
        for t in range(7 - 1 - head):
            same = (positions[0, t : t + 2 + head].diff() == 1).all()
            target[:, t] = labels[:, t + 1 + head] if same else -1
        right = right + weight * fastloss.linear_cross_entropy(
            hidden[head], W, target, ignore_index=-1, softcap=3.0
        )
    got = module(hidden, W, labels, position_ids=positions, softcap=3.0)
    torch.testing.assert_close(got, right)
    torch.testing.assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(right, hidden))
