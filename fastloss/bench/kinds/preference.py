"""Preference losses: from Σ log p per answer ("preference"), from the head with a reference model ("preference-linear")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
    random_targets,
    uniform,
    with_reference,
)

BETA = 0.1
MIXTURE = {"sigmoid": 0.8, "hinge": 0.2, "apo_zero": 1.0}


def cases(quick: bool) -> Iterator[Case]:
    calls = 20 if quick else 300
    plain = {"sigmoid": 1.0}
    for name, terms, weighted in (
        ("sigmoid", plain, False),
        ("mixture", MIXTURE, False),
        ("weights", plain, True),
    ):
        options = (("terms", tuple(terms.items())), ("weighted", weighted))
        yield Case(
            f"preference-{name}-64", "preference", 64, 0, 0, torch.float32, calls=calls, options=options
        )


def linear_cases(quick: bool) -> Iterator[Case]:
    pairs, length, dim, vocab = (2, 8, 16, 500) if quick else (8, 512, 512, 32000)
    shape = (2 * pairs * length, dim, vocab)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"preference-linear-{short(dtype)}-" + "x".join(map(str, shape))
        base = Case(name, "preference-linear", *shape, dtype, ignored=0.0, forwards=2, length=length)
        yield base
        yield Case(**{**vars(base), "name": f"{name}-half-prompt", "ignored": 0.5})


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    values = -20.0 + normal(4, case.rows, generator=generator)
    tensors = dict(zip(names, values))
    if dict(case.options)["weighted"]:
        tensors["weights"] = uniform((case.rows,), generator=generator)
    return tensors


def _linear_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = head_tensors(case, generator, random_targets(case, generator))
    return with_reference(case, generator, tensors)


TERMS = {
    "sigmoid": lambda c, r: -F.logsigmoid(BETA * (c - r)),
    "hinge": lambda c, r: torch.relu(1 - BETA * (c - r)),
    "apo_zero": lambda c, r: 1 - torch.sigmoid(BETA * c) + torch.sigmoid(BETA * r),
}


def contrast(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    pair_weights: Tensor | float = 1.0,
    *,
    terms: Mapping[str, float] | None = None,
    log: Callable[[Mapping[str, Tensor]], object] | None = None,
) -> Tensor:
    """As TRL 1.16's DPOTrainer writes its losses; ``log`` gets what it then logs of each step."""
    c, r = chosen - ref_chosen, rejected - ref_rejected
    weights = terms or {"sigmoid": 1.0}
    loss = torch.stack(
        [(weight * TERMS[name](c, r) * pair_weights).mean() for name, weight in weights.items()]
    ).sum()
    if log is not None:
        won, lost = BETA * c.detach(), BETA * r.detach()
        log(
            {
                "rewards/chosen": won.mean(),
                "rewards/rejected": lost.mean(),
                "rewards/accuracies": (won > lost).float().mean(),
                "rewards/margins": (won - lost).mean(),
                "logps/chosen": chosen.detach().mean(),
                "logps/rejected": rejected.detach().mean(),
            }
        )
    return loss


def of_answers(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """From log-probs per token ``[2B, T]``, the chosen answers first."""
    return contrast(*logprobs.sum(-1).chunk(2), *ref_logprobs.sum(-1).chunk(2))


def _ours(case: Case, call: Call) -> Loss:
    terms = dict(dict(case.options)["terms"])
    options: dict[str, Any] = {"loss_type": next(iter(terms)), "beta": BETA, **call}
    if len(terms) > 1:
        options.update(loss_type=list(terms), loss_weights=list(terms.values()))
    if dict(case.options)["weighted"]:
        return lambda *logps: fastloss.preference_loss(*logps[:4], weights=logps[4], **options).loss
    return lambda *logps: fastloss.preference_loss(*logps, **options).loss


def _ours_linear(case: Case, call: Call) -> Loss:
    def loss(
        hidden: Tensor, weight: Tensor, target: Tensor, ref_hidden: Tensor, ref_weight: Tensor
    ) -> Tensor:
        return fastloss.linear_preference_loss(
            hidden, weight, target, ref_input=ref_hidden, ref_weight=ref_weight, beta=BETA, **call
        ).loss

    return loss


def _eager(case: Case) -> Loss:
    terms = dict(dict(case.options)["terms"])
    return lambda *logps: contrast(*logps, terms=terms)


def _eager_metrics(case: Case) -> Loss:
    terms = dict(dict(case.options)["terms"])
    return lambda *logps: contrast(*logps, terms=terms, log=dict)


def _eager_linear(case: Case) -> Loss:
    def loss(
        hidden: Tensor, weight: Tensor, target: Tensor, ref_hidden: Tensor, ref_weight: Tensor
    ) -> Tensor:
        with torch.no_grad():
            reference = eager_logprobs(ref_hidden, ref_weight, target)
        return of_answers(eager_logprobs(hidden, weight, target), reference)

    return loss


def _truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, _eager(case))


def _linear_truth(case: Case, data: Data) -> Exact:
    reference = no_gradient_tokens(data["ref_hidden"], data["ref_weight"], data["target"])
    return over_vocabulary(data, data["target"], lambda logprobs: of_answers(logprobs, reference))


KINDS = {
    "preference": Kind(
        cases,
        _tensors,
        lambda case: ("chosen", "rejected"),
        _ours,
        _eager,
        _truth,
        eager_metrics=_eager_metrics,
        kept=lambda tensors: len(tensors["chosen"]),
    ),
    "preference-linear": Kind(
        linear_cases, _linear_tensors, head_leaves, _ours_linear, _eager_linear, _linear_truth, is_head=True
    ),
}
