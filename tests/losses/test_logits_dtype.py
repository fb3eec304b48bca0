"""Float32 logits of low-precision operands: asked for on every backend, and as the CPU's blocks make them anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, need
from torch import Tensor

import fastloss
from fastloss.engine import devices

ROWS, VOCAB, DIM = 8, 300, 32
GENERATOR = torch.Generator().manual_seed(4)
TARGET = torch.randint(0, VOCAB, (ROWS,), generator=GENERATOR)
BF16, F16 = torch.bfloat16, torch.float16
Loss = Callable[..., Tensor]


def operands(dtype: torch.dtype) -> list[Tensor]:
    """Whose logits lie around 200, where bfloat16's are 1 apart and float16's 1/8."""
    hidden, weight = (torch.randn(n, DIM, generator=torch.Generator().manual_seed(n)) for n in (ROWS, VOCAB))
    hidden[:, 0], weight[:, 0] = 16, 12
    return [hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)]


def target() -> Tensor:
    return TARGET.to(DEVICE)


def cross_entropy(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
    return fastloss.linear_cross_entropy(hidden, weight, target(), **o)


def logprobs(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
    return fastloss.linear_token_stats(hidden, weight, target(), outputs=("logprobs",), **o).logprobs


def dpo(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
    pairs = hidden.view(2, ROWS // 2, DIM)
    return fastloss.linear_dpo_loss(pairs, weight, target().view(2, -1), reference_free=True, **o).loss


def kto(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
    rows, good = hidden.view(2, ROWS // 2, DIM), torch.tensor([True, False], device=DEVICE)
    return fastloss.linear_kto_loss(rows, weight, target().view(2, -1), good, kl=0.0, **o).loss


def policy(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
    ones = torch.ones(1, ROWS, dtype=torch.bool, device=DEVICE)
    old, good = torch.full((1, ROWS), -6.0, device=DEVICE), torch.ones(1, device=DEVICE)
    return fastloss.linear_policy_loss(hidden[None], weight, target()[None], old, good, ones, **o).loss


def distillation(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
    teacher = hidden.detach().roll(1, 0)
    return fastloss.linear_distillation_loss(hidden, weight, teacher, weight.detach(), **o).loss


IDS = (TARGET[:, None] + torch.arange(4)) % VOCAB


def selected(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
    return fastloss.linear_selected_logprobs(hidden, weight, IDS.to(DEVICE), **o)


def topk(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
    theirs = torch.tensor([0.4, 0.3, 0.15, 0.05], device=DEVICE).log().expand(ROWS, 4)
    return fastloss.linear_topk_distillation_loss(hidden, weight, IDS.to(DEVICE), theirs, **o).loss


LOSSES: dict[str, Loss] = {
    f.__name__: f for f in (cross_entropy, logprobs, dpo, kto, policy, distillation, selected, topk)
}


def run(loss: Loss, leaves: list[Tensor], **o: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    value = loss(*leaves, **o)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(got, want, strict=True)]


def check(loss: Loss, dtype: torch.dtype, **o: Any) -> None:
    leaves = operands(dtype)
    want = run(loss, [x.double() for x in leaves], backend="reference")
    value, *gradients = errors(run(loss, leaves, logits_dtype=torch.float32, **o), want)
    # What is returned may have the operands' dtype, and so have the gradients and those of the logits.
    eps = torch.finfo(dtype).eps
    assert value <= eps, value
    assert max(gradients) <= 4 * eps, gradients


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ALL)
def test_logits_are_not_rounded(backend: str, name: str, dtype: torch.dtype) -> None:
    need(backend)
    check(LOSSES[name], dtype, backend=backend)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_on_a_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which makes float32 logits by one product, where its library can, and rounds their gradient for the two others."""
    need("cuda")
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    check(LOSSES[name], dtype, backend="cuda")
    told = fastloss.explain(LOSSES[name], *operands(dtype), logits_dtype=torch.float32, backend="cuda")
    assert told["logits_dtype"] == "torch.float32"


@pytest.mark.parametrize("name", LOSSES)
def test_by_default_in_blocks_of_the_cpu(name: str) -> None:
    need("cpu")
    leaves = [x.cpu() for x in operands(BF16)]
    if fastloss.explain(LOSSES[name], *leaves, backend="cpu")["logits_dtype"] != "torch.float32":
        pytest.skip("here this call goes in chunks of rows, whose logits the library rounds")
    ours, asked = (
        run(LOSSES[name], leaves, backend="cpu", **o) for o in ({}, {"logits_dtype": torch.float32})
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, asked, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_autocast_and_by_the_definition(name: str) -> None:
    loss, leaves = LOSSES[name], operands(BF16)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    check(compiled, BF16)
    want = run(loss, [x.double() for x in leaves], backend="reference")
    with torch.autocast(DEVICE, dtype=BF16):
        wide = [x.float() for x in leaves]
        assert max(errors(run(loss, wide, logits_dtype=torch.float32), want)) <= 2**-5
    (tangent,) = torch.autograd.functional.jvp(  # forward-mode goes to the definition
        lambda x: loss(x, leaves[1], logits_dtype=torch.float32).float(),
        leaves[0],
        torch.ones_like(leaves[0]),
    )[:1]
    assert errors([tangent], want[:1])[0] <= 2**-7


def test_another_dtype_is_refused() -> None:
    for loss in LOSSES.values():
        with pytest.raises(
            ValueError, match=r"logits_dtype: expected None or torch.float32, got torch.bfloat16"
        ):
            loss(*operands(BF16), logits_dtype=BF16)
