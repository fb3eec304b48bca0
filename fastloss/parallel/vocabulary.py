"""Cross-entropy of logits whose columns are cut over the processes of a group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.autograd import differentiable_again, new_gradient, refuse_inplace
from fastloss.engine.backend import resolve_call, resolved
from fastloss.engine.checks import ShapeError
from fastloss.engine.coefficients import of_cross_entropy
from fastloss.engine.contract import WHOLE, Backend, Factor
from fastloss.engine.head import again_only_whole
from fastloss.engine.head_shards import of_columns
from fastloss.engine.shards import Call, Shards, of_group, whole
from fastloss.losses.cross_entropy import (
    LossOptions,
    by_definition,
    constants_with_gradients,
    kernel_options,
    loss_factor,
    loss_options,
    weights_of,
    z_loss_of_weighted_mean,
)
from fastloss.tables import ACC_DTYPES, LSE_PARTS, Number


def vocab_shards(linear_weight: Tensor, group: Any) -> Shards:
    """Which process has how many classes, to be given as ``group=`` in place of the group.

    A call with a group exchanges that, and whether all have the same tokens, on the way in: a message of 48 bytes, for which a GPU
    is waited for. With this it is done once, and nothing is checked any more.

    Args:
        linear_weight: this process's rows ``[V_r, D]`` (or columns of logits, transposed).
        group: a ProcessGroup, or a DeviceMesh of one dimension. All its processes must call.

    >>> import torch, fastloss.parallel
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> fastloss.parallel.vocab_shards(torch.zeros(5, 8), dist.group.WORLD).sizes
    (5,)
    >>> dist.destroy_process_group()
    """
    checks.is_floating("linear_weight", linear_weight)
    return of_group(group, linear_weight.shape[0], linear_weight.device)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Any,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: Number = 1.0,
    normalizer: int | float | Tensor | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    loss_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Any:
    """:func:`fastloss.cross_entropy` of logits whose vocabulary is cut over a group (tensor parallelism), which no process makes whole.

    The processes exchange 3 numbers a token, once; the backward exchanges nothing. Megatron-LM's and torch's ``loss_parallel``
    do this for plain cross-entropy (arXiv:1909.08053); here with every option.

    Args:
        logits: this process's columns ``[..., V_r]``, those of rank 0 first; V_r may differ from process to process, and be 0.
        target: int64 ``[...]``, classes of the whole vocabulary, the same on each process; or class probabilities of this process's
            columns, ``[..., V_r]``.
        group: a ProcessGroup, a DeviceMesh of one dimension, or :func:`vocab_shards`. All its processes must call.
        weight: ``[V]``, a weight for each class of the whole vocabulary.
        ignore_index, reduction, label_smoothing, z_loss, logit_scale, softcap, temperature, normalizer, return_stats, backend: as in
            :func:`fastloss.cross_entropy`.
        inplace: the gradient overwrites ``logits``.
        loss_dtype: a float dtype of the returned loss, float32 beside bfloat16 logits; None is the logits'.

    Returns:
        The loss, the same bits on each process, in the logits' dtype or ``loss_dtype``; or ``(loss, TokenStats)``.

    Raises:
        ShapeError, IndexError: as in :func:`fastloss.cross_entropy`. TypeError: group is no group, loss_dtype no float dtype. NotImplementedError: the
        gradient is differentiated again.

    >>> import torch, fastloss.parallel
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> loss = fastloss.parallel.vocab_parallel_cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]), dist.group.WORLD)
    >>> round(loss.item(), 4)
    1.3863
    >>> dist.destroy_process_group()
    """
    checks.is_floating("logits", logits)
    if logits.dim() < 1:
        raise ShapeError("logits: expected at least 1 dimension, got a 0-d tensor")
    lead = tuple(logits.shape[:-1])
    logits, target, weight = resolved(logits), resolved(target), resolved(weight)
    checks.is_tensor("target", target)
    probabilities = target.is_floating_point()
    if probabilities:
        checks.has_shape("target", target, tuple(logits.shape))
        checks.same_device("target", target, logits.device)
    else:
        checks.index_target("target", target, lead, logits.device)
    tokens = math.prod(lead)
    together = Call(tokens, 0, logits.dtype, None if probabilities else target, ignore_index)
    shards = of_group(group, logits.shape[-1], logits.device, together)
    loss = loss_options(
        reduction, ignore_index, label_smoothing, z_loss, logit_scale, softcap, temperature, normalizer,
        return_stats, logits, lead, probabilities,
    )  # fmt: skip
    if weight is not None:
        checks.is_floating("weight", weight)
        checks.has_shape("weight", weight, (shards.vocab,))
        checks.same_device("weight", weight, logits.device)
    if loss_dtype is not None:
        checks.float_dtype("loss_dtype", loss_dtype)
    made = loss_dtype or logits.dtype
    rows = logits.reshape(tokens, logits.shape[-1])
    flat = target.reshape(rows.shape) if probabilities else target.reshape(-1)
    call = resolve_call(
        "vocab_parallel_cross_entropy",
        backend,
        rows,
        flat,
        weight,
        loss.row.row_scale,
        unsupported=constants_with_gradients(flat, weight) or z_loss_of_weighted_mean(loss, weight, flat),
        has_operators=False,
    )
    call.announce(**shards.details(rows.shape[0], _sent(loss), ACC_DTYPES[rows.dtype]))
    if call.by_definition:
        columns = whole(rows.t(), shards)
        assert columns is not None
        if probabilities:
            every = whole(flat.t(), shards)
            assert every is not None
            flat = every.t()
        return loss.shaped(by_definition(columns.t(), flat, weight, loss, made, None), torch.Size(lead))
    acc = ACC_DTYPES[rows.dtype]
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    elif inplace:
        refuse_inplace(rows)
    classes, w = weights_of(flat, weight, loss, acc, shards)
    factor, loss = loss_factor(call, classes, w, loss, rows.shape[0], shards.vocab, acc)
    out = _VocabParallel.apply(rows, classes, w, _Run(call.backend, loss, factor, shards, inplace, made))
    value = loss.with_stats(out[0], out[1:], loss.want) if loss.want else out
    return loss.shaped(value, torch.Size(lead))


def _sent(loss: LossOptions) -> tuple[str, ...]:
    """The statistics that processes exchange for a loss."""
    if loss.probabilities:
        return ("distance", "mass", *loss.want)
    return ("logprobs", *loss.want, *(("distance",) if loss.row.label_smoothing else ()))


@dataclass(frozen=True)
class _Run:
    """What forward and backward need beside the tensors."""

    backend: Backend
    loss: LossOptions
    factor: Factor
    shards: Shards
    inplace: bool
    loss_dtype: torch.dtype


def _again(ctx: Any) -> Any:
    again_only_whole(ctx.run.shards)


class _VocabParallel(torch.autograd.Function):
    """(this process's logits, classes, weights of all classes) -> loss and detached statistics."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor | None, w: Tensor | None, run: _Run) -> Any:
        ctx.run = run
        part = of_columns(run.shards, logits.detach(), run.backend)
        out = part.cross_entropy(classes, kernel_options(run.loss), w=w, factor=WHOLE, want=run.loss.want)
        ctx.save_for_backward(logits, classes, w, out[LSE_PARTS], out.get("mass"))
        per_row = run.loss.reduction == "none"
        loss = out["loss"] if per_row else run.backend.sum_rows(out["loss"], run.factor)
        loss = loss.to(run.loss_dtype)
        if not run.loss.want:
            return loss
        stats = [out[name] for name in run.loss.want]
        ctx.mark_non_differentiable(*stats)
        return (loss, *stats)

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        run: _Run = ctx.run
        logits, classes, w, lse_parts, mass = ctx.saved_tensors
        options = kernel_options(run.loss)
        each = upstream.to(lse_parts.dtype)
        if run.loss.reduction != "none":
            each = (each * run.factor.of_gradient()).expand(logits.shape[0])
        k = of_cross_entropy(each, lse_parts, classes, w, run.shards.vocab, options, mass)
        out = logits.detach() if run.inplace else new_gradient(logits.shape, logits.dtype, logits.device)
        part = of_columns(run.shards, logits.detach(), run.backend, out)
        part.gradients(classes, options, lse_parts, k, w)
        if run.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None
