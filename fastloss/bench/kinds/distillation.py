"""The forward KL of each token, from the logits of student and teacher ("distillation") and from their hidden states and
vocabulary matrices ("distillation-linear")."""

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
from fastloss.bench.kinds.cross_entropy import copy

FUNCTION = "linear_distillation_loss"


def row_cases(quick: bool) -> Iterator[Case]:
    rows, vocab = (16, 2000) if quick else (1024, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(f"distillation-{short(dtype)}-{rows}x{vocab}", "distillation", rows, 0, vocab, dtype)


def _row_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    logits, teacher = (normal(case.rows, case.vocab, generator=generator) for _ in range(2))
    target = ignore_some(case, random_targets(case, generator), generator)
    return {"logits": logits, "ref_logits": logits + teacher, "target": target}


def _ours_rows(case: Case, call: Call) -> Loss:
    function: Any = fastloss.distillation_loss
    return lambda *tensors: function(*tensors, divergence="forward_kl", **call).loss


def _eager_rows(case: Case) -> Loss:
    def loss(logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        kept = target != IGNORE
        return (_divergence(logits.float(), teacher.float()) * kept).sum() / kept.sum()

    return loss


def _row_truth(case: Case, data: Data) -> Exact:
    kept = (data["target"] != IGNORE).sum()
    total, gradients = torch.zeros((), dtype=torch.float64, device=torch.get_default_device()), []
    names = ("logits", "ref_logits", "target")
    for logits, teacher, target in zip(*(data[name].detach().split(BLOCK) for name in names)):
        z = logits.double().requires_grad_()
        loss = (_divergence(z, teacher.double()) * (target != IGNORE)).sum() / kept
        gradients.append(torch.autograd.grad(loss, z)[0])
        total = total + loss.detach().cpu()
    return Exact(total, {"logits": torch.cat(gradients)})


def cases(quick: bool) -> Iterator[Case]:
    shape = (32, 16, 500) if quick else (1024, 512, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"distillation-linear-{short(dtype)}-" + "x".join(map(str, shape))
        yield Case(name, "distillation-linear", *shape, dtype, forwards=2)


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """The teacher has the student's width."""
    tensors = head_tensors(case, generator, random_targets(case, generator))
    target = ignore_some(case, tensors.pop("target"), generator)
    noise = normal(tensors["weight"].shape, generator=generator) / case.dim**0.5
    ref_hidden = tensors["hidden"] + normal(tensors["hidden"].shape, generator=generator)
    return {
        **tensors,
        "ref_hidden": ref_hidden,
        "ref_weight": tensors["weight"] + 0.3 * noise,
        "target": target,
    }


def _ours(case: Case, call: Call) -> Loss:
    function: Any = getattr(fastloss, FUNCTION)
    return lambda *tensors: function(*tensors, divergence="forward_kl", **call).loss


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
    "distillation": Kind(
        row_cases, _row_tensors, lambda case: ("logits",), _ours_rows, _eager_rows, _row_truth, ("copy", copy)
    ),
    "distillation-linear": Kind(
        cases, _tensors, head_leaves, _ours, _eager, _truth, needs=FUNCTION, is_head=True
    ),
}
