"""One call that is timed: forward and backward of a fresh graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss.bench.case import Case, Data, Loss


class _Start(torch.autograd.Function):
    """Gives logits a graph node without copying them, and keeps the gradient that arrives without copying it.

    A leaf would not do: it must not be overwritten, and accumulating into it clones a gradient that the
    loss still holds and takes over one that it doesn't.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.box.append(grad)
        return None, None, None


class RowStep:
    """Over logits that another node of the graph made, as a model's are."""

    def __init__(self, loss: Loss, case: Case, data: Data):
        self.loss, self.logits = loss, data["logits"].detach()
        self.rest = [tensor for name, tensor in data.tensors.items() if name != "logits"]
        self.anchor = torch.zeros(
            (), dtype=torch.float32, device=torch.get_default_device(), requires_grad=True
        )
        self.box: list[Tensor] = []

    def prepare(self) -> None:
        """Outside the timed region: lets go of the last call's gradient."""
        self.box.clear()

    def __call__(self) -> Tensor:
        value = self.loss(_Start.apply(self.anchor, self.logits, self.box), *self.rest)
        value.backward()
        return value.detach()

    def gradients(self) -> dict[str, Tensor]:
        return {"logits": self.box[0]}


class LeafStep:
    """Over leaves that have no gradient yet; many calls where one is too short for the clock."""

    def __init__(self, loss: Loss, case: Case, data: Data):
        self.loss, self.calls = loss, case.calls
        self.arguments = list(data.tensors.values())
        self.leaves = {name: data[name] for name in data.leaves}

    def prepare(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def __call__(self) -> Tensor:
        if not self.leaves:
            with torch.no_grad():
                for _ in range(self.calls):
                    value = self.loss(*self.arguments)
                return value
        loss, arguments, leaves = self.loss, self.arguments, list(self.leaves.values())
        for _ in range(self.calls):
            for leaf in leaves:
                leaf.grad = None
            value = loss(*arguments)
            value.backward()
        return value.detach()

    def gradients(self) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}


class LimitStep:
    """A copy or GEMMs alone: no gradients. What it makes is released with the last call's gradients, untimed."""

    def __init__(self, run: Callable[[], object]):
        self.run = run
        self.result: object = None

    def prepare(self) -> None:
        self.result = None

    def __call__(self) -> object:
        self.result = self.run()
        return self.result


Step = RowStep | LeafStep


def step(loss: Loss, case: Case, data: Data) -> Step:
    over_rows = "logits" in data.tensors and case.calls == 1 and not case.nograd
    return RowStep(loss, case, data) if over_rows else LeafStep(loss, case, data)
