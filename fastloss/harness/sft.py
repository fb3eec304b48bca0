"""Instruction tuning, top to bottom: examples, packed rows, step, held-back loss and exact match."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import builtin, chat, measure, parallel, rows, sources
from .chat import Example
from .config import SftConfig
from .context import own_piece
from .data import IGNORE, Batch, Order, fingerprint, fit, pack, packed, padded
from .export import export
from .loop import Metrics, StepFn
from .losses import Loss, describe, loss_named
from .model import Head, check_packing, head_of
from .routers import routers_of, with_routers
from .run import Result, begun, open_folder, train
from .sampler import check_sampler, sample
from .stage import Stage
from .start import language_model, tokenizer_of
from .step import autocast, begins, cut_backward, learned, loss_and_grad, targets


@dataclass(frozen=True)
class Data:
    train: list[Example]
    groups: list[list[int]]  # examples that share a row
    val: list[Example]
    questions: list[rows.Row]  # held-back rows to answer: "prompt", "completion", "task"
    source: str
    order: Order

    def taken(self, position: int, config: SftConfig) -> list[list[Example]]:
        """The examples of each row of a pass."""
        taken = self.order.take(position, config.batch_size)
        return [[self.train[i] for i in self.groups[row]] for row in taken]

    def laid_out(self, groups: list[list[Example]], config: SftConfig) -> Batch:
        if config.packing:
            return packed(groups, config.seq_len)
        return padded([example for group in groups for example in group])

    def batch(self, position: int, config: SftConfig) -> Batch:
        return self.laid_out(self.taken(position, config), config)


def prepare(config: SftConfig, tok: Any, console: Console) -> Data:
    if config.data:
        given, skipped = rows.read(
            config.data,
            lambda row: chat.taken(tok, rows.supervised_row(row)),
            columns=config.column,
            skip=config.skip_bad_rows,
        )
        source = sources.named(config.data) + (f", {len(skipped)} rows skipped" if skipped else "")
        train_rows, val_rows = builtin.split(given, config.val_fraction, most=1000)
    else:
        source = "Python's own functions and arithmetic" if config.task == "both" else config.task
        train_rows, val_rows = [], []
        if config.task != "arithmetic":
            train_rows, val_rows = builtin.split(builtin.descriptions(), config.val_fraction, most=500)
        if config.task != "describe":
            more, some = builtin.split(builtin.arithmetic(config.numbers), config.val_fraction, most=500)
            train_rows += builtin.demonstrations(more, config.repeat, config.wrong)
            val_rows += some
    found, held = ([e for row in part for e in chat.examples(tok, row)] for part in (train_rows, val_rows))
    examples, cut, dropped = fit(found, config.seq_len)
    val, _, _ = fit(held, config.seq_len)
    if not examples:
        raise ValueError(f"data: expected an answer within seq_len={config.seq_len} tokens, got none")
    shuffled = Order(len(examples), config.seed).take(0, len(examples))
    examples = [examples[i] for i in shuffled]
    groups = pack(examples, config.seq_len, most=0 if config.packing else 1)
    asked = [row for row in val_rows if "messages" not in row and "completion" in row]
    room = config.seq_len - config.max_new_tokens
    answerable = [row for row in asked if 0 < len(_asked(tok, row)) <= room]
    if config.exact and len(answerable) < len(asked):
        source += f", {len(asked) - len(answerable)} questions without room for an answer"
    asked = answerable
    step = max(1, len(asked) // config.exact) if config.exact else 1
    questions = asked[::step][: config.exact]
    source += f", {len(examples):,} examples in {len(groups):,} rows, {len(val):,} held back"
    source += f", {cut} cut at seq_len" if cut else ""
    source += f", {dropped} dropped: no answer within seq_len" if dropped else ""
    console.print(source)
    return Data(examples, groups, val, questions, source, Order(len(groups), config.seed))


def _asked(tok: Any, row: rows.Row) -> list[int]:
    return chat.prompt(tok, row["prompt"], chat.options(row))


def make_step(model: Any, head: Head, loss_fn: Loss, data: Data, config: SftConfig) -> StepFn:
    device, routers = head.weight.device, routers_of(model, config)

    def step_fn(step: int) -> Metrics:
        batches = [own_piece(data.batch(start, config)).to(device) for start in config.starts(step)]
        # of all passes of all processes
        tokens = int(parallel.summed(sum(int((batch.targets != IGNORE).sum()) for batch in batches))[0])
        total, loss_s = torch.zeros((), dtype=torch.float32, device=device), 0.0
        for batch in batches:
            rows_hidden, beside = with_routers(model, batch, config, routers, len(batches))
            hidden = rows_hidden[batch.targets != IGNORE]  # [N, D]
            loss, seconds = cut_backward(
                hidden, loss_of(loss_fn, head, targets(batch), tokens, config), beside
            )
            loss_s += seconds
            total += loss
        return {"loss": parallel.summed(total)[0], "tokens": tokens, "loss_s": loss_s}

    return step_fn


def loss_of(loss_fn: Loss, head: Head, target: Tensor, tokens: int, config: SftConfig) -> Any:
    def of(hidden: Tensor) -> Tensor:
        with autocast(config, hidden.device):
            return loss_fn(hidden, head.gathered(), target, tokens)

    return of


@torch.no_grad()
def evaluate(
    model: Any, head: Head, loss_fn: Loss, data: Data, tok: Any, config: SftConfig
) -> dict[str, float]:
    """Loss of the held-back answers' tokens; share of questions whose likeliest answer is the one in the data."""
    model.eval()
    values: dict[str, float] = {}
    if data.val:
        by_length = sorted(data.val, key=lambda example: len(example.ids))

        def total(start: int) -> tuple[float, int]:
            batch = padded(by_length[start : start + 32]).to(head.weight.device)
            hidden, target = learned(model, batch, config), targets(batch)
            return float(loss_of(loss_fn, head, target, 1, config)(hidden)), len(target)

        totals = parallel.spread(total, range(0, len(by_length), 32))
        loss = sum(total for total, _ in totals) / sum(tokens for _, tokens in totals)
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    if data.questions:
        values |= exact_match(model, head, tok, data.questions, config.max_new_tokens)
    model.train()
    return values


