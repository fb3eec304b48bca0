"""Cross-entropy of a frozen head with a LoRA: the adapter's two products beside the head's, against PEFT's two steps and a merged matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import Call, Case, Data, Loss, short
from fastloss.bench.exact import Exact, cross_entropy_tail, over_vocabulary
from fastloss.bench.kinds.base import Kind, head_tensors, ignore_some, normal, random_targets

RANK, SCALE = 16, 2.0


def cases(quick: bool) -> Iterator[Case]:
    for shape in [(32, 16, 500)] if quick else [(1024, 512, 32000), (512, 1024, 128256)]:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"lora-linear-{short(dtype)}-" + "x".join(map(str, shape))
            yield Case(name, "lora-linear", *shape, dtype, frozen=True)


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """A and B stay float32, as PEFT keeps them beside a model in bfloat16."""
    tensors = head_tensors(case, generator, random_targets(case, generator))
    a = normal(RANK, case.dim, generator=generator) / case.dim**0.5
    b = 0.1 * normal(case.vocab, RANK, generator=generator)
    return {**tensors, "target": ignore_some(case, tensors["target"], generator), "a": a, "b": b}


def _ours(case: Case, call: Call) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out = fastloss.linear_cross_entropy(hidden, weight, target, lora=(a, b, SCALE), **call)
        assert isinstance(out, Tensor)
        return out

    return loss


def _two_steps(case: Case) -> Loss:
    """The forward of PEFT's Linear."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, a: Tensor, b: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        adapted = logits + F.linear(F.linear(hidden.to(a.dtype), a), b) * SCALE
        return F.cross_entropy(adapted.to(logits.dtype), target)

    return loss


def merged(case: Case) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor, a: Tensor, b: Tensor) -> Tensor:
        whole = weight + SCALE * (b.to(weight.dtype) @ a.to(weight.dtype))
        return F.cross_entropy(F.linear(hidden, whole), target)

    return loss


def _truth(case: Case, data: Data) -> Exact:
    a, b = (data[name].detach().double() for name in ("a", "b"))
    whole = {**data.tensors, "weight": data["weight"].detach().double() + SCALE * b @ a}
    exact = over_vocabulary(
        Data(whole, data.leaves, data.kept), data["target"], cross_entropy_tail(data["target"])
    )
    d_weight = exact.gradients["weight"]
    gradients = {
        "hidden": exact.gradients["hidden"],
        "a": SCALE * b.t() @ d_weight,
        "b": SCALE * d_weight @ a.t(),
    }
    return Exact(exact.loss, gradients)


def leaves(case: Case) -> tuple[str, ...]:
    return "hidden", "a", "b"


KINDS = {"lora-linear": Kind(cases, _tensors, leaves, _ours, _two_steps, _truth, is_head=True)}
