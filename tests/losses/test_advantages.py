"""gae, discounted_returns and the baselines: against loops and the peers' formulas; the borders of sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, KERNELS, need
from torch import Tensor

import fastloss


def loop(r: list[float], v: list[float], gamma: float, lam: float) -> list[float]:
    """GAE of one sequence as the paper has it: A_t = Σ (γλ)^k δ_{t+k}."""
    after = [*v[1:], 0.0]
    deltas = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(r))]


def sequences(b: int, t: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(b + t)
    mask = torch.rand(b, t, generator=g) > 0.3
    if b > 2:
        mask[1] = False
    rewards = torch.randn(b, t, generator=g).masked_fill(~mask, math.nan)
    values = torch.randn(b, t, generator=g).masked_fill(~mask, math.nan)
    return rewards.to(DEVICE, dtype), values.to(DEVICE, dtype), mask.to(DEVICE)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(1, 1), (4, 9), (3, 1100), (4, 4096), (6, 2)])
def test_gae(backend: str, shape: tuple[int, int]) -> None:
    """Bug 32: a masked token is stepped over, past the end there is nothing."""
    need(backend)
    rewards, values, mask = sequences(*shape)
    advantages, returns = fastloss.gae(rewards, values, mask, gamma=0.99, lam=0.9, backend=backend)
    totals = fastloss.discounted_returns(rewards, mask, gamma=0.99, backend=backend)
    eager = (
        *fastloss.gae(rewards, values, mask, gamma=0.99, lam=0.9, backend="reference"),
        fastloss.discounted_returns(rewards, mask, gamma=0.99, backend="reference"),
    )
    for s in range(shape[0]):
        keep = mask[s]
        r, v = rewards[s][keep].double().tolist(), values[s][keep].double().tolist()
        want = torch.tensor(loop(r, v, 0.99, 0.9), dtype=torch.float64)
        g = torch.tensor(loop(r, [0.0] * len(r), 0.99, 1.0), dtype=torch.float64)
        for got, float32_loop, exact in (
            (advantages, eager[0], want),
            (returns, eager[1], want + torch.tensor(v, dtype=torch.float64)),
            (totals, eager[2], g),
        ):
            if not len(r):
                continue
            error, eager_error = (
                (x[s][keep].double().cpu() - exact).abs().max() for x in (got, float32_loop)
            )
            # Never worse than the loop; a rounding of the result is no error.
            assert error <= max(eager_error, 2.0**-24 * exact.abs().max())
    assert not advantages[~mask].any() and not returns[~mask].any() and not totals[~mask].any()


@pytest.mark.parametrize("backend", ALL)
def test_gae_packed(backend: str) -> None:
    """Bug 32: nothing crosses the border of packed sequences."""
    need(backend)
    rewards, values, _ = sequences(4, 9)
    rewards, values = (torch.where(x.isnan(), 0.5, x) for x in (rewards, values))
    lengths = torch.tensor([3, 9, 0, 5])
    inside = (torch.arange(9)[None, :] < lengths[:, None]).to(DEVICE)
    mask = inside & (torch.arange(9, device=DEVICE) != 2)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    padded = fastloss.gae(rewards, values, mask, gamma=0.9, backend=backend)
    packed = fastloss.gae(
        rewards[inside], values[inside], mask[inside], gamma=0.9, cu_seqlens=cu, backend=backend
    )
    for a, b in zip(padded, packed, strict=True):
        assert torch.allclose(a[inside], b, rtol=1e-6, atol=1e-6)
    a = fastloss.discounted_returns(rewards, mask, gamma=0.9, backend=backend)[inside]
    b = fastloss.discounted_returns(rewards[inside], mask[inside], gamma=0.9, cu_seqlens=cu, backend=backend)
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_gae_dtypes_and_empty(backend: str) -> None:
    need(backend)
    rewards, values, mask = sequences(3, 5, torch.bfloat16)
    low = fastloss.gae(rewards, values, mask, backend=backend)
    wide = fastloss.gae(rewards.float(), values.float(), mask, backend=backend)
    assert low[0].dtype == torch.float32 and torch.equal(low[0], wide[0])
    for shape in ((0, 4), (3, 0)):
        nothing = torch.zeros(shape, device=DEVICE)
        assert fastloss.gae(nothing, nothing, None, backend=backend)[0].shape == shape
    exact = fastloss.gae(rewards.double(), values.double(), mask)
    assert exact[0].dtype == torch.float64


def _trl_grpo(rewards: Tensor, size: int, scale: str) -> Tensor:
    """The advantage code of TRL 1.16's GRPOTrainer."""
    from trl.trainer.utils import nanstd

    mean = torch.nanmean(rewards.view(-1, size), dim=1).repeat_interleave(size, dim=0)
    std = torch.zeros_like(rewards)
    if scale == "batch":
        std = nanstd(rewards).expand_as(rewards)
    elif size > 1:
        std = nanstd(rewards.view(-1, size), dim=1).repeat_interleave(size, dim=0)
    advantages = rewards - mean
    if scale != "none":
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


