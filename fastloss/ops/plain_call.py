"""The commonest call, with the fewest Python calls around the kernel: mean or sum over int64 targets, on the CPU, no option.

On a tensor of a few hundred logits those calls are the whole cost. The numbers are those of ops/cross_entropy.py.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fastloss import dispatch
from fastloss.checks import bad_target
from fastloss.ops import cpu_rows
from fastloss.ops.new_gradient import LARGE, new_gradient
from fastloss.ops.once import once_differentiable

_native: Any = cpu_rows.native if hasattr(cpu_rows.native, "reduced_cross_entropy") else None
# float16 is not here: its gradient is kept unscaled until the upstream gradient is known.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 3}
_PLAIN = (Tensor, torch.nn.Parameter)
_CPU = torch.device("cpu")
_INT64 = torch.int64
_is_compiling, _autocast, _logs = (
    torch.compiler.is_compiling,
    torch.is_autocast_enabled,
    dispatch.log.isEnabledFor,
)
_tracing = torch._C._get_tracing_state
_interpreter = torch._C._functorch.peek_interpreter_stack


def is_plain(logits: Any, target: Any, backend: str) -> bool:
    """Whether :func:`plain_cross_entropy` takes the call; if not, the long way checks it and says what is wrong."""
    return (
        _native is not None
        and not _is_compiling()
        and type(logits) in _PLAIN
        and type(target) is Tensor
        and logits.is_cpu
        and target.is_cpu
        and logits.dtype in _CODES
        and target.dtype is _INT64
        and len(size := logits.shape) == 2
        and target.shape == size[:1]
        and 0 not in size
        and logits.is_contiguous()
        and target.is_contiguous()
        and _interpreter() is None
        and _tracing() is None
        and not _autocast("cpu")
        and dispatch.is_default(backend)
        and not _logs(logging.DEBUG)
    )


def plain_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
    """Of a call that :func:`is_plain`."""
    if logits.requires_grad and torch.is_grad_enabled():
        return _Plain.apply(logits, target, ignore_index, mean)
    return _run(logits, target, ignore_index, mean, None)


def _run(logits: Tensor, target: Tensor, ignore_index: int, mean: bool, grad: Tensor | None) -> Tensor:
    dtype = logits.dtype
    loss = torch.empty((), dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    bad = _native.reduced_cross_entropy(
        logits.data_ptr(), _CODES[dtype], logits.size(0), logits.size(1), logits.stride(0), target.data_ptr(),
        ignore_index, mean, 0 if grad is None else grad.data_ptr(), loss.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise bad_target(target, bad, logits.size(1))
    return loss.to(dtype) if dtype is torch.bfloat16 else loss


class _Plain(torch.autograd.Function):
    """(logits, target) -> loss; the gradient is made in the forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
        if logits.nbytes >= LARGE:
            grad = new_gradient(logits.shape, logits.dtype, _CPU)
        else:
            grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.save_for_backward(logits, target)
        ctx.made = grad, ignore_index, mean
        return _run(logits, target, ignore_index, mean, grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            return _once(ctx, upstream)
        return _gradient(ctx, upstream)


def _gradient(ctx: Any, upstream: Tensor) -> Any:
    grad, ignore_index, mean = ctx.made
    if grad is None:  # retain_graph: the first backward gave the buffer away
        logits, target = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _run(logits, target, ignore_index, mean, grad)
    ctx.made = None, ignore_index, mean
    scale = upstream.item()
    return grad if scale == 1.0 else grad.mul_(scale), None, None, None


_once = once_differentiable(_gradient)
