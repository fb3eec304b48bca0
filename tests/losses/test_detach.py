"""Statistics that nobody differentiates: the same numbers, no gradient, and no GEMM for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, need
from torch import Tensor

import fastloss
from fastloss import TokenStats

OUTPUTS = ("logprobs", "entropy", "logsumexp")
N, D, V = 9, 8, 37


def operands() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    target = torch.randint(0, V, (N,), generator=g)
    target[2] = -100
    return hidden.to(DEVICE), weight.to(DEVICE), target.to(DEVICE)


def called(kind: str, hidden: Tensor, weight: Tensor, target: Tensor, **how: Any) -> TokenStats:
    if kind == "head":
        return fastloss.linear_token_stats(hidden, weight, target, outputs=OUTPUTS, **how)
    return fastloss.token_stats(hidden @ weight.t(), target, outputs=OUTPUTS, **how)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", ["head", "logits"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("detach", [("entropy",), ("entropy", "logsumexp"), ("logprobs",), OUTPUTS])
def test_values_stay_and_gradients_go(backend: str, kind: str, frozen: bool, detach: tuple[str, ...]) -> None:
    need(backend)
    hidden, weight, target = operands()
    gradients = []
    for own in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        out = called(kind, h, w, target, backend=backend, detach=detach if own else ())
        values = {name: getattr(out, name) for name in OUTPUTS}
        if own:
            assert {name for name, x in values.items() if not x.requires_grad} == set(detach)
        kept = [x * (k + 1.0) for k, (name, x) in enumerate(values.items()) if name not in detach]
        if kept:
            torch.stack(kept).sum().backward()
            gradients.append((h.grad, w.grad, values))
    if detach == OUTPUTS:
        return
    (h0, w0, right), (h1, w1, got) = gradients
    for name in OUTPUTS:
        torch.testing.assert_close(got[name], right[name])
    torch.testing.assert_close(h1, h0)
    if not frozen:
        torch.testing.assert_close(w1, w0)


def test_a_detached_entropy_costs_no_gemm_of_a_frozen_head() -> None:
    hidden, weight, target = operands()
    hidden.requires_grad_()
    plans = [
        fastloss.explain(
            fastloss.linear_token_stats,
            hidden,
            weight,
            target,
            outputs=("logprobs", "entropy"),
            detach=detach,
        )
        for detach in ((), ("entropy",))
    ]
    assert [plan["gemms"] for plan in plans] == [3, 2]


@pytest.mark.parametrize("detach", ["entropy", ("mean_logits",), ("loss",)])
def test_a_name_that_is_not_there_is_refused(detach: Any) -> None:
    hidden, weight, target = operands()
    for kind in ("head", "logits"):
        with pytest.raises(ValueError, match="detach: expected a tuple of names that are in outputs"):
            called(kind, hidden, weight, target, detach=detach)


def test_under_torch_compile() -> None:
    hidden, weight, target = operands()
    hidden.requires_grad_()

    def run(h: Tensor, w: Tensor, t: Tensor) -> tuple[Any, Any]:
        out = fastloss.linear_token_stats(h, w, t, outputs=("logprobs", "entropy"), detach=("entropy",))
        return out.logprobs, out.entropy

    right, compiled = (
        run(hidden, weight, target),
        torch.compile(run, backend="aot_eager", fullgraph=True)(hidden, weight, target),
    )
    assert compiled[0].requires_grad and not compiled[1].requires_grad
    torch.testing.assert_close(compiled, right)
