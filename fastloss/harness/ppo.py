"""PPO, top to bottom: samples, values, the KL in the reward, generalised advantages, step, held-back reward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from . import layers, measure, parallel, rewards
from .config import PpoConfig
from .data import IGNORE, Batch, fingerprint
from .export import export
from .loop import Metrics, StepFn
from .losses import named
from .model import head_of
from .policy import LOGPROBS, POLICIES, Objective, Out, Tokens, described
from .rollout import (
    METRICS,
    Actor,
    Carry,
    Data,
    asked_ids,
    check_carried,
    drawn_with,
    evaluate,
    parts,
    prepare,
    roll_out,
)
from .run import Result, begun, open_folder, train
from .sampler import check_sampler
from .stage import Stage
from .start import language_model, reference, tokenizer_of
from .step import autocast, begins, cut_backward, learned, loss_and_grad, offsets, targets


class PolicyAndValue(nn.Module):
    """The language model and, on the same hidden states, what the rest of the answer will be worth."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.value = nn.Linear(policy.get_output_embeddings().weight.shape[1], 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)


def sampled(
    both: PolicyAndValue, actor: Actor, ref: Any, name: str, data: Data, config: PpoConfig, index: int
) -> Carry:
    """A batch of samples with values, advantages and returns of every token."""
    import fastloss

    carry = roll_out(actor, ref, head_of(ref), LOGPROBS[name], data, index, 1)
    batch = Batch(carry["inputs"], carry["targets"])
    mask = batch.targets != IGNORE  # [R, T]
    carry["values"] = values_of(both, batch, config)
    per_token = fastloss.token_rewards(carry["rewards"], mask) - config.kl * (carry["old"] - carry["ref"])
    advantages, carry["returns"] = fastloss.gae(
        per_token, carry["values"], mask, gamma=config.gamma, lam=config.lam
    )
    everyones, own = parallel.everyones(advantages[mask])
    carry["advantages"] = torch.zeros_like(advantages).masked_scatter_(
        mask, fastloss.whiten(everyones, None)[own]
    )
    return carry


@torch.no_grad()
def values_of(both: PolicyAndValue, batch: Batch, config: PpoConfig) -> Tensor:
    """Before each sampled token, 0 elsewhere.  # [R, T]"""
    out = torch.zeros(batch.targets.shape, dtype=torch.float32, device=batch.targets.device)
    for start, part in parts(batch, config, 1):
        hidden = learned(both.policy, part, config)
        out[start : start + len(part.inputs)][part.targets != IGNORE] = both.value(hidden.float())[:, 0]
    return out


def make_step(
    both: PolicyAndValue, actor: Actor, ref: Any, name: str, data: Data, config: PpoConfig, carry: Carry
) -> StepFn:
    """``carry`` holds the samples from one of their updates to the next."""

    def step_fn(step: int) -> Metrics:
        index, update = divmod(step, config.updates)
        if update == 0:
            carry.clear()
            carry.update(sampled(both, actor, ref, name, data, config, index))
        check_carried(carry, update)
        tokens, scored, reward, kl = parallel.summed(
            (carry["targets"] != IGNORE).sum(), (~carry["rewards"].isnan()).sum(), carry["rewards"].nansum(),
            (carry["old"] - carry["ref"]).sum(),
        )  # fmt: skip
        total, loss_s = 0.0, 0.0
        sums: dict[str, Tensor] = {}
        for start, batch in parts(Batch(carry["inputs"], carry["targets"]), config, 1):
            seen: list[Out] = []
            hidden = learned(both.policy, batch, config)
            of = loss_of(both, actor, name, carry, start, batch, tokens, config, seen)
            loss, seconds = cut_backward(hidden, of)
            total, loss_s = total + float(loss), loss_s + seconds
            share = int((batch.targets != IGNORE).sum()) / tokens
            for key, value in seen[0].metrics.items():
                sums[key] = (
                    sums.get(key, torch.zeros((), dtype=torch.float32, device="cpu")) + value.cpu() * share
                )
        step_loss, *values = parallel.summed(total, *sums.values())
        means = dict(zip(sums, values, strict=True))
        explained = explained_variance(*(means.pop(key) for key in MOMENTS))
        return {
            "loss": step_loss, "tokens": int(tokens), "loss_s": loss_s, "reward": reward / scored,
            "length": tokens / scored, "kl_to_start": kl / tokens, **means, "explained_variance": explained,
        }  # fmt: skip

    return step_fn


