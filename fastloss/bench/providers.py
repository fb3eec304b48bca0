"""Who is measured: fastloss's backends, PyTorch in several ways, and the peers."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench import internals, peers
from fastloss.bench.case import Case, Loss
from fastloss.bench.kinds import KINDS, lora
from fastloss.bench.provider import Provider, emulated

# Python steps that torch.compile would have to unroll.
UNROLLED = 256


def _fastloss(backend: str) -> Provider:
    def available(case: Case, device: str) -> str | None:
        state = fastloss.backends()[backend]
        if state != "available":
            return state
        if (backend == "cpu") != (device == "cpu"):
            return ""
        if (name := KINDS[case.kind].needs) and not hasattr(fastloss, name):
            return f"fastloss has no {name}"
        return None

    return Provider(
        f"fastloss[{backend}]", available, lambda case: KINDS[case.kind].ours(case, {"backend": backend})
    )


def _head(memory: str) -> Provider:
    """The CPU's head, told what to spend."""
    ours = _fastloss("cpu")

    def available(case: Case, device: str) -> str | None:
        if not KINDS[case.kind].is_head or case.nograd:
            return ""
        return ours.available(case, device)

    def loss(case: Case) -> Loss:
        return KINDS[case.kind].ours(case, {"backend": "cpu", "memory": memory})

    return Provider(f"fastloss[cpu], memory={memory}", available, loss)


SKIP = 0.2


def _skip() -> Provider:
    """The CPU's cross-entropy from the head with gradients left out, where there is what may be."""
    ours = _fastloss("cpu")

    def available(case: Case, device: str) -> str | None:
        return ours.available(case, device) if case.trained else ""

    def loss(case: Case) -> Loss:
        return functools.partial(fastloss.linear_cross_entropy, skip=SKIP, backend="cpu")

    return Provider(f"fastloss[cpu], skip={SKIP}", available, loss)


def _exponentials(backend: str) -> Provider:
    """A GPU's cross-entropy from the head with FASTLOSS_SCALED_EXPONENTIALS=1."""
    ours = _fastloss(backend)

    def available(case: Case, device: str) -> str | None:
        if case.kind != "linear" or case.nograd or case.dtype != torch.bfloat16:
            return ""
        return ours.available(case, device)

    def loss(case: Case) -> Loss:
        def switched_on(*tensors: Tensor) -> Tensor:
            with internals.scaled_exponentials():
                return fastloss.linear_cross_entropy(*tensors, backend=backend)

        return switched_on

    return Provider(f"fastloss[{backend}], scaled exponentials", available, loss)


def _eager(case: Case) -> Loss:
    return KINDS[case.kind].eager(case)


def _eager_metrics(case: Case) -> Loss:
    loss = KINDS[case.kind].eager_metrics
    assert loss is not None
    return loss(case)


def _has_metrics(case: Case, device: str) -> str | None:
    return "" if KINDS[case.kind].eager_metrics is None else None


def _eager_f32(case: Case) -> Loss:
    """What one does about it: the same expression over float32 copies."""
    loss = KINDS[case.kind].eager(case)

    def upcast(*tensors: Tensor) -> Tensor:
        return loss(*(t.float() if t.is_floating_point() else t for t in tensors))

    return upcast


def _only_emulated(case: Case, device: str) -> str | None:
    return None if case.emulated(device) else ""


def _compiled(case: Case) -> Loss:
    return torch.compile(_eager(case), dynamic=False)


def _compiles(case: Case, device: str) -> str | None:
    if case.kind == "gae" and case.length > UNROLLED:
        return "would unroll a Python loop over time"
    return emulated(case, device)


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


def _has_adapter(case: Case, device: str) -> str | None:
    return emulated(case, device) if case.kind == "lora-linear" else ""


def registry() -> list[Provider]:
    return [
        _fastloss("cpu"),
        _fastloss("cuda"),
        _fastloss("triton"),
        _head("fast"),
        _head("low"),
        _skip(),
        _exponentials("cuda"),
        _exponentials("triton"),
        Provider("torch eager", emulated, _eager),
        Provider("eager with TRL's metrics", _has_metrics, _eager_metrics),
        Provider("torch eager, f32 GEMMs", _only_emulated, _eager_f32),
        Provider("torch.compile", _compiles, _compiled, compiles=True),
        Provider("torch eager, merged", _has_adapter, lora.merged),
        Provider("torch linear_cross_entropy", _has_linear, _torch_linear),
        Provider("torch chunked", _has_linear, _torch_chunked),
        Provider("torch chunked auto", _has_linear, _torch_chunked_auto),
        *peers.registry(),
    ]


def chosen(
    case: Case, device: str, patterns: Sequence[str] = ("*",), skip: Sequence[str] = ()
) -> tuple[list[Provider], dict[str, str]]:
    """Those that can run the case, and the reasons of those that can't."""
    found, reasons = [], {}
    for provider in registry():
        if not all(any(fnmatch.fnmatch(provider.name, p) for p in given) for given in (case.only, patterns)):
            continue
        reason = provider.available(case, device)
        if reason is None and any(fnmatch.fnmatch(provider.name, p) for p in skip):
            reason = "left out (--skip)"
        if reason is None:
            found.append(provider)
        elif reason:
            reasons[provider.name] = reason
    return found, reasons
