"""What a kind of case brings along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.bench.case import IGNORE, Call, Case, Data, Loss
from fastloss.bench.exact import Truth


@dataclass(frozen=True)
class Kind:
    cases: Callable[[bool], Iterable[Case]]  # of quick
    tensors: Callable[[Case, torch.Generator], dict[str, Tensor]]  # the loss's arguments, in order
    leaves: Callable[[Case], tuple[str, ...]]  # that get a gradient
    ours: Callable[[Case, Call], Loss]
    eager: Callable[[Case], Loss]  # what one writes in PyTorch
    truth: Truth
    limit: tuple[str, Callable[[Case, Data], Callable[[], object]]] | None = None  # None: the GEMMs
    eager_metrics: Callable[[Case], Loss] | None = None  # eager, with what a trainer logs of each step
    kept: Callable[[dict[str, Tensor]], int] = lambda tensors: int((tensors["target"] != IGNORE).sum())
    needs: str = ""  # a function that not every fastloss has
    is_head: bool = False  # its function takes memory=


def normal(*shape: Any, generator: torch.Generator) -> Tensor:
    """float32, on the case's device (:func:`fastloss.bench.cases.data`), as all that a case is made of."""
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device=torch.get_default_device())


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device=torch.get_default_device())


def integers(low: int, high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """int64."""
    return torch.randint(
        low, high, shape, generator=generator, dtype=torch.int64, device=torch.get_default_device()
    )


def places(count: int) -> Tensor:
    """0, 1, … in int64."""
    return torch.arange(count, dtype=torch.int64, device=torch.get_default_device())


def ones_mask(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool, device=torch.get_default_device())


def head_tensors(case: Case, generator: torch.Generator, target: Tensor) -> dict[str, Tensor]:
    """Hidden states of ``target``'s shape and a vocabulary matrix."""
    hidden = normal(*target.shape, case.dim, generator=generator)
    weight = normal(case.vocab, case.dim, generator=generator) / case.dim**0.5
    if case.peaked:
        hidden += 12.0 * weight[target]
    return {"hidden": hidden, "weight": weight, "target": target}


def head_leaves(case: Case) -> tuple[str, ...]:
    return ("hidden",) if case.frozen else ("hidden", "weight")


def random_targets(case: Case, generator: torch.Generator) -> Tensor:
    shape = (case.rows // case.length, case.length) if case.length else (case.rows,)
    return integers(0, case.vocab, shape, generator=generator)


def ignore_some(case: Case, target: Tensor, generator: torch.Generator) -> Tensor:
    ignored = torch.randperm(
        case.rows, generator=generator, dtype=torch.int64, device=torch.get_default_device()
    )[: round(case.rows * case.ignored)]
    return target.index_fill(0, ignored, IGNORE)


def eager_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """float32 log-probs of ``target [...]`` by PyTorch; 0 where it is ignored."""
    logits = F.linear(hidden, weight).flatten(0, -2).float()
    loss = F.cross_entropy(logits, target.flatten(), reduction="none", ignore_index=IGNORE)
    return -loss.view(target.shape)


def with_reference(case: Case, generator: torch.Generator, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A reference model beside the policy: the policy and a little noise, as after some steps of training; the first tokens
    of each answer are its prompt."""
    tensors["target"][:, : round(case.length * case.ignored)] = IGNORE
    noise = 0.02 * normal(tensors["weight"].shape, generator=generator)
    ref_hidden = tensors["hidden"] + 0.02 * normal(tensors["hidden"].shape, generator=generator)
    return {**tensors, "ref_hidden": ref_hidden, "ref_weight": tensors["weight"] + noise / case.dim**0.5}


def read_all_write_one(case: Case, data: Data) -> Callable[[], object]:
    """Every floating-point number per token read once, as many written as the largest tensor has."""
    tensors = [t.detach().float() for t in data.tensors.values() if t.is_floating_point()]
    largest = max(tensors, key=Tensor.numel)
    sources = [t for t in tensors if t is not largest and t.shape == largest.shape]
    into = largest.clone()

    def run() -> None:
        into.copy_(largest)
        for source in sources:
            source.sum()

    return run
