"""Losses of single answers, good or bad: from Σ log p ("unpaired": KTO, BCO), from the head with a reference ("kto-linear")."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import Call, Case, Data, Loss, short
from fastloss.bench.exact import Exact, no_gradient_tokens, over_numbers, over_vocabulary
from fastloss.bench.kinds.base import (
    Kind,
    eager_logprobs,
    head_leaves,
    head_tensors,
    normal,
    places,
    random_targets,
    with_reference,
)

BETA = 0.1


def cases(quick: bool) -> Iterator[Case]:
    calls = 20 if quick else 300
    for name in ("kto", "bco"):
        options = (("loss", name),)
        yield Case(f"{name}-64", "unpaired", 64, 0, 0, torch.float32, calls=calls, options=options)


def linear_cases(quick: bool) -> Iterator[Case]:
    answers, length, dim, vocab = (4, 8, 16, 500) if quick else (8, 512, 512, 32000)
    shape = (answers * length, dim, vocab)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"kto-linear-{short(dtype)}-" + "x".join(map(str, shape))
        yield Case(name, "kto-linear", *shape, dtype, ignored=0.5, forwards=2, length=length)


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    names = ("logps", "ref", "kl_logps", "ref_kl")
    values = -20.0 + normal(4, case.rows, generator=generator)
    desirable = places(case.rows) % 2 == 0
    return {**dict(zip(names[:2], values)), "desirable": desirable, **dict(zip(names[2:], values[2:]))}


def _linear_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = head_tensors(case, generator, random_targets(case, generator))
    tensors = with_reference(case, generator, tensors)
    return {**tensors, "desirable": places(case.rows // case.length) % 2 == 0}


def kto(logps: Tensor, ref: Tensor, desirable: Tensor, kl: Tensor | float) -> Tensor:
    """As TRL 1.16's KTOTrainer writes it, without splitting the batch."""
    sign = torch.where(desirable, 1.0, -1.0).to(logps.dtype)
    return (1 - torch.sigmoid(BETA * sign * (logps - ref - kl))).mean()


def _bco(logps: Tensor, ref: Tensor, desirable: Tensor) -> Tensor:
    rewards = BETA * (logps - ref)
    shifted = rewards - rewards.detach().mean()
    return -F.logsigmoid(torch.where(desirable, shifted, -shifted)).mean()


def _eager(case: Case) -> Loss:
    if dict(case.options)["loss"] == "bco":
        return lambda logps, ref, desirable, *_: _bco(logps, ref, desirable)

    def loss(logps: Tensor, ref: Tensor, desirable: Tensor, kl_logps: Tensor, ref_kl: Tensor) -> Tensor:
        return kto(logps, ref, desirable, (kl_logps - ref_kl).mean().detach().clamp(min=0))

    return loss


def _ours(case: Case, call: Call) -> Loss:
    if dict(case.options)["loss"] == "bco":
        return lambda logps, ref, desirable, *_: (
            fastloss.bco_loss(logps, ref, desirable, beta=BETA, **call).loss
        )

    def loss(logps: Tensor, ref: Tensor, desirable: Tensor, kl_logps: Tensor, ref_kl: Tensor) -> Tensor:
        return fastloss.kto_loss(
            logps, ref, desirable, kl_logps=kl_logps, ref_kl_logps=ref_kl, beta=BETA, **call
        ).loss

    return loss


def _ours_linear(case: Case, call: Call) -> Loss:
    def loss(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        desirable: Tensor,
    ) -> Tensor:
        return fastloss.linear_kto_loss(
            hidden,
            weight,
            target,
            desirable,
            ref_input=ref_hidden,
            ref_weight=ref_weight,
            kl=0.0,
            beta=BETA,
            **call,
        ).loss

    return loss


def _eager_linear(case: Case) -> Loss:
    def loss(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        desirable: Tensor,
    ) -> Tensor:
        with torch.no_grad():
            reference = eager_logprobs(ref_hidden, ref_weight, target).sum(-1)
        return kto(eager_logprobs(hidden, weight, target).sum(-1), reference, desirable, 0.0)

    return loss


def _truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, _eager(case))


def _linear_truth(case: Case, data: Data) -> Exact:
    reference = no_gradient_tokens(data["ref_hidden"], data["ref_weight"], data["target"]).sum(-1)

    def tail(logprobs: Tensor) -> Tensor:
        return kto(logprobs.sum(-1), reference, data["desirable"], 0.0)

    return over_vocabulary(data, data["target"], tail)


KINDS = {
    "unpaired": Kind(
        cases,
        _tensors,
        lambda case: ("logps",),
        _ours,
        _eager,
        _truth,
        kept=lambda tensors: len(tensors["logps"]),
    ),
    "kto-linear": Kind(
        linear_cases, _linear_tensors, head_leaves, _ours_linear, _eager_linear, _linear_truth, is_head=True
    ),
}
