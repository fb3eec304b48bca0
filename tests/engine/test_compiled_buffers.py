"""What the graphs of torch.compile hold beside a call's inputs: how many tensors as large as the logits, and no rounding twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends_under_test import ALL, DEVICE, need
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule, Node

import fastloss

ROWS, VOCAB, DIM = 24, 96, 16


def graphs(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, list[GraphModule]]:
    """The value, and the graphs of forward and backward, which have run once."""
    torch._dynamo.reset()
    seen: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> Callable[..., object]:
        seen.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        function, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    loss = compiled(*leaves)
    loss.backward(retain_graph=True)
    return loss, seen


def made(graph: GraphModule, shape: tuple[int, int]) -> list[str]:
    """The operations that make a tensor of ``shape``."""

    def has(node: Node) -> bool:
        value = node.meta.get("val")
        each = value if isinstance(value, (list, tuple)) else (value,)
        return any(isinstance(x, Tensor) and tuple(x.shape) == shape for x in each)

    names = (str(n.target) for n in graph.graph.nodes if n.op == "call_function" and has(n))
    return [name for name in names if "getitem" not in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", [name for name in ALL if name != "reference"])
def test_one_tensor_of_the_logits_size(backend: str, reduction: str, dtype: torch.dtype) -> None:
    """The gradient, written once: none in the forward, and no second one that is the first times the upstream gradient."""
    need(backend)
    logits = torch.randn(ROWS, VOCAB, dtype=dtype).to(DEVICE).requires_grad_()
    target = torch.randint(0, VOCAB, (ROWS,)).to(DEVICE)
    target[::4] = -100

    def loss(x: Tensor) -> Tensor:
        return fastloss.cross_entropy(x, target, reduction=reduction, backend=backend) * 0.375

    _, (forward, backward) = graphs(loss, logits)
    assert made(forward, (ROWS, VOCAB)) == []
    assert made(backward, (ROWS, VOCAB)) == ["fastloss.row_grad.default"]
    exact = logits.detach().double().requires_grad_()
    (torch.nn.functional.cross_entropy(exact, target, reduction=reduction) * 0.375).backward()
    assert logits.grad is not None and exact.grad is not None
    rtol = 0.5 * torch.finfo(dtype).eps + 1e-6  # rounded once, after float32's arithmetic
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rtol, atol=1e-7)


def test_a_graph_that_runs_its_backward_twice_scales_once() -> None:
    logits = torch.randn(ROWS, VOCAB).to(DEVICE).requires_grad_()
    target = torch.randint(0, VOCAB, (ROWS,)).to(DEVICE)
    loss, _ = graphs(lambda x: fastloss.cross_entropy(x, target), logits)
    assert logits.grad is not None
    once = logits.grad.clone()
    (0.5 * loss).backward()
    torch.testing.assert_close(logits.grad, 1.5 * once)


def test_the_head_holds_no_logits_and_rounds_its_gradients_once_more() -> None:
    hidden = torch.randn(ROWS, DIM).bfloat16().to(DEVICE).requires_grad_()
    weight = torch.randn(VOCAB, DIM).bfloat16().to(DEVICE).requires_grad_()
    target = torch.randint(0, VOCAB, (ROWS,)).to(DEVICE)
    function = lambda h, w: fastloss.linear_cross_entropy(h, w, target, loss_dtype=torch.float32) / 3
    _, both = graphs(function, hidden, weight)
    assert [made(graph, (ROWS, VOCAB)) for graph in both] == [[], []]
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    function(*leaves).backward()
    for ours, eager in zip((hidden, weight), leaves, strict=True):
        assert ours.grad is not None and torch.equal(ours.grad, eager.grad)
