"""Modes that a call runs under: inference mode, selective activation checkpointing, float16 with nothing to learn (bugs 42, 47, 48)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from backends_under_test import ALL, DEVICE, need
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastloss

MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default)
POLICIES: dict[str, Callable[..., CheckpointPolicy]] = {
    "matmuls": lambda ctx, op, *a, **k: (
        CheckpointPolicy.MUST_SAVE if op in MATMULS else CheckpointPolicy.PREFER_RECOMPUTE
    ),
    "everything": lambda ctx, op, *a, **k: CheckpointPolicy.MUST_SAVE,
}
TARGET = torch.arange(70) % 300
HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear_cross_entropy": lambda h, w, t: fastloss.linear_cross_entropy(torch.tanh(h), w, t),
    "linear_cross_entropy, chunks": lambda h, w, t: fastloss.linear_cross_entropy(
        torch.tanh(h), w, t, chunk_size=16
    ),
    "linear_cross_entropy, none": lambda h, w, t: fastloss.linear_cross_entropy(
        torch.tanh(h), w, t, reduction="none"
    ).mean(),
    "linear_token_stats": lambda h, w, t: fastloss.linear_token_stats(torch.tanh(h), w, t).logprobs.mean(),
    "linear_kto_loss": lambda h, w, t: (
        fastloss.linear_kto_loss(
            torch.tanh(h).view(2, 35, -1),
            w,
            t.view(2, 35),
            torch.tensor([True, False], device=h.device),
            kl=0.0,
        ).loss
    ),
    "linear_policy_loss": lambda h, w, t: (
        fastloss.linear_policy_loss(
            torch.tanh(h).view(2, 35, -1), w, t.view(2, 35), None, torch.ones(2, device=h.device), None
        ).loss
    ),
    "linear_policy_loss, sequences": lambda h, w, t: (
        fastloss.linear_policy_loss(
            torch.tanh(h).view(2, 35, -1),
            w,
            t.view(2, 35),
            None,
            torch.ones(2, device=h.device),
            None,
            loss_type="gspo",
        ).loss
    ),
    "linear_sequence_loss": lambda h, w, t: fastloss.linear_sequence_loss(
        torch.tanh(h).view(2, 35, -1),
        w,
        t.view(2, 35),
        lambda part: part.logps.exp().neg().sum() + part.logprobs.mean(),
    ),
    "cross_entropy": lambda h, w, t: fastloss.cross_entropy(torch.tanh(h) @ w.T, t),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", HEADS)
def test_selective_checkpointing(name: str, policy: str) -> None:
    """A policy that caches operators' outputs hands back scratch that was written to: same gradients, and an end."""
    numbers = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 64, generator=numbers).to(DEVICE)
    weight = (torch.randn(300, 64, generator=numbers) * 0.1).to(DEVICE)
    target = TARGET.to(DEVICE)

    def gradients(run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        run(h, w, target).backward()
        assert h.grad is not None and w.grad is not None
        return h.grad, w.grad

    function = HEADS[name]
    context = functools.partial(create_selective_checkpoint_contexts, POLICIES[policy])
    got = gradients(lambda *x: checkpoint(function, *x, use_reentrant=False, context_fn=context))
    for a, b in zip(got, gradients(function), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_constants_made_in_inference_mode(backend: str) -> None:
    need(backend)
    chosen, rejected = (torch.randn(4, device=DEVICE, requires_grad=True) for _ in range(2))
    logprobs = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    with torch.inference_mode():
        rc, rr, old = (x.detach() - 0.1 for x in (chosen, rejected, logprobs))
        advantages, mask = torch.ones(4, device=DEVICE), torch.ones(4, 5, dtype=torch.bool, device=DEVICE)
        good = torch.tensor([True, False, True, True], device=DEVICE)
        lengths = torch.full((4,), 3.0, device=DEVICE)
    losses = (
        fastloss.dpo_loss(chosen, rejected, rc, rr, backend=backend).loss,
        fastloss.ipo_loss(
            chosen, rejected, rc, rr, chosen_lengths=lengths, rejected_lengths=lengths, backend=backend
        ).loss,
        fastloss.kto_loss(chosen, rc, good, kl=0.0, backend=backend).loss,
        fastloss.policy_loss(logprobs, old, advantages, mask, backend=backend).loss,
        fastloss.policy_loss(logprobs, old, advantages, mask, weights=advantages, backend=backend).loss,
    )
    for loss in losses:
        (grad, *_) = (
            g for g in torch.autograd.grad(loss, (chosen, logprobs), allow_unused=True) if g is not None
        )
        assert grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rows", [0, 3])
def test_float16_with_nothing_to_learn(backend: str, rows: int) -> None:
    """The late factor is one over a count of 0: a mean is NaN, as PyTorch's, and its gradient 0."""
    need(backend)
    target = torch.full((rows,), -100, device=DEVICE)
    x = torch.randn(rows, 7, device=DEVICE, dtype=torch.float16, requires_grad=True)
    hidden = torch.randn(rows, 4, device=DEVICE, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(7, 4, device=DEVICE, dtype=torch.float16, requires_grad=True)
    for loss, leaves in (
        (fastloss.cross_entropy(x, target, backend=backend), (x,)),
        (fastloss.cross_entropy(x, target, label_smoothing=0.1, backend=backend), (x,)),
        (fastloss.linear_cross_entropy(hidden, weight, target, backend=backend), (hidden, weight)),
    ):
        assert loss.isnan()
        for grad in torch.autograd.grad(loss, leaves):
            if backend != "reference":  # the definition divides by the count itself
                assert torch.equal(grad, torch.zeros_like(grad))


NUMBERS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy, normalizer": lambda x, t, n: fastloss.cross_entropy(x, t, normalizer=n),
    "linear_cross_entropy, normalizer": lambda x, t, n: fastloss.linear_cross_entropy(
        x, x[:6] * 1, t, normalizer=n
    ),
    "cross_entropy, temperature": lambda x, t, n: fastloss.cross_entropy(x, t, temperature=n / 4.5),
    "linear_cross_entropy, temperature": lambda x, t, n: fastloss.linear_cross_entropy(
        x, x[:6] * 1, t, temperature=n / 4.5
    ),
    "token_stats, temperature": lambda x, t, n: fastloss.token_stats(x, t, temperature=n / 4.5).logprobs,
    "linear_token_stats, temperature": lambda x, t, n: (
        fastloss.linear_token_stats(x, x[:6] * 1, t, temperature=n / 4.5).logprobs
    ),
    "dpo_loss, beta": lambda x, t, n: fastloss.dpo_loss(x[0], x[1], x[2], x[3], beta=n / 10.0).loss,
    "policy_loss, beta": lambda x, t, n: (
        fastloss.policy_loss(x, x + 0.1, x[:, 0], x > -9, ref_logprobs=x - 0.1, beta=n / 10.0).loss
    ),
    "policy_loss, clip_low": lambda x, t, n: (
        fastloss.policy_loss(x, x * 1.5, x[:, 0], x > -9, clip_low=n / 20.0).loss
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_compiles_twice_at_most(name: str) -> None:
    """num_items_in_batch as an int, an annealed coefficient (bug 46)."""
    function = NUMBERS[name]
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    target = torch.arange(6, device=DEVICE) % 6
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for n in range(3, 13):
        torch.testing.assert_close(compiled(x, target, n), function(x, target, n), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2
