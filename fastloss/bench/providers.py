"""Who is measured: forward and backward of a fresh graph per call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.cases import Case, Data

Step = Callable[[], Tensor]


class _Start(torch.autograd.Function):
    """Gives logits a graph node without copying them, and swallows the gradient without copying it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _Start.last = grad
        return None, None

    last: Tensor | None = None


def _row_step(loss: Callable[..., Tensor], case: Case, data: Data) -> Step:
    assert data.logits is not None
    logits = data.logits.detach()
    anchor = torch.zeros((), requires_grad=True)

    def step() -> Tensor:
        _Start.last = None
        value = loss(_Start.apply(anchor, logits), data.target)
        value.backward()
        return value

    return step


def _linear_step(loss: Callable[..., Tensor], case: Case, data: Data) -> Step:
    def step() -> Tensor:
        assert data.hidden is not None and data.weight is not None
        data.hidden.grad = data.weight.grad = None
        value = loss(data.hidden, data.weight, data.target)
        value.backward()
        return value

    return step


def _eager_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(
        hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128)
    )


def _trl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    kept = target != -100
    logprobs = ChunkedLogProbFunction.apply(
        hidden, weight, None, target.clamp(min=0), 1.0, 8192, None, 1.0, ()
    )[0]
    return -(logprobs * kept).sum() / kept.sum()


def _missing(module: str, attribute: str = "") -> str:
    try:
        found = __import__(module, fromlist=["_"])
    except Exception as error:  # a peer may fail to import in any way
        return f"{module}: {error}"
    return "" if not attribute or hasattr(found, attribute) else f"{module} has no {attribute}"


def providers(case: Case, data: Data) -> dict[str, Step | str]:
    """Name to a step, or to the reason why it cannot run here."""
    out: dict[str, Step | str] = {}
    available = fastloss.backends()
    device = data.target.device.type
    for backend in ("cpu",) if device == "cpu" else ("cuda", "triton"):
        name = f"fastloss[{backend}]"
        if available[backend] != "available":
            out[name] = available[backend]
        elif case.kind == "row":
            out[name] = _row_step(
                functools.partial(fastloss.cross_entropy, inplace=case.inplace, backend=backend), case, data
            )
        else:
            out[name] = _linear_step(
                functools.partial(fastloss.linear_cross_entropy, backend=backend), case, data
            )
    if case.kind == "row":
        out["torch eager"] = _row_step(F.cross_entropy, case, data)
        out["torch.compile"] = _row_step(torch.compile(F.cross_entropy, dynamic=False), case, data)
        return out
    out["torch eager"] = _linear_step(_eager_linear, case, data)
    out["torch.compile"] = _linear_step(torch.compile(_eager_linear, dynamic=False), case, data)
    if hasattr(F, "linear_cross_entropy"):
        out["torch linear_cross_entropy"] = _linear_step(F.linear_cross_entropy, case, data)
        out["torch chunked"] = _linear_step(_torch_chunked, case, data)
    out["trl"] = _missing("trl.kernels.chunked_logprob", "ChunkedLogProbFunction") or _linear_step(
        _trl, case, data
    )
    if device == "cuda":
        out.update(_gpu_peers(case, data))
    return out


def _gpu_peers(case: Case, data: Data) -> dict[str, Step | str]:
    out: dict[str, Step | str] = {}
    reason = _missing("liger_kernel.transformers.functional")
    if reason:
        out["liger"] = reason
    else:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        out["liger"] = _linear_step(liger_fused_linear_cross_entropy, case, data)
    reason = _missing("cut_cross_entropy")
    if reason:
        out["cut-cross-entropy"] = reason
    else:
        from cut_cross_entropy import linear_cross_entropy

        out["cut-cross-entropy"] = _linear_step(linear_cross_entropy, case, data)
    return out
