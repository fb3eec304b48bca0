"""Log-probs and entropies over the 64 classes that a sampler kept at each position, from hidden states: torch eager makes all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import Call, Case, Data, Loss, short
from fastloss.bench.exact import Exact
from fastloss.bench.kinds.base import Kind, head_leaves, head_tensors, random_targets
from fastloss.bench.kinds.token_stats import mean

KEPT = 64
FUNCTION = "sampler_support"  # where there is one, support= is too


def cases(quick: bool) -> Iterator[Case]:
    shape = (32, 16, 500) if quick else (1024, 512, 128000)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"support-linear-{short(dtype)}-" + "x".join(map(str, shape))
        yield Case(name, "support-linear", *shape, dtype)
        yield Case(f"{name}-nograd", "support-linear", *shape, dtype, nograd=True)


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    target = random_targets(case, generator)
    steps = torch.arange(KEPT, dtype=torch.int64, device=target.device) * max(1, case.vocab // KEPT)
    tensors = head_tensors(case, generator, target)
    return {**tensors, "ids": ((target[:, None] + steps) % case.vocab).sort(1).values}  # no class twice


def _ours(case: Case, call: Call) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor, ids: Tensor) -> Tensor:
        given: dict[str, Any] = {"outputs": ("logprobs", "entropy"), **call, "support": ids}
        out = fastloss.linear_token_stats(hidden, weight, target, **given)
        assert out.logprobs is not None and out.entropy is not None
        return mean(out.logprobs, out.entropy)

    return loss


def _of_kept(z: Tensor, place: Tensor) -> Tensor:
    """``z [rows, K]``, the kept logits; ``place [rows]`` of the target among them."""
    log_p = z.log_softmax(-1)
    return mean(log_p.gather(-1, place[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1))


def _place(target: Tensor, ids: Tensor) -> Tensor:
    return (ids == target[:, None]).int().argmax(-1)


def _eager(case: Case) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor, ids: Tensor) -> Tensor:
        return _of_kept(F.linear(hidden, weight).gather(-1, ids).float(), _place(target, ids))

    return loss


def _truth(case: Case, data: Data) -> Exact:
    hidden, weight = (data[name].detach().double() for name in ("hidden", "weight"))
    ids = data["ids"]
    rows = weight[ids]  # [rows, K, D]
    z = torch.einsum("nd,nkd->nk", hidden, rows).requires_grad_()
    loss = _of_kept(z, _place(data["target"], ids))
    (grad,) = torch.autograd.grad(loss, z)
    d_weight = torch.zeros_like(weight)
    d_weight.index_add_(0, ids.flatten(), (grad[:, :, None] * hidden[:, None]).flatten(0, 1))
    return Exact(loss.detach(), {"hidden": torch.einsum("nk,nkd->nd", grad, rows), "weight": d_weight})


KINDS = {"support-linear": Kind(cases, _tensors, head_leaves, _ours, _eager, _truth, needs=FUNCTION)}
