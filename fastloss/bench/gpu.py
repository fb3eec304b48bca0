"""The cases of a GPU: shapes that fill one. Their names have the form of the CPU's, so that goals and patterns hold for both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from fastloss.bench.case import Case, short
from fastloss.bench.kinds import KINDS

ROWS, LENGTH = 8192, 1024
VOCABULARIES = (32000, 128256, 262144)
HEADS = tuple((rows, 4096, 128256) for rows in (1024, 2048, 4096, ROWS, 16384))
MODELS = ((ROWS, 2304, 256000), (ROWS, 4096, 151936))  # Gemma 2 2B, Qwen 3 8B
SMALL = {
    ROWS: 32,
    16384: 64,
    LENGTH: 8,
}  # what --quick makes of them; every vocabulary is 500, every width 16
# Kinds whose cases are large enough for a GPU as they are, or measure the overhead of a call.
AS_THEY_ARE = (
    "unpaired",
    "preference",
    "reward",
    "process-reward",
    "policy",
    "policy-corrected",
    "value",
    "kl",
    "gae",
    "group",
    "returns",
)


def cases(quick: bool) -> list[Case]:
    """What matters most comes first: a run may be short of time."""
    return [*_heads(quick), *_rows(quick), *_losses(quick), *_small(quick)]


def _small(quick: bool) -> Iterator[Case]:
    yield from (case for case in KINDS["row"].cases(quick) if case.calls > 1)
    for kind in AS_THEY_ARE:
        yield from KINDS[kind].cases(quick)


def _rows(quick: bool) -> Iterator[Case]:
    """No cold twins: half a gigabyte and more of logits are in no cache."""
    for vocab in (500, 503) if quick else VOCABULARIES:
        rows = SMALL[ROWS] if quick else ROWS
        for dtype in (torch.bfloat16, torch.float32):
            base = Case(f"row-{short(dtype)}-{rows}x{vocab}", "row", rows, 0, vocab, dtype)
            yield replace(base, name=f"{base.name}-inplace-warm", inplace=True)
            yield replace(base, name=f"{base.name}-new-warm")
            if vocab in (500, 128256):
                yield replace(base, name=f"{base.name}-inplace-warm-peaked", inplace=True, peaked=True)
                yield replace(base, name=f"{base.name}-inplace-warm-half-ignored", inplace=True, ignored=0.5)


def _heads(quick: bool) -> Iterator[Case]:
    for shape in ((SMALL[ROWS], 16, 500),) if quick else (*HEADS, *MODELS):
        base = _head("linear", shape)
        yield base
        yield replace(base, name=f"{base.name}-whole", ignored=0.0)
        if shape[0] in (ROWS, SMALL[ROWS]):
            yield replace(base, name=f"{base.name}-peaked", peaked=True)
            yield replace(base, name=f"{base.name}-frozen", frozen=True)
            yield replace(base, name=f"{base.name}-nograd", nograd=True)
            yield replace(base, name=f"{base.name}-half-ignored", ignored=0.5)


def _losses(quick: bool) -> Iterator[Case]:
    """Statistics, preference, policy and distillation from one model's hidden states."""
    rows, many, length = (SMALL[ROWS], SMALL[16384], SMALL[LENGTH]) if quick else (ROWS, 16384, LENGTH)
    dim, vocab = (16, 500) if quick else (4096, 128256)
    shape = (rows, dim, vocab)
    stats = _head("stats-linear", (many, dim, vocab))
    yield replace(stats, name=f"{stats.name}-nograd", nograd=True)
    yield replace(_head("stats-linear", shape), forwards=2)
    preference = replace(_head("preference-linear", shape), ignored=0.0, forwards=2, length=length)
    yield preference
    yield replace(preference, name=f"{preference.name}-half-prompt", ignored=0.5)
    yield replace(_head("kto-linear", shape), ignored=0.5, forwards=2, length=length)
    policy = replace(_head("policy-linear", shape), length=length, options=(("loss_type", "dapo"),))
    yield policy
    yield replace(policy, name=f"{policy.name}-frozen", frozen=True)
    yield replace(_head("distillation-linear", shape), forwards=2)


def _head(kind: str, shape: tuple[int, int, int]) -> Case:
    return Case(f"{kind}-bf16-" + "x".join(map(str, shape)), kind, *shape, torch.bfloat16)
