"""Rows of tokens in an order that is a function of the seed and the position, so a run resumes anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

IGNORE = -100


class Rows:
    """A stream of tokens as rows of ``seq_len`` inputs and their next tokens; the last row is padded."""

    def __init__(self, tokens: Tensor, seq_len: int, seed: int = 0) -> None:
        if len(tokens) < 2:
            raise ValueError(f"data: expected at least 2 tokens, got {len(tokens)}; give more text")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.seq_len)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.seq_len
        piece = self.tokens[start : start + self.seq_len + 1].long()
        inputs, targets = torch.zeros(self.seq_len, dtype=torch.long), torch.full((self.seq_len,), IGNORE)
        inputs[: len(piece) - 1], targets[: len(piece) - 1] = piece[:-1], piece[1:]
        return inputs, targets

    def at(self, position: int) -> int:
        """The row at ``position`` of the endless shuffled sequence: one permutation per epoch."""
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator)
        return int(self._order[index])

    def batch(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """``size`` shuffled rows from ``position`` on.  # inputs, targets [size, seq_len]"""
        rows = [self.row(self.at(position + i)) for i in range(size)]
        return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])

    def in_order(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every row once, unshuffled, for evaluation."""
        for start in range(0, len(self), size):
            rows = [self.row(i) for i in range(start, min(start + size, len(self)))]
            yield torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])

    def fingerprint(self) -> str:
        """Changes with the tokens, the row length and the order: a checkpoint resumes only on the same."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        digest.update(f"{self.seq_len} {self.seed}".encode())
        return digest.hexdigest()[:16]
