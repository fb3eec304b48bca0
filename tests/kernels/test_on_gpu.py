"""On a GPU alone: real vocabularies, strides and row counts, heads of several chunks, a second device, streams, CUDA graphs,
autocast, torch.compile, and calls at which the host may not wait. `make gpu STAGES=tests` runs them.

What needs no GPU to run is rehearsed on small shapes on the CPU, with the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import DEVICE, KERNELS, need
from torch import Tensor

import fastloss
from fastloss.engine import devices, head_exponentials

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="FASTLOSS_TEST_DEVICE=cuda")
gpu = lambda test: pytest.mark.gpu(on_gpu(test))
second = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
BACKENDS = [name for name in KERNELS if name != "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = [32000, 50257, 128256, 151936, 256000]
IGNORE = -100
# Of the largest entry of a gradient: what its dtype rounds away, and float32's sums over a vocabulary.
EPS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def seeded(*shape: int, device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def labels(rows: int, vocab: int, device: Any, every: int = 4) -> Tensor:
    generator = torch.Generator(device).manual_seed(rows)
    target = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    target[::every] = IGNORE
    return target


def near(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ours.isfinite().all()
    off = float((ours.double() - exact.double()).abs().max())
    assert off <= tolerance * max(float(exact.abs().max()), 1e-30), f"off by {off}"


def check_rows(
    backend: str, vocab: int, dtype: torch.dtype, layout: str, inplace: bool, device: Any, rows: int = 64
) -> None:
    """Loss and gradient against float64: dense rows, rows at an odd stride, rows that begin at an odd address, padded ones."""
    wide, first = {"dense": (0, 0), "odd stride": (3, 0), "odd start": (3, 1), "padded": (-vocab % 64, 0)}[
        layout
    ]
    memory = seeded(rows, vocab + wide, device=device, dtype=dtype)
    leaf = memory.clone().requires_grad_()
    target = labels(rows, vocab, device)
    logits = (leaf * 1 if inplace else leaf)[:, first : first + vocab]
    loss = fastloss.cross_entropy(logits, target, z_loss=1e-4, inplace=inplace, backend=backend)
    exact = memory[:, first : first + vocab].double().requires_grad_()
    right = fastloss.cross_entropy(exact, target, z_loss=1e-4, backend="reference")
    (2 * loss).backward()
    (2 * right).backward()
    assert leaf.grad is not None and exact.grad is not None
    near(loss.detach(), right.detach(), EPS[dtype])
    grad = leaf.grad[:, first : first + vocab]
    near(grad, exact.grad, EPS[dtype])
    assert not grad[target == IGNORE].any()
    assert float(leaf.grad.abs().double().sum() - grad.abs().double().sum()) == pytest.approx(0, abs=1e-3)


def check_head(
    backend: str, vocab: int, dtype: torch.dtype, device: Any, rows: int, dim: int, **options: Any
) -> dict[str, Any]:
    hidden = seeded(rows, dim, device=device, dtype=dtype).requires_grad_()
    weight = (seeded(vocab, dim, device=device) / dim**0.5).to(dtype).requires_grad_()
    target = labels(rows, vocab, device, every=8)
    call = {"backend": backend, **options}
    plan = fastloss.explain(fastloss.linear_cross_entropy, hidden, weight, target, **call)
    loss = fastloss.linear_cross_entropy(hidden, weight, target, **call)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    F.cross_entropy(exact[0] @ exact[1].t(), target, ignore_index=IGNORE).backward()
    for ours, right in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and right.grad is not None and ours.grad.dtype == dtype
        near(ours.grad, right.grad, 8 * EPS[dtype])  # logits and their gradients are rounded too
    return plan


@pytest.mark.parametrize("layout", ["dense", "odd stride", "odd start", "padded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rehearsal_of_rows(backend: str, layout: str) -> None:
    for inplace in (False, True):
        check_rows(need(backend), 131, torch.float32, layout, inplace, DEVICE, rows=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rehearsal_of_heads(backend: str) -> None:
    check_head(need(backend), 131, torch.float32, DEVICE, 12, 16, chunk_size=5)


@gpu
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["dense", "odd stride", "odd start", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows(backend: str, vocab: int, dtype: torch.dtype, layout: str, inplace: bool) -> None:
    check_rows(need(backend), vocab, dtype, layout, inplace, DEVICE)


@gpu
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["dense", "odd stride", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1000, *VOCABS])
def test_rows_read_once(
    vocab: int, dtype: torch.dtype, layout: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By clusters, of more rows than there are clusters at once; those that do not begin at 16 bytes by the other kernel."""
    monkeypatch.setenv("FASTLOSS_CLUSTER_ROWS", "1")
    if layout == "padded" and torch.cuda.get_device_capability()[0] >= 9:
        width = vocab + -vocab % 64
        x = torch.zeros(2, width, device=DEVICE, dtype=dtype).requires_grad_() * 1
        call = (fastloss.cross_entropy, x[:, :vocab], torch.zeros(2, dtype=torch.int64, device=DEVICE))
        told = fastloss.explain(*call, inplace=True, backend="cuda")["row_kernel"]
        assert "one read" in told or "do not fit" in told, told
    check_rows("cuda", vocab, dtype, layout, inplace, DEVICE, rows=140)


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_dimension_of_the_grid_takes(backend: str) -> None:
    check_rows(need(backend), 64, torch.float32, "dense", False, DEVICE, rows=70001)


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_logits_than_32_bits_count(backend: str) -> None:
    """2^31 elements and a few rows more: the last rows are those of a call with these alone."""
    need(backend)
    vocab = 32000
    rows = 2**31 // vocab + 10
    logits = torch.zeros(rows, vocab, device=DEVICE, dtype=torch.bfloat16)
    logits[-8:] = seeded(8, vocab, device=DEVICE, dtype=torch.bfloat16)
    target = labels(rows, vocab, DEVICE)
    all_rows = fastloss.token_stats(logits, target, outputs=("logprobs", "entropy"), backend=backend)
    last = fastloss.token_stats(logits[-8:], target[-8:], outputs=("logprobs", "entropy"), backend=backend)
    assert torch.equal(all_rows.logprobs[-8:], last.logprobs)
    assert torch.equal(all_rows.entropy[-8:], last.entropy)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [50257, 128256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_one_and_of_three_chunks(backend: str, vocab: int, dtype: torch.dtype) -> None:
    need(backend)
    one = check_head(backend, vocab, dtype, DEVICE, 768, 512)
    assert one["chunk_rows"] == one["rows"] == 672 and one["accumulator_bytes"] == (
        4 * vocab * 512 if dtype == torch.float16 else 0
    )
    three = check_head(backend, vocab, dtype, DEVICE, 768, 512, chunk_size=256)
    assert -(-three["rows"] // three["chunk_rows"]) == 3


@gpu
@pytest.mark.parametrize("chunk_size", [None, 256])
@pytest.mark.parametrize("vocab", [50257, 128256, 256000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_from_scaled_exponentials(backend: str, vocab: int, chunk_size: int | None) -> None:
    need(backend)
    with head_exponentials.enabled():
        plan = check_head(backend, vocab, torch.bfloat16, DEVICE, 768, 512, chunk_size=chunk_size)
    assert plan["row_pass"] == "scaled exponentials" and plan["chunk_rows"] == (chunk_size or 672)


@gpu
def test_heads_of_their_own_three_chunks() -> None:
    plan = check_head("auto", 32000, torch.bfloat16, DEVICE, 6000, 256)
    assert -(-plan["rows"] // plan["chunk_rows"]) == 3 and plan["chunk_rows"] % 256 == 0


@gpu
@second
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    need(backend)
    with torch.cuda.device(0):
        check_rows(backend, 32000, torch.bfloat16, "dense", False, "cuda:1")
        check_head(backend, 32000, torch.bfloat16, "cuda:1", 256, 128)
        assert torch.cuda.current_device() == 0


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_side_stream(backend: str) -> None:
    """The kernels wait for what the stream was given before: logits that a long product makes."""
    need(backend)
    a, target = seeded(2048, 2048, device=DEVICE), labels(2048, 2048, DEVICE)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        logits = a
        for _ in range(20):
            logits = (logits @ a) / 45.0
        loss = fastloss.cross_entropy(logits, target, backend=backend)
    side.synchronize()
    torch.testing.assert_close(loss, F.cross_entropy(logits, target), rtol=1e-5, atol=1e-5)


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Warmed up on a side stream, then captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


@gpu
@pytest.mark.parametrize("from_head", [False, True], ids=["logits", "head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_is_captured_and_replayed_twice(backend: str, from_head: bool) -> None:
    """Over other numbers and other ignored rows each time: nothing of the capture's is left in it."""
    need(backend)
    rows, dim, vocab = 256, 128, 50257
    x = seeded(rows, dim if from_head else vocab, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = seeded(vocab, dim, device=DEVICE, dtype=torch.bfloat16).div_(dim**0.5).requires_grad_()
    target = labels(rows, vocab, DEVICE)
    leaves = (x, weight) if from_head else (x,)

    def loss_of(*given: Tensor, **call: Any) -> Tensor:
        return fastloss.linear_cross_entropy(*given, target, **call) if from_head else fastloss.cross_entropy(
            *given, target, **call
        )  # fmt: skip

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = loss_of(*leaves, backend=backend)
        return loss, torch.autograd.grad(loss, leaves)

    graph, (loss, grads) = capture(step)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, device=DEVICE, dtype=torch.float32))
            target.copy_(labels(rows, vocab, DEVICE, every=2 + seed))
        graph.replay()
        torch.cuda.synchronize()
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        right = loss_of(*exact, backend="reference")
        near(loss, right.detach(), 4 * EPS[torch.bfloat16])
        for ours, theirs in zip(grads, torch.autograd.grad(right, exact), strict=True):
            near(ours, theirs, 8 * EPS[torch.bfloat16])


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    need(backend)
    hidden = seeded(256, 128, device=DEVICE).requires_grad_()
    weight = (seeded(32000, 128, device=DEVICE) / 11).requires_grad_()
    target = labels(256, 32000, DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        loss = fastloss.linear_cross_entropy(hidden, weight, target, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    F.cross_entropy(exact[0] @ exact[1].t(), target).backward()
    for ours, right in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and right.grad is not None and ours.grad.dtype == torch.float32
        near(ours.grad, right.grad, 8 * EPS[torch.bfloat16])


@gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    """The second mode captures CUDA graphs of its own."""
    torch._dynamo.reset()
    hidden = seeded(256, 128, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = (seeded(50257, 128, device=DEVICE) / 11).to(torch.bfloat16).requires_grad_()
    target = labels(256, 50257, DEVICE)

    def step(h: Tensor, w: Tensor) -> Tensor:
        logits = h @ w.t()
        return fastloss.linear_cross_entropy(h, w, target) + fastloss.cross_entropy(logits, target)

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (2 * F.cross_entropy(exact[0] @ exact[1].t(), target)).backward()
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        hidden.grad = weight.grad = None
        compiled(hidden, weight).backward()
        for ours, right in zip((hidden, weight), exact, strict=True):
            assert ours.grad is not None and right.grad is not None
            near(ours.grad, right.grad, 8 * EPS[torch.bfloat16])


def policies_in_turn(device: Any, **compiling: Any) -> None:
    """Compiled losses of two shapes, one after the other and again, against those that are not."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, *given: fastloss.policy_loss(x, *given, None).loss, fullgraph=True, **compiling
    )
    for turn in range(4):
        for batch, length in ((8, 70), (5, 33)):
            old = seeded(batch, length, device=device) * 0.1 - 1
            given = old, seeded(batch, device=device)
            ours, right = ((old + 0.01 * turn).requires_grad_() for _ in range(2))
            if device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            loss = compiled(ours, *given)
            loss.backward()
            theirs = fastloss.policy_loss(right, *given, None).loss
            theirs.backward()
            near(loss.detach(), theirs.detach(), 1e-5)
            assert ours.grad is not None and right.grad is not None
            near(ours.grad, right.grad, 1e-5)


@gpu
def test_graphs_that_share_memory_take_turns() -> None:
    """What a launch counts its blocks in is in no other graph's tensors."""
    policies_in_turn(DEVICE, mode="reduce-overhead", dynamic=False)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda h, w, t: fastloss.cross_entropy(h @ w.t(), t),
    "cross_entropy, per row": lambda h, w, t: fastloss.cross_entropy(h @ w.t(), t, reduction="none").sum(),
    "linear_cross_entropy": lambda h, w, t: fastloss.linear_cross_entropy(h, w, t),
    "linear_token_stats": lambda h, w, t: fastloss.linear_token_stats(h, w, t).logprobs.sum(),
    "linear_simpo_loss": lambda h, w, t: (
        fastloss.linear_simpo_loss(h.view(8, -1, h.shape[1]), w, t.view(8, -1)).loss
    ),
    "linear_policy_loss": lambda h, w, t: (
        fastloss.linear_policy_loss(
            h.view(8, -1, h.shape[1]),
            w,
            t.clamp(min=0).view(8, -1),
            None,
            torch.ones(8, device=h.device),
            None,
        ).loss
    ),
}


@gpu
@pytest.mark.parametrize("name", CALLS)
def test_no_call_waits_where_ignored_rows_are_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "SKIP_IGNORED", False)
    hidden = seeded(64, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = seeded(1000, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    target = labels(64, 1000, DEVICE)
    CALLS[name](hidden, weight, target).backward()  # compiles, asks the device what it can do
    with no_waiting():
        CALLS[name](hidden, weight, target).backward()


@gpu
def test_the_head_waits_once() -> None:
    """To learn which rows have a target; the count of its warnings is that of its waits."""
    hidden = seeded(64, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = seeded(1000, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    target = labels(64, 1000, DEVICE)
    fastloss.linear_cross_entropy(hidden, weight, target).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as seen:
            fastloss.linear_cross_entropy(hidden, weight, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(w.message) for w in seen) == 1


def test_calls_of_this_file_run() -> None:
    """On small tensors, wherever the suite runs."""
    hidden, weight = (seeded(n, 16, device=DEVICE).requires_grad_() for n in (16, 40))
    target = labels(16, 40, DEVICE)
    for name, call in CALLS.items():
        hidden.grad = weight.grad = None
        call(hidden, weight, target).backward()
        assert hidden.grad is not None and hidden.grad.isfinite().all(), name
