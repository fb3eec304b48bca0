"""Advantages without a value model: of the answers to a prompt ("group"), and per token ("returns")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fastloss
from fastloss.bench.case import Call, Case, Data, Loss
from fastloss.bench.exact import Exact, over_numbers
from fastloss.bench.kinds.base import Kind, integers, normal, ones_mask, read_all_write_one, uniform
from fastloss.bench.kinds.policy import GAMMA, padding

GROUP = 8  # answers to a prompt


class Advantage(NamedTuple):
    """``loops``: written in PyTorch it is a loop over time, which torch.compile would unroll."""

    tensors: tuple[str, ...]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    loops: bool = False
    backend: bool = False  # takes one


def _centred(rewards: Tensor) -> Tensor:
    groups = rewards.view(-1, GROUP)
    return groups - groups.mean(1, keepdim=True)


def _grpo(rewards: Tensor) -> Tensor:
    deviation = rewards.view(-1, GROUP).std(1, keepdim=True)
    return (_centred(rewards) / (deviation + 1e-4)).flatten()


def _rloo(rewards: Tensor) -> Tensor:
    groups = rewards.view(-1, GROUP)
    return (groups - (groups.sum(1, keepdim=True) - groups) / (GROUP - 1)).flatten()


def _gpg(rewards: Tensor) -> Tensor:
    differ = rewards.view(-1, GROUP).std(1) > 0
    return (_centred(rewards) * (len(differ) / differ.sum().clamp(min=1))).flatten()


def _gdpo(several: Tensor) -> Tensor:
    groups = several.view(-1, GROUP, several.shape[1])
    normed = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    summed = normed.sum(2).flatten()
    return (summed - summed.mean()) / (summed.std() + 1e-4)


def _opo(rewards: Tensor, lengths: Tensor) -> Tensor:
    groups, weights = rewards.view(-1, GROUP), lengths.view(-1, GROUP).to(rewards.dtype)
    return (groups - (groups * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)).flatten()


def _pass_at_k(rewards: Tensor) -> Tensor:
    groups = rewards.view(-1, GROUP)
    best = groups.topk(2, 1)
    lead = (best.values[:, :1] - best.values[:, 1:]) / (groups.std(1, keepdim=True) + 1e-6)
    return torch.zeros_like(groups).scatter(1, best.indices[:, :1], lead).flatten()


def _returns(tokens: Tensor, mask: Tensor, gamma: float = GAMMA) -> Tensor:
    """verl's loop."""
    kept, running, out = mask.to(tokens.dtype), torch.zeros_like(tokens[:, 0]), []
    for t in reversed(range(tokens.shape[1])):
        running = (tokens[:, t] + gamma * running) * kept[:, t]
        out.append(running)
    return torch.stack(out[::-1], 1)


def _whiten(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = (((x - mean) * mask) ** 2).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def _reinforce_plus_plus(tokens: Tensor, mask: Tensor) -> Tensor:
    return _whiten(_returns(tokens, mask, 1.0), mask)


def _cumulative(tokens: Tensor, mask: Tensor) -> Tensor:
    return (tokens * mask).flip(1).cumsum(1).flip(1) * mask


def _remax(tokens: Tensor, greedy: Tensor, mask: Tensor) -> Tensor:
    return (_cumulative(tokens, mask) - greedy.unsqueeze(1)) * mask


def _optimal(tokens: Tensor, logprobs: Tensor, log_sum_sq: Tensor, mask: Tensor) -> Tensor:
    returns = _cumulative(tokens, mask)
    variance = ((1 - 2 * logprobs.exp() + log_sum_sq.exp()) * mask).cumsum(1) * mask
    grouped = (-1, GROUP, tokens.shape[1])
    weight = variance.view(grouped)
    baseline = (returns.view(grouped) * weight).sum(1, keepdim=True) / (weight.sum(1, keepdim=True) + 1e-8)
    return ((returns.view(grouped) - baseline).view(tokens.shape)) * mask


def _token_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1)
    return rewards.new_zeros(mask.shape).scatter(1, last.unsqueeze(1), rewards.unsqueeze(1))


