"""The forward KL to a teacher of which K tokens are known, from hidden states: its other tokens are one more outcome."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import IGNORE, Call, Case, Data, Loss, short
from fastloss.bench.exact import BLOCK, Exact
from fastloss.bench.kinds.base import Kind, head_leaves, head_tensors, ignore_some, normal, random_targets

FUNCTION = "linear_topk_distillation_loss"
KNOWN = 64
MASS = 0.9  # of the known tokens


def cases(quick: bool) -> Iterator[Case]:
    shape = (32, 16, 500) if quick else (1024, 512, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"distillation-topk-linear-{short(dtype)}-" + "x".join(map(str, shape))
        yield Case(name, "distillation-topk-linear", *shape, dtype)


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = head_tensors(case, generator, random_targets(case, generator))
    target = tensors.pop("target")
    steps = torch.arange(KNOWN, dtype=torch.int64, device=target.device) * max(1, case.vocab // KNOWN)
    logits = normal(case.rows, KNOWN, generator=generator)
    return {
        **tensors,
        "ids": (target[:, None] + steps) % case.vocab,  # no token twice
        "logprobs": (MASS * logits.softmax(-1)).log(),
        "target": ignore_some(case, target, generator),
    }


def _ours(case: Case, call: Call) -> Loss:
    function: Any = getattr(fastloss, FUNCTION)
    return lambda *tensors: function(*tensors, tail="bin", **call).loss


def _divergence(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Of each row, in the dtype of ``logits``."""
    own, theirs = logits.log_softmax(-1).gather(-1, ids), logprobs.to(logits.dtype)
    rest, their_rest = 1 - own.exp().sum(-1), 1 - theirs.exp().sum(-1)
    return (theirs.exp() * (theirs - own)).sum(-1) + their_rest * (their_rest.log() - rest.log())


def _eager(case: Case) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, target: Tensor) -> Tensor:
        kept = target != IGNORE
        return (_divergence(F.linear(hidden, weight).float(), ids, logprobs) * kept).sum() / kept.sum()

    return loss


def _truth(case: Case, data: Data) -> Exact:
    names, weight = ("hidden", "ids", "logprobs", "target"), data["weight"].detach().double()
    kept = (data["target"] != IGNORE).sum()
    total, d_hidden, d_weight = weight.new_zeros(()), [], torch.zeros_like(weight)
    for hidden, ids, logprobs, target in zip(*(data[name].detach().split(BLOCK) for name in names)):
        logits = (hidden.double() @ weight.t()).requires_grad_()
        loss = (_divergence(logits, ids, logprobs) * (target != IGNORE)).sum() / kept
        (grad,) = torch.autograd.grad(loss, logits)
        total += loss.detach()
        d_hidden.append(grad @ weight)
        d_weight.addmm_(grad.t(), hidden.double())
    return Exact(total, {"hidden": torch.cat(d_hidden), "weight": d_weight})


KINDS = {
    "distillation-topk-linear": Kind(
        cases, _tensors, head_leaves, _ours, _eager, _truth, needs=FUNCTION, is_head=True
    )
}
