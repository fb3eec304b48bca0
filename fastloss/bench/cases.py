"""What is measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    name: str
    kind: str  # "row" or "linear"
    rows: int
    dim: int  # 0 for rows of logits
    vocab: int
    dtype: torch.dtype
    inplace: bool = False
    cold: bool = False
    frozen: bool = False
    peaked: bool = False

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def cases(quick: bool = False) -> list[Case]:
    """The issue's shapes; ``quick`` keeps the kinds and shrinks the shapes."""
    row_shapes = [(16, 2000)] if quick else [(1024, 32000), (256, 128256)]
    linear_shapes = [(32, 16, 500)] if quick else [(1024, 512, 32000), (512, 1024, 128256)]
    out = [Case("tiny", "row", 8, 0, 32, torch.float32)]
    for rows, vocab in row_shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for inplace in (True, False):
                for cold in (False, True):
                    name = f"row-{_short(dtype)}-{rows}x{vocab}-{'inplace' if inplace else 'new'}-{'cold' if cold else 'warm'}"
                    out.append(Case(name, "row", rows, 0, vocab, dtype, inplace, cold))
        out.append(
            Case(f"row-f32-{rows}x{vocab}-new-warm-peaked", "row", rows, 0, vocab, torch.float32, peaked=True)
        )
    for rows, dim, vocab in linear_shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for frozen in (False, True):
                name = f"linear-{_short(dtype)}-{rows}x{dim}x{vocab}{'-frozen' if frozen else ''}"
                out.append(Case(name, "linear", rows, dim, vocab, dtype, frozen=frozen))
    for rows in [32, 64] if quick else [1024, 4096, 16384, 32768]:
        dim, vocab = (16, 500) if quick else (64, 8192)
        out.append(Case(f"tokens-f32-{rows}x{dim}x{vocab}", "linear", rows, dim, vocab, torch.float32))
    return out


class Data(NamedTuple):
    logits: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    target: Tensor


def data(case: Case, device: str) -> Data:
    """Seeded; one target in eight is ignored; peaked logits put most of the mass on the target."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, case.vocab, (case.rows,), generator=generator)
    logits = hidden = weight = None
    if case.kind == "row":
        logits = torch.randn(case.rows, case.vocab, generator=generator)
        if case.peaked:
            logits[torch.arange(case.rows), target] += 12.0
        logits = logits.to(case.dtype).to(device)
    else:
        hidden = (
            torch.randn(case.rows, case.dim, generator=generator).to(case.dtype).to(device).requires_grad_()
        )
        weight = (
            (torch.randn(case.vocab, case.dim, generator=generator) / case.dim**0.5).to(case.dtype).to(device)
        )
        weight.requires_grad_(not case.frozen)
    target[::8] = -100
    return Data(logits, hidden, weight, target.to(device))
