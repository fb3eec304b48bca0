"""One cross-entropy from three places: hidden states and head in, sum of losses / ``normalizer`` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import IGNORE
from .model import Head

T = TypeVar("T")
Loss = Callable[[Tensor, Head, Tensor, int], Tensor]


def fastloss_loss(hidden: Tensor, head: Head, target: Tensor, normalizer: int, skip: float = 0.0) -> Tensor:
    """Never holds the logits of the batch.  hidden [N, D], target [N] -> scalar"""
    import fastloss

    return fastloss.linear_cross_entropy(
        hidden, head.weight, target, linear_bias=head.bias, ignore_index=IGNORE,
        logit_scale=head.scale, softcap=head.softcap, normalizer=normalizer, group=head.group, skip=skip,
    )  # fmt: skip


def torch_loss(hidden: Tensor, head: Head, target: Tensor, normalizer: int) -> Tensor:
    """What most training loops do: all logits, in float32.  # [N, V]"""
    return F.cross_entropy(head.logits(hidden), target, ignore_index=IGNORE, reduction="sum") / normalizer


def torch_linear_loss(hidden: Tensor, head: Head, target: Tensor, normalizer: int) -> Tensor:
    """torch.nn.functional.linear_cross_entropy (torch 2.13 and later); it has no softcap."""
    if head.softcap or (head.bias is not None and head.scale != 1.0):
        raise ValueError(
            "loss: torch-linear takes no softcap and no scale beside a bias; use fastloss or torch"
        )
    hidden = hidden if head.scale == 1.0 else hidden * head.scale
    total = F.linear_cross_entropy(
        hidden, head.weight, target, linear_bias=head.bias, ignore_index=IGNORE, reduction="sum"
    )
    return total / normalizer


def describe(name: str, head: Head, rows: int, dtype: torch.dtype, skip: float = 0.0) -> str:
    """Who computes the cross-entropy of ``rows`` tokens here: for fastloss its backend and the reason for it."""
    import fastloss

    head = head.gathered()
    hidden, weight = example(head, rows, dtype)
    target = torch.zeros(rows, device=weight.device, dtype=torch.long)
    return explained(
        name, fastloss.linear_cross_entropy, hidden, weight, target, linear_bias=head.bias, ignore_index=IGNORE,
        logit_scale=head.scale, softcap=head.softcap, normalizer=rows, group=head.group, skip=skip,
    )  # fmt: skip


def example(head: Head, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and a vocabulary matrix as a step of ``rows`` tokens hands them to its loss."""
    hidden = torch.zeros(rows, head.weight.shape[1], device=head.weight.device, dtype=dtype)
    weight = head.weight.detach().to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(head.weight.requires_grad)


def explained(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """What fastloss would do in this call, in words; for the other losses, that it is PyTorch's."""
    if name != "fastloss":
        return f"PyTorch {torch.__version__}"
    import fastloss

    plan = fastloss.explain(function, *args, **options)
    text = f"fastloss {fastloss.__version__}, backend {plan['backend']} ({plan['reason']})"
    if "gemms" in plan and plan["backend"] != "reference":
        text += f", {plan['gemms']} GEMMs, {plan['chunk_rows']} rows a chunk"
    if "skip" in plan:
        text += f", skip: {plan['skip']}"
    return text


LOSSES: dict[str, Loss] = {"fastloss": fastloss_loss, "torch": torch_loss}
if hasattr(F, "linear_cross_entropy"):
    LOSSES["torch-linear"] = torch_linear_loss


def loss_named(name: str, skip: float = 0.0) -> Loss:
    """``skip`` is fastloss's alone: the others it is compared with are exact."""
    if name == "torch-linear" and name not in LOSSES:
        raise ValueError(
            f"loss: torch-linear needs torch 2.13 or later, this is {torch.__version__}; use fastloss or torch"
        )
    loss = named(LOSSES, name)
    return partial(fastloss_loss, skip=skip) if skip and loss is fastloss_loss else loss


def named(losses: Mapping[str, T], name: str) -> T:
    if name not in losses:
        raise ValueError(f"loss: expected one of {', '.join(map(repr, losses))}, got {name!r}")
    return losses[name]
