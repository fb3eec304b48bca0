"""Jagged (nested) tensors, as verl and torchtune pass sequences: the packed call's numbers, gradients in the jagged leaf, results
per token jagged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, need
from torch import Tensor

import fastloss

D, V = 8, 23
LENGTHS = torch.tensor([3, 0, 5, 2])
OFFSETS = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)]).to(DEVICE)
N, B = int(LENGTHS.sum()), len(LENGTHS)


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _classes() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9)).to(DEVICE)


GOOD = (torch.arange(B) % 2 == 0).to(DEVICE)
MASK = torch.arange(N, device=DEVICE) % 4 != 1
HEAD = {"input": _numbers(N, D), "target": _classes()}
WEIGHT = {"linear_weight": _numbers(V, D, seed=1)}
# name: (function, arguments per token, those that are not, whether it packs by cu_seqlens)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any], bool]] = {
    "policy_loss": (
        fastloss.policy_loss,
        {"logprobs": -_numbers(N).abs(), "old_logprobs": -_numbers(N, seed=1).abs(), "mask": MASK},
        {"advantages": _numbers(B, seed=2), "loss_type": "gspo"}, True,
    ),
    "linear_policy_loss": (
        fastloss.linear_policy_loss, {**HEAD, "advantages": _numbers(N, seed=2), "mask": MASK},
        {**WEIGHT, "old_logprobs": None, "loss_type": "grpo", "return_stats": True}, True,
    ),
    "kto_loss": (fastloss.kto_loss, {"logps": -_numbers(N).abs()}, {"ref_logps": None, "desirable": GOOD, "kl": 0.1}, True),
    "bco_loss": (fastloss.bco_loss, {"logps": -_numbers(N).abs()}, {"ref_logps": None, "desirable": GOOD}, True),
    "linear_kto_loss": (
        fastloss.linear_kto_loss, HEAD, {**WEIGHT, "desirable": GOOD, "kl": 0.0, "return_stats": True}, True,
    ),
    "linear_preference_loss": (
        fastloss.linear_preference_loss, HEAD, {**WEIGHT, "reference_free": True, "return_stats": True}, True,
    ),
    "linear_sequence_loss": (
        fastloss.linear_sequence_loss, HEAD, {**WEIGHT, "loss_fn": lambda part: part.logps.square().sum()}, True,
    ),
    "value_loss": (
        fastloss.value_loss, {"values": _numbers(N), "returns": _numbers(N, seed=1), "mask": MASK}, {"old_values": None}, True,
    ),
    "gae": (fastloss.gae, {"rewards": _numbers(N), "values": _numbers(N, seed=1), "mask": MASK}, {}, True),
    "discounted_returns": (fastloss.discounted_returns, {"rewards": _numbers(N), "mask": MASK}, {"gamma": 0.9}, True),
    "token_stats": (fastloss.token_stats, {"logits": _numbers(N, V), "target": _classes()}, {"outputs": ("logprobs", "entropy")}, False),
    "linear_token_stats": (fastloss.linear_token_stats, HEAD, {**WEIGHT, "outputs": ("logprobs", "is_top1")}, False),
    "entropy_from_logits": (fastloss.entropy_from_logits, {"logits": _numbers(N, V)}, {}, False),
    "linear_cross_entropy": (fastloss.linear_cross_entropy, HEAD, WEIGHT, False),
    "linear_cross_entropy, none": (fastloss.linear_cross_entropy, HEAD, {**WEIGHT, "reduction": "none"}, False),
    "supervised_loss": (fastloss.supervised_loss, {"logits": _numbers(N, V), "target": _classes()}, {"loss_type": "focal"}, True),
    "linear_supervised_loss": (fastloss.linear_supervised_loss, HEAD, {**WEIGHT, "loss_type": "dft"}, True),
}  # fmt: skip


def _parts(value: Any) -> list[Tensor]:
    """Every tensor of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for v in value.values() for x in _parts(v)]
    return [x for v in value for x in _parts(v)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("backend", ["reference", KERNELS[0]])
@pytest.mark.parametrize("name", CALLS)
def test_is_the_packed_call(name: str, backend: str) -> None:
    need(backend)
    function, per_token, rest, packs = CALLS[name]
    packed = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in per_token.items()}
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in per_token.items()}
    jagged = {k: torch.nested.nested_tensor_from_jagged(v, OFFSETS) for k, v in leaves.items()}
    want = _parts(function(**packed, **rest, **({"cu_seqlens": OFFSETS} if packs else {}), backend=backend))
    got = _parts(function(**jagged, **rest, backend=backend))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if a.is_nested:
            assert torch.equal(a.offsets(), OFFSETS)
        # What there is of each token is jagged, and nothing else.
        assert a.is_nested == (b.dim() == 1 and b.shape[0] == N)
        torch.testing.assert_close(a.values() if a.is_nested else a, b)
    if want[0].requires_grad:
        want[0].sum().backward()
        (got[0].values() if got[0].is_nested else got[0]).sum().backward()
        first = next(iter(per_token))
        assert leaves[first].grad is not None
        torch.testing.assert_close(leaves[first].grad, packed[first].grad)


def test_errors() -> None:
    function, per_token, rest, _ = CALLS["linear_kto_loss"]
    jagged = {k: torch.nested.nested_tensor_from_jagged(v, OFFSETS) for k, v in per_token.items()}
    with pytest.raises(ValueError, match="cu_seqlens: expected None beside a jagged input"):
        function(**jagged, **rest, cu_seqlens=OFFSETS)
    other = torch.nested.nested_tensor_from_jagged(
        per_token["target"], torch.tensor([0, 1, 2, 3, N], device=DEVICE)
    )
    with pytest.raises(ValueError, match="target: expected the lengths of input, got others"):
        function(**{**jagged, "target": other}, **rest)
    holes = torch.nested.nested_tensor_from_jagged(
        per_token["input"], OFFSETS, lengths=torch.tensor([2, 0, 4, 1], device=DEVICE)
    )
    with pytest.raises(ValueError, match=r"input: expected a jagged tensor .* without holes"):
        function(**{**jagged, "input": holes}, **rest)
    with pytest.raises(
        (ValueError, TypeError), match="target"
    ):  # a packed target beside jagged hidden states fits
        function(**{**jagged, "target": per_token["target"][:-1]}, **rest)
