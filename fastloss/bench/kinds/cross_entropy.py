"""Cross-entropy over logits ("row") and over hidden states and the vocabulary matrix ("linear")."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import Call, Case, Data, Loss, short
from fastloss.bench.exact import Exact, cross_entropy_tail, over_vocabulary
from fastloss.bench.kinds.base import (
    Kind,
    head_leaves,
    head_tensors,
    ignore_some,
    normal,
    places,
    random_targets,
)

EAGER_FITS = 1 << 30  # logits of which eager holds several copies
OURS_AND_EAGER = ("fastloss*", "torch eager")


def row_cases(quick: bool) -> Iterator[Case]:
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


def linear_cases(quick: bool) -> Iterator[Case]:
    for rows, dim, vocab in [(32, 16, 500)] if quick else [(1024, 512, 32000), (512, 1024, 128256)]:
        shape = (rows, dim, vocab)
        for dtype in (torch.float32, torch.bfloat16):
            base = f"linear-{short(dtype)}-{rows}x{dim}x{vocab}"
            yield Case(base, "linear", *shape, dtype)
            yield Case(f"{base}-frozen", "linear", *shape, dtype, frozen=True)
            yield Case(f"{base}-nograd", "linear", *shape, dtype, nograd=True)
            yield Case(f"{base}-trained", "linear", *shape, dtype, ignored=0.0, trained=True)
        name = f"linear-f32-{rows}x{dim}x{vocab}"
        yield Case(f"{name}-peaked", "linear", *shape, torch.float32, peaked=True)
        yield Case(f"{name}-half-ignored", "linear", *shape, torch.float32, ignored=0.5)
    # Cost per token over the length of the batch.
    dim, vocab = (16, 500) if quick else (256, 16384)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (32, 64) if quick else (256, 1024, 4096, 16384, 65536):
            only = OURS_AND_EAGER if rows * vocab < EAGER_FITS else ("fastloss*",)
            yield Case(
                f"tokens-{short(dtype)}-{rows}x{dim}x{vocab}", "linear", rows, dim, vocab, dtype, only=only
            )


def row_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    target = random_targets(case, generator)
    logits = normal(case.rows, case.vocab, generator=generator)
    if case.peaked:
        logits[places(case.rows), target] += 12.0
    return {"logits": logits, "target": ignore_some(case, target, generator)}


def trained_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Classes of the frequencies rank^-1.5, in no order, and in each row others above them; a target that is drawn from the row's own."""
    hidden = 2 * normal(case.rows, case.dim, generator=generator)
    weight = normal(case.vocab, case.dim, generator=generator) / case.dim**0.5
    device = torch.get_default_device()
    rank = torch.randperm(case.vocab, generator=generator, dtype=torch.int64, device=device) + 1
    hidden[:, 0], weight[:, 0] = 4.0, -1.5 / 4 * rank.float().log()
    target = torch.multinomial((hidden @ weight.t()).softmax(-1), 1, generator=generator).view(-1)
    return {"hidden": hidden, "weight": weight, "target": ignore_some(case, target, generator)}


def linear_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    if case.trained:
        return trained_tensors(case, generator)
    tensors = head_tensors(case, generator, random_targets(case, generator))
    return {**tensors, "target": ignore_some(case, tensors["target"], generator)}


def copy(case: Case, data: Data) -> Callable[[], object]:
    """The logits' bytes, read once and written once."""
    source = data["logits"].detach().clone()
    into = source.clone()
    return lambda: into.copy_(source)


def truth(case: Case, data: Data) -> Exact:
    return over_vocabulary(data, data["target"], cross_entropy_tail(data["target"]))


def _ours_rows(case: Case, call: Call) -> Loss:
    return functools.partial(fastloss.cross_entropy, inplace=case.inplace, **call)


def _ours_linear(case: Case, call: Call) -> Loss:
    return functools.partial(fastloss.linear_cross_entropy, **call)


def eager_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


KINDS = {
    "row": Kind(
        row_cases,
        row_tensors,
        lambda case: ("logits",),
        _ours_rows,
        lambda case: F.cross_entropy,
        truth,
        ("copy", copy),
    ),
    "linear": Kind(
        linear_cases,
        linear_tensors,
        head_leaves,
        _ours_linear,
        lambda case: eager_linear,
        truth,
        is_head=True,
    ),
}