REWARDS = torch.tensor([0.0, 1, 1, 0, 2, 2, 2, 2, 0.5, math.nan, 1, 3, math.nan, math.nan, 4, math.nan])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_trls(scale: str) -> None:
    """Bug 29: sample deviation; equal rewards, one scored reward and NaN give 0."""
    pytest.importorskip("trl")
    got = fastloss.group_advantages(REWARDS, 4, scale=scale)
    assert torch.allclose(got, _trl_grpo(REWARDS, 4, scale), atol=1e-6)
    assert not got[4:8].any() and not got[12:].any() and got[9] == 0


def test_equal_rewards_and_groups_of_one() -> None:
    """Bug 29: the mean of equal rewards need not be their bits."""
    equal = torch.full((7,), 0.1)
    for scale in ("group", "batch", "none"):
        assert not fastloss.group_advantages(equal, 7, scale=scale).any()
        assert not fastloss.group_advantages(torch.tensor([3.0]), 1, scale=scale).any()
    assert not fastloss.rloo_advantages(equal, 7).any()
    assert not fastloss.rloo_advantages(torch.tensor([3.0, 4.0]), 1).any()
    assert not fastloss.opo_advantages(equal, torch.arange(1, 8), 7).any()
    assert not fastloss.gpg_advantages(equal, 7).any()
    assert fastloss.group_advantages(torch.zeros(0), 4).shape == (0,)


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_is_trls(normalize: bool) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    grouped = REWARDS.view(-1, 4)
    scored = (~grouped.isnan()).sum(1, keepdim=True)
    baselines = (torch.nansum(grouped, 1, keepdim=True) - grouped) / (scored - 1)
    want = REWARDS - baselines.view(-1)
    got = fastloss.rloo_advantages(REWARDS, 4, normalize=normalize)
    if normalize:  # TRL leaves a group with one scored response out of the mean; fastloss counts its 0
        want = torch.where(REWARDS.isnan(), want, torch.nan_to_num(want, nan=0.0))
        want = (want - want.nanmean()) / (utils.nanstd(want) + 1e-4)
    assert torch.allclose(got, torch.nan_to_num(want, nan=0.0), atol=1e-6)


def test_reinforce_plus_plus() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards = fastloss.token_rewards(torch.tensor([1.0, -2.0]), mask)
    assert rewards.tolist() == [[0, 1, 0], [0, 0, -2]]
    kl = torch.tensor([[0.1, 0.2, math.nan], [0.0, 0.3, 0.1]])
    got = fastloss.reinforce_plus_plus_advantages(rewards, mask, kl=kl, kl_coef=0.5, gamma=0.9)
    returns = torch.tensor([-0.05 + 0.9 * 0.9, 0.9, 0.9 * (-0.15 - 0.9 * 2.05), -0.15 - 0.9 * 2.05, -2.05])
    want = (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()
    assert torch.allclose(got[mask.bool()], want, atol=1e-6) and got[0, 2] == 0
    both = fastloss.reinforce_plus_plus_advantages(rewards, mask, group_size=2)
    assert torch.allclose(both[mask.bool()].sum(), torch.tensor(0.0), atol=1e-6)
    assert (both[0, :2] > 0).all() and (both[1] < 0).all()


def test_remax_and_opo_and_gpg() -> None:
    rewards, greedy = torch.tensor([1.0, 0.0]), torch.tensor([0.4, 0.6])
    assert torch.allclose(fastloss.remax_advantages(rewards, greedy), rewards - greedy)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    tokens = fastloss.token_rewards(rewards, mask)
    got = fastloss.remax_advantages(tokens, greedy, mask)
    assert torch.allclose(got, (rewards - greedy)[:, None] * mask)
    opo = fastloss.opo_advantages(torch.tensor([1.0, 0.0, 2.0, 3.0]), torch.tensor([2, 6, 0, 0]), 2)
    assert torch.allclose(opo, torch.tensor([0.75, -0.25, 2.0, 3.0]))  # no length at all: no baseline
    gpg = fastloss.gpg_advantages(torch.tensor([1.0, 0.0, 2.0, 2.0, 3.0, 5.0]), 2)
    assert torch.allclose(gpg, 1.5 * torch.tensor([0.5, -0.5, 0, 0, -1, 1]))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean: bool) -> None:
    x, mask = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5) > 0.4
    got = fastloss.whiten(x.masked_fill(~mask, math.nan), mask, shift_mean=shift_mean)
    v = x[mask]
    want = (v - v.mean()) / (v.var() + 1e-8).sqrt() + (0 if shift_mean else v.mean())
    assert torch.allclose(got[mask], want) and not got[~mask].any()
    assert not fastloss.whiten(x, torch.zeros_like(mask)).any()
    one = torch.zeros_like(mask)
    one[0, 0] = True
    assert fastloss.whiten(x, one).isfinite().all()


