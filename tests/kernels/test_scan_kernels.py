"""gae and discounted_returns of every backend against the definition in float64, a loop over time."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, contract
from torch import Tensor

from fastloss.engine.contract import Backend
from fastloss.engine.sequences import Sequences

NAN = float("nan")
LENGTHS = {
    "many": (5, 0, 1, 64, 65),
    "long": (1100,),
    "empty": (0, 0),
    "none": (),
}


def make_batch(
    lengths: tuple[int, ...], packed: bool, density: float = 0.8
) -> tuple[dict[str, Tensor], Sequences]:
    """Rewards, values (NaN where masked) in float64 that float32 holds exactly, and the mask; their layout."""
    generator = torch.Generator().manual_seed(sum(lengths))
    count, length = len(lengths), 0 if packed else max(lengths, default=0)
    n = sum(lengths) if packed else count * length
    mask = torch.rand(n, generator=generator) < density
    if not packed:
        mask &= (torch.arange(length) < torch.tensor(lengths, dtype=torch.long)[:, None]).reshape(-1)
    rewards, values = torch.randn(2, n, generator=generator).double().masked_fill(~mask, NAN)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE) if packed else None
    layout = Sequences(offsets, length, count, n, torch.device(DEVICE))
    return {"rewards": rewards, "values": values, "mask": mask}, layout


def run(
    backend: Backend,
    batch: dict[str, Tensor],
    layout: Sequences,
    gamma: float,
    lam: float,
    dtype: torch.dtype,
) -> Tensor:
    """advantages, returns, discounted returns: [3, n]."""
    rewards, values = (batch[k].to(DEVICE, dtype) for k in ("rewards", "values"))
    mask = batch["mask"].to(DEVICE, torch.uint8)
    advantages, returns = backend.gae(rewards, values, mask, layout, gamma, lam)
    out = torch.stack([advantages, returns, backend.discounted_returns(rewards, mask, layout, gamma)])
    return out.cpu().double()


@pytest.mark.parametrize("density", [0.8, 1.0, 0.02])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", KERNELS)
def test_agrees_with_the_loop(backend: str, lengths: str, packed: bool, density: float) -> None:
    batch, layout = make_batch(LENGTHS[lengths], packed, density)
    pairs = [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0), (0.0, 0.5), (1.0, 1.0)]
    for gamma, lam in pairs if backend == "cpu" or DEVICE == "cuda" else pairs[:2]:
        want = run(contract("reference"), batch, layout, gamma, lam, torch.float64)
        for dtype in (torch.float32, torch.float64) if backend == "cpu" else (torch.float32,):
            got = run(contract(backend), batch, layout, gamma, lam, dtype)
            rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (1e-12, 1e-12)
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
            assert not got[:, ~batch["mask"]].any()


@pytest.mark.parametrize("backend", KERNELS)
def test_sequences_do_not_touch_each_other(backend: str) -> None:
    """bugs: GAE across the border of packed sequences or past the end of a padded one."""
    batch, layout = make_batch((40, 40, 40), True, 1.0)
    want = run(contract(backend), batch, layout, 1.0, 0.95, torch.float32)
    for name in ("rewards", "values"):
        batch[name][40:80] = NAN
    got = run(contract(backend), batch, layout, 1.0, 0.95, torch.float32)
    assert torch.equal(got[:, :40], want[:, :40]) and torch.equal(got[:, 80:], want[:, 80:])
    assert got[:, 40:80].isnan().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_outside_of_all_sequences_is_zero(backend: str) -> None:
    batch, _ = make_batch((20,), True, 1.0)
    layout = Sequences(torch.tensor([3, 9], device=DEVICE), 0, 1, 20, torch.device(DEVICE))
    got = run(contract(backend), batch, layout, 1.0, 0.95, torch.float32)
    assert not got[:, :3].any() and not got[:, 9:].any() and bool(got[:, 3:9].all())


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    batch, layout = make_batch((9000, 1, 30000, 37), True)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(contract("cpu"), batch, layout, 1.0, 0.95, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
