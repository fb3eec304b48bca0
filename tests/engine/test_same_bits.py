"""A token's log-probability has the same bits alone and in any batch, order, packing, chunk, with any number of threads, and in
every function: the first ratio of new to old policy is exactly 1 (docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss.engine.native import cpu_backend

pytestmark = pytest.mark.skipif(bool(cpu_backend().why_not()), reason="the native CPU module is not built")

ROWS, DIM, VOCAB = 150, 40, 700
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def problem(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, target, log-probs of all rows at once)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, DIM, generator=generator).to(request.param)
    weight = torch.randn(VOCAB, DIM, generator=generator).to(request.param)
    target = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    plan = fastloss.explain(fastloss.linear_token_stats, hidden, weight, target)
    if plan["schedule"] != "blocks of the vocabulary":
        pytest.skip("this processor's library multiplies bfloat16")
    return hidden, weight, target, logprobs(hidden, weight, target)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def logprobs(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    got = fastloss.linear_token_stats(hidden, weight, target, **options).logprobs
    assert got is not None
    return got


@pytest.mark.parametrize("size", [1, 7, 64, 97])
def test_splits_of_the_batch(problem: Any, size: int) -> None:
    hidden, weight, target, want = problem
    parts = [
        logprobs(hidden[k : k + size], weight, target[k : k + size])
        for k in range(0, min(ROWS, 40 * size), size)
    ]
    got = torch.cat(parts)
    assert torch.equal(got, want[: got.numel()])


def test_orders_padding_and_prompts(problem: Any) -> None:
    hidden, weight, target, want = problem
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(logprobs(hidden[order], weight, target[order]), want[order])
    padded = torch.cat([hidden, torch.full((50, DIM), float("nan"), dtype=hidden.dtype)])
    ignored = torch.cat([target, torch.full((50,), -100)])
    assert torch.equal(logprobs(padded, weight, ignored)[:ROWS], want)
    batch = logprobs(hidden.view(3, 50, DIM), weight, target.view(3, 50))
    assert torch.equal(batch.view(-1), want)
    mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) < 0.5
    some = logprobs(hidden, weight, target.masked_fill(mask, -100))
    assert torch.equal(some[~mask], want[~mask]) and not some[mask].any()


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 1}, {"chunk_size": 8}, {"chunk_size": 64}, {"memory": "low"}, {"memory": "fast"}],
)
def test_chunks_and_memory(problem: Any, options: dict[str, Any]) -> None:
    hidden, weight, target, want = problem
    assert torch.equal(logprobs(hidden, weight, target, **options), want)
    loss = fastloss.linear_cross_entropy(
        hidden, weight, target, reduction="none", return_stats=True, **options
    )
    assert torch.equal(loss[1].logprobs, want)


def test_threads(problem: Any, threads: Any) -> None:
    hidden, weight, target, want = problem
    for count in (1, 2, 3, 5):
        threads(count)
        assert torch.equal(logprobs(hidden, weight, target), want)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("options", [{}, {"memory": "low"}, {"memory": "fast"}, {"chunk_size": 9}])
def test_functions(problem: Any, trained: tuple[bool, bool], options: dict[str, Any]) -> None:
    hidden, weight, target, want = problem
    leaves = [x.clone().requires_grad_(on) for x, on in zip((hidden, weight), trained, strict=True)]
    for outputs in (("logprobs",), ("logprobs", "entropy")):
        assert torch.equal(logprobs(*leaves, target, outputs=outputs, **options), want)
    stats = fastloss.linear_cross_entropy(*leaves, target, return_stats=True, **options)[1]
    assert torch.equal(stats.logprobs, want)
    rows = leaves[0].view(2, 75, DIM)
    for entropy in (0.0, 0.1):
        out = fastloss.linear_policy_loss(
            rows, leaves[1], target.view(2, 75), want.view(2, 75), torch.ones(2), torch.ones(2, 75),
            entropy_coef=entropy, **options,
        )  # fmt: skip
        assert float(out.metrics["approx_kl_k3"]) == 0 and float(out.metrics["ratio/max"]) == 1
    # Sums over a sequence follow from its tokens alone: those of the pairs are those of the statistics.
    pair = fastloss.linear_dpo_loss(rows, leaves[1], target.view(2, 75), reference_free=True, **options)
    reference = fastloss.linear_dpo_loss(
        rows.detach(), leaves[1].detach(), target.view(2, 75), reference_free=True
    )
    assert torch.equal(pair.chosen_logps, reference.chosen_logps)
    assert torch.equal(pair.rejected_logps, reference.rejected_logps)
