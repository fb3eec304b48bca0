"""GRPO, top to bottom: groups of samples, rewards, advantages within the group, step, held-back reward."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import measure, parallel, rewards
from .config import GrpoConfig
from .data import IGNORE, Batch, fingerprint
from .export import export
from .loop import Metrics, StepFn
from .losses import named
from .model import head_of
from .policy import LOGPROBS, POLICIES, TORCH_KNOWS, Objective, Out, Tokens, averages_tokens, described
from .rollout import (
    METRICS,
    Actor,
    Carry,
    Data,
    asked_ids,
    check_carried,
    cut_of,
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


def sampled(actor: Actor, ref: Any, name: str, data: Data, config: GrpoConfig, index: int) -> Carry:
    """A batch of samples with the advantage of each."""
    import fastloss

    ref_head = head_of(ref) if ref is not None else None
    carry = roll_out(actor, ref, ref_head, LOGPROBS[name], data, index, config.group_size)
    everyones, own = parallel.everyones(carry["rewards"])  # scale="batch" divides by the deviation of all
    advantages = fastloss.group_advantages(everyones, config.group_size, scale=config.scale)
    carry["advantages"] = advantages[own]
    return carry


def make_step(actor: Actor, ref: Any, name: str, data: Data, config: GrpoConfig, carry: Carry) -> StepFn:
    """``carry`` holds the samples from one of their updates to the next."""

    def step_fn(step: int) -> Metrics:
        index, update = divmod(step, config.updates)
        if update == 0:
            carry.clear()
            carry.update(sampled(actor, ref, name, data, config, index))
        check_carried(carry, update)
        tokens, samples, scored, reward, mixed_groups = counts(config, carry)
        objective = objective_of(config, tokens, scored)
        total, loss_s = 0.0, 0.0
        sums: dict[str, Tensor] = {}
        for start, batch in parts(Batch(carry["inputs"], carry["targets"]), config, config.group_size):
            read = tokens_of(carry, start, batch, config)
            seen: list[Out] = []
            hidden = learned(actor.model, batch, config)
            loss, seconds = cut_backward(hidden, loss_of(actor, name, read, objective, config, seen))
            total, loss_s = total + float(loss), loss_s + seconds
            for key, value in {**seen[0].metrics, **beside_sampler(carry, start, batch)}.items():
                sums[key] = sums.get(
                    key, torch.zeros((), dtype=torch.float32, device="cpu")
                ) + value.cpu() * (len(read.target) / tokens)
        step_loss, *means = parallel.summed(total, *sums.values())
        return {
            "loss": step_loss, "tokens": int(tokens), "loss_s": loss_s, "reward": reward / scored,
            "length": tokens / scored, "mixed_groups": mixed_groups * config.group_size / samples,
            **dict(zip(sums, means, strict=True)),
        }  # fmt: skip

    return step_fn


def counts(config: GrpoConfig, carry: Carry) -> list[float]:
    """Of all processes' samples: tokens, samples, those with a reward, the rewards' sum, groups with a contrast."""
    rewards, mixed_groups = carry["rewards"], mixed(carry["rewards"], config.group_size)
    tokens, scored = (carry["targets"] != IGNORE).sum(), (~rewards.isnan()).sum()
    return parallel.summed(tokens, len(rewards), scored, rewards.nansum(), mixed_groups)


def objective_of(config: GrpoConfig, tokens: float, samples: float) -> Objective:
    """The normalizer counts the whole step, so that neither accumulation nor the number of processes changes anything."""
    return Objective(
        config.loss_type, config.clip_low, config.clip_high, config.beta, config.temperature,
        config.max_new_tokens, tokens if averages_tokens(config.loss_type) else samples,
    )  # fmt: skip


def tokens_of(carry: Carry, start: int, batch: Batch, config: GrpoConfig) -> Tokens:
    """One pass's share of the samples."""
    rows = slice(start, start + len(batch.inputs))
    kept = batch.targets != IGNORE
    ref = carry["ref"][rows][kept] if "ref" in carry else None
    sets = carry["kept"][rows][kept] if "kept" in carry and not config.whole else None
    old, advantages = carry["old"][rows][kept], carry["advantages"][rows]
    return Tokens(targets(batch), offsets(batch), old, ref, advantages, sets)


