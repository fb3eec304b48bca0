"""Who is measured. A provider says why it cannot run a case, or hands out the loss that it would run."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.cases import Case
from fastloss.bench.steps import Loss


@dataclass(frozen=True)
class Provider:
    name: str
    available: Callable[[Case, str], str | None]  # why not, on this device; "" where the case is not its kind
    loss: Callable[[Case], Loss]  # (logits, target) or (hidden, weight, target) -> mean loss
    compiles: bool = False  # the first call is spent on compiling


def eager_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _always(case: Case, device: str) -> str | None:
    return None


def _fastloss(backend: str) -> Provider:
    def available(case: Case, device: str) -> str | None:
        state = fastloss.backends()[backend]
        if state != "available":
            return state
        if (backend == "cpu") != (device == "cpu"):
            return ""
        return None

    def loss(case: Case) -> Loss:
        if case.kind == "linear":
            return functools.partial(fastloss.linear_cross_entropy, backend=backend)
        return functools.partial(fastloss.cross_entropy, inplace=case.inplace, backend=backend)

    return Provider(f"fastloss[{backend}]", available, loss)


def _eager(case: Case) -> Loss:
    return F.cross_entropy if case.kind == "row" else eager_linear


def _compiled(case: Case) -> Loss:
    return torch.compile(_eager(case), dynamic=False)


def _has_linear(case: Case, device: str) -> str | None:
    if case.kind != "linear":
        return ""
    return None if hasattr(F, "linear_cross_entropy") else "torch has no linear_cross_entropy"


def _torch_linear(case: Case) -> Loss:
    return F.linear_cross_entropy


def _torch_chunked(case: Case) -> Loss:
    """Eight chunks of rows."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, case.rows // 8))
    return functools.partial(F.linear_cross_entropy, options=options)


def _torch_chunked_auto(case: Case) -> Loss:
    """Chunks and accumulation as PyTorch picks them for the device and dtype."""
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def registry() -> list[Provider]:
    from fastloss.bench import peers

    return [
        _fastloss("cpu"),
        _fastloss("cuda"),
        _fastloss("triton"),
        Provider("torch eager", _always, _eager),
        Provider("torch.compile", _always, _compiled, compiles=True),
        Provider("torch linear_cross_entropy", _has_linear, _torch_linear),
        Provider("torch chunked", _has_linear, _torch_chunked),
        Provider("torch chunked auto", _has_linear, _torch_chunked_auto),
        *peers.registry(),
    ]


def chosen(case: Case, device: str, pattern: str = "*") -> tuple[list[Provider], dict[str, str]]:
    """Those that can run the case, and the reasons of those that can't."""
    found, reasons = [], {}
    for provider in registry():
        wanted = any(fnmatch.fnmatch(provider.name, p) for p in case.only)
        if not wanted or not fnmatch.fnmatch(provider.name, pattern):
            continue
        reason = provider.available(case, device)
        if reason is None:
            found.append(provider)
        elif reason:
            reasons[provider.name] = reason
    return found, reasons
