"""All calls: those of each family, of modules, under torch.compile and autocast, differentiated twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from arguments import Arguments, Case, joined, leaf, normal, targets
from policy_calls import build_linear_policy, build_policy, policy_cases
from preference_calls import build_linear_pairs, build_pairs, build_unpaired, preference_cases
from vocabulary_calls import (
    STATISTICS,
    build_cross_entropy,
    build_linear_cross_entropy,
    build_linear_stats,
    build_stats,
    vocabulary_cases,
)


def module_cases() -> Iterator[Case]:
    """The first argument of a module's ``build`` is its constructor's keywords."""

    def module(name: str, build: Callable[..., Arguments], **constructor: Any) -> Case:
        def with_constructor(dtype: torch.dtype, g: torch.Generator) -> Arguments:
            args, kwargs = build(dtype, g)
            return (constructor, *args), kwargs

        return Case(joined(constructor), f"nn.{name}", with_constructor)

    yield module("CrossEntropyLoss", build_cross_entropy(5, 33), label_smoothing=0.1, z_loss=0.01)
    yield module("PreferenceLoss", build_pairs(7), loss_type="hinge", beta=0.2)
    yield module("PolicyLoss", build_policy(5, 9), loss_type="grpo", clip_high=0.28)
    yield module(
        "RewardModelLoss", lambda d, g: ((leaf(normal(g, 5), d), leaf(normal(g, 5), d)), {}), margin=0.1
    )

    def hidden(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        return (leaf(normal(g, 9, 16), dtype), targets(g, 67, 9)), {}

    yield module("LinearCrossEntropyLoss", hidden, in_features=16, num_classes=67, z_loss=0.01)
    yield module("LinearHead", hidden, in_features=16, out_features=67, bias=True, softcap=5.0)

    def stats(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        return hidden(dtype, g)[0], {"stats": ("logprobs", "entropy")}

    yield module("LinearHead", stats, in_features=16, out_features=67)


def special_cases() -> Iterator[Case]:
    calls: list[tuple[str, Callable[..., Arguments]]] = [
        ("cross_entropy", build_cross_entropy(5, 33, z_loss=0.01, softcap=5.0)),
        ("cross_entropy", build_cross_entropy(5, 33, reduction="none", label_smoothing=0.1)),
        ("linear_cross_entropy", build_linear_cross_entropy(9, 16, 67, bias=True)),
        ("linear_cross_entropy", build_linear_cross_entropy(9, 16, 67, frozen=("weight",), reduction="none")),
        ("token_stats", build_stats(7, 33, outputs=STATISTICS)),
        ("linear_token_stats", build_linear_stats(9, 16, 67, outputs=("logprobs", "entropy"))),
        ("preference_loss", build_pairs(7, loss_type=["sigmoid", "sft"])),
        ("preference_loss", build_pairs(5, "padded", loss_type="ipo")),
        ("linear_preference_loss", build_linear_pairs(3, 4, 16, 67)),
        ("linear_kto_loss", build_linear_pairs(5, 4, 16, 67, sequences=1, kl=0.1)),
        ("kto_loss", build_unpaired(7, kl=0.1)),
        ("policy_loss", build_policy(5, 9, loss_type="grpo", beta=0.1)),
        ("policy_loss", build_policy(5, 9, loss_type="gspo")),
        ("linear_policy_loss", build_linear_policy(3, 5, 16, 67, beta=0.1, entropy_coef=0.01)),
        ("reward_model_loss", lambda d, g: ((leaf(normal(g, 7), d), leaf(normal(g, 7), d)), {})),
    ]
    for k, (name, build) in enumerate(calls):
        yield Case(f"twice{k}", name, build, twice=True, dtypes=("f32", "f64"))
        yield Case(f"autocast{k}", name, build, autocast=True, dtypes=("f32",))
        yield Case(f"aot_eager{k}", name, build, compiled="aot_eager", dtypes=("f32", "bf16"))
        if k in (0, 2, 6, 8, 11, 13):
            yield Case(f"inductor{k}", name, build, compiled="inductor", dtypes=("f32",))


def all_cases() -> list[Case]:
    rng = random.Random(20)
    cases = [
        *vocabulary_cases(rng),
        *preference_cases(rng),
        *policy_cases(rng),
        *module_cases(),
        *special_cases(),
    ]
    seen: Counter[str] = Counter()
    out = []
    for case in cases:  # two combinations may be the same options
        key = f"{case.function}:{case.name}"
        seen[key] += 1
        out.append(case if seen[key] == 1 else case._replace(name=f"{case.name}#{seen[key]}"))
    return out
