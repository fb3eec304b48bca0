"""What is measured: shapes, dtypes, and the state of the caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE = -100
OURS_AND_EAGER = ("fastloss*", "torch eager")


@dataclass(frozen=True)
class Case:
    """One line-up: every provider runs it on the same tensors."""

    name: str
    kind: str  # "row": over logits; "linear": over hidden states and the vocabulary matrix
    rows: int
    dim: int  # 0 for "row"
    vocab: int
    dtype: torch.dtype
    inplace: bool = False  # row: the gradient may overwrite the logits
    cold: bool = False  # caches flushed before each call
    peaked: bool = False  # most of the probability on the target, as late in training
    ignored: float = 0.125  # fraction of targets that are ignore_index
    frozen: bool = False  # linear: the weight needs no gradient
    nograd: bool = False  # linear: the forward alone
    calls: int = 1  # calls per timing; more than one where a call is too short for the clock
    only: tuple[str, ...] = ("*",)  # patterns of the providers' names

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def gemms(self) -> int:
        return 1 if self.nograd else 2 if self.frozen else 3

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients that a step leaves behind."""
        if self.nograd:
            return 0
        if self.kind == "row":
            return 0 if self.inplace else self.logits_bytes
        return (self.rows * self.dim + (0 if self.frozen else self.vocab * self.dim)) * self.dtype.itemsize

    @property
    def inputs(self) -> tuple[object, ...]:
        """Cases with equal ``inputs`` have equal numbers in their tensors."""
        return self.kind, self.rows, self.dim, self.vocab, self.dtype, self.peaked, self.ignored


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


def cases(quick: bool = False) -> list[Case]:
    """The issue's shapes; ``quick`` keeps the kinds and shrinks the shapes."""
    return [*_row_cases(quick), *_linear_cases(quick), *_token_cases(quick)]


def _row_cases(quick: bool) -> Iterator[Case]:
    yield Case("tiny", "row", 8, 0, 32, torch.float32, ignored=0.0, calls=20 if quick else 300)
    for rows, vocab in [(16, 2000)] if quick else [(1024, 32000), (256, 128256)]:
        for dtype in (torch.float32, torch.bfloat16):
            base = f"row-{short(dtype)}-{rows}x{vocab}"
            for inplace in (True, False):
                for cold in (False, True):
                    name = f"{base}-{'inplace' if inplace else 'new'}-{'cold' if cold else 'warm'}"
                    yield Case(name, "row", rows, 0, vocab, dtype, inplace, cold)
            yield Case(f"{base}-inplace-cold-peaked", "row", rows, 0, vocab, dtype, True, True, peaked=True)
            yield Case(
                f"{base}-inplace-cold-half-ignored", "row", rows, 0, vocab, dtype, True, True, ignored=0.5
            )


def _linear_cases(quick: bool) -> Iterator[Case]:
    for rows, dim, vocab in [(32, 16, 500)] if quick else [(1024, 512, 32000), (512, 1024, 128256)]:
        for dtype in (torch.float32, torch.bfloat16):
            base, shape = f"linear-{short(dtype)}-{rows}x{dim}x{vocab}", (rows, dim, vocab)
            yield Case(base, "linear", *shape, dtype)
            yield Case(f"{base}-frozen", "linear", *shape, dtype, frozen=True)
            yield Case(f"{base}-nograd", "linear", *shape, dtype, nograd=True)
        yield Case(
            f"linear-f32-{rows}x{dim}x{vocab}-peaked", "linear", rows, dim, vocab, torch.float32, peaked=True
        )


def _token_cases(quick: bool) -> Iterator[Case]:
    """Cost per token over the length of the batch."""
    dim, vocab = (16, 500) if quick else (256, 16384)
    for rows in (32, 64) if quick else (1024, 4096, 16384, 32768):
        name = f"tokens-f32-{rows}x{dim}x{vocab}"
        yield Case(name, "linear", rows, dim, vocab, torch.float32, only=OURS_AND_EAGER)


@dataclass
class Data:
    """A case's tensors. ``pristine`` is what in-place losses are given back before each call."""

    target: Tensor
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    pristine: Tensor | None = field(default=None, repr=False)

    def restore(self) -> None:
        if self.pristine is not None and self.logits is not None:
            self.logits.copy_(self.pristine)


def data(case: Case, device: str) -> Data:
    """Seeded, and the same on every device."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, case.vocab, (case.rows,), generator=generator)
    out = Data(target)
    if case.kind == "row":
        logits = torch.randn(case.rows, case.vocab, generator=generator)
        if case.peaked:
            logits[torch.arange(case.rows), target] += 12.0
        out.logits = logits.to(case.dtype).to(device)
        out.pristine = out.logits.clone() if case.inplace else None
    else:
        hidden = torch.randn(case.rows, case.dim, generator=generator)
        weight = torch.randn(case.vocab, case.dim, generator=generator) / case.dim**0.5
        if case.peaked:
            hidden += 12.0 * weight[target]
        out.hidden = hidden.to(case.dtype).to(device).requires_grad_(not case.nograd)
        out.weight = weight.to(case.dtype).to(device).requires_grad_(not (case.nograd or case.frozen))
    ignored = torch.randperm(case.rows, generator=generator)[: round(case.rows * case.ignored)]
    out.target = target.index_fill(0, ignored, IGNORE).to(device)
    return out