def beside_sampler(carry: Carry, start: int, batch: Batch) -> dict[str, Tensor]:
    """How far the log-probs that the loss starts from are from the sampler's, where that cut its distribution."""
    import fastloss

    if "sampler" not in carry:
        return {}
    rows, kept = slice(start, start + len(batch.inputs)), batch.targets != IGNORE
    out = fastloss.sampler_metrics(carry["old"][rows], carry["sampler"][rows], kept)
    return {"sampler_ratio": out["ratio/mean"], "sampler_kl": out["kl"]}


def loss_of(
    actor: Actor, name: str, read: Tokens, objective: Objective, config: GrpoConfig, seen: list[Out]
) -> Any:
    def of(hidden: Tensor) -> Tensor:
        with autocast(config, hidden.device):
            out = POLICIES[name](hidden, actor.head.gathered(), read, objective)
        seen.append(out)
        return out.loss

    return of


def mixed(scores: Tensor, group_size: int) -> Tensor:
    """Groups whose rewards differ: the others teach nothing."""
    groups = scores.view(-1, group_size)
    most, least = groups.nan_to_num(-math.inf).amax(1), groups.nan_to_num(math.inf).amin(1)
    return (most > least).sum()


@begun
def run(config: GrpoConfig, *, resume: bool, overwrite: bool, console: Console) -> Result:
    named(POLICIES, config.loss)
    averages_tokens(config.loss_type)  # an unknown one is an error now
    if config.loss_type not in TORCH_KNOWS and (config.compare or config.loss == "torch"):
        raise ValueError(
            f"loss_type: expected one of {TORCH_KNOWS} beside PyTorch's loss, got {config.loss_type!r}"
        )
    functions = rewards.load(config.reward)
    folder = open_folder(config, resume, overwrite, console)
    tok = tokenizer_of(config, folder, console)
    data = parallel.from_reader(partial(prepare, config, tok, console))
    # no dropout: samples and updates must see one policy
    model = language_model(config, tok).eval()
    check_sampler(model, head_of(model), len(tok))
    actor = Actor(model, head_of(model), tok, functions, config)
    ref = reference(config, model) if config.beta else None

    def step(name: str, carry: Carry) -> StepFn:
        return make_step(actor, ref, name, data, config, carry)

    def one_loss(name: str) -> Any:
        carry = sampled(actor, ref, name, data, config, 0)
        start, batch = next(parts(Batch(carry["inputs"], carry["targets"]), config, config.group_size))
        with torch.no_grad():
            hidden = learned(model, batch, config)
        tokens, samples, *_ = counts(config, carry)
        objective = objective_of(config, tokens, samples)
        of = loss_of(actor, name, tokens_of(carry, start, batch, config), objective, config, [])
        return partial(loss_and_grad, hidden, of)

    size = config.batch_size * config.group_size
    stage = Stage(
        title="grpo",
        model=model,
        source=data.source,
        fingerprint=fingerprint(
            data.train,
            config.seed,
            config.rows_per_step,
            config.updates,
            *drawn_with(config, config.group_size, *(cut_of(config) or ())),
        ),
        step=step,
        loss_alone=one_loss,
        loss_by=lambda name: described(name, actor.head, size * 4, config.loss_type, config),
        model_flops=lambda: measure.count_flops(partial(step(plain(config), {}), 0)),
        same_shape=False,
        examples=lambda step: begins(
            tok,
            data.order.step(step // config.updates, config.rows_per_step),
            lambda number: asked_ids(tok, data.train[number]),
        ),
        held_back=lambda: evaluate(actor, data),
        metrics=METRICS,
        export=partial(export, model, tok),
        curves={"reward": "mean reward", "mixed_groups": "groups with a contrast"},
    )
    return train(stage, config, folder, resume=resume, console=console)


def plain(config: GrpoConfig) -> str:
    """The loss that counts the model's FLOPs: PyTorch's, where it has this loss_type."""
    return "torch" if config.loss_type in TORCH_KNOWS else config.loss
