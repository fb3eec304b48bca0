"""fastloss.batch_invariant: the same bits of a token's log-probability in any batch, from a GPU's chunks of rows too.

Without a GPU the kernels run in the interpreter or emulated, and each number of a tile is summed by itself; that a GPU's matrix
units do so too is what the same tests find out there (FASTLOSS_TEST_DEVICE=cuda).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, need
from torch import Tensor

import fastloss
from fastloss.engine import devices, invariance
from fastloss.engine.native import cpu_backend
from fastloss.kernels import logits
from fastloss.kernels.logits import TILES, invariant_logits

GPU_KERNELS = [name for name in KERNELS if name != "cpu"]
# Under torch.compile: seconds each.
COMPILED = ["cuda", pytest.param("triton", marks=pytest.mark.slow)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROWS, DIM, VOCAB = (
    (45, 35, 50) if DEVICE == "cpu" else (141, 70, 150)
)  # more than one tile of each, none whole


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which is slow."""
    if DEVICE == "cpu":
        monkeypatch.setattr(logits, "TILES", {n: {**t, "M": 32, "N": 32, "K": 16} for n, t in TILES.items()})


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)


@pytest.fixture
def asked() -> Iterator[None]:
    with fastloss.batch_invariant():
        yield


def operands(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(rows, DIM, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(VOCAB, DIM, generator=generator).to(DEVICE, dtype)
    return hidden, weight, torch.randint(0, VOCAB, (rows,), generator=generator).to(DEVICE)


def logprobs(*tensors: Tensor, **options: Any) -> Tensor:
    found = fastloss.linear_token_stats(*tensors, **options).logprobs
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_product(dtype: torch.dtype) -> None:
    """Against float64, between rows that it does not touch; a row's bits are its own."""
    need("triton")
    hidden, weight, _ = operands(dtype)
    memory = torch.full((ROWS, 192), float("nan"), device=DEVICE)
    invariant_logits(hidden, weight, memory[:, :VOCAB])
    right = hidden.double() @ weight.double().t()
    # Products of low precision are exact, and all are added in float32.
    bound = DIM * 2**-24 * (hidden.double().abs() @ weight.double().abs().t())
    assert ((memory[:, :VOCAB] - right).abs() <= bound).all() and memory[:, VOCAB:].isnan().all()
    assert logits.tile_of(hidden.element_size())["M"] < ROWS
    for start, stop in ((0, 1), (3, 4), (ROWS - 1, ROWS), (5, 41)):
        some = torch.empty(stop - start, VOCAB, device=DEVICE)
        invariant_logits(hidden[start:stop], weight, some)
        assert torch.equal(some, memory[start:stop, :VOCAB])


def test_a_row_of_nan_stays_alone() -> None:
    need("triton")
    hidden, weight, _ = operands(F32)
    out, clean = (torch.empty(ROWS, VOCAB, device=DEVICE) for _ in range(2))
    invariant_logits(hidden, weight, clean)
    hidden[4] = float("nan")
    invariant_logits(hidden, weight, out)
    assert out[4].isnan().all()
    out[4] = clean[4]
    assert torch.equal(out, clean)


@pytest.mark.parametrize(
    ("dim", "shift", "copied"), [(32, 0, False), (35, 0, True), (32, 1, True), (48, 16, False)]
)
def test_only_aligned_rows_reach_the_product(dim: int, shift: int, copied: bool) -> None:
    """One program for a row wherever its batch has put it."""
    memory = torch.arange(4.0 * dim + shift, device=DEVICE)
    rows = memory[shift:].view(4, dim)
    for start in (0, 1, 3):
        found = invariance.aligned(rows[start:], logits.FARTHEST)
        assert torch.equal(found, rows[start:]) and found.stride(0) % 16 == 0 and found.data_ptr() % 16 == 0
        assert (found.data_ptr() != rows[start:].data_ptr()) == copied
    assert invariance.aligned(rows.t().contiguous().t(), logits.FARTHEST).stride(1) == 1
    assert invariance.aligned(rows, 16).data_ptr() != rows.data_ptr()


def test_what_the_product_refuses() -> None:
    need("triton")
    hidden, weight, _ = operands(F32)
    out = torch.empty(ROWS, VOCAB, device=DEVICE)
    with pytest.raises(TypeError, match="float64"):
        invariant_logits(hidden.double(), weight, out)
    with pytest.raises(ValueError, match="one width"):
        invariant_logits(hidden[:, 1:], weight, out)
    with pytest.raises(ValueError, match="unit stride"):
        invariant_logits(hidden.t().contiguous().t(), weight, out)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_log_probs_of_a_head(as_gpu: None, asked: None, backend: str, dtype: torch.dtype) -> None:
    need(backend)
    hidden, weight, target = operands(dtype)
    want = logprobs(hidden, weight, target, backend=backend)
    for chunk_size in (7, 40):
        assert torch.equal(logprobs(hidden, weight, target, chunk_size=chunk_size, backend=backend), want)
    for start, stop in ((0, 1), (ROWS - 1, ROWS), (5, 41)):
        some = logprobs(hidden[start:stop], weight, target[start:stop], backend=backend)
        assert torch.equal(some, want[start:stop])
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(logprobs(hidden[order], weight, target[order], backend=backend), want[order])
    masked = target.clone()
    masked[::3] = -100
    some = logprobs(hidden, weight, masked, backend=backend)
    assert torch.equal(some[1::3], want[1::3]) and not some[::3].any()


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_the_first_ratio_of_policies_is_one(as_gpu: None, asked: None, backend: str) -> None:
    need(backend)
    hidden, weight, target = operands(BF16, rows=24)
    old = logprobs(hidden, weight, target, chunk_size=16, backend=backend).view(4, 6)
    leaves = hidden.view(4, 6, DIM).clone().requires_grad_(), weight.clone().requires_grad_()
    ones = torch.ones(4, device=DEVICE)
    out = fastloss.linear_policy_loss(*leaves, target.view(4, 6), old, ones, None, backend=backend)
    assert float(out.metrics["ratio/max"]) == 1 and float(out.metrics["approx_kl_k3"]) == 0
    out.loss.backward()
    assert leaves[0].grad is not None and leaves[0].grad.isfinite().all() and leaves[0].grad.any()
    stats = fastloss.linear_cross_entropy(hidden, weight, target, return_stats=True, backend=backend)[1]
    assert torch.equal(stats.logprobs, old.view(-1))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_of_a_head(as_gpu: None, asked: None, dtype: torch.dtype) -> None:
    backend = need("triton")
    hidden, weight, target = operands(dtype, rows=20)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    fastloss.linear_cross_entropy(*leaves, target, backend=backend).backward()
    with fastloss.batch_invariant(False):
        right = [x.double().requires_grad_() for x in (hidden, weight)]
        fastloss.linear_cross_entropy(*right, target, backend="reference").backward()
    for x, y in zip(leaves, right, strict=True):
        assert x.grad is not None and y.grad is not None
        eps = 1e-5 if dtype == F32 else 2**-7
        assert float((x.grad.double() - y.grad).abs().max()) <= 4 * eps * float(y.grad.abs().max())


def test_explain_and_the_switch(as_gpu: None) -> None:
    backend = need("triton")
    hidden, weight, target = operands(BF16, rows=4)

    def plan() -> dict[str, Any]:
        return fastloss.explain(fastloss.linear_token_stats, hidden, weight, target, backend=backend)

    assert "batch_invariant" not in plan() and plan()["logits_dtype"] == "torch.bfloat16"
    with fastloss.batch_invariant():
        assert plan()["batch_invariant"] and plan()["logits_dtype"] == "torch.float32"
        with fastloss.batch_invariant(False):
            assert not invariance.wanted()
        assert invariance.wanted()
    assert not invariance.wanted()
    fastloss.batch_invariant()
    assert invariance.wanted()
    fastloss.batch_invariant(False)
    assert not invariance.wanted()


def test_who_cannot_promise_it_says_so(as_gpu: None, asked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = need("triton")
    hidden, weight, target = operands(F32, rows=4)
    with pytest.raises(RuntimeError, match=r"batch_invariant: .*the definition"):
        logprobs(hidden, weight, target, backend="reference")
    with pytest.raises(RuntimeError, match=r"batch_invariant: .*LoRA"):
        lora = torch.ones(2, DIM, device=DEVICE), torch.ones(VOCAB, 2, device=DEVICE), 1.0
        fastloss.linear_cross_entropy(hidden, weight, target, lora=lora, backend=backend)
    backend = need("cuda")  # whose logits would be Triton's too
    monkeypatch.setattr(invariance.TritonBackend, "why_not", lambda self: "triton cannot be imported")
    with pytest.raises(RuntimeError, match=r"batch_invariant: .*triton cannot be imported"):
        logprobs(hidden, weight, target, backend=backend)


@pytest.mark.skipif(bool(cpu_backend().why_not()) or DEVICE != "cpu", reason="of the CPU's kernels")
def test_on_a_cpu(asked: None) -> None:
    """Blocks of the vocabulary have it as they are; the library's products have not."""
    hidden, weight, target = operands(F32, rows=8)
    assert torch.equal(logprobs(hidden[2:3], weight, target[2:3]), logprobs(hidden, weight, target)[2:3])
    with pytest.raises(RuntimeError, match="chunks of rows on a CPU"):
        logprobs(hidden.double(), weight.double(), target)


@pytest.mark.parametrize("backend", COMPILED)
def test_under_torch_compile(as_gpu: None, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """A compiled call has the bits of an eager one and of a token alone; asked for after it was compiled, it is compiled again."""
    need(backend)
    torch._dynamo.reset()
    hidden, weight, target = operands(BF16, 20)
    products: list[int] = []
    plain = invariance.multiply

    def spy(out: Tensor, rows: Tensor, matrix: Tensor) -> None:
        products.append(rows.shape[0])
        plain(out, rows, matrix)

    monkeypatch.setattr(invariance, "multiply", spy)
    function = torch.compile(
        lambda h, t: logprobs(h, weight, t, backend=backend), fullgraph=True, backend="aot_eager", dynamic=False
    )  # fmt: skip
    with torch.no_grad():
        function(hidden, target)
        assert products == []
        with fastloss.batch_invariant():
            together = function(hidden, target)
            assert products == [20]
            assert torch.equal(together, logprobs(hidden, weight, target, backend=backend))
            for row in (0, 7):
                alone = function(hidden[row : row + 1], target[row : row + 1])
                assert torch.equal(alone, together[row : row + 1])
    assert products == [20, 20, 1, 1]


@pytest.mark.parametrize("backend", COMPILED)
def test_gradients_under_torch_compile(as_gpu: None, asked: None, backend: str) -> None:
    """Of a loss, in one graph, against float64: float32 logits and the library's products behind them."""
    need(backend)
    torch._dynamo.reset()
    hidden, weight, target = operands(F32, 20)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    function = torch.compile(
        lambda h, w: fastloss.linear_cross_entropy(h, w, target, backend=backend), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    loss = function(*leaves)
    ours = torch.autograd.grad(loss, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    right = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), target)
    for grad, want in zip(ours, torch.autograd.grad(right, exact), strict=True):
        assert float((grad.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert abs(float(loss.detach()) - float(right.detach())) <= 1e-5 * float(right.detach())
