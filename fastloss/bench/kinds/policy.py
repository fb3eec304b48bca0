"""Policy-gradient losses from log-probs ("policy") and from the head ("policy-linear"), one of the user's own from the head
("sequence-linear": RLOO), and advantages ("gae")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.bench.case import IGNORE, Call, Case, Data, Loss, short
from fastloss.bench.exact import Exact, no_gradient_tokens, over_numbers, over_vocabulary
from fastloss.bench.kinds.base import (
    Kind,
    eager_logprobs,
    head_leaves,
    head_tensors,
    integers,
    normal,
    ones_mask,
    random_targets,
    read_all_write_one,
    uniform,
)

GAMMA, LAMBDA = 0.99, 0.95
# Drawn from, so that every branch of the clip is taken and none hangs on a rounding: log 0.8 and log 1.2 are far.
LOG_RATIOS = torch.tensor([-0.5, -0.1, -0.05, 0.0, 0.05, 0.1, 0.5], dtype=torch.float32, device="cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.04, "aggregation": "token-mean"},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "beta": 0.0, "aggregation": "seq-mean-token-mean"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.0, "aggregation": "token-mean"},
}


def cases(quick: bool) -> Iterator[Case]:
    sequences, length = (4, 64) if quick else (64, 4096)
    for name in ("ppo", "gspo"):
        yield Case(
            f"policy-{name}-{sequences}x{length}",
            "policy",
            sequences * length,
            0,
            0,
            torch.float32,
            length=length,
            options=(("loss_type", name),),
        )


def linear_cases(quick: bool) -> Iterator[Case]:
    rows, length, dim, vocab = (32, 8, 16, 500) if quick else (4096, 512, 512, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"policy-linear-{short(dtype)}-{rows}x{dim}x{vocab}"
        options = (("loss_type", "dapo"),)
        yield Case(name, "policy-linear", rows, dim, vocab, dtype, length=length, options=options)
        name = f"policy-linear-gspo-{short(dtype)}-{rows}x{dim}x{vocab}"
        options = (("loss_type", "gspo"),)
        yield Case(name, "policy-linear", rows, dim, vocab, dtype, length=length, options=options)


def sequence_cases(quick: bool) -> Iterator[Case]:
    rows, length, dim, vocab = (32, 8, 16, 500) if quick else (4096, 512, 512, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"sequence-linear-{short(dtype)}-{rows}x{dim}x{vocab}"
        yield Case(name, "sequence-linear", rows, dim, vocab, dtype, ignored=0.25, length=length)


def gae_cases(quick: bool) -> Iterator[Case]:
    sequences, length = (4, 64) if quick else (64, 4096)
    name, only = f"gae-{sequences}x{length}", ("fastloss*", "torch eager", "trl")
    yield Case(name, "gae", sequences * length, 0, 0, torch.float32, nograd=True, length=length, only=only)


def padding(case: Case) -> Tensor:
    """Padding at the end of each sequence."""
    mask = ones_mask(case.rows // case.length, case.length)
    mask[:, round(case.length * (1 - case.ignored)) :] = False
    return mask


def log_ratios(shape: torch.Size, generator: torch.Generator) -> Tensor:
    drawn = integers(0, len(LOG_RATIOS), tuple(shape), generator=generator)
    return LOG_RATIOS.to(drawn.device)[drawn]


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    mask = padding(case)
    logprobs = -2.0 * uniform(mask.shape, generator=generator)
    return {
        "logprobs": logprobs,
        "old": logprobs - log_ratios(mask.shape, generator),
        "advantages": normal(len(mask), generator=generator),
        "mask": mask,
        "ref": logprobs + 0.1 * normal(mask.shape, generator=generator),
    }


def _linear_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    tensors, mask = head_tensors(case, generator, random_targets(case, generator)), padding(case)
    now = no_gradient_tokens(tensors["hidden"], tensors["weight"], tensors["target"]).float()
    return {
        **tensors,
        "old": now - log_ratios(mask.shape, generator),
        "advantages": normal(len(mask), generator=generator),
        "mask": mask,
    }


def _sequence_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = head_tensors(case, generator, random_targets(case, generator))
    tensors["target"][:, : round(case.length * case.ignored)] = IGNORE  # prompts
    now = no_gradient_tokens(tensors["hidden"], tensors["weight"], tensors["target"]).float().sum(-1)
    return {
        **tensors,
        "old": now - log_ratios(now.shape, generator),
        "advantages": normal(len(now), generator=generator),
    }


def _gae_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    mask = padding(case)
    rewards, values = normal(2, *mask.shape, generator=generator) * mask
    return {"rewards": rewards, "values": values, "mask": mask}


def surrogate(
    case: Case, log: Callable[[Mapping[str, Tensor]], object] | None = None
) -> Callable[..., Tensor]:
    """As TRL 1.16's GRPOTrainer writes it: clipped ratio per token or sequence, k3 to the reference, aggregation; ``log``
    gets what it then logs of each step."""
    name = dict(case.options)["loss_type"]
    option = OPTIONS[name]
    low, high = 1 - option["clip_low"], 1 + option["clip_high"]

    def loss(
        logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ref: Tensor | None = None
    ) -> Tensor:
        log_ratio, per_sequence = logprobs - old, advantages.unsqueeze(1)
        if name == "gspo":
            log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        ratio = torch.exp(log_ratio)
        per_token = -torch.min(ratio * per_sequence, torch.clamp(ratio, low, high) * per_sequence)
        kl = None
        if ref is not None and option["beta"]:
            kl = torch.exp(ref - logprobs) - (ref - logprobs) - 1
            per_token = per_token + option["beta"] * kl
        if log is not None:
            with torch.no_grad():
                log(_trl_metrics(ratio, per_sequence, mask, kl, low, high))
        if option["aggregation"] == "token-mean":
            return (per_token * mask).sum() / mask.sum().clamp(min=1.0)
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()

    return loss


def _trl_metrics(
    ratio: Tensor, advantages: Tensor, mask: Tensor, kl: Tensor | None, low: float, high: float
) -> dict[str, Tensor]:
    def mean(x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return x.sum() / x.shape[0]
        return (x * mask).sum() / mask.sum().float().clamp(min=1.0)

    def of_sequences(x: Tensor) -> Tensor:
        return x.squeeze(1) if x.shape[1] == 1 else (x * mask).sum(-1) / mask.sum(-1)

    is_low, is_high = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    return {
        **({} if kl is None else {"kl": mean(kl)}),
        "clip_ratio/low_mean": mean(is_low.float()),
        "clip_ratio/high_mean": mean(is_high.float()),
        "clip_ratio/region_mean": mean((is_low | is_high).float()),
        "clip_ratio/low_min": of_sequences(is_low.float()).min(),
        "clip_ratio/high_max": of_sequences(is_high.float()).max(),
    }


def _ours(case: Case, call: Call) -> Loss:
    name = dict(case.options)["loss_type"]
    options = {"loss_type": name, **call, **OPTIONS[name]}

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ref: Tensor) -> Tensor:
        reference = ref if OPTIONS[name]["beta"] else None
        return fastloss.policy_loss(logprobs, old, advantages, mask, ref_logprobs=reference, **options).loss

    return loss


def _ours_linear(case: Case, call: Call) -> Loss:
    name = dict(case.options)["loss_type"]
    options = {"loss_type": name, **call, **OPTIONS[name]}
    return lambda *tensors: fastloss.linear_policy_loss(*tensors, **options).loss


def rloo(logps: Tensor, old: Tensor, advantages: Tensor, count: int) -> Tensor:
    """As TRL 1.16's RLOOTrainer writes it, of some of ``count`` sequences: their share of the mean."""
    ratio = torch.exp(logps - old)
    return -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages).sum() / count


