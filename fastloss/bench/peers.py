"""Other libraries, where they are installed: TRL, Liger-Kernel, cut-cross-entropy, quack."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastloss.bench.cases import IGNORE, Case
from fastloss.bench.providers import Provider
from fastloss.bench.steps import Loss

# The vocabulary tile of TRL 1.16's trainers (trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE).
TRL_CHUNK = 32768


@functools.cache
def missing(module: str, attribute: str) -> str | None:
    """Why ``module.attribute`` cannot be had; a peer may fail to import in any way."""
    try:
        getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            return f"{error.name} is not installed"
        return f"ModuleNotFoundError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _needs(
    module: str, attribute: str, kind: str, gpu: bool, also: Callable[[Case], str | None] = lambda case: None
) -> Callable[[Case, str], str | None]:
    def available(case: Case, device: str) -> str | None:
        if case.kind != kind:
            return ""
        if gpu and device != "cuda":
            return "needs a GPU"
        reason = also(case)
        return missing(module, attribute) if reason is None else reason

    return available


def _function(module: str, attribute: str) -> Any:
    return getattr(importlib.import_module(module), attribute)


def _first(result: Any) -> Tensor:
    """Some versions give (loss, z_loss, …)."""
    return result[0] if isinstance(result, tuple) else result


def _plain(module: str, attribute: str) -> Callable[[Case], Loss]:
    def loss(case: Case) -> Loss:
        function = _function(module, attribute)
        return lambda *args: _first(function(*args))

    return loss


def _trl(case: Case) -> Loss:
    function = _function("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        kept = target != IGNORE
        if hidden.is_cuda:  # as its trainers: ignored tokens are dropped on a GPU, masked on a CPU
            logprobs = function.apply(hidden[kept], weight, None, target[kept], 1.0, TRL_CHUNK, None, 1.0, ())
            return -logprobs[0].mean()
        safe = target.clamp(min=0)
        logprobs = function.apply(hidden, weight, None, safe, 1.0, TRL_CHUNK, None, 1.0, ())
        return -(logprobs[0] * kept).sum() / kept.sum()

    return loss


def _only_in_place(case: Case) -> str | None:
    return None if case.inplace else ""


def _quack_rows(case: Case) -> Loss:
    function = _function("quack.cross_entropy", "cross_entropy")
    return functools.partial(function, reduction="mean", inplace_backward=case.inplace)


def _quack_linear(case: Case) -> Loss:
    function = _function("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return functools.partial(function, chunk_size=4096, reduction="mean")


def registry() -> list[Provider]:
    trl = ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    liger_rows = ("liger_kernel.transformers.functional", "liger_cross_entropy")
    liger_linear = ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    cut = ("cut_cross_entropy", "linear_cross_entropy")
    quack_rows = ("quack.cross_entropy", "cross_entropy")
    quack_linear = ("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return [
        Provider("trl", _needs(*trl, kind="linear", gpu=False), _trl),
        Provider(
            "liger", _needs(*liger_rows, kind="row", gpu=True, also=_only_in_place), _plain(*liger_rows)
        ),
        Provider("liger linear", _needs(*liger_linear, kind="linear", gpu=True), _plain(*liger_linear)),
        Provider("cut-cross-entropy", _needs(*cut, kind="linear", gpu=True), _plain(*cut)),
        Provider("quack", _needs(*quack_rows, kind="row", gpu=True), _quack_rows),
        Provider("quack linear", _needs(*quack_linear, kind="linear", gpu=True), _quack_linear),
    ]
