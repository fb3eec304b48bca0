"""What a student learns from: a teacher's hidden states and head, or the K likeliest tokens that it named, also from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from . import chat, layers, rows, sources
from .chat import Example
from .config import DistillConfig
from .data import Batch, padded
from .model import Head, check_head, check_positions, folder_of, head_of, load_model
from .step import learned

# Rows of the teacher's logits that are made at once where only its K likeliest are kept.
ROWS = 256
IDS, LOGPROBS = "teacher_ids", "teacher_logprobs"  # columns of the rows of a stored teacher


class Named(NamedTuple):
    """The teacher's K likeliest tokens at each token to learn."""

    ids: Tensor  # int64 [N, K]; -1 is padding
    logprobs: Tensor  # float32 [N, K], nats


class Lesson(NamedTuple):
    """What a loss reads of the teacher: its hidden states and head, or what it named."""

    hidden: Tensor | None  # [N, D']
    head: Head | None
    named: Named | None


class Teacher:
    """A model folder that is read for each batch."""

    def __init__(self, config: DistillConfig, tok: Any, vocab: int) -> None:
        self.config = config
        own = chat.load(folder_of(config.teacher), config.date)
        if own.get_vocab() != tok.get_vocab():
            raise ValueError(
                f"teacher: expected a model with the student's tokenizer, got another in {config.teacher}"
            )
        model: Any = load_model(config.teacher, layers.build_device(config))
        check_positions(model, config.seq_len)
        device = next(model.parameters()).device
        check_head(model, torch.arange(1, 9, dtype=torch.int64, device=device)[None] % len(tok))
        self.model = layers.prepare(model.requires_grad_(False), config).eval()
        self.head = head_of(self.model)
        if not config.top_k:
            check_plain("teacher", self.head)
        elif config.top_k > min(self.head.vocab, vocab):
            raise ValueError(
                f"top_k: expected at most {min(self.head.vocab, vocab)}, the classes of both, got {config.top_k}"
            )
        self.vocab = min(vocab, self.head.vocab)

    @torch.no_grad()
    def lesson(self, batch: Batch, examples: Sequence[Example]) -> Lesson:
        hidden = learned(self.model, batch, self.config)
        if not self.config.top_k:
            return Lesson(hidden, self.head.gathered(), None)
        return Lesson(None, None, likeliest(hidden, self.head.gathered(), self.vocab, self.config))


class Stored:
    """What rows of data carry of a teacher that is not here."""

    def __init__(self, config: DistillConfig, tok: Any) -> None:
        """A teacher's words are a function of the tokens before them: an example finds them by its own tokens."""
        self.config = config
        self.found: dict[tuple[int, ...], Named] = {}
        read, _ = rows.read(
            config.data, partial(_with_teacher, tok), columns=config.column, skip=config.skip_bad_rows
        )
        for row in read:
            named, start = _named(row), 0
            for example in chat.examples(tok, row):
                count = sum(example.learned[1:])
                part = Named(*(x[start : start + count] for x in named))
                start += count
                self.found[tuple(example.ids[: config.seq_len + 1])] = part

    def lesson(self, batch: Batch, examples: Sequence[Example]) -> Lesson:
        parts = []
        for example in examples:
            named, count = self.found[tuple(example.ids)], sum(example.learned[1:])
            parts.append(Named(*(x[:count] for x in named)))
        most = max(part.ids.shape[1] for part in parts)
        wide = [
            Named(*(_widened(x, most, fill) for x, fill in zip(p, (-1, -torch.inf), strict=True)))
            for p in parts
        ]
        device = batch.inputs.device
        return Lesson(None, None, Named(*(torch.cat(x).to(device) for x in zip(*wide, strict=True))))


def _widened(x: Tensor, most: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, most - x.shape[1]), value=fill)


def _with_teacher(tok: Any, row: rows.Row) -> rows.Row:
    """A checked row whose teacher has named tokens for each token to learn."""
    row = chat.taken(tok, rows.supervised_row(row))
    if IDS not in row or LOGPROBS not in row:
        raise ValueError(
            f"expected `{IDS}` and `{LOGPROBS}` without --teacher, got {sorted(row)}; fastloss teach writes them"
        )
    named = _named(row)
    count = sum(sum(example.learned[1:]) for example in chat.examples(tok, row))
    if len(named.ids) != count:
        raise ValueError(f"{IDS}: expected {count} lists, one for each token to learn, got {len(named.ids)}")
    if int(named.ids.max()) >= len(tok) or int(named.ids.min()) < -1:
        raise ValueError(f"{IDS}: expected ids of the tokenizer's {len(tok)} tokens, or -1, got others")
    return row


