"""One call that is timed: forward and backward of a fresh graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss.bench.cases import Case, Data

Loss = Callable[..., Tensor]


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
        assert data.logits is not None
        self.loss, self.target, self.logits = loss, data.target, data.logits.detach()
        self.anchor = torch.zeros((), requires_grad=True)
        self.box: list[Tensor] = []

    def prepare(self) -> None:
        """Outside the timed region: lets go of the last call's gradient."""
        self.box.clear()

    def __call__(self) -> Tensor:
        value = self.loss(_Start.apply(self.anchor, self.logits, self.box), self.target)
        value.backward()
        return value.detach()

    def gradients(self) -> dict[str, Tensor]:
        return {"logits": self.box[0]}


class LeafStep:
    """Over a small leaf, many calls: the overhead of a call, without the cost of a Python node."""

    def __init__(self, loss: Loss, case: Case, data: Data):
        assert data.logits is not None
        self.loss, self.target, self.calls = loss, data.target, case.calls
        self.logits = data.logits.detach().clone().requires_grad_()

    def prepare(self) -> None:
        self.logits.grad = None

    def __call__(self) -> Tensor:
        loss, logits, target = self.loss, self.logits, self.target
        for _ in range(self.calls):
            logits.grad = None
            value = loss(logits, target)
            value.backward()
        return value.detach()

    def gradients(self) -> dict[str, Tensor]:
        assert self.logits.grad is not None
        return {"logits": self.logits.grad}


class LinearStep:
    """Over hidden states and the vocabulary matrix, both leaves that have no gradient yet."""

    def __init__(self, loss: Loss, case: Case, data: Data):
        assert data.hidden is not None and data.weight is not None
        self.loss, self.hidden, self.weight, self.target = loss, data.hidden, data.weight, data.target
        self.nograd = case.nograd

    def prepare(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def __call__(self) -> Tensor:
        if self.nograd:
            with torch.no_grad():
                return self.loss(self.hidden, self.weight, self.target)
        value = self.loss(self.hidden, self.weight, self.target)
        value.backward()
        return value.detach()

    def gradients(self) -> dict[str, Tensor]:
        both = {"hidden": self.hidden.grad, "weight": self.weight.grad}
        return {name: grad for name, grad in both.items() if grad is not None}


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


Step = RowStep | LeafStep | LinearStep


def step(loss: Loss, case: Case, data: Data) -> Step:
    if case.kind == "linear":
        return LinearStep(loss, case, data)
    return LeafStep(loss, case, data) if case.calls > 1 else RowStep(loss, case, data)
