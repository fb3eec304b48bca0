"""What the losses' autograd functions share: a backward that can be differentiated again, the memory of a gradient, and what a
gradient that was made in the forward is multiplied by in the backward."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.engine.contract import Backend, Factor
from fastloss.engine.definition import REFERENCE
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


Again = Callable[[Any], tuple[Sequence[Tensor | None], Sequence[Tensor | None]]]


def differentiable_again(again: Again) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A backward by a kernel where that is enough, and by the definition where its result is differentiated again
    (``create_graph=True``), vectorised (``is_grads_batched=True``, torch.func), or of an upstream gradient of another type.

    Args:
        again: from the context of the function: its outputs by the definition (None where one carries no gradient), and its
            inputs, by position (None where one is no tensor).
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *upstream: Tensor | None) -> Any:
            if torch.is_grad_enabled() or is_transformed(upstream):
                return _by_definition(again, ctx, upstream)
            return backward(ctx, *upstream)

        return wrapper

    return decorate


_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_batched = torch._C._functorch.is_legacy_batchedtensor


def is_transformed(upstream: Sequence[Tensor | None]) -> bool:
    """Whether an upstream gradient is many at once (``is_grads_batched=True``, a vectorised Jacobian), or of a subclass of Tensor:
    its elements are not to be asked for."""
    return any(g is not None and (type(g) is not Tensor or _wrapped(g) or _batched(g)) for g in upstream)


def _by_definition(again: Again, ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs, inputs = again(ctx)
    wanted = [i for i, x in enumerate(inputs) if x is not None and ctx.needs_input_grad[i]]
    pairs = [
        (out, g.to(out.dtype))
        for out, g in zip(outputs, upstream, strict=False)
        if out is not None and g is not None and out.requires_grad
    ]
    made: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if pairs and wanted:
        grads = torch.autograd.grad(
            [out for out, _ in pairs],
            [x for i, x in enumerate(inputs) if i in wanted and x is not None],
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        for i, grad in zip(wanted, grads, strict=True):
            made[i] = grad
    return tuple(made)


def savable(*constants: Tensor | None) -> tuple[Tensor | None, ...]:
    """Constants of a loss that autograd may save: one made in inference mode (log-probs of a reference model) is copied."""
    return tuple(x.clone() if x is not None and x.is_inference() else x for x in constants)


def refuse_inplace(logits: Tensor) -> None:
    """ValueError where overwriting the logits would give another operation a wrong gradient."""
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
        return upstream.item() * (1.0 if factor is None else float(factor.of_gradient()))
    scale = upstream.to(ACC_DTYPES[upstream.dtype])
    return scale if factor is None else scale * factor.of_gradient()


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


def _segment_sum_again(ctx: Any) -> Any:
    values, weights = ctx.saved_tensors
    return [REFERENCE.segment_sum(values, weights, ctx.layout)], [values]


class _SegmentSum(torch.autograd.Function):
    """(values [N]) -> Σ w·v per sequence [count]."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weights: Tensor | None, layout: Sequences, backend: Backend
    ) -> Tensor:
        ctx.save_for_backward(values, *savable(weights))
        ctx.layout, ctx.backend = layout, backend
        return backend.segment_sum(values.contiguous(), weights, layout)

    @staticmethod
    @differentiable_again(_segment_sum_again)
    def backward(ctx: Any, upstream: Tensor) -> Any:
        _, weights = ctx.saved_tensors
        return ctx.backend.segment_expand(upstream.contiguous(), weights, ctx.layout), None, None, None


def segment_sum(backend: Backend, values: Tensor, weights: Tensor | None, layout: Sequences) -> Tensor:
    """Σ w·v over each sequence of flat ``values``; a position of weight 0 adds nothing, NaN or not."""
    if backend.differentiable:
        return backend.segment_sum(values, weights, layout)
    # Kernels take the address of the first weight for all, in the backward too.
    return _SegmentSum.apply(values, None if weights is None else weights.contiguous(), layout, backend)


class _MadeInForward(torch.autograd.Function):
    """(a, b) -> loss; ``run(given, a, b, *constants)`` makes it and both gradients (None: none) in the forward, and
    ``define(given, a, b, *constants)`` is the loss by the definition.

    For small tensors on the CPU, where every Python call around the kernel counts (the losses' ``_direct`` functions)."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        run: Callable[..., Any],
        define: Callable[..., Tensor],
        given: Any,
        constants: tuple[Tensor | None, ...],
    ) -> Tensor:
        loss, made = run(given, a, b, *constants)
        for x in constants:
            if x is not None and x.is_inference():
                constants = savable(*constants)
                break
        ctx.save_for_backward(a, b, *constants)
        ctx.made = made, run, define, given
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled() or is_transformed((upstream,)):
            return _by_definition(_made_again, ctx, (upstream,))
        made, run, define, given = ctx.made
        if made is None:  # retain_graph: the first backward gave the buffers away
            _, made = run(given, *ctx.saved_tensors)
        ctx.made = None, run, define, given
        d_a, d_b = made
        scale = upstream if upstream.dim() else upstream.item()
        if scale is upstream or scale != 1.0:
            d_a.mul_(scale)
            if d_b is not None:
                d_b.mul_(scale)
        return d_a, d_b, None, None, None, None


def _made_again(ctx: Any) -> Any:
    _, _, define, given = ctx.made
    a, b, *constants = ctx.saved_tensors
    return [define(given, a, b, *constants)], [a, b]


# Function.apply asks whether a torch.func transform is active; backend.is_direct has.
made_in_forward = super(torch.autograd.function._SingleLevelFunction, _MadeInForward).apply
