"""Samples and their rewards: what GRPO and PPO learn from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import builtin, chat, parallel, rewards, rows, sources
from .chat import Example
from .config import RolloutConfig
from .data import IGNORE, Batch, Order, padded
from .model import Head
from .policy import LogProbs
from .sampler import Cut, Kept, sample
from .step import autocast, learned, targets

Carry = dict[
    str, Tensor
]  # one batch of samples; in the checkpoint, so that a run resumes between its updates


@dataclass(frozen=True)
class Data:
    train: list[rows.Row]
    val: list[rows.Row]
    source: str
    order: Order


@dataclass(frozen=True)
class Actor:
    """Who answers, and who judges."""

    model: Any
    head: Head
    tok: Any
    rewards: list[rewards.Reward]
    config: RolloutConfig

    def answer(
        self,
        asked: Sequence[rows.Row],
        temperature: float,
        noise: Tensor,
        kept: list[list[Kept]] | None = None,
    ) -> tuple[list[list[int]], list[float]]:
        """Tokens and reward of an answer to each row; ``kept``: gets what the sampler kept, where it cuts its distribution."""
        stop = chat.ends(self.tok, self.model.generation_config.eos_token_id)
        with autocast(self.config, self.head.weight.device):
            ids = sample(
                self.model, self.head, [asked_ids(self.tok, row) for row in asked],
                max_new_tokens=self.config.max_new_tokens, end=stop,
                temperature=temperature, noise=noise, cut=cut_of(self.config), kept=kept,
            )  # fmt: skip
        texts = [chat.decode(self.tok, chat.without_end(tokens, stop)) for tokens in ids]
        # once for all parts of a model: a reward function may draw
        return ids, parallel.from_reader(lambda: rewards.score(self.rewards, asked, texts, ids))

    def noise(self, place: int, rows: int) -> Tensor:
        """The random numbers of so many samples: a function of the seed and the place in the run, no state to save.
        # float64 [rows, max_new_tokens]"""
        seed = (self.config.seed * 1_000_003 + place) * 1_000_003  # not one of those that shuffle the data
        generator = torch.Generator(device="cpu").manual_seed(seed % 2**63)
        return torch.rand(
            rows, self.config.max_new_tokens, dtype=torch.float64, device="cpu", generator=generator
        )


def cut_of(config: RolloutConfig) -> Cut | None:
    """How the sampler cuts its distribution; None: not at all."""
    cut = Cut(getattr(config, "top_k", 0), getattr(config, "top_p", 1.0))
    return None if cut == Cut(0, 1.0) else cut


def asked_ids(tok: Any, row: rows.Row) -> list[int]:
    """A row's prompt."""
    return chat.prompt(tok, row["prompt"], chat.options(row))


def _asked(tok: Any, row: rows.Row) -> rows.Row:
    row = chat.taken(tok, rows.prompt_row(row))
    if not asked_ids(tok, row):
        raise ValueError("prompt: expected at least one token, got none")
    return row


