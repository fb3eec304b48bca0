"""Advantages: constants of a loss, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator

from fastloss.conformance import measure, right
from fastloss.conformance.check import Check, Inputs, mask_of
from fastloss.conformance.checks.tolerances import ROUNDING

GAE = "arXiv:1506.02438, eq. 16, as a loop in float64"
GRPO = "arXiv:2402.03300, section 4.1.2, with TRL's 1e-4 beside the sample's deviation, in float64"
WHITEN = "mean and sample's variance in float64"


def steps(lengths: tuple[int, ...], padding: float = 0.0) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        rewards, values = torch.randn(
            2, len(lengths), 6, generator=generator, dtype=torch.float32, device="cpu"
        )
        mask = mask_of(lengths, 6)
        return {
            "rewards": rewards.masked_fill(~mask, padding),
            "values": values.masked_fill(~mask, padding),
            "mask": mask,
        }

    return make


def packed(borders: tuple[int, ...]) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        rewards, values = torch.randn(2, borders[-1], generator=generator, dtype=torch.float32, device="cpu")
        return {
            "rewards": rewards,
            "values": values,
            "cu_seqlens": torch.tensor(borders, dtype=torch.int64, device="cpu"),
        }

    return make


def rewards(*values: float) -> Callable[[Generator], Inputs]:
    return lambda generator: {"rewards": torch.tensor(values, dtype=torch.float32, device="cpu")}


def some(count: int) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        x = torch.randn(2, 5, generator=generator, dtype=torch.float32, device="cpu") * 3 + 100
        return {"x": x, "mask": mask_of((count,), 10).view(2, 5)}

    return make


def row(
    name: str, bug: str, interface: str, inputs: Callable[[Generator], Inputs], source: str, **options: Any
) -> Check:
    function = getattr(right, interface)
    return Check(
        f"{interface}: {name}", interface, inputs, function, measure.value, ROUNDING, source, options, bug=bug
    )


CHECKS = (
    row(
        "sequences beside each other",
        "the next sequence's value is bootstrapped",
        "packed_gae",
        packed((0, 3, 9, 14)),
        GAE,
        gamma=0.9,
        lam=0.8,
    ),
    row(
        "an empty sequence and one of one token",
        "the scan starts at the wrong border",
        "packed_gae",
        packed((0, 5, 5, 6)),
        GAE,
    ),
    row("full sequences", "the plain case", "gae", steps((6, 6)), GAE, gamma=0.9, lam=0.8),
    row(
        "past the end",
        "the padding's value is bootstrapped",
        "gae",
        steps((6, 2, 4), padding=7.0),
        GAE,
        gamma=0.9,
        lam=0.8,
    ),
    row("NaN in the padding", "0 × NaN", "gae", steps((6, 2), padding=float("nan")), GAE, gamma=0.9, lam=0.8),
    row("an empty response", "an index of -1", "gae", steps((6, 0)), GAE),
    row(
        "two groups",
        "statistics of the whole batch",
        "group_advantages",
        rewards(1, 2, 4, 0, 0, 9),
        GRPO,
        group_size=3,
    ),
    row("equal rewards", "0 / 0", "group_advantages", rewards(0.1, 0.1, 0.1, 1, 2, 3), GRPO, group_size=3),
    row(
        "a group of one",
        "0 / 0: the deviation of one number",
        "group_advantages",
        rewards(1, 2),
        GRPO,
        group_size=1,
    ),
    row("over the unmasked", "the padding counts", "whiten", some(7), WHITEN),
    row("one value", "0 / 0: the variance of one number", "whiten", some(1), WHITEN),
)
