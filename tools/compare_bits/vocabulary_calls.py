"""Calls of cross-entropy, token statistics and their linear heads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from arguments import Arguments, Case, combined, joined, leaf, normal, targets, uniform
from torch import Tensor

CROSS_ENTROPY: dict[str, list[Any]] = {
    "reduction": ["mean", "sum", "none"],
    "label_smoothing": [0.1, 1.0],
    "z_loss": [0.01],
    "logit_scale": [0.3, 1.7],
    "softcap": [4.0, 30.0],
    "normalizer": [17, 3.5],
    "classes": [True],
    "return_stats": [True],
    "probabilities": [True],
}
STATISTICS = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "is_top1")
STATS: dict[str, list[Any]] = {
    "temperature": [0.7, 1.9],
    "logit_scale": [0.5],
    "softcap": [6.0],
    "outputs": [(name,) for name in STATISTICS[:3]] + [STATISTICS, ("logprobs", "entropy"), ("is_top1",)],
}
HEAD: dict[str, list[Any]] = {"bias": [True], "chunk_size": [2, 5], "frozen": [("weight",), ("input",)]}


def target_and_classes(
    g: torch.Generator, rows: int, vocab: int, dtype: torch.dtype, options: dict[str, Any]
) -> Tensor:
    if options.pop("classes", False):
        options["weight"] = (uniform(g, vocab) + 0.5).to(dtype)
    t = targets(g, vocab, rows, ignore=options.get("ignore_index"))
    if options.pop("probabilities", False):
        return normal(g, rows, vocab).softmax(-1).to(dtype)
    return t


def build_cross_entropy(rows: int, vocab: int, **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = dict(options)
        x = normal(g, rows, vocab, scale=o.pop("scale", 2.0))
        if o.pop("masked", False):
            x[:, ::3] = float("-inf")
        if o.pop("strided", False):
            x = x.repeat_interleave(2, 1)
            z = leaf(x, dtype)
            return (z[:, ::2], targets(g, vocab, rows)), o
        z = leaf(x, dtype)
        target = target_and_classes(g, rows, vocab, dtype, o)
        return (z * 1 if o.get("inplace") else z, target), o

    return build


def build_spatial(**options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        return (leaf(normal(g, 3, 11, 5, 2), dtype), targets(g, 11, 3, 5, 2)), dict(options)

    return build


def head_operands(
    g: torch.Generator,
    lead: tuple[int, ...],
    dim: int,
    vocab: int,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    frozen = options.pop("frozen", ())
    x = leaf(normal(g, *lead, dim), dtype, "input" in frozen)
    w = leaf(normal(g, vocab, dim, scale=2 / dim**0.5), dtype, "weight" in frozen)
    if options.pop("bias", False):
        options["linear_bias"] = leaf(normal(g, vocab), dtype, "bias" in frozen)
    return x, w


def build_linear_cross_entropy(rows: int, dim: int, vocab: int, **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = dict(options)
        x, w = head_operands(g, (rows,), dim, vocab, dtype, o)
        return (x, w, target_and_classes(g, rows, vocab, dtype, o)), o

    return build


def build_k_dimensional(**options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        x, w = leaf(normal(g, 6, 8), dtype), leaf(normal(g, 7, 3, 8), dtype)
        return (x, w, targets(g, 7, 6, 3, ignore=options.get("ignore_index"))), {
            "linear_bias": leaf(normal(g, 7, 3), dtype),
            **options,
        }

    return build


def build_stats(rows: int, vocab: int, **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        z = leaf(normal(g, rows, vocab, scale=2.0), dtype)
        return (
            z * 1 if options.get("inplace") else z,
            targets(g, vocab, rows, ignore=options.get("ignore_index")),
        ), dict(options)

    return build


def build_linear_stats(rows: int, dim: int, vocab: int, **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = dict(options)
        x, w = head_operands(g, (rows,), dim, vocab, dtype, o)
        return (x, w, targets(g, vocab, rows)), o

    return build


def vocabulary_cases(rng: random.Random) -> Iterator[Case]:
    singles = [{name: value} for name, values in CROSS_ENTROPY.items() for value in values]
    for o in [{}, *singles, *combined(rng, CROSS_ENTROPY, 30)]:
        yield Case(f"5x33,{joined(o)}", "cross_entropy", build_cross_entropy(5, 33, **o), small=True)
    extra: list[dict[str, Any]] = [
        {"inplace": True},
        {"inplace": True, "softcap": 5.0, "label_smoothing": 0.1},
        {"inplace": True, "reduction": "none", "classes": True, "z_loss": 0.01},
        {"masked": True},
        {"masked": True, "z_loss": 0.1, "reduction": "none"},
        {"strided": True},
        {"scale": 60.0},
        {"ignore_index": 3},
        {"normalizer": torch.tensor(9.0)},
        {"reduce": False},
        {"size_average": False},
    ]
    for o in extra:
        yield Case(f"5x33,{joined(o)}", "cross_entropy", build_cross_entropy(5, 33, **o), small=True)
    for o in [
        {},
        {"softcap": 5.0, "z_loss": 0.01},
        {"reduction": "none"},
        {"inplace": True},
        {"probabilities": True},
    ]:
        for rows, vocab in ((1, 1), (1, 2), (67, 1031), (3, 20011)):
            yield Case(f"{rows}x{vocab},{joined(o)}", "cross_entropy", build_cross_entropy(rows, vocab, **o))
    for o in [{}, {"reduction": "none"}, {"label_smoothing": 0.1}]:
        yield Case(f"3x11x5x2,{joined(o)}", "cross_entropy", build_spatial(**o), small=True)

    linear = CROSS_ENTROPY | HEAD
    singles = [{name: value} for name, values in linear.items() for value in values]
    for k, o in enumerate([{}, *singles, *combined(rng, linear, 40)]):
        build = build_linear_cross_entropy(9, 16, 67, **o)
        yield Case(f"9x16x67,{joined(o)}", "linear_cross_entropy", build, small=k < 25)
    for o in [
        {},
        {"bias": True, "softcap": 5.0, "z_loss": 0.01},
        {"reduction": "none"},
        {"frozen": ("weight",)},
        {"frozen": ("input",)},
        {"chunk_size": 64},
        {"label_smoothing": 0.1, "return_stats": True},
    ]:
        for rows, dim, vocab in ((1, 4, 2), (130, 48, 1031), (300, 96, 700)):
            name, build = (
                f"{rows}x{dim}x{vocab},{joined(o)}",
                build_linear_cross_entropy(rows, dim, vocab, **o),
            )
            yield Case(name, "linear_cross_entropy", build)
            yield Case(name, "explain", explained("linear_cross_entropy", build), dtypes=("f32", "bf16"))
    for o in [{}, {"reduction": "none"}, {"ignore_index": 2}]:
        yield Case(f"6x3x8x7,{joined(o)}", "linear_cross_entropy", build_k_dimensional(**o))

    singles = [{name: value} for name, values in STATS.items() for value in values]
    for o in [{}, *singles, *combined(rng, STATS, 12), {"inplace": True}, {"ignore_index": 5}]:
        for k, (rows, vocab) in enumerate(((7, 33), (65, 1031))):
            yield Case(
                f"{rows}x{vocab},{joined(o)}", "token_stats", build_stats(rows, vocab, **o), small=k == 0
            )
    linear = STATS | HEAD
    singles = [{name: value} for name, values in linear.items() for value in values]
    for k, o in enumerate([{}, *singles, *combined(rng, linear, 20)]):
        yield Case(
            f"9x16x67,{joined(o)}", "linear_token_stats", build_linear_stats(9, 16, 67, **o), small=k < 12
        )
        if k % 3 == 0:
            yield Case(
                f"130x48x1031,{joined(o)}", "linear_token_stats", build_linear_stats(130, 48, 1031, **o)
            )
    for many in (0, 3):
        for temperature in (1.0, 0.6):

            def build(
                dtype: torch.dtype, g: torch.Generator, many: int = many, t: float = temperature
            ) -> Arguments:
                shape = (4, 5, many) if many else (4, 5)
                index = torch.randint(0, 33, shape, generator=g)
                return (leaf(normal(g, 4, 5, 33), dtype), index, t), {}

            yield Case(f"4x5x33,K={many},{temperature}", "selective_log_softmax", build, small=True)
    yield Case(
        "4x5x33", "entropy_from_logits", lambda d, g: ((leaf(normal(g, 4, 5, 33), d),), {}), small=True
    )


def explained(function: str, build: Callable[..., Arguments]) -> Callable[..., Arguments]:
    def with_function(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        args, kwargs = build(dtype, g)
        return (function, *args), kwargs

    return with_function