def prepare(config: RolloutConfig, tok: Any, console: Console) -> Data:
    skipped: list[str] = []
    if config.data:
        found, skipped = rows.read(
            config.data,
            partial(_asked, tok),
            columns=config.column,
            skip=config.skip_bad_rows,
        )
        source = sources.named(config.data)
    else:
        found, source = builtin.arithmetic(config.numbers), f"a+b and a-b below {config.numbers}"
    train, val = builtin.split(found, config.val_fraction, most=500)
    room = config.seq_len - config.max_new_tokens
    kept, val = ([r for r in part if len(asked_ids(tok, r)) <= room] for part in (train, val))
    if not kept:
        raise ValueError(f"data: expected a prompt within {room} tokens (seq_len - max_new_tokens), got none")
    val = val[:: max(1, len(val) // config.evaluate)][: config.evaluate]
    source += f", {len(kept):,} prompts, {len(val):,} held back"
    source += f", {len(skipped)} rows skipped" if skipped else ""
    source += f", {len(train) - len(kept)} dropped: too long" if len(kept) < len(train) else ""
    console.print(source)
    return Data(kept, val, source, Order(len(kept), config.seed))


def roll_out(
    actor: Actor, ref: Any, ref_head: Head | None, logprobs: LogProbs, data: Data, index: int, group: int
) -> Carry:
    """This process's share of the ``index``-th batch of samples, ``group`` per prompt beside each other; R rows of T tokens.

    A sample that no function could score (its reward is NaN) has no token to learn.
    """
    config = actor.config
    examples: list[Example] = []
    scores: list[float] = []
    kept: list[list[Kept]] = []
    noise = actor.noise(index, config.rows_per_step * group)  # of all processes
    for at in config.starts(index):
        asked = [data.train[i] for i in data.order.take(at, config.batch_size) for _ in range(group)]
        first = (at - index * config.rows_per_step) * group
        ids, gained = actor.answer(asked, config.temperature, noise[first : first + len(asked)], kept)
        scores += gained
        for row, tokens, reward in zip(asked, ids, gained, strict=True):
            before = asked_ids(actor.tok, row)
            scored = not math.isnan(reward)
            examples.append(Example(before + tokens, [False] * len(before) + [scored] * len(tokens)))
    samples, unscored = parallel.summed(len(scores), sum(map(math.isnan, scores)))
    if samples == unscored:  # in every process, or the others would wait for this one
        raise ValueError(
            f"reward: expected a value, got None for each of the {samples:.0f} samples of a step"
        )
    batch = padded(examples).to(actor.head.weight.device)
    cut: Carry = {}
    if cut_of(config) is not None:
        cut = _laid_out(kept, batch.targets)
    sets = None if getattr(config, "whole", False) else cut.get("kept")
    carry = {
        **cut,
        "inputs": batch.inputs,
        "targets": batch.targets,
        "old": token_logprobs(actor.model, actor.head, logprobs, batch, config, group, sets),
        "rewards": torch.tensor(scores, dtype=torch.float32, device=batch.inputs.device),
    }
    if ref is not None and ref_head is not None:
        carry["ref"] = token_logprobs(ref, ref_head, logprobs, batch, config, group, sets)
    return carry


def _laid_out(kept: list[list[Kept]], targets: Tensor) -> Carry:
    """What the sampler kept where each token to learn was drawn, padded with -1, int32 [R, T, K], and its log-prob [R, T]."""
    device = targets.device
    widest = max((len(each.ids) for drawn in kept for each in drawn), default=1)
    ids = torch.full((*targets.shape, widest), -1, dtype=torch.int32, device="cpu")
    logprobs = torch.zeros(targets.shape, dtype=torch.float32, device="cpu")
    for row, (learned_here, drawn) in enumerate(zip((targets != IGNORE).cpu(), kept, strict=True)):
        for column, each in zip(learned_here.nonzero()[:, 0].tolist(), drawn, strict=False):
            ids[row, column, : len(each.ids)] = torch.tensor(each.ids, dtype=torch.int32, device="cpu")
            logprobs[row, column] = each.logprob
    return {"kept": ids.to(device), "sampler": logprobs.to(device)}


@torch.no_grad()
def token_logprobs(
    model: Any, head: Head, logprobs: LogProbs, batch: Batch, config: RolloutConfig, group: int,
    kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Of the sampled tokens, 0 elsewhere; in the updates' passes, so that the first ratio is 1.  # [R, T]"""
    out = torch.zeros(batch.targets.shape, dtype=torch.float32, device=batch.targets.device)
    for start, part in parts(batch, config, group):
        hidden = learned(model, part, config)
        with autocast(config, hidden.device):
            own = None if kept is None else kept[start : start + len(part.inputs)][part.targets != IGNORE]
            values = logprobs(hidden, head.gathered(), targets(part), config.temperature, own)
        out[start : start + len(part.inputs)][part.targets != IGNORE] = values
    return out


def drawn_with(config: RolloutConfig, *more: object) -> tuple[object, ...]:
    """What samples depend on, where a checkpoint may lie between two updates of one batch of them; else nothing."""
    return (config.temperature, config.max_new_tokens, *more) if config.updates > 1 else ()


def check_carried(carry: Carry, update: int) -> None:
    """A checkpoint made between two updates of one batch of samples holds each process's own."""
    if update and not carry:
        raise ValueError(
            "resume: this checkpoint lies between two updates of one batch of samples: "
            "it goes on with the number of processes that made it"
        )


def parts(batch: Batch, config: RolloutConfig, group: int) -> Iterator[tuple[int, Batch]]:
    """The passes of a step: first row and rows of each."""
    size = config.batch_size * group
    for start in range(0, len(batch.inputs), size):
        yield start, Batch(batch.inputs[start : start + size], batch.targets[start : start + size])


@torch.no_grad()
def evaluate(actor: Actor, data: Data) -> dict[str, float]:
    """Mean reward of the held-back prompts: of one sample each, and of the likeliest answer."""
    if not data.val:
        return {}
    values = {}
    noise = actor.noise(2**31, len(data.val))
    for name, temperature in (("reward", actor.config.temperature), ("greedy", 0.0)):

        def gained(start: int, temperature: float = temperature) -> list[float]:
            part = slice(start, start + 128)
            return actor.answer(data.val[part], temperature, noise[part])[1]

        parts_of = parallel.spread(gained, range(0, len(data.val), 128))
        scores = [reward for part in parts_of for reward in part if not math.isnan(reward)]
        if scores:
            values[name] = sum(scores) / len(scores)
    return values


METRICS = {"reward": "reward, sampled", "greedy": "reward, likeliest answer"}
