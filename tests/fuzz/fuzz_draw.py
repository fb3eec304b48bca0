"""What a case draws from: numbers, shapes and tensors of one seed, the same on every machine."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
VOCABS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 256, 257, 300, 511, 513)
DIMS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80)


@dataclass
class Case:
    """One call: the arguments of a public function by name, plain tensors and everything else apart."""

    function: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()  # those that may ask for a gradient
    dtype: torch.dtype = torch.float32
    head: tuple[str, ...] = ()  # operands of a GEMM, which autocast rounds


class Draw:
    """Every choice of one case."""

    def __init__(self, seed: int, number: int, dtypes: Sequence[torch.dtype] | None = None):
        self.random = random.Random(seed * 1_000_003 + number)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        low = [torch.float32] * 4 + [torch.bfloat16] * 3 + [torch.float16] * 2 + [torch.float64]
        self.dtype = self.random.choice(low if dtypes is None else list(dtypes))

    def pick(self, *choices: T) -> T:
        return self.random.choice(choices)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def number(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    # --- shapes

    def rows(self) -> int:
        return self.whole(1, 40) if self.chance(0.5) else self.pick(0, 1, 1, 2, 3, 4, 5, 7, 8, 17, 33)

    def vocab(self) -> int:
        return self.whole(1, 700) if self.chance(0.4) else self.pick(*VOCABS)

    def dim(self) -> int:
        """Of hidden states; without any, logits are their bias."""
        return 0 if self.chance(0.03) else self.pick(*DIMS)

    def lead(self) -> tuple[int, ...]:
        """Leading dimensions of a batch of tokens."""
        shape = self.pick((1,), (2,), (2,), (3,))[0]
        if shape == 1:
            return (self.rows(),)
        if shape == 2:
            return (self.pick(0, 1, 2, 3, 5), self.pick(0, 1, 2, 3, 7, 12))
        return (self.pick(1, 2), self.pick(1, 3), self.pick(1, 2, 4))

    # --- tensors

    def normal(
        self, shape: Sequence[int], scale: float = 1.0, dtype: torch.dtype | None = None, shift: float = 0.0
    ) -> Tensor:
        x = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        return (x * scale + shift).to(dtype or self.dtype)

    def uniform(
        self, shape: Sequence[int], low: float, high: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        x = torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * x).to(dtype or self.dtype)

    def integers(self, shape: Sequence[int], low: int, high: int) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=self.generator, dtype=torch.int64)

    def logits(self, shape: Sequence[int], *, infinite: bool = True) -> Tensor:
        """Flat, peaked, far from 0, with masked vocabularies, with equal rows."""
        x = self.normal(shape, self.pick(0.01, 1.0, 1.0, 3.0, 30.0), torch.float64)
        if self.chance(0.2):
            x = x + self.pick(100.0, -100.0, 1e3, -1e3, 1e4)
        if self.chance(0.1) and x.dim() > 1:  # one row far from the others
            x[..., :1, :] += self.pick(500.0, -2e4)
        if self.chance(0.05):
            x = torch.full_like(x, self.pick(0.0, -3.0, 1e4, -1e30))
        if infinite and self.chance(0.1) and x.shape[-1] > 1:
            keep = torch.rand(x.shape, generator=self.generator) < self.pick(0.1, 0.5, 0.9)
            keep[..., 0] = True
            x = x.masked_fill(~keep, -math.inf)
        return x.clamp(-6e4, 6e4).masked_fill(x == -math.inf, -math.inf).to(self.dtype)

    def targets(self, shape: Sequence[int], vocab: int, ignored: int | None) -> Tensor:
        target = self.integers(shape, 0, vocab)
        if ignored is None:
            return target
        share = self.pick(0.0, 0.0, 0.3, 0.9, 1.0)
        return target.masked_fill(torch.rand(tuple(shape), generator=self.generator) < share, ignored)

    def mask(self, shape: Sequence[int]) -> Tensor:
        """bool, or 0/1 of another dtype; a row of it may be empty."""
        keep = torch.rand(tuple(shape), generator=self.generator) < self.pick(0.0, 0.5, 0.8, 1.0)
        return keep.to(self.pick(torch.bool, torch.bool, torch.int64, torch.float32))

    def hide(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """NaN where nothing may be read."""
        if mask is None or mask.shape != x.shape or not self.chance(0.3):
            return x
        return x.masked_fill(mask == 0, self.pick(math.nan, math.inf, -math.inf))

    def borders(self, count: int, total: int) -> Tensor:
        """cu_seqlens of ``count`` sequences, empty ones among them."""
        inner = sorted(self.whole(0, total) for _ in range(count - 1))
        dtype = self.pick(torch.int32, torch.int64)
        return torch.tensor([0, *inner, total] if count else [0], dtype=dtype, device="cpu")

    def tokens(self) -> tuple[tuple[int, ...], Tensor | None, int]:
        """(shape of per-token tensors, cu_seqlens, sequences): padded ``[B, T]`` or packed ``[N]``."""
        count = self.pick(1, 1, 2, 3, 4, 6)
        if self.chance(0.4):
            total = self.pick(0, 1, 5, 12, 33)
            return (total,), self.borders(count, total), count
        count = self.pick(0, 1, 2, 3, 6)
        return (count, self.pick(0, 1, 2, 5, 9, 33)), None, count
