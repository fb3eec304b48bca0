"""What FlopCounterMode counts of the linear head on the kernels of a GPU: in eager mode, in the backward, under torch.compile."""

from __future__ import annotations

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, need
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastloss
from fastloss.engine import compile_heads
from fastloss.engine.contract import WHOLE
from fastloss.engine.head_types import NOTHING, Limits, Needs
from fastloss.tables import CrossEntropyOptions

ROWS, DIM, VOCAB = 12, 16, 40
GEMM = 2 * ROWS * DIM * VOCAB
GPU_KERNELS = [name for name in KERNELS if name != "cpu"]


def operands(dtype: torch.dtype = torch.float32, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, DIM, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator).to(DEVICE, dtype).requires_grad_(not frozen)
    return hidden, weight, torch.randint(0, VOCAB, (ROWS,), generator=generator).to(DEVICE)


def counted(mode: FlopCounterMode) -> dict[str, int]:
    return {str(op): flops for op, flops in mode.get_flop_counts().get("Global", {}).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_gradients_made_in_the_forward(backend: str, chunk_size: int | None, dtype: torch.dtype) -> None:
    hidden, weight, target = operands(dtype)
    call = {"chunk_size": chunk_size, "backend": need(backend)}
    with FlopCounterMode(display=False) as forward:
        loss = fastloss.linear_cross_entropy(hidden, weight, target, **call)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert counted(forward) == {"fastloss.head_gemms": 3 * GEMM}
    assert counted(backward) == {}


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_each_pass_counts_what_it_multiplies(backend: str) -> None:
    need(backend)
    hidden, weight, target = operands()
    for frozen, forward, backward in ((False, 1, 3), (True, 2, 0)):
        leaf = weight.detach().requires_grad_(not frozen)
        with FlopCounterMode(display=False) as first:
            logprobs = fastloss.linear_token_stats(hidden, leaf, target, backend=backend).logprobs
        with FlopCounterMode(display=False) as second:
            logprobs.square().sum().backward()
        assert (first.get_total_flops(), second.get_total_flops()) == (forward * GEMM, backward * GEMM)
    with torch.no_grad(), FlopCounterMode(display=False) as alone:
        fastloss.linear_cross_entropy(hidden, weight, target, backend=backend)
    assert alone.get_total_flops() == GEMM


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_under_torch_compile(backend: str, frozen: bool) -> None:
    """A compiled function that is called under a mode runs as eager code; the graph of its backward is counted by the operator's
    formula, and the operator's inside not once more."""
    need(backend)
    torch._dynamo.reset()
    hidden, weight, target = operands(frozen=frozen)

    def step(h: Tensor, w: Tensor) -> Tensor:
        loss = fastloss.linear_cross_entropy(h, w, target, backend=backend)
        return loss + fastloss.linear_token_stats(h, w, target, backend=backend).logprobs.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(hidden, weight)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    ahead = 2 if frozen else 3
    assert counted(backward) == {"fastloss.linear_row_grad": ahead * GEMM}
    # Not with fullgraph: under a mode PyTorch compiles no whole graph, which 2.15 calls an error.
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        compiled(hidden, weight)
    assert forward.get_total_flops() == 2 * GEMM


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_operators_of_compiled_graphs(backend: str) -> None:
    need(backend)
    hidden, weight, target = (x.detach() for x in operands())
    options, limits, dtype = CrossEntropyOptions(), Limits(), torch.float32
    for needs, gemms in ((Needs(True, True, False), 3), (Needs(True, False, False), 2), (NOTHING, 1)):
        with FlopCounterMode(display=False) as mode:
            compile_heads.linear_cross_entropy(
                hidden, weight, None, target, None, None, WHOLE, options, "sum", (), needs, dtype, limits, backend
            )  # fmt: skip
        assert counted(mode) == {"fastloss.linear_cross_entropy": gemms * GEMM}
