"""The linear head as a GPU runs it: chunks, d weight without an accumulator, ignored rows, padded logits.

A device of type "cuda" needs no GPU to ask what is done on it; to do it, ``devices.is_gpu`` takes the CPU's tensors for a GPU's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, contract, dtypes, need
from torch import Tensor

import fastloss
from fastloss.engine import devices, head, head_rows
from fastloss.engine.backend import get_backend
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.head_types import Head, Limits, Needs
from fastloss.tables import LSE_PARTS, CrossEntropyOptions

IGNORE = -100
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GPU_KERNELS = [name for name in KERNELS if name != "cpu"]
EPS = {F32: 1e-5, BF16: 2**-7, F16: 2**-10}


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)


def operands(
    rows: int = 37, dim: int = 24, vocab: int = 301, dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + dim)
    hidden = torch.randn(rows, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) / dim**0.5
    target = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), target.to(DEVICE)


def step(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    loss = fastloss.linear_cross_entropy(*leaves, target, **options)
    loss.backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    return loss.detach(), leaves[0].grad, leaves[1].grad


def exact(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return step(hidden.double(), weight.double(), target, backend="reference", **options)


def close(ours: tuple[Tensor, ...], right: tuple[Tensor, ...], eps: float) -> None:
    for x, y in zip(ours, right, strict=True):
        assert float((x.double() - y).abs().max()) <= 4 * eps * float(y.abs().max())


# --- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "dim", "vocab", "dtype", "weight_gradient", "chunk"),
    [
        (1024, 4096, 128256, BF16, True, 1024),
        (8192, 4096, 128256, BF16, True, 8192),  # N = 2 D: the logits are as large as the accumulator
        (8193, 4096, 128256, BF16, True, 4352),  # two equal chunks, a multiple of 256
        (32768, 4096, 128256, BF16, True, 8192),
        (8192, 4096, 128256, F32, True, 4096),  # logits of 4 bytes: N = D
        (4096, 4096, 128256, F32, True, 4096),
        (8192, 2304, 256000, BF16, True, 4096),  # 4608 = 18 · 256 rows at most
        (16384, 768, 50257, BF16, True, 2048),  # a small weight: GEMMs need rows
        (8192, 4096, 128256, BF16, False, 2048),  # no accumulator that pays for more
        (8192, 4096, 1 << 20, BF16, False, 256),
        (3, 4096, 128256, BF16, True, 3),
        (0, 4096, 128256, BF16, True, 1),
    ],
)
def test_chunk_on_a_gpu(
    rows: int, dim: int, vocab: int, dtype: torch.dtype, weight_gradient: bool, chunk: int
) -> None:
    assert head_rows.default_chunk(rows, vocab, dim, dtype, CUDA, weight_gradient) == chunk


@pytest.mark.parametrize("rows", [2049, 5000, 8193, 9999, 40000])
def test_chunks_on_a_gpu_are_equal_multiples_within_the_accumulator(rows: int) -> None:
    chunk = head_rows.default_chunk(rows, 128256, 1000, BF16, CUDA)
    parts = [stop - start for start, stop in head_rows.equal_chunks(rows, chunk)]
    assert chunk % 256 == 0 and chunk <= max(head_rows.accumulator_rows(1000, BF16), head_rows.GPU_ROWS)
    assert sum(parts) == rows and len(parts) == -(-rows // head_rows.GPU_ROWS)


def test_chunk_on_the_cpu_is_what_it_was() -> None:
    assert head_rows.default_chunk(8192, 128256, 4096, BF16, CPU) == 256
    assert head_rows.default_chunk(40, 128256, 4096, BF16, CPU) == 32


def fake_head(dtype: torch.dtype, leaf: torch.dtype | None = None) -> Head:
    hidden, weight = torch.empty(8, 64, dtype=leaf or dtype), torch.empty(1000, 64, dtype=leaf or dtype)
    return Head(get_backend("reference"), hidden, weight, None, dtype)


@pytest.mark.parametrize(
    ("dtype", "leaf", "chunks", "made"),
    [
        (BF16, None, 1, BF16),
        (BF16, None, 2, F32),
        (F16, None, 1, F32),  # waits, unscaled, for the upstream gradient
        (BF16, F32, 1, F32),  # autocast: never rounded to bfloat16
        (F32, None, 1, F32),
        (torch.float64, None, 3, torch.float64),
    ],
)
def test_dtype_of_the_weight_gradient(
    as_gpu: None, dtype: torch.dtype, leaf: torch.dtype | None, chunks: int, made: torch.dtype
) -> None:
    operand = fake_head(dtype, leaf)
    assert head_rows.weight_dtype(operand, chunks) == made
    size = 0 if made == operand.weight.dtype else operand.weight.numel() * 4
    assert head_rows.accumulator_bytes(operand, chunks) == size


def test_an_accumulator_on_the_cpu_stays() -> None:
    assert head_rows.weight_dtype(fake_head(BF16), 1) == F32


@pytest.mark.parametrize("trained", [True, False])
def test_what_memory_means(as_gpu: None, trained: bool) -> None:
    needs, operand = Needs(True, trained, False), fake_head(BF16)
    limit = head_rows.accumulator_rows(64, BF16)

    def chunk(rows: int, memory: str = "auto", chunk_size: int | None = None) -> int:
        return head.chunked(operand, rows, needs, Limits(chunk_size, memory)).chunk

    assert chunk(limit, "low") == (limit if trained else limit // 4)  # all rows spare the accumulator
    assert chunk(9000) == 2048 and chunk(9000, "low") == 512 and chunk(9000, "fast") == 2048
    assert chunk(9000, chunk_size=100) == 100 and chunk(50, chunk_size=100) == 50


def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """Of the products that make d weight from here on: which function, into which dtype."""
    seen: list[tuple[str, torch.dtype]] = []
    plain = devices.add_transposed

    def spy(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
        seen.append(("add" if accumulate else "write", out.dtype))
        plain(out, a, b, accumulate=accumulate)

    monkeypatch.setattr(devices, "add_transposed", spy)
    return seen


@pytest.mark.parametrize("chunk_size", [None, 20])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_weight_gradient_against_float64(
    as_gpu: None, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, chunk_size: int | None
) -> None:
    """One product in the leaf's dtype where all rows are one chunk; added up in float32 where they are not."""
    need(backend)
    hidden, weight, target = operands(dtype=dtype)
    seen = products(monkeypatch)
    ours = step(hidden, weight, target, chunk_size=chunk_size, backend=backend)
    one = dtype if dtype != F16 else F32
    assert seen == ([("write", one)] if chunk_size is None else [("write", F32), ("add", F32)])
    assert [x.dtype for x in ours] == [dtype] * 3
    close(ours[1:], exact(hidden, weight, target)[1:], EPS[dtype])


