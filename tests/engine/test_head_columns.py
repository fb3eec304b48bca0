"""memory="low" on a GPU: blocks of the vocabulary with the library's GEMMs and the row kernels (engine/head_columns.py)."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, contract, need
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastloss
from fastloss.engine import devices, head, head_columns
from fastloss.engine.backend import get_backend
from fastloss.engine.head_types import Head, Limits, Needs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GPU_KERNELS = [name for name in KERNELS if name != "cpu"]
# Under torch.compile: seconds each.
COMPILED = ["cuda", pytest.param("triton", marks=pytest.mark.slow)]
EPS = {F32: 1e-5, BF16: 2**-7, F16: 2**-10}
DIM, VOCAB = 24, 150
LOW: dict[str, Any] = {"memory": "low"}


@pytest.fixture(autouse=True)
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 columns: five, the last one of 22."""
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(head_columns, "BLOCKS", 5)
    monkeypatch.setattr(head_columns, "COLUMNS", 32)


def operands(rows: int = 37, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, DIM, generator=generator)
    weight = torch.randn(VOCAB, DIM, generator=generator) / DIM**0.5
    target = torch.randint(0, VOCAB, (rows,), generator=generator)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), target.to(DEVICE)


def grads(loss: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
    found = torch.autograd.grad(loss, leaves)
    return tuple(found)


def close(ours: tuple[Tensor, ...], right: tuple[Tensor, ...], eps: float) -> None:
    for x, y in zip(ours, right, strict=True):
        assert x.shape == y.shape and float((x.double() - y).abs().max()) <= 4 * eps * float(y.abs().max())


def both(
    function: Any, dtype: torch.dtype, backend: str, rows: int = 37, **options: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(loss, d hidden, d weight, d bias) in low memory, and those of the definition in float64."""
    hidden, weight, target = operands(rows, dtype)
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    out = []
    for kind, low in ((dtype, {**LOW, "backend": backend}), (torch.float64, {"backend": "reference"})):
        leaves = [x.detach().to(kind).requires_grad_() for x in (hidden, weight, bias)]
        loss = function(*leaves[:2], target, linear_bias=leaves[2], **options, **low)
        out.append((loss.detach(), *grads(loss, *leaves)))
    return out[0], out[1]


@pytest.mark.parametrize("rows", [20, 60])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_cross_entropy(backend: str, dtype: torch.dtype, rows: int) -> None:
    """With all rows' logits kept, and with some made again."""
    need(backend)
    close(*both(fastloss.linear_cross_entropy, dtype, backend, rows, z_loss=1e-3, softcap=5.0), EPS[dtype])


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"ignore": True},
        {"weights": True},
        {"token_weight": True},
        {"logits_dtype": F32},
        {"temperature": True},
        {"reduction": "none"},
    ],
    ids=str,
)
def test_options_of_cross_entropy(options: dict[str, Any]) -> None:
    backend, dtype = need("triton"), BF16 if "logits_dtype" in options else F32
    generator = torch.Generator().manual_seed(5)
    positive = torch.rand(37, generator=generator).to(DEVICE) + 0.5
    given = dict(options)
    ignore, per_class = given.pop("ignore", False), given.pop("weights", False)
    per_row = given.get("reduction") == "none"

    def function(hidden: Tensor, weight: Tensor, target: Tensor, **more: Any) -> Tensor:
        own = dict(given)
        if ignore:
            target = target.clone()
            target[::3] = -100
        if per_class:
            own["weight"] = torch.linspace(0.5, 1.5, VOCAB).to(DEVICE, hidden.dtype)
        for name in ("token_weight", "temperature"):
            if own.get(name):
                own[name] = positive.to(torch.promote_types(hidden.dtype, F32))
        if hidden.dtype == torch.float64:
            own.pop("logits_dtype", None)
        loss = fastloss.linear_cross_entropy(hidden, weight, target, **own, **more)
        return (loss * positive.to(loss.dtype)).sum() if per_row else loss

    close(*both(function, dtype, backend), EPS[dtype])


