"""trust_region_mask: every statistic and level against its formula, packed, edges, errors. verl's values: tests/peers/golden."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from backends_under_test import DEVICE
from torch import Tensor

import fastloss

STATISTICS = ("ratio", "k2", "k3", "tv", "binary_kl")
LEVELS = ("token", "seq_mean", "seq_sum", "seq_max")
CASES = [case for case in itertools.product(STATISTICS, LEVELS) if case != ("ratio", "seq_max")]


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    old = -torch.rand(5, 6, generator=g, dtype=torch.float64) * 3
    sampler = (old + 0.4 * torch.randn(5, 6, generator=g, dtype=torch.float64)).clamp(max=0)
    mask = torch.rand(5, 6, generator=g) > 0.25
    mask[2] = False
    return old.to(DEVICE), sampler.to(DEVICE), mask.to(DEVICE)


def divergence(statistic: str, old: float, sampler: float) -> float:
    p, q, t = math.exp(sampler), math.exp(old), old - sampler
    if statistic == "binary_kl":
        p, q = (min(max(x, 1e-6), 1 - 1e-6) for x in (p, q))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return {"ratio": t, "k2": t * t / 2, "k3": math.exp(t) - 1 - t, "tv": abs(p - q)}[statistic]


@pytest.mark.parametrize(("statistic", "level"), CASES)
def test_against_the_formula(statistic: str, level: str) -> None:
    old, sampler, mask = tokens()
    reduce = {
        "seq_mean": lambda x: sum(x) / max(len(x), 1),
        "seq_sum": sum,
        "seq_max": lambda x: max(x, default=0.0),
    }
    table: list[list[float]] = []
    for row in range(5):
        values = [divergence(statistic, float(old[row, t]), float(sampler[row, t])) for t in range(6)]
        if level != "token":
            values = [reduce[level]([v for v, m in zip(values, mask[row].tolist(), strict=True) if m])] * 6
        table.append([math.exp(v) if statistic == "ratio" else v for v in values])
    want = torch.tensor(table, dtype=torch.float64, device=DEVICE)
    seen = want[mask].unique()  # sorted: the bounds lie between the two smallest and the two largest
    low, high = float(seen[:2].mean()), float(seen[-2:].mean())
    for bounds in ({"low": low, "high": high}, {"high": high}, {"low": low}):
        keep = mask & (want >= bounds.get("low", -1)) & (want <= bounds.get("high", math.inf))
        got = fastloss.trust_region_mask(old, sampler, mask, statistic=statistic, level=level, **bounds)
        assert torch.equal(got, keep)
        assert keep.any() and not torch.equal(keep, mask)  # the case decides something
        cu = torch.arange(0, 31, 6, device=DEVICE)
        flat = (x.reshape(-1) for x in (old, sampler, mask))
        packed = fastloss.trust_region_mask(*flat, statistic=statistic, level=level, cu_seqlens=cu, **bounds)
        assert torch.equal(packed, keep.reshape(-1))


def test_what_the_engine_did_not_score_is_no_difference() -> None:
    old, sampler, mask = tokens()
    sampler[0, 0] = math.nan
    old[~mask] = math.nan
    got = fastloss.trust_region_mask(old, sampler, mask, statistic="k3", level="seq_mean", high=1e9)
    assert torch.equal(got, mask)


def test_extremes_are_decided() -> None:
    old, sampler = torch.tensor([[-1e4, 0.0]]), torch.tensor([[0.0, -1e4]])
    for statistic in STATISTICS:
        assert not fastloss.trust_region_mask(old, sampler, statistic=statistic, low=0.9, high=0.95).any()
    assert fastloss.trust_region_mask(
        old[:0], sampler[:0], level="seq_max", statistic="tv", high=1
    ).shape == (0, 2)
    nothing = torch.zeros(3, 0)
    assert fastloss.trust_region_mask(nothing, nothing, level="seq_max", statistic="tv", high=1).shape == (
        3,
        0,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "high: expected a number for high, low or both, got None"),
        ({"high": 1, "statistic": "kl"}, "statistic: expected one of"),
        ({"high": 1, "level": "sequence"}, "level: expected one of"),
        ({"high": 1, "level": "seq_max"}, "level: expected 'token', 'seq_mean' or 'seq_sum'"),
        ({"high": 0.5, "low": 0.7}, "high: "),
        ({"high": 0.5, "mask": torch.ones(3)}, "mask: expected shape"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    old = torch.zeros(2, 2)
    with pytest.raises((ValueError, TypeError), match=message):
        fastloss.trust_region_mask(old, old, **options)
