"""The likeliest class of each token beside its statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, need
from torch import Tensor

import fastloss
from fastloss.engine import head_blocks

ROWS, VOCAB, DIM = 40, 700, 16


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole numbers, so that every GEMM is exact and many logits are equal."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randint(-1, 2, (n, DIM), generator=g).to(DEVICE, dtype) for n in (ROWS, VOCAB))
    target = torch.randint(0, VOCAB, (ROWS,), generator=g).to(DEVICE)
    target[::7] = -100
    return hidden, weight, torch.randint(-2, 3, (VOCAB,), generator=g).to(DEVICE, dtype), target


def expected(logits: Tensor, target: Tensor) -> Tensor:
    return logits.double().argmax(-1).masked_fill(target == -100, 0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equal_logits(dtype: torch.dtype, backend: str) -> None:
    need(backend)
    hidden, weight, bias, target = operands(dtype)
    logits = hidden @ weight.t()
    assert (logits == logits.amax(1, keepdim=True)).sum(1).max() > 1
    out = fastloss.token_stats(logits, target, outputs=("argmax", "logprobs"), softcap=3.0, backend=backend)
    assert out.argmax is not None and out.argmax.dtype == torch.int64
    assert torch.equal(out.argmax, expected(logits, target))
    for own, scale in ((None, 1.0), (bias, 0.5), (bias, -1.0)):
        z = logits if own is None else logits + own
        out = fastloss.linear_token_stats(
            hidden, weight, target, linear_bias=own, logit_scale=scale, outputs=("argmax", "entropy"), backend=backend
        )  # fmt: skip
        assert out.argmax is not None and torch.equal(out.argmax, expected(z * scale, target))
    alone = fastloss.linear_token_stats(hidden, weight, None, outputs=("argmax",), backend=backend).argmax
    assert torch.equal(alone, logits.double().argmax(-1))


def test_every_schedule_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu")
    hidden, weight, _, target = operands()

    def found(**how: Any) -> Tensor:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(how.pop("learned", True))
        out = fastloss.linear_token_stats(h, w, target, outputs=("argmax", "logprobs"), backend="cpu", **how)
        out.logprobs.sum().backward()
        assert out.argmax is not None and not out.argmax.requires_grad
        return out.argmax

    right = expected(hidden @ weight.t(), target)
    for how in ({}, {"learned": False}, {"chunk_size": 8}, {"memory": "low"}):
        assert torch.equal(found(**how), right), how
    monkeypatch.setattr(head_blocks, "ENABLED", False)
    assert torch.equal(found(chunk_size=8), right)


def test_gradients_and_shapes_are_those_without_it() -> None:
    hidden, weight, _, target = operands(torch.float64)
    h = hidden.view(4, 10, DIM).requires_grad_()
    names = ("entropy", "argmax", "logprobs")
    out = fastloss.linear_token_stats(h, weight, target.view(4, 10), outputs=names)
    assert out.argmax is not None and out.argmax.shape == (4, 10)
    (out.logprobs - out.entropy).sum().backward()
    g = hidden.detach().requires_grad_()
    other = fastloss.linear_token_stats(g, weight, target, outputs=("entropy", "logprobs"))
    (other.logprobs - other.entropy).sum().backward()
    assert h.grad is not None and g.grad is not None
    torch.testing.assert_close(h.grad.view(ROWS, DIM), g.grad)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0, 4, 2])
    torch.autograd.gradgradcheck(
        lambda a: fastloss.token_stats(a, t, outputs=("argmax", "logprobs")).logprobs, (x,)
    )


def test_compiled() -> None:
    torch.compiler.reset()
    hidden, weight, _, target = operands()

    def both(h: Tensor, w: Tensor) -> tuple[Tensor | None, ...]:
        names = ("argmax", "logprobs")
        head = fastloss.linear_token_stats(h, w, target, outputs=names)
        rows = fastloss.token_stats(h @ w.t(), target, outputs=names)
        return head.argmax, rows.argmax, head.logprobs, rows.logprobs

    h = hidden.clone().requires_grad_()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    got, right = compiled(h, weight), both(h, weight)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)
    assert got[2] is not None and right[2] is not None
    torch.testing.assert_close(*(torch.autograd.grad(out[2].sum(), h)[0] for out in (got, right)))
    torch.compiler.reset()


def test_without_a_target_others_are_refused() -> None:
    with pytest.raises(ValueError, match="target: expected a tensor for outputs='is_top1'"):
        fastloss.token_stats(torch.zeros(1, 3), None, outputs=("argmax", "is_top1"))
