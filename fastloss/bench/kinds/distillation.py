"""Distillation from the hidden states of student and teacher ("distillation-linear"): the forward KL of each token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import IGNORE, Case, Data, Loss, short
from fastloss.bench.exact import BLOCK, Exact
from fastloss.bench.kinds.base import Kind, head_leaves, head_tensors, ignore_some, random_targets

FUNCTION = "linear_distillation_loss"


def cases(quick: bool) -> Iterator[Case]:
    shape = (32, 16, 500) if quick else (1024, 512, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"distillation-linear-{short(dtype)}-" + "x".join(map(str, shape))
        yield Case(name, "distillation-linear", *shape, dtype, forwards=2)


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """The teacher has the student's width."""
    tensors = head_tensors(case, generator, random_targets(case, generator))
    target = ignore_some(case, tensors.pop("target"), generator)
    noise = torch.randn(tensors["weight"].shape, generator=generator) / case.dim**0.5
    ref_hidden = tensors["hidden"] + torch.randn(tensors["hidden"].shape, generator=generator)
    return {
        **tensors,
        "ref_hidden": ref_hidden,
        "ref_weight": tensors["weight"] + 0.3 * noise,
        "target": target,
    }


def _ours(case: Case, backend: str) -> Loss:
    function: Any = getattr(fastloss, FUNCTION)
    return lambda *tensors: function(*tensors, divergence="forward_kl", backend=backend).loss


def _divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )


def _eager(case: Case) -> Loss:
    def loss(
        hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, target: Tensor
    ) -> Tensor:
        with torch.no_grad():
            teacher = F.linear(ref_hidden, ref_weight).float()
        kept = target != IGNORE
        return (_divergence(F.linear(hidden, weight).float(), teacher) * kept).sum() / kept.sum()

    return loss


def _truth(case: Case, data: Data) -> Exact:
    names = ("hidden", "ref_hidden", "target")
    weight, ref_weight = data["weight"].detach().double(), data["ref_weight"].double()
    kept = data["target"] != IGNORE
    total, d_hidden, d_weight = weight.new_zeros(()), [], torch.zeros_like(weight)
    for hidden, ref_hidden, target in zip(*(data[name].detach().split(BLOCK) for name in names)):
        logits = (hidden.double() @ weight.t()).requires_grad_()
        loss = (
            _divergence(logits, ref_hidden.double() @ ref_weight.t()) * (target != IGNORE)
        ).sum() / kept.sum()
        (grad,) = torch.autograd.grad(loss, logits)
        total += loss.detach()
        d_hidden.append(grad @ weight)
        d_weight.addmm_(grad.t(), hidden.double())
    return Exact(total, {"hidden": torch.cat(d_hidden), "weight": d_weight})


KINDS = {
    "distillation-linear": Kind(cases, _tensors, head_leaves, _ours, _eager, _truth, needs=FUNCTION),
}