def test_autocast_adds_up_in_the_leafs_float32(as_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    need("triton")
    hidden, weight, target = operands()
    seen = products(monkeypatch)
    with torch.autocast(DEVICE, BF16):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        fastloss.linear_cross_entropy(*leaves, target, backend="triton").backward()
    assert seen == [("write", F32)] and leaves[1].grad is not None and leaves[1].grad.dtype == F32
    close((leaves[1].grad,), exact(hidden, weight, target)[2:], EPS[BF16])


@pytest.mark.parametrize("function", ["preference", "policy"])
def test_other_losses_go_in_one_chunk(as_gpu: None, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    backend = need("triton")
    hidden, weight, target = operands(24, dtype=BF16)
    leaves = [x.requires_grad_() for x in (hidden.view(4, 6, -1), weight)]
    target = target.view(4, 6)
    seen = products(monkeypatch)

    def loss() -> Any:
        if function == "preference":
            return fastloss.linear_simpo_loss(*leaves, target, backend=backend)
        ones = torch.ones(4, device=DEVICE)
        return fastloss.linear_policy_loss(*leaves, target, None, ones, None, backend=backend)

    loss().loss.backward()
    assert seen == [("write", BF16)]
    assert leaves[1].grad is not None and leaves[1].grad.dtype == BF16


def test_explain_tells_chunks_and_accumulator(as_gpu: None) -> None:
    backend = need("triton")
    hidden, weight, target = operands(dtype=BF16)

    def plan(trained: bool = True, **options: Any) -> tuple[int, int, int]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        told = fastloss.explain(fastloss.linear_cross_entropy, *leaves, target, backend=backend, **options)
        return told["chunk_rows"], told["buffer_bytes"], told["accumulator_bytes"]

    stride = 2 * 320  # 301 logits, padded to a multiple of 64
    assert plan() == (37, 37 * stride, 0)
    assert plan(chunk_size=20) == (20, 20 * stride, 4 * weight.numel())
    assert plan(trained=False, chunk_size=20) == (20, 20 * stride, 0)


# --- rows without a target ----------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(as_gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What makes the host wait, in order."""
    waits: list[str] = []
    nonzero = Tensor.nonzero

    def spy(x: Tensor, **options: Any) -> Tensor:
        waits.append("nonzero")
        return nonzero(x, **options)

    monkeypatch.setattr(Tensor, "nonzero", spy)
    return waits


def test_who_may_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert devices.may_wait(CUDA) and devices.may_wait(CPU) and devices.may_wait(torch.device("xpu"))
    capturing = True
    assert not devices.may_wait(CUDA) and devices.may_wait(CPU)
    capturing = False
    monkeypatch.setattr(devices, "SKIP_IGNORED", False)
    assert not devices.may_wait(CUDA) and devices.may_wait(CPU)
    monkeypatch.setattr(devices, "SKIP_IGNORED", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not devices.may_wait(CUDA) and devices.may_wait(CPU)


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_ignored_rows_cost_one_wait_and_reach_nothing(
    on_a_gpu: list[str], backend: str, chunk_size: int | None
) -> None:
    need(backend)
    hidden, weight, target = operands()
    target[::3] = IGNORE
    hidden[::3] = float("nan")
    keep = (target != IGNORE).nonzero().view(-1)
    del on_a_gpu[:]
    ours = step(hidden, weight, target, chunk_size=chunk_size, backend=backend)
    assert on_a_gpu == ["nonzero"]
    alone = step(hidden[keep], weight, target[keep], chunk_size=chunk_size, backend=backend)
    assert torch.equal(ours[0], alone[0]) and torch.equal(ours[2], alone[2])
    assert torch.equal(ours[1][keep], alone[1]) and not ours[1][::3].any()
    close(alone, exact(hidden[keep], weight, target[keep]), EPS[F32])


def test_a_backward_of_its_own_does_not_wait_again(on_a_gpu: list[str]) -> None:
    backend = need("triton")
    hidden, weight, target = operands()
    target[5:30] = IGNORE
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    logprobs = fastloss.linear_token_stats(*leaves, target, backend=backend).logprobs
    logprobs.square().sum().backward()
    loss = fastloss.linear_cross_entropy(*leaves, target, reduction="none", backend=backend)
    loss.sum().backward()
    assert on_a_gpu == ["nonzero"] * 2


def test_all_rows_are_computed_where_it_is_switched_off(
    on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = need("triton")
    monkeypatch.setattr(devices, "SKIP_IGNORED", False)
    hidden, weight, target = operands()
    target[::3] = IGNORE
    right = exact(hidden, weight, target)
    del on_a_gpu[:]
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    assert fastloss.explain(fastloss.linear_cross_entropy, *leaves, target, backend=backend)["rows"] == 37
    close(step(hidden, weight, target, backend=backend), right, EPS[F32])
    assert on_a_gpu == []


def test_prompts_of_pairs_are_left_out(on_a_gpu: list[str]) -> None:
    backend = need("triton")
    hidden, weight, target = operands(24)
    hidden, target = hidden.view(4, 6, -1), target.view(4, 6)
    target[:, :4] = IGNORE
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    plan = fastloss.explain(fastloss.linear_simpo_loss, *leaves, target, backend=backend)
    assert plan["rows"] == 8
    del on_a_gpu[:]
    loss = fastloss.linear_simpo_loss(*leaves, target, backend=backend).loss
    assert on_a_gpu == ["nonzero"]
    loss.backward()
    assert hidden.grad is not None and not hidden.grad[:, :4].any()
    right = fastloss.linear_simpo_loss(
        *(x.detach().double() for x in leaves), target, backend="reference"
    ).loss
    torch.testing.assert_close(loss.detach().double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_masked_tokens_of_policies_are_left_out(on_a_gpu: list[str], frozen: bool) -> None:
    backend = need("triton")
    hidden, weight, target = operands(24)
    hidden, target = hidden.view(4, 6, -1), target.view(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool, device=DEVICE)
    mask[:, :3] = False
    hidden[:, :3] = float("nan")
    old, advantages = -torch.rand(4, 6, device=DEVICE), torch.randn(4, device=DEVICE)
    leaves = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    call = (target, old, advantages, mask)
    assert fastloss.explain(fastloss.linear_policy_loss, *leaves, *call, backend=backend)["rows"] == 12
    del on_a_gpu[:]
    loss = fastloss.linear_policy_loss(*leaves, *call, backend=backend).loss
    assert on_a_gpu == ["nonzero"]
    loss.backward()
    clean = (leaves[0].detach().nan_to_num(), leaves[1].detach())
    right = fastloss.linear_policy_loss(*(x.double() for x in clean), *call, backend="reference").loss
    torch.testing.assert_close(loss.detach().double(), right, rtol=1e-5, atol=1e-5)
    assert hidden.grad is not None and hidden.grad.isfinite().all() and not hidden.grad[:, :3].any()


def test_an_operator_of_a_compiled_graph_does_not_wait(on_a_gpu: list[str]) -> None:
    backend = need("triton")
    torch._dynamo.reset()
    hidden, weight, target = operands()
    target[::3] = IGNORE
    function = torch.compile(
        lambda h, w: fastloss.linear_cross_entropy(h, w, target, backend=backend), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    right = exact(hidden, weight, target)
    del on_a_gpu[:]
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = function(*leaves)
    loss.backward()
    assert on_a_gpu == []
    assert leaves[0].grad is not None and leaves[1].grad is not None
    close((loss.detach(), leaves[0].grad, leaves[1].grad), right, EPS[F32])


# --- padded rows of logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "stride"), [(50257, 50304), (128256, 128256), (64, 64), (1, 64), (65, 128)]
)
def test_rows_of_logits_begin_at_multiples_of_64(as_gpu: None, vocab: int, stride: int) -> None:
    logits = head_rows.new_logits(3, vocab, BF16, CPU)
    assert logits.shape == (3, vocab) and logits.stride() == (stride, 1)


def test_rows_of_logits_on_the_cpu_are_dense() -> None:
    assert head_rows.new_logits(3, 301, F32, CPU).is_contiguous()


@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
@pytest.mark.parametrize("vocab", [1, 37, 301, 1031])
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_padding_changes_no_bit_and_is_not_touched(backend: str, vocab: int, dtype: torch.dtype) -> None:
    """Statistics, loss and gradient, in place, of rows 64 elements apart: those of dense rows, with NaN in between."""
    kernels = contract(backend)
    generator = torch.Generator().manual_seed(vocab)
    dense = torch.randn(5, vocab, generator=generator).to(DEVICE, dtype)
    target = torch.randint(0, vocab, (5,), generator=generator).to(DEVICE)
    target[3] = IGNORE
    stride = -(-vocab // 64) * 64 + 64 * (vocab % 64 == 0)
    options = CrossEntropyOptions(label_smoothing=0.1, z_loss=1e-3)
    want = ("logprobs", "entropy", "mean_logits")

    def padded() -> tuple[Tensor, Tensor]:
        memory = torch.full((5, stride), float("nan"), device=DEVICE, dtype=dtype)
        memory[:, :vocab] = dense
        return memory[:, :vocab], memory

    def everything(rows: Tensor, other: Tensor) -> list[Tensor]:
        stats = kernels.row_stats(rows, target, options, want=(*want, LSE_PARTS))
        out = kernels.row_cross_entropy(rows, target, options, grad=rows, want=want)
        one = torch.ones(5, device=DEVICE)
        k = Coefficients(a=one, b=-one, c=one)
        kernels.row_grad(other, target, options, lse_parts=stats[LSE_PARTS], coefficients=k, out=other)
        return [*stats.values(), out["loss"], *(out[name] for name in want), rows, other]

    (first, memory), (second, memory_too) = padded(), padded()
    for ours, theirs in zip(everything(first, second), everything(dense.clone(), dense.clone()), strict=True):
        assert torch.equal(ours, theirs) and ours.isfinite().all()
    assert memory[:, vocab:].isnan().all() and memory_too[:, vocab:].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_a_head_over_padded_logits(
    as_gpu: None, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype
) -> None:
    """Of 301 logits, in chunks, with a bias: the buffer is full of NaN before, and its padding afterwards."""
    need(backend)
    hidden, weight, target = operands(dtype=dtype)
    bias = torch.randn(301, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    plain, buffers = head_rows.new_logits, []

    def filled(*given: Any) -> Tensor:
        buffers.append(plain(*given))
        base = buffers[-1]._base
        assert base is not None
        base.fill_(float("nan"))
        return buffers[-1]

    monkeypatch.setattr(head_rows, "new_logits", filled)
    leaf = bias.clone().requires_grad_()
    ours = (*step(hidden, weight, target, linear_bias=leaf, chunk_size=16, backend=backend), leaf.grad)
    assert [x.stride(0) for x in buffers] == [320] and buffers[0]._base[:, 301:].isnan().all()
    right_bias = bias.double().requires_grad_()
    right = (*exact(hidden, weight, target, linear_bias=right_bias), right_bias.grad)
    close(ours, right, EPS[dtype])