def loss_of(
    both: PolicyAndValue, actor: Actor, name: str, carry: Carry, start: int, batch: Batch, tokens: float,
    config: PpoConfig, seen: list[Out],
) -> Any:  # fmt: skip
    """Policy and value loss of one pass; both are divided by the whole step's tokens."""
    import fastloss

    rows, kept = slice(start, start + len(batch.inputs)), batch.targets != IGNORE

    def of_pass(key: str) -> Tensor:
        return carry[key][rows][kept]

    read = Tokens(targets(batch), offsets(batch), of_pass("old"), None, of_pass("advantages"))
    objective = Objective(
        "ppo", config.clip_low, config.clip_high, 0.0, config.temperature, config.max_new_tokens, tokens
    )

    def of(hidden: Tensor) -> Tensor:
        with autocast(config, hidden.device):
            out = POLICIES[name](hidden, actor.head.gathered(), read, objective)
        values, returns = both.value(hidden.float())[:, 0], of_pass("returns")
        value = fastloss.value_loss(
            values, of_pass("values"), returns, None, clip_range=config.value_clip or None,
            normalizer=tokens, cu_seqlens=read.offsets,
        )  # fmt: skip
        seen.append(Out(out.loss, {**out.metrics, **moments(returns, values.detach())}))
        return out.loss + config.value_coef * value.loss

    return of


MOMENTS = ("returns", "squared returns", "errors", "squared errors")


def moments(returns: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Means over a pass's tokens: the variances of passes do not add up to the step's, these do."""
    returns, errors = returns.double(), returns.double() - values.double()
    sums = torch.stack([returns.sum(), returns.square().sum(), errors.sum(), errors.square().sum()])
    means = sums / max(1, len(returns))  # none, where nothing in a pass was scored
    return dict(zip(MOMENTS, means, strict=True))


def explained_variance(returns: float, squared_returns: float, errors: float, squared_errors: float) -> float:
    """1 - Var(R - V) / Var(R), from means; 0 where R is constant."""
    variance = squared_returns - returns**2
    return 1 - (squared_errors - errors**2) / variance if variance > 1e-12 * squared_returns else 0.0


@begun
def run(config: PpoConfig, *, resume: bool, overwrite: bool, console: Console) -> Result:
    named(POLICIES, config.loss)
    functions = rewards.load(config.reward)
    folder = open_folder(config, resume, overwrite, console)
    tok = tokenizer_of(config, folder, console)
    data = parallel.from_reader(partial(prepare, config, tok, console))
    # no dropout: samples and updates must see one policy
    policy = language_model(config, tok).eval()
    ref = reference(config, policy)
    check_sampler(policy, head_of(policy), len(tok))
    both = PolicyAndValue(policy).to(next(policy.parameters()).device)
    if layers.shards(config):
        layers.shard_module(both.value, config)
    actor = Actor(policy, head_of(policy), tok, functions, config)

    def step(name: str, carry: Carry) -> StepFn:
        return make_step(both, actor, ref, name, data, config, carry)

    def one_loss(name: str) -> Any:
        carry = sampled(both, actor, ref, name, data, config, 0)
        start, batch = next(parts(Batch(carry["inputs"], carry["targets"]), config, 1))
        tokens = parallel.summed((carry["targets"] != IGNORE).sum())[0]
        with torch.no_grad():
            hidden = learned(policy, batch, config)
        return partial(
            loss_and_grad, hidden, loss_of(both, actor, name, carry, start, batch, tokens, config, [])
        )

    stage = Stage(
        title="ppo",
        model=both,
        source=data.source,
        fingerprint=fingerprint(
            data.train, config.seed, config.rows_per_step, config.updates, *drawn_with(config)
        ),
        step=step,
        loss_alone=one_loss,
        loss_by=lambda name: described(name, actor.head, config.batch_size * 4, "ppo", config),
        model_flops=lambda: measure.count_flops(partial(step("torch", {}), 0)),
        same_shape=False,
        examples=lambda step: begins(
            tok,
            data.order.step(step // config.updates, config.rows_per_step),
            lambda number: asked_ids(tok, data.train[number]),
        ),
        held_back=lambda: evaluate(actor, data),
        metrics=METRICS,
        export=partial(export, policy, tok),
        curves={"reward": "mean reward", "kl_to_start": "KL to the start (nats per token)"},
    )
    return train(stage, config, folder, resume=resume, console=console)