def _ours_sequence(case: Case, call: Call) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        def of_part(part: fastloss.SequencePart) -> Tensor:
            return rloo(part.logps, old[part.indices], advantages[part.indices], len(old))

        out: Tensor = fastloss.linear_sequence_loss(hidden, weight, target, of_part, **call)
        return out

    return loss


def _eager_sequence(case: Case) -> Loss:
    return lambda hidden, weight, target, old, advantages: rloo(
        eager_logprobs(hidden, weight, target).sum(-1), old, advantages, len(old)
    )


def _sequence_truth(case: Case, data: Data) -> Exact:
    old, advantages = data["old"].double(), data["advantages"].double()
    return over_vocabulary(
        data, data["target"], lambda logprobs: rloo(logprobs.sum(-1), old, advantages, len(old))
    )


def _ours_gae(case: Case, call: Call) -> Loss:
    return lambda rewards, values, mask: fastloss.gae(rewards, values, mask, gamma=GAMMA, lam=LAMBDA, **call)[
        0
    ]


def _eager_metrics(case: Case) -> Loss:
    return surrogate(case, log=dict)


def _eager_linear(case: Case) -> Loss:
    loss = surrogate(case)
    return lambda hidden, weight, target, *rest: loss(eager_logprobs(hidden, weight, target), *rest)


def _eager_gae(case: Case) -> Loss:
    """verl's loop (core_algos.compute_gae_advantage_return), without its whitening."""

    def advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        next_values: Tensor | float = 0.0
        last: Tensor | float = 0.0
        kept, reversed_advantages = mask.to(rewards.dtype), []
        for t in reversed(range(rewards.shape[1])):
            delta = rewards[:, t] + GAMMA * next_values - values[:, t]
            here = delta + GAMMA * LAMBDA * last
            next_values = values[:, t] * kept[:, t] + (1 - kept[:, t]) * next_values
            last = here * kept[:, t] + (1 - kept[:, t]) * last
            reversed_advantages.append(last)
        return torch.stack(reversed_advantages[::-1], dim=1) * kept

    return advantages


def _truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, surrogate(case))


def _gae_truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, _eager_gae(case))


def _linear_truth(case: Case, data: Data) -> Exact:
    loss, rest = surrogate(case), (data["old"].double(), data["advantages"].double(), data["mask"])
    return over_vocabulary(data, data["target"], lambda logprobs: loss(logprobs, *rest))


def _kept(tensors: dict[str, Tensor]) -> int:
    return int(tensors["mask"].sum())


def _leaves(case: Case) -> tuple[str, ...]:
    return ("logprobs",)


TRAFFIC = ("read all, write one", read_all_write_one)
KINDS = {
    "policy": Kind(cases, _tensors, _leaves, _ours, surrogate, _truth, TRAFFIC, _eager_metrics, _kept),
    "policy-linear": Kind(
        linear_cases,
        _linear_tensors,
        head_leaves,
        _ours_linear,
        _eager_linear,
        _linear_truth,
        kept=_kept,
        is_head=True,
    ),
    "sequence-linear": Kind(
        sequence_cases,
        _sequence_tensors,
        head_leaves,
        _ours_sequence,
        _eager_sequence,
        _sequence_truth,
        is_head=True,
    ),
    "gae": Kind(
        gae_cases,
        _gae_tensors,
        lambda case: (),
        _ours_gae,
        _eager_gae,
        _gae_truth,
        TRAFFIC,
        kept=_kept,
    ),
}
