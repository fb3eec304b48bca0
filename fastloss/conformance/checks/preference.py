"""Preference and policy losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator

from fastloss.conformance import measure, right
from fastloss.conformance.check import Check, Inputs, mask_of
from fastloss.conformance.checks.tolerances import ROUNDING

DPO = "arXiv:2305.18290, eq. 7, in float64"
KTO = "arXiv:2402.01306, eq. 8, in float64"
ORPO = "arXiv:2403.07691, eq. 6 and 7, in float64"
BCO = "arXiv:2404.04656: -log σ(±(βx - δ)), in float64"
PPO = "arXiv:1707.06347, eq. 7, in float64"
K3 = "http://joschu.net/blog/kl-approx.html, in float64"


def pairs(scale: float = 10.0) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        values = torch.randn(4, 5, generator=generator, dtype=torch.float32, device="cpu") * scale - 50
        return dict(zip(("chosen", "rejected", "ref_chosen", "ref_rejected"), values))

    return make


def answers(kinds: str) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        logps, ref = torch.randn(2, 4, generator=generator, dtype=torch.float32, device="cpu") * 5 - 30
        desirable = {
            "both": torch.tensor([True, False, False, True], dtype=torch.bool, device="cpu"),
            "good": torch.ones(4, dtype=torch.bool, device="cpu"),
        }
        return {"logps": logps, "ref_logps": ref, "desirable": desirable[kinds]}

    return make


def responses(per_token: float) -> Callable[[Generator], Inputs]:
    """Pairs whose mean log-probs are up to ``per_token`` below 0."""

    def make(generator: Generator) -> Inputs:
        chosen_lengths = torch.full((5,), 7, dtype=torch.int64, device="cpu")
        rejected_lengths = torch.tensor([3, 9, 1, 7, 12], dtype=torch.int64, device="cpu")
        means = -(0.1 + torch.rand(2, 5, generator=generator, dtype=torch.float32, device="cpu")) * per_token
        return {
            "chosen": means[0] * chosen_lengths,
            "rejected": means[1] * rejected_lengths,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
        }

    return make


def packed(borders: tuple[int, ...]) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        noise = torch.randn(2, borders[-1], generator=generator, dtype=torch.float32, device="cpu")
        logprobs = -noise[0].abs() - 0.1
        advantages = torch.randn(len(borders) - 1, generator=generator, dtype=torch.float32, device="cpu")
        return {
            "logprobs": logprobs,
            "old": logprobs + noise[1] / 2,
            "advantages": advantages,
            "cu_seqlens": torch.tensor(borders, dtype=torch.int32, device="cpu"),
        }

    return make


def tokens(
    lengths: tuple[int, ...] = (6, 3, 5),
    *,
    on_policy: bool = False,
    padding: float = 0.0,
    spread: float = 0.5,
    lowest: float | None = None,
) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        shape = (len(lengths), 6)
        logprobs = -torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 3 - 0.1
        old = (
            logprobs.clone()
            if on_policy
            else logprobs
            + torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * spread
        )
        advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float32, device="cpu")
        if lowest is not None:
            advantages = advantages.clamp(max=lowest)
        mask = mask_of(lengths, 6)
        old = old.masked_fill(~mask, padding)
        return {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages, "mask": mask}

    return make


def row(
    name: str,
    bug: str,
    interface: str,
    inputs: Callable[[Generator], Inputs],
    source: str,
    how: Any = measure.gradients,
    leaves: tuple[str, ...] | None = None,
    **options: Any,
) -> Check:
    if leaves is None:
        pair, alone = ("chosen", "rejected"), ("logps",)
        leaves = {"dpo": pair, "orpo": pair, "kto": alone, "bco": alone}.get(interface, ("logprobs",))
    function = getattr(right, interface)
    return Check(
        f"{interface}: {name}", interface, inputs, function, how, ROUNDING, source, options, leaves, bug=bug
    )


def _two(generator: Generator) -> Inputs:
    a, b = -torch.rand(2, 8, generator=generator, dtype=torch.float32, device="cpu") * 4
    return {"logprobs": a, "ref_logprobs": b}


REF = torch.linspace(-3.0, -0.2, 18, dtype=torch.float32, device="cpu").view(3, 6)

CHECKS = (
    row("value and gradients", "the reference's sign", "dpo", pairs(), DPO),
    row(
        "an upstream gradient of 1024",
        "a gradient made in the forward is not scaled",
        "dpo",
        pairs(),
        DPO,
        measure.scaled,
    ),
    row("margins of hundreds", "log σ of a large number overflows", "dpo", pairs(3000.0), DPO),
    row("backward twice", "a buffer scaled in place is scaled twice", "dpo", pairs(), DPO, measure.twice),
    row("both kinds", "the sign of the undesirable", "kto", answers("both"), KTO, kl=0.5),
    row("one kind alone", "the mean of nothing", "kto", answers("good"), KTO, kl=0.5),
    row("value and gradients", "the odds' sign", "orpo", responses(3.0), ORPO),
    row("log-probs near 0", "log(1 - p) of p near 1 is -inf", "orpo", responses(1e-5), ORPO),
    row("far from 0", "p underflows", "orpo", responses(200.0), ORPO),
    row("both kinds", "the sign of the undesirable", "bco", answers("both"), BCO, delta=0.3),
    row("one kind alone", "the mean of nothing", "bco", answers("good"), BCO, delta=-0.2),
    row(
        "backward twice",
        "a buffer scaled in place is scaled twice",
        "bco",
        answers("both"),
        BCO,
        measure.twice,
        delta=0.3,
    ),
    row("mean over tokens", "a sequence's border is shifted", "packed_policy", packed((0, 4, 5, 11)), PPO),
    row(
        "mean over sequences, an empty one",
        "0 / 0, or the empty one's neighbour counted twice",
        "packed_policy",
        packed((0, 4, 4, 11)),
        PPO,
        aggregation="seq-mean-token-mean",
    ),
    row("clipped", "the clip's sign for negative advantages", "policy", tokens(), PPO),
    row("far off the policy", "exp of an unclamped log-ratio", "policy", tokens(spread=3.0), PPO),
    row("on the policy", "the ratio is not exactly 1", "policy", tokens(on_policy=True), PPO),
    row(
        "dual clip",
        "applied to positive advantages",
        "policy",
        tokens(spread=2.0),
        "arXiv:1912.09729, eq. 6, in float64",
        dual_clip=3.0,
    ),
    row("mean over tokens", "mean over sequences", "policy", tokens(), "arXiv:2503.14476, eq. 8, in float64"),
    row(
        "mean over sequences",
        "mean over tokens",
        "policy",
        tokens(),
        "arXiv:2402.03300, eq. 3, in float64",
        aggregation="seq-mean-token-mean",
    ),
    row(
        "a batch's normalizer",
        "the micro-batch's count",
        "policy",
        tokens(),
        "closed form: the sum / normalizer",
        normalizer=100,
    ),
    row("NaN in the padding", "0 × NaN", "policy", tokens(padding=float("nan")), PPO),
    row("an empty response", "0 / 0", "policy", tokens((6, 0, 5)), PPO, aggregation="token-mean"),
    row(
        "k3 to a reference",
        "the wrong argument is differentiated, or the mask is left out",
        "policy",
        tokens(),
        K3,
        ref_logprobs=REF,
        beta=0.1,
    ),
    row(
        "an upstream gradient of 1024",
        "a gradient made in the forward is not scaled",
        "policy",
        tokens(),
        PPO,
        measure.scaled,
    ),
    row("k1", "k1, k2 and k3 mixed up", "kl", _two, K3, kind="k1"),
    row("k2", "k1, k2 and k3 mixed up", "kl", _two, K3, kind="k2"),
    row("k3", "k1, k2 and k3 mixed up", "kl", _two, K3, kind="k3"),
)