def test_statistics_and_their_gradients() -> None:
    backend = need("triton")
    hidden, weight, target = operands()
    target[3] = -100
    want = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "is_top1", "argmax")
    out = []
    for dtype, options in ((F32, {**LOW, "backend": backend}), (torch.float64, {"backend": "reference"})):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        found = fastloss.linear_token_stats(*leaves, target, outputs=want, **options)
        made = [getattr(found, name) for name in want]
        loss = (made[0] * 2 + made[1] + 0.5 * made[2]).sum()
        out.append((*made, *grads(loss, *leaves)))
    for ours, right in zip(*out, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=2e-5, atol=2e-5)


def test_bad_targets_and_infinite_logits() -> None:
    """A target outside the vocabulary is NaN in its row alone; a block whose classes a bias forbids has no share."""
    kernels = contract("triton")
    hidden, weight, target = operands(6)
    target[2] = VOCAB
    bias = torch.zeros(VOCAB, device=DEVICE)
    bias[32:64] = -torch.inf  # the second block
    target[0] = 40
    operand = Head(kernels, hidden, weight, bias, F32)
    schedule = head.in_columns(operand, 6, Needs(True, True, True), Limits(memory="low"))
    assert schedule is not None and schedule.columns == 32
    from fastloss.engine.contract import WHOLE
    from fastloss.tables import CrossEntropyOptions

    out, made = head.cross_entropy(
        operand, Needs(True, True, True), target, None, CrossEntropyOptions(), ("logprobs",), WHOLE, schedule, None
    )  # fmt: skip
    right = torch.log_softmax((hidden @ weight.t() + bias).double(), -1)
    assert out["logprobs"][2].isnan() and out["logprobs"][0] == -torch.inf
    rest = [1, 3, 4, 5]
    torch.testing.assert_close(
        out["logprobs"][rest].double(), right[rest, target[rest]], rtol=1e-5, atol=1e-5
    )
    assert made.hidden is not None and made.hidden[2].isnan().all() and made.hidden[rest].isfinite().all()
    assert made.weight is not None and made.bias is not None


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_policies(loss_type: str) -> None:
    backend = need("triton")
    hidden, weight, target = operands(24)
    old = -torch.rand(4, 6, device=DEVICE) * 3
    advantages = torch.randn(4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones(4, 6, dtype=torch.bool, device=DEVICE)
    mask[1, 2:] = False
    out = []
    for dtype, options in ((F32, {**LOW, "backend": backend}), (torch.float64, {"backend": "reference"})):
        leaves = hidden.view(4, 6, DIM).to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        call = (target.view(4, 6), old.to(dtype), advantages.to(dtype), mask)
        if dtype == F32:
            plan = fastloss.explain(
                fastloss.linear_policy_loss, *leaves, *call, loss_type=loss_type, entropy_coef=0.1, **options
            )
            assert plan["schedule"] == "blocks of the vocabulary" and plan["gemms"] == 3
        loss = fastloss.linear_policy_loss(
            *leaves, *call, loss_type=loss_type, entropy_coef=0.1, **options
        ).loss
        out.append((loss.detach(), *grads(loss, *leaves)))
    close(out[0], out[1], EPS[F32])


def test_pairs() -> None:
    backend = need("triton")
    hidden, weight, target = operands(24)
    target = target.view(4, 6).clone()
    target[:, :2] = -100
    out = []
    for dtype, options in ((F32, {**LOW, "backend": backend}), (torch.float64, {"backend": "reference"})):
        leaves = hidden.view(4, 6, DIM).to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = fastloss.linear_simpo_loss(*leaves, target, **options).loss
        out.append((loss.detach(), *grads(loss, *leaves)))
    close(out[0], out[1], EPS[F32])


@pytest.mark.parametrize(("rows", "gemms"), [(20, 3.0), (24, 3.0), (48, 3.5)])
def test_products_are_counted_as_they_are(monkeypatch: pytest.MonkeyPatch, rows: int, gemms: float) -> None:
    """What a FLOP counter is told, what ``explain`` says, and what is multiplied."""
    backend = need("triton")
    hidden, weight, target = operands(rows)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    plan = fastloss.explain(fastloss.linear_cross_entropy, *leaves, target, backend=backend, **LOW)
    assert plan["schedule"] == "blocks of the vocabulary" and plan["gemms"] == gemms
    assert (
        plan["chunk_columns"] == 32
        and plan["buffer_bytes"] == rows * 32 * 4
        and plan["accumulator_bytes"] == 0
    )
    whole = round(2 * rows * VOCAB * DIM * gemms)
    with FlopCounterMode(display=False) as told:
        fastloss.linear_cross_entropy(*leaves, target, backend=backend, **LOW)
    assert told.get_total_flops() == whole
    monkeypatch.setattr(head, "_disable_current_modes", contextlib.nullcontext)
    with FlopCounterMode(display=False) as seen:
        fastloss.linear_cross_entropy(*leaves, target, backend=backend, **LOW)
    assert seen.get_total_flops() == 2 * whole  # the products themselves, and what was told


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 8192 rows of D = 4096, V = 128256 in bfloat16: under 8% of the logits."""
    monkeypatch.undo()
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    hidden, weight = (torch.empty(n, 4096, dtype=BF16, device="meta") for n in (8192, 128256))
    operand = Head(get_backend("triton"), hidden, weight, None, BF16)
    needs = Needs(True, True, False)
    schedule = head.in_columns(operand, 8192, needs, Limits(memory="low"))
    assert schedule is not None and schedule.columns == 4096
    told = schedule.details(operand, 8192, needs, False)
    assert (
        told["buffer_bytes"] < 0.08 * 8192 * 128256 * 2
        and told["gemms"] == 3.5
        and told["accumulator_bytes"] == 0
    )


def test_who_takes_chunks_of_rows() -> None:
    backend = need("triton")
    hidden, weight, target = operands()
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def schedule(*tensors: Tensor, **options: Any) -> str:
        plan = fastloss.explain(fastloss.linear_cross_entropy, *tensors, target, backend=backend, **options)
        return str(plan["schedule"])

    assert schedule(*leaves, **LOW) == "blocks of the vocabulary"
    for options in ({}, {"memory": "fast"}, {**LOW, "chunk_size": 8}, {**LOW, "label_smoothing": 0.1}):
        assert schedule(*leaves, **options) == "chunks of rows"
    assert schedule(hidden, weight.detach(), **LOW) == "chunks of rows"
    with fastloss.batch_invariant():
        assert schedule(*leaves, **LOW) == "chunks of rows"


@pytest.mark.parametrize("backend", COMPILED)
def test_under_torch_compile(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The operators take the same blocks for the gradients, in one graph; for cross-entropy all bits are those of an eager call."""
    need(backend)
    torch._dynamo.reset()
    hidden, weight, target = operands(30, BF16)
    made: list[int] = []
    plain = head_columns.ColumnPart.gradients

    def spy(self: Any, *given: Any, **options: Any) -> None:
        made.append(self.run.rows)
        plain(self, *given, **options)

    monkeypatch.setattr(head_columns.ColumnPart, "gradients", spy)

    def cross_entropy(h: Tensor, w: Tensor) -> Tensor:
        return fastloss.linear_cross_entropy(h, w, target, z_loss=1e-3, backend=backend, **LOW)

    def stats(h: Tensor, w: Tensor) -> Tensor:
        found = fastloss.linear_token_stats(h, w, target, backend=backend, **LOW).logprobs
        assert found is not None
        return found.square().sum()

    for function in (cross_entropy, stats):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves)
        eager = (loss.detach(), *grads(loss, *leaves))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
        found = (compiled.detach(), *grads(compiled, *leaves))
        for ours, theirs in zip(found, eager, strict=True):
            if function is cross_entropy:
                assert torch.equal(ours, theirs)
            else:  # statistics of whole rows: no gradient is made beside them
                torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * float(theirs.abs().max()))
    assert made == [30] * 4