OF_GROUPS = {
    "group": Advantage(("rewards",), lambda r: fastloss.group_advantages(r, GROUP), _grpo),
    "rloo": Advantage(("rewards",), lambda r: fastloss.rloo_advantages(r, GROUP), _rloo),
    "gpg": Advantage(("rewards",), lambda r: fastloss.gpg_advantages(r, GROUP), _gpg),
    "gdpo": Advantage(("several",), lambda r: fastloss.gdpo_advantages(r, GROUP), _gdpo),
    "opo": Advantage(("rewards", "lengths"), lambda r, n: fastloss.opo_advantages(r, n, GROUP), _opo),
    "pass-at-k": Advantage(("rewards",), lambda r: fastloss.pass_at_k_advantages(r, GROUP), _pass_at_k),
}
OF_TOKENS = {
    "returns": Advantage(
        ("tokens", "mask"),
        lambda r, mask, **o: fastloss.discounted_returns(r, mask, gamma=GAMMA, **o),
        _returns,
        loops=True,
        backend=True,
    ),
    "reinforce-plus-plus": Advantage(
        ("tokens", "mask"),
        fastloss.reinforce_plus_plus_advantages,
        _reinforce_plus_plus,
        loops=True,
        backend=True,
    ),
    "remax": Advantage(("tokens", "greedy", "mask"), fastloss.remax_advantages, _remax, backend=True),
    "optimal-token": Advantage(
        ("tokens", "logprobs", "log_sum_sq", "mask"),
        lambda r, logp, sq, mask: fastloss.optimal_token_advantages(r, logp, sq, mask, GROUP),
        _optimal,
    ),
    "whiten": Advantage(("tokens", "mask"), fastloss.whiten, _whiten),
    "token-rewards": Advantage(("rewards", "mask"), fastloss.token_rewards, _token_rewards),
}
ALL = {**OF_GROUPS, **OF_TOKENS}


def group_cases(quick: bool) -> Iterator[Case]:
    for name in OF_GROUPS:
        options = (("name", name),)
        yield Case(
            f"advantages-{name}-1024",
            "group",
            1024,
            0,
            0,
            torch.float32,
            nograd=True,
            calls=20 if quick else 100,
            options=options,
        )


def token_cases(quick: bool) -> Iterator[Case]:
    sequences, length = (8, 64) if quick else (64, 4096)
    for name, advantage in OF_TOKENS.items():
        only = ("fastloss*", "torch eager") if advantage.loops else ("*",)
        yield Case(
            f"advantages-{name}-{sequences}x{length}",
            "returns",
            sequences * length,
            0,
            0,
            torch.float32,
            nograd=True,
            length=length,
            only=only,
            options=(("name", name),),
        )


def _advantage(case: Case) -> Advantage:
    return ALL[dict(case.options)["name"]]


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    answers = case.rows // case.length if case.length else case.rows
    mask = padding(case) if case.length else ones_mask(answers, 1)
    logprobs = -0.1 - 2 * uniform(mask.shape, generator=generator)
    made = {
        "rewards": normal(answers, generator=generator),
        "several": normal(answers, 3, generator=generator),
        "lengths": integers(1, 4096, (answers,), generator=generator),
        "greedy": normal(answers, generator=generator),
        "tokens": normal(mask.shape, generator=generator) * mask,
        "logprobs": logprobs,
        "log_sum_sq": 2 * logprobs + 0.1,
        "mask": mask,
    }
    return {name: made[name] for name in _advantage(case).tensors}


def _ours(case: Case, call: Call) -> Loss:
    advantage = _advantage(case)
    return lambda *tensors: advantage.ours(*tensors, **(call if advantage.backend else {}))


def _eager(case: Case) -> Loss:
    return _advantage(case).eager


def _truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, _advantage(case).eager)


def _kept(tensors: dict[str, Tensor]) -> int:
    return len(next(iter(tensors.values())))


KINDS = {
    "group": Kind(group_cases, _tensors, lambda case: (), _ours, _eager, _truth, kept=_kept),
    "returns": Kind(
        token_cases,
        _tensors,
        lambda case: (),
        _ours,
        _eager,
        _truth,
        ("read all, write one", read_all_write_one),
        kept=_kept,
    ),
}