def _named(row: rows.Row) -> Named:
    try:
        named = Named(
            torch.tensor(row[IDS], dtype=torch.int64, device="cpu"),
            torch.tensor(row[LOGPROBS], dtype=torch.float32, device="cpu"),
        )
    except (TypeError, ValueError) as error:  # of unequal lengths, or no numbers
        raise ValueError(f"{IDS}, {LOGPROBS}: expected lists of equally many numbers: {error}") from None
    if named.ids.dim() != 2 or named.ids.shape != named.logprobs.shape or not named.ids.shape[1]:
        raise ValueError(
            f"{IDS}, {LOGPROBS}: expected lists of one shape [tokens, K], got {list(named.ids.shape)} and "
            f"{list(named.logprobs.shape)}"
        )
    return named


def check_plain(name: str, head: Head) -> None:
    """The two heads of a whole distribution take no soft-cap, and a scale only where no bias is beside it."""
    if head.softcap or (head.bias is not None and head.scale != 1.0):
        raise ValueError(
            f"{name}: expected a head without soft-cap, and without a scale beside a bias; --top-k takes them"
        )


@torch.no_grad()
def likeliest(hidden: Tensor, head: Head, vocab: int, config: DistillConfig) -> Named:
    """The K likeliest of the first ``vocab`` classes, at the temperature of the distillation."""
    found = []
    for start in range(0, max(1, len(hidden)), ROWS):
        z = head.logits(hidden[start : start + ROWS])[:, :vocab] / config.temperature
        logprobs, ids = z.log_softmax(-1).topk(config.top_k, -1)
        found.append((ids, logprobs))
    return Named(*(torch.cat(x) for x in zip(*found, strict=True)))


def write(config: DistillConfig, out: Path, *, overwrite: bool, console: Console) -> int:
    """Rows of ``config.data`` with what the teacher names at each token to learn, as ``--data`` takes them without a teacher;
    how many."""
    if not config.top_k:
        raise ValueError("top_k: expected how many tokens to store of each position, got 0")
    if out.exists() and not overwrite:
        raise ValueError(f"out: {out} is there; --overwrite writes it anew")
    tok = chat.load(folder_of(config.teacher), config.date)
    read, _ = rows.read(
        config.data,
        lambda row: chat.taken(tok, rows.supervised_row(row)),
        columns=config.column,
        skip=config.skip_bad_rows,
    )
    teacher = Teacher(config, tok, len(tok))
    partial_file = out.with_name(out.name + ".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with partial_file.open("w", encoding="utf-8") as file:
        for row, named in _taught(teacher, tok, read):
            columns = {
                IDS: named.ids.tolist(),
                LOGPROBS: [[round(x, 5) for x in r] for r in named.logprobs.tolist()],
            }
            file.write(json.dumps(row | columns, ensure_ascii=False) + "\n")
            count += 1
    if not count:
        partial_file.unlink()
        raise ValueError(f"data: expected an answer within seq_len={config.seq_len} tokens, got none")
    partial_file.replace(out)
    console.print(
        f"{count:,} rows of {sources.named(config.data)} with {config.top_k} tokens a position: {out}"
    )
    return count


def _taught(teacher: Teacher, tok: Any, read: Iterable[rows.Row]) -> Iterator[tuple[rows.Row, Named]]:
    """Rows whose examples are not longer than the teacher may read, each with what it names."""
    device = teacher.head.weight.device
    for row in read:
        examples = chat.examples(tok, row)
        if any(len(e.ids) > teacher.config.seq_len + 1 or not any(e.learned[1:]) for e in examples):
            continue
        parts = [teacher.lesson(padded([e]).to(device), [e]).named for e in examples]
        yield row, Named(*(torch.cat([getattr(p, name) for p in parts]).cpu() for name in Named._fields))
