"""Autograd of cross-entropy over rows of logits: the gradient is made in the forward, in the same pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import coefficients, cpu_rows
from fastloss.engine.backend import targets_are_validated
from fastloss.engine.checks import bad_target, reject_bad_targets
from fastloss.engine.native_rows import acc_dtype
from fastloss.engine.new_gradient import new_gradient
from fastloss.engine.once import once_differentiable
from fastloss.engine.scale import scale_in_place


class CrossEntropyCall(NamedTuple):
    """Everything about a call but its tensors."""

    rows: Any
    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    scale: float
    softcap: float
    inplace: bool
    loss_dtype: torch.dtype
    want: tuple[str, ...]
    needs_grad: bool = True


class Factor(NamedTuple):
    """What the sum of the rows' losses is multiplied by: ``value``, times ``tensor`` where it is on a device."""

    value: float = 1.0
    tensor: Tensor | None = None


def loss_factor(
    target: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    rows: int,
    vocab: int,
    ignore_index: int,
    acc: torch.dtype,
    traced: bool = False,
) -> Factor:
    """The reduction's factor; on the way, targets are checked (on a GPU only with ``validate_targets(True)``)."""
    on_cpu = not traced and (target is None or target.device.type == "cpu")
    valid = rows
    if target is not None and not traced:
        if on_cpu and cpu_rows.native is not None:
            valid, bad = cpu_rows.count_targets(target, vocab, ignore_index)
            if bad >= 0:
                raise bad_target(target, bad, vocab)
        elif on_cpu or targets_are_validated():
            reject_bad_targets(target, vocab, ignore_index)
            valid = int((target != ignore_index).sum())
    if normalizer is not None:
        if isinstance(normalizer, Tensor) and (traced or normalizer.device.type != "cpu"):
            return Factor(tensor=normalizer.to(acc).reciprocal())
        return Factor(_reciprocal(float(normalizer)))
    if reduction != "mean":
        return Factor()
    if target is None:
        return Factor(_reciprocal(rows))
    if class_weight is None:
        if on_cpu:
            return Factor(_reciprocal(valid))
        return Factor(tensor=(target != ignore_index).sum().to(acc).reciprocal())
    kept = target != ignore_index
    total = (class_weight[target.clamp(0, vocab - 1)] * kept).sum()
    return Factor(_reciprocal(float(total))) if on_cpu else Factor(tensor=total.reciprocal())


def _reciprocal(value: float) -> float:
    # A mean over nothing is 0 · inf = NaN, as PyTorch's; its gradient stays 0 because ignored rows are written as 0.
    return 1.0 / value if value else float("inf")


def reduced(loss: Tensor, factor: Factor, dtype: torch.dtype) -> Tensor:
    """factor · Σ loss as a 0-d tensor."""
    if factor.tensor is None and loss.device.type == "cpu" and cpu_rows.native is not None:
        total = cpu_rows.sum_rows(loss, factor.value)
    else:
        total = loss.sum() * factor.value
        if factor.tensor is not None:
            total = total * factor.tensor
    return total if total.dtype == dtype else total.to(dtype)


def factor_is_late(dtype: torch.dtype) -> bool:
    """float16 gradients are kept unscaled until the upstream gradient (GradScaler) is known: p/n underflows."""
    return dtype == torch.float16


def run(
    call: CrossEntropyCall,
    logits: Tensor,
    target: Tensor | None,
    w: Tensor | None,
    bias: Tensor | None,
    grad: Tensor | None,
    factor: Factor,
) -> dict[str, Tensor]:
    """One pass over the rows."""
    scaled = grad is not None and not factor_is_late(logits.dtype)
    return call.rows.row_cross_entropy(
        logits,
        target,
        ignore_index=call.ignore_index,
        bias=bias,
        scale=call.scale,
        softcap=call.softcap,
        w=w,
        label_smoothing=call.label_smoothing,
        z_loss=call.z_loss,
        grad_scale=factor.value if scaled else 1.0,
        grad_scale_tensor=factor.tensor if scaled else None,
        grad=grad,
        want=call.want,
    )


def scale_gradient(rows: Any, grad: Tensor, upstream: Tensor, factor: Factor | None) -> Tensor:
    """``grad`` (exclusively ours) times the upstream scalar, in place; nothing is done where that is 1."""
    if not hasattr(rows, "scale_in_place"):  # the cpu backend: the host may look
        value = float(upstream)
        if factor is not None:
            value *= factor.value * (1.0 if factor.tensor is None else float(factor.tensor))
        return scale_in_place(grad, value)
    scale = upstream.to(acc_dtype(grad.dtype))
    if factor is not None:
        scale = scale * factor.value if factor.tensor is None else scale * factor.tensor
    return scale_in_place(grad, scale, rows)


class CrossEntropy(torch.autograd.Function):
    """(logits, target, w) -> loss and the wanted statistics, which are detached."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor | None,
        w: Tensor | None,
        call: CrossEntropyCall,
        factor: Factor,
    ) -> Any:
        ctx.call, ctx.factor, ctx.grad = call, factor, None
        per_row = call.reduction == "none"
        if call.needs_grad and not per_row:
            ctx.grad = logits if call.inplace else new_gradient(logits.shape, logits.dtype, logits.device)
        out = run(call, logits, target, w, None, ctx.grad, factor)
        if ctx.grad is not None and call.inplace:
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(target, w)
            ctx.grad = ctx.grad.detach()
        else:
            ctx.save_for_backward(target, w, logits, out["logsumexp"] if per_row else None)
        loss = out["loss"].to(call.loss_dtype) if per_row else reduced(out["loss"], factor, call.loss_dtype)
        if not call.want:
            return loss
        stats = [out[name] for name in call.want]
        ctx.mark_non_differentiable(*stats)
        return (loss, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        call: CrossEntropyCall = ctx.call
        if call.reduction == "none":
            target, w, logits, lse = ctx.saved_tensors
            k = coefficients.of_cross_entropy(
                upstream, lse, target, w, logits.shape[1], call.label_smoothing, call.z_loss
            )
            out = logits.detach() if call.inplace else new_gradient(logits.shape, logits.dtype, logits.device)
            call.rows.row_grad(
                logits,
                target,
                ignore_index=call.ignore_index,
                bias=None,
                scale=call.scale,
                softcap=call.softcap,
                lse=lse,
                a=k.a,
                b=k.b,
                c=k.c,
                d=k.d,
                w=w,
                out=out,
            )
            if call.inplace:
                torch.autograd.graph.increment_version(logits)
            return out, None, None, None, None
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # retain_graph: the first backward gave the buffer away
            if call.inplace:
                raise RuntimeError(
                    "inplace: a second backward through cross_entropy(inplace=True) is impossible, its logits were "
                    "overwritten by the gradient; use inplace=False with retain_graph=True"
                )
            target, w, logits, _ = ctx.saved_tensors
            grad = new_gradient(logits.shape, logits.dtype, logits.device)
            run(call, logits, target, w, None, grad, ctx.factor)
        return (
            scale_gradient(call.rows, grad, upstream, ctx.factor if factor_is_late(grad.dtype) else None),
            None,
            None,
            None,
            None,
        )