def exact_match(
    model: Any, head: Head, tok: Any, questions: Sequence[rows.Row], max_new_tokens: int
) -> dict[str, float]:
    """Over all questions, and for each task that the rows name."""
    hits: dict[str, list[float]] = defaultdict(list)
    stop = chat.ends(tok, model.generation_config.eos_token_id)

    def answered(start: int) -> list[bool]:
        asked = questions[start : start + 64]
        prompts = [_asked(tok, row) for row in asked]
        answers = sample(model, head, prompts, max_new_tokens=max_new_tokens, end=stop, temperature=0)
        return [right(row, ids) for row, ids in zip(asked, answers, strict=True)]

    def right(row: rows.Row, ids: list[int]) -> bool:
        wanted = chat.completion(tok, row["prompt"], row["completion"], chat.options(row))
        said, meant = (chat.decode(tok, chat.without_end(of, stop)).strip() for of in (ids, wanted))
        return said == meant

    found = chain.from_iterable(parallel.spread(answered, range(0, len(questions), 64)))
    for row, hit in zip(questions, found, strict=True):
        hits["exact"].append(hit)
        if "task" in row:
            hits[f"exact_{row['task']}"].append(hit)
    return {key: sum(values) / len(values) for key, values in hits.items()}


@begun
def run(config: SftConfig, *, resume: bool, overwrite: bool, console: Console) -> Result:
    loss_fn = loss_named(config.loss)
    folder: Path = open_folder(config, resume, overwrite, console)
    tok = tokenizer_of(config, folder, console)
    data = parallel.from_reader(partial(prepare, config, tok, console))
    model = language_model(config, tok)
    head = head_of(model)
    if config.packing:
        check_packing(model, len(tok))
    if data.questions:
        check_sampler(model, head, len(tok), instead=" (--exact 0 does without)")
    dtype = torch.bfloat16 if config.bf16 else torch.float32

    def one_loss(name: str) -> Any:
        batch = data.batch(0, config).to(head.weight.device)
        with torch.no_grad():
            hidden = learned(model, batch, config)
        target = targets(batch)
        return partial(loss_and_grad, hidden, loss_of(loss_named(name), head, target, len(target), config))

    def flops() -> int:
        return measure.count_flops(partial(make_step(model, head, loss_named("torch"), data, config), 0))

    tasks = sorted({row["task"] for row in data.questions if "task" in row})
    stage = Stage(
        title="sft",
        model=model,
        source=data.source,
        fingerprint=fingerprint(
            data.train, config.seq_len, config.seed, config.rows_per_step, config.packing
        ),
        step=lambda name, _: make_step(model, head, loss_named(name), data, config),
        loss_alone=one_loss,
        loss_by=lambda name: describe(name, head, len(targets(data.batch(0, config))), dtype),
        model_flops=flops,
        same_shape=False,
        examples=lambda step: begins(
            tok,
            chain.from_iterable(data.groups[row] for row in data.order.step(step, config.rows_per_step)),
            lambda number: data.train[number].ids,
        ),
        held_back=lambda: evaluate(model, head, loss_fn, data, tok, config),
        metrics={
            **({"exact_arithmetic": "exact match, arithmetic"} if "arithmetic" in tasks else {}),
            "perplexity": "perplexity of the answers",
            "loss": "loss of the answers (nats per token)",
            "exact": "exact match",
            **{f"exact_{task}": f"exact match, {task}" for task in tasks if task != "arithmetic"},
        },
        export=partial(export, model, tok),
        curves={"loss": "loss (nats per answer token)"},
    )
    return train(stage, config, folder, resume=resume, console=console)
