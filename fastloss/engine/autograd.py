"""What the losses' autograd functions share: a backward that is differentiated at most once, the memory of a gradient, and
what a gradient that was made in the forward is multiplied by in the backward."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.engine.contract import Backend, Factor
from fastloss.engine.gate import address
from fastloss.engine.native import advise_huge_pages
from fastloss.engine.sequences import Sequences
from fastloss.tables import ACC_DTYPES

# Below this the allocator gives back memory that has its pages already.
LARGE = 32 << 20
# Most of the time of writing a fresh 131 MB tensor is page faults. FASTLOSS_HUGE_PAGES=0 keeps the usual pages.
HUGE_PAGES = os.environ.get("FASTLOSS_HUGE_PAGES", "1") != "0"


def new_gradient(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, with large pages asked for where it is large and on a CPU (Linux)."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if HUGE_PAGES and out.nbytes >= LARGE and device.type == "cpu" and type(out) is Tensor:
        advise_huge_pages(out)
    return out


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        raise RuntimeError(
            "fastloss: the kernels' gradient cannot be differentiated again (double backward); "
            "backend='reference' can be differentiated twice"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Like torch's, but with ``create_graph=True`` the gradient carries a node that raises.

    torch's marks only gradients whose upstream requires grad, so that a gradient penalty would silently vanish.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        anchor = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
        return tuple(_Refuse.apply(g, anchor) if isinstance(g, Tensor) else g for g in grads)

    return wrapper


def refuse_inplace(logits: Tensor) -> None:
    """inplace=True must not give anybody a wrong gradient."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return
    if logits.is_leaf:
        raise ValueError("inplace: expected logits made by an operation, got a leaf that requires grad")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError("inplace: expected logits with memory of their own, got an expanded tensor")
    node = logits.grad_fn
    saved = getattr(node, "_saved_result", None)
    if isinstance(saved, Tensor) and address(saved) == address(logits):
        raise ValueError(f"inplace: {node.name() if node else ''} needs the logits for its own backward")


def upstream_scale(backend: Backend, upstream: Tensor, factor: Factor | None) -> float | Tensor:
    """The scalar that gradients made in the forward still need: the upstream gradient, times ``factor`` where that is late."""
    if backend.host_reads:
        value = float(upstream)
        if factor is not None:
            value *= factor.value * (1.0 if factor.tensor is None else float(factor.tensor))
        return value
    scale = upstream.to(ACC_DTYPES[upstream.dtype])
    if factor is not None:
        scale = scale * factor.value if factor.tensor is None else scale * factor.tensor
    return scale


def scale_in_place(backend: Backend, grad: Tensor, scale: float | Tensor) -> Tensor:
    """``grad`` (exclusively ours) times ``scale``: a number, a 0-d tensor, or a column of one per row.

    A 0-d tensor on a GPU is read by the kernel alone: the host does not wait for it, and where it is 1 the gradient is
    neither read nor written. (torch's ``mul_`` would do both, and round the scale to the gradient's dtype.)
    """
    if not isinstance(scale, Tensor):
        return grad if scale == 1.0 else grad.mul_(scale)
    matrix = _as_rows(grad) if scale.dim() == 0 else None
    if matrix is None or backend.host_reads or backend.why_not_for(grad):
        return grad.mul_(scale)
    backend.scale_in_place(matrix, scale.to(grad.device, torch.float32))
    torch.autograd.graph.increment_version(grad)
    return grad


def _as_rows(x: Tensor) -> Tensor | None:
    """``x`` as ``[rows, width]`` in which a row is contiguous, as few rows as there can be; None where it is none."""
    if x.is_contiguous():
        return x.view(1, -1)
    if x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(0) >= x.shape[1]:
        return x
    return None


class _SegmentSum(torch.autograd.Function):
    """(values [N]) -> Σ w·v per sequence [count]."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weights: Tensor | None, layout: Sequences, backend: Backend
    ) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.layout, ctx.backend = layout, backend
        return backend.segment_sum(values, weights, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (weights,) = ctx.saved_tensors
        return ctx.backend.segment_expand(upstream, weights, ctx.layout), None, None, None


def segment_sum(backend: Backend, values: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
    """Σ w·v over each sequence of flat ``values``; a position of weight 0 adds nothing, NaN or not."""
    if backend.differentiable:
        return backend.segment_sum(values, weights, layout)
    return _SegmentSum.apply(values, weights, layout, backend)


class _MadeInForward(torch.autograd.Function):
    """(a, b) -> loss; ``run(given, a, b, *constants)`` makes it and both gradients (None: none) in the forward.

    For small tensors on the CPU, where every Python call around the kernel counts (the losses' ``_direct`` functions)."""

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
# Function.apply asks whether a torch.func transform is active; backend.is_direct has.
made_in_forward = super(torch.autograd.function._SingleLevelFunction, _MadeInForward).apply