@pytest.mark.parametrize(
    ("fn", "arguments", "message"),
    [
        (fastloss.gae, (torch.zeros(2), torch.zeros(2), None), r"rewards: expected shape \[B, T\]"),
        (fastloss.gae, (torch.zeros(2, 3), torch.zeros(2, 2), None), "values: expected shape"),
        (fastloss.gae, (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2)), "mask: expected shape"),
        (
            fastloss.group_advantages,
            (torch.zeros(5), 2),
            "rewards: expected shape .* multiple of group_size=2",
        ),
        (fastloss.group_advantages, (torch.zeros(4), 0), "group_size: expected a positive int"),
        (fastloss.opo_advantages, (torch.zeros(4), torch.zeros(3), 2), "lengths: expected shape"),
        (fastloss.remax_advantages, (torch.zeros(4), torch.zeros(3)), "greedy_rewards: expected shape"),
        (fastloss.token_rewards, (torch.zeros(4), torch.zeros(3, 2)), "rewards: expected shape"),
    ],
)
def test_errors(fn: Callable[..., Any], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fn(*arguments)
    with pytest.raises(ValueError, match="gamma: expected a finite number"):
        fastloss.gae(torch.zeros(1, 2), torch.zeros(1, 2), None, gamma=1.5)
    with pytest.raises(ValueError, match="scale: expected one of"):
        fastloss.group_advantages(torch.zeros(2), 2, scale="std")


def _packed_calls() -> dict[str, Callable[..., Any]]:
    old = torch.linspace(-2, -0.1, 7)
    return {
        "gae": lambda x, m, cu: fastloss.gae(x, old, m, gamma=0.9, lam=0.8, cu_seqlens=cu),
        "discounted_returns": lambda x, m, cu: fastloss.discounted_returns(x, m, gamma=0.9, cu_seqlens=cu),
        "reinforce_plus_plus": lambda x, m, cu: fastloss.reinforce_plus_plus_advantages(x, m, cu_seqlens=cu),
        "optimal_token": lambda x, m, cu: fastloss.optimal_token_advantages(x, old, old, m, 2, cu_seqlens=cu),
        "token_rewards": lambda x, m, cu: fastloss.token_rewards(x[:4], m, cu_seqlens=cu),
        "top entropy": lambda x, m, cu: (
            fastloss.policy_loss(
                old,
                old,
                x[:4],
                m,
                entropy=x.square(),
                top_entropy_quantile=0.4,
                cu_seqlens=cu,
                max_length=8.0,
            ).loss
        ),
    }


@pytest.mark.parametrize("name", _packed_calls())
def test_packed_sequences_under_compile(name: str) -> None:
    """Lengths are numbers that a trace does not know; one graph for all of them, and for other masks."""
    call = _packed_calls()[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = torch.linspace(-1, 2, 7).sin()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for cu, masked in (([0, 3, 3, 5, 7], 1), ([0, 0, 1, 6, 7], 4)):
            mask, offsets = torch.arange(7) != masked, torch.tensor(cu)
            torch.testing.assert_close(compiled(x, mask, offsets), call(x, mask, offsets))


def test_compiled_scans_do_not_grow_with_the_length() -> None:
    """A loop over steps in a graph would."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    x, values = torch.randn(2, 50), torch.randn(2, 50)
    compiled = torch.compile(lambda x, v: fastloss.gae(x, v, None, lam=0.9), fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(x, values), fastloss.gae(x, values, None, lam=0.9))
    assert len(graphs) == 1 and len(graphs[0].graph.nodes) < 30
