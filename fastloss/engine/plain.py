"""What the short ways around the CPU's kernels share (plain_call.py, plain_policy.py, plain_pairs.py): who may take them, and autograd."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fastloss.engine import backend as dispatch
from fastloss.engine.once import once_differentiable

CODES = {torch.float32: 0, torch.float64: 3}
LEAVES = (Tensor, torch.nn.Parameter)
is_compiling = torch.compiler.is_compiling  # asked first: torch.compile cannot trace the rest
_logs = dispatch.log.isEnabledFor
_tracing = torch._C._get_tracing_state
_interpreter = torch._C._functorch.peek_interpreter_stack


def is_eager(backend: str) -> bool:
    """No torch.func transform, no tracer, nobody who wants to be told, and the CPU's kernels are what is asked for."""
    return (
        _interpreter() is None
        and _tracing() is None
        and dispatch.is_default(backend)
        and not _logs(logging.DEBUG)
    )


def are_like(like: Tensor, *tensors: Any) -> bool:
    """Whether each is None, or a plain contiguous tensor on the CPU of ``like``'s shape and dtype."""
    dtype, size = like.dtype, like.shape
    for x in tensors:
        if x is not None and not (
            type(x) in LEAVES and x.dtype is dtype and x.is_cpu and x.shape == size and x.is_contiguous()
        ):
            return False
    return True


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Made(torch.autograd.Function):
    """(a, b) -> loss; ``run(given, a, b, *constants)`` makes it and both gradients (None: none) in the forward."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor | None, run: Any, given: Any, constants: tuple[Tensor | None, ...]
    ) -> Tensor:
        loss, made = run(given, a, b, *constants)
        ctx.save_for_backward(a, b, *constants)
        ctx.made = made, run, given
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            return _once(ctx, upstream)
        return _gradients(ctx, upstream)


def _gradients(ctx: Any, upstream: Tensor) -> Any:
    made, run, given = ctx.made
    if made is None:  # retain_graph: the first backward gave the buffers away
        _, made = run(given, *ctx.saved_tensors)
    ctx.made = None, run, given
    d_a, d_b = made
    scale = upstream if upstream.dim() else upstream.item()
    if scale is upstream or scale != 1.0:
        d_a.mul_(scale)
        if d_b is not None:
            d_b.mul_(scale)
    return d_a, d_b, None, None, None


_once = once_differentiable(_gradients)
# Function.apply asks whether a torch.func transform is active; is_eager has.
made_in_forward = super(torch.autograd.function._SingleLevelFunction, _Made).apply
