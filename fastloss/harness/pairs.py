"""Preference pairs: what the reward model and DPO learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from . import builtin, chat, rows, sources
from .chat import Example, Pair
from .config import TrainConfig
from .data import Order


@dataclass(frozen=True)
class Data:
    train: list[Pair]
    val: list[Pair]
    source: str
    order: Order

    def batch(self, position: int, size: int) -> list[Pair]:
        return [self.train[i] for i in self.order.take(position, size)]

    def held_back(self, size: int) -> Iterator[list[Pair]]:
        by_length = sorted(self.val, key=length)
        for start in range(0, len(by_length), size):
            yield by_length[start : start + size]


def prepare(config: TrainConfig, tok: Any, console: Console) -> Data:
    skipped: list[str] = []
    if config.data:
        found, skipped = rows.read(
            config.data,
            lambda row: chat.taken(tok, rows.preference_row(row)),
            columns=config.column,
            skip=config.skip_bad_rows,
        )
        source = sources.named(config.data)
        train_rows, val_rows = builtin.split(found, config.val_fraction, most=500)
    else:
        train_rows, val_rows = builtin.preferences(config.val_fraction, most=500)
        source = "descriptions of Python's own functions, right and wrong"
    train, val = ([chat.pair(tok, row) for row in part] for part in (train_rows, val_rows))
    kept, val = ([p for p in part if length(p) <= config.seq_len] for part in (train, val))
    if not kept:
        raise ValueError(f"data: expected a pair within seq_len={config.seq_len} tokens, got none")
    source += f", {len(kept):,} pairs, {len(val):,} held back"
    source += ", with margins" if any(pair.margin for pair in kept) else ""
    source += f", {len(skipped)} rows skipped" if skipped else ""
    source += f", {len(train) - len(kept)} dropped: longer than seq_len" if len(kept) < len(train) else ""
    console.print(source)
    return Data(kept, val, source, Order(len(kept), config.seed))


def length(pair: Pair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def examples(pairs: Sequence[Pair]) -> list[Example]:
    """The chosen answers to all prompts, then the rejected ones; the answers are what is learned."""
    sides = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    return [Example(q + a, [False] * len(q) + [True] * len(a)) for q, a in sides]
