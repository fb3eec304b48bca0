"""Other libraries, each called as its own documentation or trainer calls it."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fastloss.conformance.providers.interface import Missing, Provider


def _function(package: str, module: str, name: str) -> tuple[Any, str]:
    """A peer may fail to import in any way."""
    try:
        return getattr(importlib.import_module(module), name), version(package)
    except PackageNotFoundError:
        raise Missing(f"{package} is not installed") from None
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Missing(f"{package}: {said}") from None


def trl() -> Provider:
    """trl.trainer.utils, and the chunked head of its trainers (called with one tile of 16 tokens here)."""
    selective, number = _function("trl", "trl.trainer.utils", "selective_log_softmax")
    entropy_of, _ = _function("trl", "trl.trainer.utils", "entropy_from_logits")
    chunked, _ = _function("trl", "trl.kernels.chunked_logprob", "ChunkedLogProbFunction")

    def logprobs(logits: Tensor, target: Tensor) -> Tensor:
        return selective(logits, target)

    def linear_logprobs(
        hidden: Tensor, linear_weight: Tensor, target: Tensor, *, temperature: float = 1.0
    ) -> Tensor:
        return chunked.apply(hidden, linear_weight, None, target, temperature, 16, None, 1.0, ())[0]

    def entropy(logits: Tensor) -> Tensor:
        return entropy_of(logits)

    return Provider(
        "trl", number, {"logprobs": logprobs, "linear_logprobs": linear_logprobs, "entropy": entropy}
    )


def liger() -> Provider:
    """liger_kernel.transformers.functional; on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise Missing("needs a GPU, or TRITON_INTERPRET=1")
    module = "liger_kernel.transformers.functional"
    plain, number = _function("liger-kernel", module, "liger_cross_entropy")
    fused, _ = _function("liger-kernel", module, "liger_fused_linear_cross_entropy")

    def run(kernel: Any, *args: Any, **options: Any) -> Tensor:
        try:
            result = kernel(*args, **options)
        except Exception as error:
            if type(error).__name__ != "InterpreterError":
                raise
            raise NotImplementedError(f"Triton's interpreter: {error}") from None
        return result[0] if isinstance(result, tuple) else result

    def cross_entropy(
        logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        # It writes the gradient over the logits, as documented: a copy is what a model's output is.
        return run(
            plain,
            logits * 1,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            lse_square_scale=z_loss,
            softcap=softcap,
        )

    def linear_cross_entropy(
        hidden: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        return run(
            fused,
            hidden,
            linear_weight,
            target,
            bias=bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            lse_square_scale=z_loss,
            softcap=softcap,
        )

    return Provider(
        "liger", number, {"cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy}
    )


def cut_cross_entropy() -> Provider:
    """On a CPU with impl="torch_compile", the one of its implementations that needs no GPU."""
    function, number = _function("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if torch.cuda.is_available() else "torch_compile"

    def linear_cross_entropy(
        hidden: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        softcap: float | None = None,
    ) -> Tensor:
        torch._dynamo.reset()  # the shapes of other checks are no reason to reach its limit of recompilations
        given = {} if bias is None else {"bias": bias}  # older releases have no such argument
        return function(
            hidden,
            linear_weight,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            softcap=softcap,
            impl=impl,
            **given,
        )

    return Provider("cce", f"{number} ({impl})", {"linear_cross_entropy": linear_cross_entropy})


def quack() -> Provider:
    if not torch.cuda.is_available():
        raise Missing("needs a GPU")
    function, number = _function("quack-kernels", "quack.cross_entropy", "cross_entropy")

    def cross_entropy(
        logits: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
    ) -> Tensor:
        return function(logits, target, ignore_index=ignore_index, reduction=reduction)

    return Provider("quack", number, {"cross_entropy": cross_entropy})
