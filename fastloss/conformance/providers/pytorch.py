"""PyTorch's own: what people write without a library."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.conformance.check import Loss
from fastloss.conformance.providers.interface import Missing, Provider


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    return F.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def linear_then_cross_entropy(
    hidden: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    logits = F.linear(hidden, linear_weight, bias)
    return F.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def logprobs(logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, target[:, None])[:, 0]


def linear_logprobs(hidden: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return logprobs(F.linear(hidden, linear_weight), target)


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


_EAGER: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_then_cross_entropy,
    "logprobs": logprobs,
    "linear_logprobs": linear_logprobs,
    "entropy": entropy,
}


def eager() -> Provider:
    return Provider("torch", torch.__version__, _EAGER)


def compiled() -> Provider:
    def of(function: Loss) -> Loss:
        import functools

        fast = torch.compile(function)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Tensor:
            torch._dynamo.reset()
            return fast(*args, **options)

        return call

    return Provider("torch.compile", torch.__version__, {name: of(f) for name, f in _EAGER.items()})


def _linear(options: Any) -> Loss:
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Missing(f"torch {torch.__version__} has no linear_cross_entropy")

    def call(
        hidden: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        return function(
            hidden,
            linear_weight,
            target,
            linear_bias=bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            options=options,
        )

    return call


def linear() -> Provider:
    return Provider("torch-linear", torch.__version__, {"linear_cross_entropy": _linear(None)})


def chunked() -> Provider:
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Missing(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    return Provider(
        "torch-chunked", torch.__version__, {"linear_cross_entropy": _linear(options(batch_chunk_size=4))}
    )
