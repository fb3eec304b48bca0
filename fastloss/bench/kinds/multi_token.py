"""Four heads' targets over one vocabulary matrix: cross-entropy of the stacked hidden states, a weight for each head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import IGNORE, Call, Case, Data, Loss, short
from fastloss.bench.exact import Exact, over_vocabulary
from fastloss.bench.kinds.base import Kind, head_leaves, head_tensors, integers

FUNCTION = "multi_token_targets"
HEADS = 4
WEIGHTS = (1.0, 0.1, 0.1, 0.1)


def cases(quick: bool) -> Iterator[Case]:
    shape = (32, 16, 500) if quick else (1024, 512, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"multi-token-linear-{short(dtype)}-" + "x".join(map(str, shape))
        yield Case(name, "multi-token-linear", *shape, dtype)


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    labels = integers(0, case.vocab, (case.rows // HEADS,), generator)
    function: Any = getattr(fastloss, FUNCTION)
    made = function(labels, HEADS, weights=WEIGHTS)
    tensors = head_tensors(case, generator, made.target.clamp(min=0))
    return {**tensors, "target": made.target, "token_weight": made.token_weight}


def _ours(case: Case, call: Call) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor) -> Tensor:
        out = fastloss.linear_cross_entropy(
            hidden, weight, target, token_weight=token_weight, reduction="sum", **call
        )
        assert isinstance(out, Tensor)
        return out

    return loss


def _eager(case: Case) -> Loss:
    """A cross-entropy for each head."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor) -> Tensor:
        losses = [
            w * F.cross_entropy(F.linear(h, weight).float(), t, ignore_index=IGNORE)
            for w, h, t in zip(WEIGHTS, hidden, target)
        ]
        return torch.stack(losses).sum()

    return loss


def _truth(case: Case, data: Data) -> Exact:
    weight = data["token_weight"].double()
    return over_vocabulary(data, data["target"], lambda logprobs: -(weight * logprobs).sum())


KINDS = {
    "multi-token-linear": Kind(
        cases, _tensors, head_leaves, _ours, _eager, _truth, needs=FUNCTION, is_head=True
    )
}
