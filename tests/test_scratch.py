"""No tensor is made from the default dtype or on the default device: ``torch.set_default_dtype`` and ``set_default_device``
change nothing (bug 40)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastloss

ROOT = Path(__file__).resolve().parents[1]
ALL = [*(ROOT / "fastloss").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
MAKERS = {
    "empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "randint", "randperm", "eye", "linspace", "logspace",
    "empty_strided",
}  # fmt: skip


def _nameless(path: Path) -> Iterator[str]:
    """Calls of torch.empty and its kin that lack a dtype or a device."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if node.func.attr not in MAKERS or not isinstance(owner, ast.Name) or owner.id != "torch":
            continue
        named = {keyword.arg for keyword in node.keywords}
        if not {"dtype", "device"} <= named:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: torch.{node.func.attr}"


def test_every_tensor_names_its_dtype_and_device() -> None:
    assert len(ALL) > 150
    assert [place for path in ALL for place in _nameless(path)] == []


def _results() -> list[torch.Tensor]:
    """A call of each family, of tensors that name their own dtype and device."""
    cpu = torch.device("cpu")
    numbers = torch.Generator(device=cpu).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers, dtype=torch.float32, device=cpu).requires_grad_()

    x, hidden, weight = randn(70, 33), randn(70, 16), randn(33, 16)
    target = torch.arange(70, dtype=torch.int64, device=cpu) % 33
    pairs = target[:24].reshape(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool, device=cpu)
    logprobs, advantages = randn(4, 6), randn(4).detach()
    good = torch.arange(4, dtype=torch.int64, device=cpu) % 2 == 0
    losses = [
        fastloss.cross_entropy(x, target),
        fastloss.cross_entropy(x, target, label_smoothing=0.1, reduction="none").sum(),
        fastloss.token_stats(x, target, outputs=("logprobs", "entropy")).entropy.sum(),
        fastloss.linear_cross_entropy(hidden, weight, target),
        fastloss.linear_cross_entropy(hidden, weight, target, chunk_size=16),
        fastloss.linear_token_stats(hidden, weight, target).logprobs.sum(),
        fastloss.linear_preference_loss(randn(4, 6, 16), weight, pairs, reference_free=True).loss,
        fastloss.linear_kto_loss(randn(4, 6, 16), weight, pairs, good, kl=0.0).loss,
        fastloss.linear_policy_loss(randn(4, 6, 16), weight, pairs, None, advantages, mask).loss,
        fastloss.dpo_loss(randn(4), randn(4), randn(4).detach(), randn(4).detach()).loss,
        fastloss.preference_loss(
            logprobs, randn(4, 6), reference_free=True, chosen_mask=mask, rejected_mask=mask
        ).loss,
        fastloss.kto_loss(randn(4), None, good, kl=0.0).loss,
        fastloss.reward_model_loss(randn(4), randn(4)).loss,
        fastloss.policy_loss(logprobs, logprobs.detach(), advantages, mask).loss,
        fastloss.policy_loss(logprobs, None, advantages, mask, loss_type="clip_cov").loss,
        fastloss.value_loss(logprobs, None, logprobs.detach() + 1, mask).loss,
    ]
    grads = [
        g for loss in losses for g in torch.autograd.grad(loss, x if loss.grad_fn is None else _leaves(loss))
    ]
    constants = fastloss.gae(logprobs.detach(), logprobs.detach(), mask)
    return [*(loss.detach() for loss in losses), *grads, *constants]


def _leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    found, todo, seen = [], [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    want = _results()
    torch.set_default_dtype(dtype)
    try:
        got = _results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(want, got, strict=True))


def test_default_device_changes_nothing() -> None:
    want = _results()
    with torch.device("meta"):
        got = _results()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
