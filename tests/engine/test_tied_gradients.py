"""A tied weight's two gradients are added in the memory of one of them: autograd does so where it is a gradient's only owner, and
a third tensor of the weight's size where a kernel's call left another one behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, need
from torch import Tensor

import fastloss
from fastloss.engine import head as heads

B, T, D, V = 3, 8, 16, 90


def _good() -> Tensor:
    return torch.tensor([True, False, True], device=DEVICE)


HEADS: dict[str, Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "cross_entropy": lambda h, w, t, o: fastloss.linear_cross_entropy(h.flatten(0, 1), w, t.flatten(), **o),
    "cross_entropy, none": lambda h, w, t, o: fastloss.linear_cross_entropy(
        h.flatten(0, 1), w, t.flatten(), reduction="none", **o
    ).mean(),
    "token_stats": lambda h, w, t, o: fastloss.linear_token_stats(
        h, w, t, outputs=("logprobs", "entropy"), **o
    ).entropy.mean(),
    "policy": lambda h, w, t, o: fastloss.linear_policy_loss(h, w, t, None, _good().float(), None, **o).loss,
    "policy, sequences": lambda h, w, t, o: (
        fastloss.linear_policy_loss(h, w, t, None, _good().float(), None, loss_type="gspo", **o).loss
    ),
    "kto": lambda h, w, t, o: fastloss.linear_kto_loss(h, w, t, _good(), kl=0.0, **o).loss,
    "sequences": lambda h, w, t, o: fastloss.linear_sequence_loss(
        h, w, t, lambda part: part.logps.sum(), **o
    ),
    "supervised": lambda h, w, t, o: (
        fastloss.linear_supervised_loss(h.flatten(0, 1), w, t.flatten(), **o).loss
    ),
    "distillation": lambda h, w, t, o: (
        fastloss.linear_distillation_loss(
            h.flatten(0, 1), w, h.detach().flatten(0, 1).roll(1, 0), w.detach(), t.flatten(), **o
        ).loss
    ),
}


@pytest.mark.parametrize(
    "backend", [b for b in KERNELS if b != "triton" or DEVICE == "cuda"]
)  # its interpreter reads storages
@pytest.mark.parametrize("rows", ["all in one", "in parts"])
@pytest.mark.parametrize("name", HEADS)
def test_the_sum_lies_in_a_gradient(
    name: str, rows: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(backend)
    options: dict[str, Any] = {"backend": backend, **({} if rows == "all in one" else {"chunk_size": T})}
    places, finish = [], heads.finish

    def seen(*arguments: Any, **keywords: Any) -> Any:
        grads = finish(*arguments, **keywords)
        if grads.weight is not None:
            places.append(grads.weight.data_ptr())
        return grads

    monkeypatch.setattr(heads, "finish", seen)
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=numbers).to(DEVICE).requires_grad_()
    target = torch.randint(0, V, (B, T), generator=numbers).to(DEVICE)
    embedded = torch.nn.functional.embedding(target, weight)
    of_embedding: list[int] = []
    embedded.grad_fn.register_hook(lambda made, _: of_embedding.append(made[0].data_ptr()))
    (0.5 * HEADS[name](embedded.tanh(), weight, target, options)).backward()
    assert places and weight.grad is not None
    assert weight.grad.data_ptr() in (*places, *of_embedding)
