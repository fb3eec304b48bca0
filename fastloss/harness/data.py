"""Batches of tokens in an order that is a function of the seed and the position, so a run resumes anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .chat import Example

IGNORE = -100


class Batch(NamedTuple):
    """Row by row: inputs, and the token that follows each, or IGNORE where nothing is to be learned."""

    inputs: Tensor  # [B, T]
    targets: Tensor  # [B, T]
    positions: Tensor | None = None  # [B, T]; restarts at 0 where a packed row's next document begins
    mask: Tensor | None = (
        None  # bool [B, 1, T, whole row]; which tokens each sees, where a process has a piece of the rows
    )

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


class Order:
    """The endless shuffled sequence of ``count`` things: one permutation per epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def at(self, position: int) -> int:
        epoch, index = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._permutation = (
                epoch,
                torch.randperm(self.count, generator=generator, dtype=torch.int64, device="cpu"),
            )
        return int(self._permutation[index])

    def take(self, position: int, size: int) -> list[int]:
        return [self.at(position + i) for i in range(size)]

    def step(self, step: int, size: int) -> list[int]:
        """All that step takes, when each takes ``size``."""
        return self.take(step * size, size)


class Rows:
    """A stream of tokens as rows of ``seq_len`` inputs and their next tokens; the last row is padded."""

    def __init__(self, tokens: Tensor, seq_len: int, seed: int = 0) -> None:
        if len(tokens) < 2:
            raise ValueError(f"data: expected at least 2 tokens, got {len(tokens)}; give more text")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.order = Order(len(self), seed)

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.seq_len)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.seq_len
        piece = self.tokens[start : start + self.seq_len + 1].long()
        inputs, targets = _filled(self.seq_len, value=0), _filled(self.seq_len, value=IGNORE)
        inputs[: len(piece) - 1], targets[: len(piece) - 1] = piece[:-1], piece[1:]
        return inputs, targets

    def batch(self, position: int, size: int) -> Batch:
        """``size`` shuffled rows from ``position`` on."""
        rows = [self.row(i) for i in self.order.take(position, size)]
        return Batch(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))

    def in_order(self, size: int) -> Iterator[Batch]:
        """Every row once, unshuffled, for evaluation."""
        for start in range(0, len(self), size):
            rows = [self.row(i) for i in range(start, min(start + size, len(self)))]
            yield Batch(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))

    def fingerprint(self) -> str:
        return fingerprint(self.tokens, self.seq_len, self.seed)


def fingerprint(tokens: Tensor | Sequence[object], *settings: object) -> str:
    """Changes with the data and the settings of its order: a checkpoint resumes only on the same."""
    plain = tokens.numpy().tobytes() if isinstance(tokens, Tensor) else repr(tokens).encode()
    digest = hashlib.sha256(plain)
    digest.update(" ".join(map(str, settings)).encode())
    return digest.hexdigest()[:16]


def _filled(*shape: int, value: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.int64, device="cpu")


def padded(examples: Sequence[Example]) -> Batch:
    """One example per row; padding at the end, which a causal model's real tokens never see."""
    length = max(len(example.ids) for example in examples) - 1
    inputs = _filled(len(examples), length, value=0)
    targets = _filled(len(examples), length, value=IGNORE)
    for row, example in enumerate(examples):
        _place(inputs[row], targets[row], example, 0)
    return Batch(inputs, targets)


def pack(examples: Sequence[Example], seq_len: int, *, most: int = 0) -> list[list[int]]:
    """Which examples share a row: each goes to the first open row with room for it. ``most`` per row; 0: any.

    Of the open rows the oldest is closed once there are 64, so that a long data set takes linear time.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = []  # [row, room]
    for index, example in enumerate(examples):
        need = len(example.ids) - 1
        fit = next((slot for slot in open_rows if slot[1] >= need), None)
        if fit is None:
            fit = [len(rows), seq_len]
            rows.append([])
            open_rows.append(fit)
            if len(open_rows) > 64:
                open_rows.pop(0)
        rows[fit[0]].append(index)
        fit[1] -= need
        if fit[1] == 0 or len(rows[fit[0]]) == most:
            open_rows.remove(fit)
    return rows


def packed(groups: Sequence[Sequence[Example]], seq_len: int) -> Batch:
    """A row per group: its examples one after the other, positions from 0 in each."""
    inputs = _filled(len(groups), seq_len, value=0)
    targets = _filled(len(groups), seq_len, value=IGNORE)
    positions = _filled(len(groups), seq_len, value=0)
    for row, group in enumerate(groups):
        start = 0
        for example in group:
            length = _place(inputs[row], targets[row], example, start)
            positions[row, start : start + length] = torch.arange(length, dtype=torch.int64, device="cpu")
            start += length
        positions[row, start:] = torch.arange(
            seq_len - start, dtype=torch.int64, device="cpu"
        )  # the padding is one more document
    return Batch(inputs, targets, positions)


def _place(inputs: Tensor, targets: Tensor, example: Example, start: int) -> int:
    ids = torch.tensor(example.ids, dtype=torch.int64, device="cpu")
    length = len(ids) - 1
    inputs[start : start + length] = ids[:-1]
    learned = torch.tensor(example.learned[1:], dtype=torch.bool, device="cpu")
    targets[start : start + length] = torch.where(learned, ids[1:], IGNORE)
    return length


def fit(examples: Sequence[Example], seq_len: int) -> tuple[list[Example], int, int]:
    """Cut at ``seq_len`` inputs; how many were cut, and how many dropped since nothing to learn was left."""
    kept, cut, dropped = [], 0, 0
    for example in examples:
        short = Example(example.ids[: seq_len + 1], example.learned[: seq_len + 1])
        if not any(short.learned[1:]):
            dropped += 1
            continue
        cut += len(short.ids) < len(example.ids)
        kept.append(short)
    return kept, cut, dropped
