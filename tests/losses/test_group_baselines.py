"""pass_at_k, gdpo and the optimal token baseline: edges, layouts, errors. Their values: tests/peers/golden."""

from __future__ import annotations

import math

import pytest
import torch
from backends_under_test import DEVICE
from torch import Tensor

import fastloss


def rewards(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE, dtype=torch.float32)


def test_pass_at_k_of_ties_and_missing_rewards() -> None:
    nan = math.nan
    table = rewards(3, 3, 1, nan, 2, 1, nan, nan, 5, nan, nan, nan)
    got = fastloss.pass_at_k_advantages(table, 3, scale="none")
    # two best; the best of two scored; alone; nobody
    assert got.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert fastloss.pass_at_k_advantages(rewards(), 2).shape == (0,)


def test_gdpo_does_not_drown_the_small_reward() -> None:
    """The larger reward decides alone in the sum's normalisation, not in GDPO's."""
    large, small = rewards(0, 100, 50, 25), rewards(1, 0, 1, 0)
    of_sum = fastloss.group_advantages(large + small, 4)
    apart = fastloss.gdpo_advantages(torch.stack([large, small], 1), 4)
    alone = fastloss.group_advantages(large, 4)
    assert torch.allclose(of_sum, alone, atol=0.02)
    assert (apart - alone).abs().max() > 0.4
    assert apart.mean().abs() < 1e-6


def test_gdpo_of_equal_and_missing_rewards() -> None:
    nan = math.nan
    equal = fastloss.gdpo_advantages(torch.ones(4, 2, device=DEVICE), 2)
    assert torch.equal(equal, torch.zeros_like(equal))
    table = torch.tensor([[nan, nan], [1.0, nan], [0.0, 3.0], [1.0, 3.0]], device=DEVICE)
    got = fastloss.gdpo_advantages(table, 2)
    assert got[0] == 0 and got.isfinite().all() and got[2] < 0 < got[3]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    table, logprobs, squares = (torch.randn(6, 7, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(6, 7, generator=g) > 0.3
    mask[4] = False
    return tuple(x.to(DEVICE) for x in (table, -logprobs.abs(), -squares.abs(), mask))  # type: ignore[return-value]


def test_optimal_token_packed_is_padded() -> None:
    table, logprobs, squares, mask = batch()
    padded = fastloss.optimal_token_advantages(table, logprobs, squares, mask, 3)
    lengths = torch.tensor([7, 5, 7, 6, 0, 7])
    inside = (torch.arange(7)[None, :] < lengths[:, None]).to(DEVICE)
    cut = mask & inside
    padded = fastloss.optimal_token_advantages(table, logprobs, squares, cut, 3)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    packed = fastloss.optimal_token_advantages(
        table[inside], logprobs[inside], squares[inside], cut[inside], 3, cu_seqlens=cu
    )
    assert torch.allclose(padded[inside], packed, rtol=1e-12, atol=1e-12)
    assert not padded[~cut].any()


def test_optimal_token_groups_of_one_and_the_longest_tail() -> None:
    table, logprobs, squares, mask = batch()
    alone = fastloss.optimal_token_advantages(table, logprobs, squares, mask, 1)
    assert torch.allclose(alone, fastloss.discounted_returns(table, mask))
    pair = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    pair[1, 1:] = False
    got = fastloss.optimal_token_advantages(table[:2, :3], logprobs[:2, :3], squares[:2, :3], pair, 2)
    assert torch.allclose(got[0, 1:], fastloss.discounted_returns(table[:2, :3], pair)[0, 1:])
    assert fastloss.optimal_token_advantages(*(x[:0] for x in batch()), 2).shape == (0, 7)


def test_masked_positions_touch_nothing() -> None:
    table, logprobs, squares, mask = batch()
    want = fastloss.optimal_token_advantages(table, logprobs, squares, mask, 3)
    holes = [x.masked_fill(~mask, math.nan) for x in (table, logprobs, squares)]
    assert torch.equal(want, fastloss.optimal_token_advantages(*holes, mask, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastloss.pass_at_k_advantages(rewards(1, 2), 1), "group_size: expected at least 2"),
        (lambda: fastloss.pass_at_k_advantages(rewards(1, 2, 3), 2), "rewards: expected shape"),
        (lambda: fastloss.pass_at_k_advantages(rewards(1, 2), 2, scale="batch"), "scale: expected one of"),
        (lambda: fastloss.gdpo_advantages(rewards(1, 2), 2), "rewards: expected shape"),
        (
            lambda: fastloss.gdpo_advantages(torch.ones(2, 2), 2, weights=torch.ones(3)),
            "weights: expected shape",
        ),
        (lambda: fastloss.gdpo_advantages(torch.ones(2, 2), 0), "group_size: expected a positive int"),
        (
            lambda: fastloss.optimal_token_advantages(*batch(), 4),
            "group_size: expected a divisor of the 6 sequences, got 4",
        ),
        (
            lambda: fastloss.optimal_token_advantages(*batch(), 3, token_weights=torch.ones(6)),
            "token_weights: expected shape",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
