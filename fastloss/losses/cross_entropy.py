"""cross_entropy: PyTorch's function, and z-loss, soft-cap, logit scale, normalizer, in-place gradients and statistics."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import autograd, checks, compile_rows, devices
from fastloss.engine import backend as backends
from fastloss.engine.autograd import differentiable_again, new_gradient
from fastloss.engine.backend import Call, resolve_call, resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.engine.coefficients import of_cross_entropy
from fastloss.engine.contract import WHOLE, Factor, count_plainly
from fastloss.engine.definition import REFERENCE
from fastloss.engine.gate import address
from fastloss.engine.native import DIRECT_CODES, NativeBackend, cpu_backend
from fastloss.engine.sequences import Sequences
from fastloss.engine.shards import Shards
from fastloss.losses.token_stats import TokenStats, stats_from
from fastloss.tables import (
    ACC_DTYPES,
    LATE_DTYPES,
    LSE_PARTS,
    STATS,
    STATS_WITHOUT_TARGET,
    CrossEntropyOptions,
    Number,
)


@resolves_views
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: Number = 1.0,
    normalizer: int | float | Tensor | None = None,
    token_weight: Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    r"""Drop-in for :func:`torch.nn.functional.cross_entropy`: the logits are read once, their gradient written once.

    With ``z = logit_scale · softcap · tanh(input / softcap) / temperature`` and class weights ``w``, a row's loss is

    .. math:: (1-\epsilon)\,w_t(\mathrm{lse}(z) - z_t) + \tfrac{\epsilon}{V}\sum_v w_v(\mathrm{lse}(z) - z_v)
              + \zeta\,\mathrm{lse}(z)^2

    Label smoothing (``ε``): arXiv:1512.00567. z-loss (``ζ``): arXiv:2204.02311. Soft-cap: arXiv:2408.00118.

    Args:
        input: logits ``[C]``, ``[N, C]`` or ``[N, C, d1, …]`` in float32, bfloat16, float16 or float64.
        target: int64 or uint8 classes, of ``input``'s shape without C; or class probabilities of ``input``'s shape.
        weight: ``[C]``, a weight per class, in ``input``'s dtype (any float dtype beside class probabilities or under autocast).
        size_average, reduce: deprecated in PyTorch; honoured as there.
        ignore_index: targets of this value add nothing to the loss and get no gradient.
        reduction: "mean" (over targets not ignored, weighted by ``weight``), "sum" or "none".
        label_smoothing: in [0, 1].
        z_loss: coefficient of ``logsumexp²``, in the same reduction; its mean is over tokens, whatever their class weights.
        logit_scale: a factor on the (capped) logits.
        softcap: cap the logits smoothly to ``(-softcap, softcap)``.
        temperature: > 0: a number, or one per token, of ``target``'s shape (class probabilities: without C) or what broadcasts to
            it, in any float dtype.
        token_weight: a factor of each token's loss and gradient, of the targets' shape (class probabilities: without C), any
            float dtype; that of an ignored token may be anything, NaN too. A mean still divides by the number of targets or the
            sum of their class weights; ``normalizer`` by what it says. The backward then reads the logits again, as with
            "none"; where it requires a gradient, the definition computes the call.
        loss_dtype: a float dtype of the returned loss; None is PyTorch's rule.
        normalizer: the sum is divided by this in place of the mean's count (transformers' num_items_in_batch).
        inplace: the gradient overwrites ``input``. Refused for a leaf, or a tensor that autograd still needs.
        return_stats: also a :class:`TokenStats`, detached, from the same pass.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        The loss in ``input``'s dtype (float32 under autocast; of class probabilities the widest of input, target and weight), as
        PyTorch; or ``(loss, TokenStats)``.

    Raises:
        ValueError: shapes, dtypes or options that do not fit (also a RuntimeError, as in PyTorch).
        IndexError: on CPU, a target outside ``[0, C)`` that is not ``ignore_index``. On a GPU that row's loss is NaN,
            and with ``fastloss.validate_targets(True)`` the IndexError.

    >>> import torch, fastloss
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = fastloss.cross_entropy(logits, torch.tensor([1, -100]))
    >>> round(loss.item(), 4)
    1.3863
    """
    if (
        reduction in ("mean", "sum")
        and weight is None
        and size_average is None
        and reduce is None
        and label_smoothing == 0.0
        and z_loss == 0.0
        and logit_scale == 1.0
        and softcap is None
        and token_weight is None
        and loss_dtype is None
        and not isinstance(temperature, Tensor)
        and temperature == 1.0
        and normalizer is None
        and not inplace
        and not return_stats
        and _is_direct(input, target, backend)
    ):
        return _direct(input, target, ignore_index, reduction == "mean")
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    target = checks.wide_index(target)
    probabilities = _check(input, target, weight, ignore_index, reduction)
    shape = target.shape
    if probabilities:
        shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    loss = loss_options(
        reduction, ignore_index, label_smoothing, z_loss, logit_scale, softcap, temperature, normalizer, return_stats,
        input, shape, probabilities,
    )  # fmt: skip
    token_weight = flat_token_weight(token_weight, shape, input.device)
    if loss_dtype is not None:
        checks.float_dtype("loss_dtype", loss_dtype)
    logits = input
    if input.dim() != 2:
        logits, target = _as_rows(input, target, probabilities)
    call = resolve_call(
        "cross_entropy",
        backend,
        logits,
        target,
        weight,
        normalizer,
        token_weight,
        loss.row.row_scale,
        unsupported=constants_with_gradients(target, weight)
        or token_weight_with_gradient(token_weight)
        or z_loss_of_weighted_mean(loss, weight, target),
    )
    rows, vocab = logits.shape
    if vocab == 0:
        if return_stats:
            raise ShapeError("input: expected at least one class for return_stats, got 0")
        call = call.without_kernels("there is no class")
    call.announce(lambda: _row_kernel(call, logits, loss, inplace, token_weight is not None), inplace=inplace)
    dtype = loss_dtype or checks.loss_dtype(input, target, weight)
    if call.by_definition:
        return loss.shaped(by_definition(logits, target, weight, loss, dtype, token_weight), shape)
    if logits.stride(1) != 1 and vocab > 1:
        logits = logits.contiguous()
    elif inplace and not call.traced:
        autograd.refuse_inplace(logits)
    acc = ACC_DTYPES[logits.dtype]
    classes, w = weights_of(target, weight, loss, acc)
    factor, loss = loss_factor(call, classes, w, loss, rows, vocab, acc)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    factors = row_factors(token_weight, classes, loss.row.ignore_index, acc)
    each = loss if factors is None else replace(loss, reduction="none")
    names: tuple[str, ...]
    if call.traced:
        value, *stats = compile_rows.cross_entropy(
            logits, classes, w, factor, each.row, each.reduction, each.want, call.backend.name
        )
        names, stats = STATS, stats[:6]
    else:
        run = _Run(call.backend, each, factor, inplace, dtype if factors is None else acc, needs_grad)
        out = CrossEntropy.apply(logits, classes, w, run)
        value, *stats = out if loss.want else (out,)
        names = loss.want
    if factors is not None:
        value = _weighted(call, value, factors, factor, loss.reduction)
    return loss.shaped(loss.with_stats(value.to(dtype), stats, names), shape)


def _row_kernel(
    call: Call, logits: Tensor, loss: LossOptions, inplace: bool, weighted: bool
) -> dict[str, str]:
    """What ``explain`` tells of the kernel that reads the rows."""
    if not isinstance(call.backend, NativeBackend):
        return {}
    vocab = logits.shape[1]
    dense = logits.stride(1) == 1 or vocab == 1
    start, stride = (address(logits), logits.stride(0)) if dense else (0, vocab)
    makes_gradient = (
        torch.is_grad_enabled() and logits.requires_grad and loss.reduction != "none" and not weighted
    )
    grad = ((start, stride) if inplace else (0, vocab)) if makes_gradient else None
    return call.backend.row_kernel(
        logits, kernel_options(loss), vocab=vocab, row_stride=stride, start=start, grad=grad,
        labels=not loss.probabilities, bias=False, want=loss.want,
    )  # fmt: skip


def _weighted(call: Call, losses: Tensor, factors: Tensor, factor: Factor, reduction: str) -> Tensor:
    """The rows' losses times their token weights, reduced."""
    if reduction == "none":
        return losses * factors
    if call.traced:
        return factor.times((losses * factors).sum())
    layout = Sequences(None, losses.numel(), 1, losses.numel(), losses.device)
    return factor.times(autograd.segment_sum(call.backend, losses, factors, layout).squeeze(0))


def flat_token_weight(token_weight: Any, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The checked factors of the tokens' losses, ``[rows]``."""
    if token_weight is None:
        return None
    checks.is_floating("token_weight", token_weight)
    checks.same_device("token_weight", token_weight, device)
    checks.has_shape("token_weight", token_weight, shape)
    flat: Tensor = token_weight.reshape(-1)
    return flat


def token_weight_with_gradient(token_weight: Tensor | None) -> str:
    """Why no kernel can compute the call; empty if one can."""
    if token_weight is not None and token_weight.requires_grad and torch.is_grad_enabled():
        return "the token weights' own gradient is computed by the definition"
    return ""


def row_factors(
    token_weight: Tensor | None, classes: Tensor | None, ignore_index: int, acc: torch.dtype
) -> Tensor | None:
    """The token weights as kernels read them: 0 where a row has no target, whatever was there."""
    if token_weight is None:
        return None
    factors = token_weight.detach().to(acc)
    return (factors if classes is None else factors.masked_fill(classes == ignore_index, 0)).contiguous()


@dataclass(frozen=True)
class LossOptions:
    """The checked options of a cross-entropy, from logits or from a head."""

    row: CrossEntropyOptions
    reduction: str
    normalizer: float | Tensor | None
    want: tuple[str, ...]  # statistics that are returned too
    probabilities: bool  # the target holds class probabilities
    return_stats: bool

    def with_stats(self, loss: Tensor, stats: Any, names: tuple[str, ...]) -> Any:
        """The loss, or ``(loss, TokenStats)`` where statistics were asked for."""
        if not self.return_stats:
            return loss
        return loss, stats_from({n: x.detach() for n, x in zip(names, stats, strict=True)}, self.want)

    def shaped(self, result: Any, shape: torch.Size) -> Any:
        """Rows back to the caller's shape."""
        if not self.return_stats:
            return result if self.reduction != "none" or len(shape) == 1 else result.reshape(shape)
        loss, stats = result
        stats = TokenStats(*(None if s is None else s.reshape(shape) for s in stats))
        return (loss.reshape(shape) if self.reduction == "none" else loss), stats


def loss_options(
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    temperature: Number,
    normalizer: Any,
    return_stats: bool,
    input: Tensor,
    shape: tuple[int, ...],
    probabilities: bool,
) -> LossOptions:
    """The record of a call's options; the error of one that does not fit names it. ``shape``: that of the tokens."""
    if reduction not in checks.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")  # PyTorch's words
    make = _row_options.__wrapped__ if torch.compiler.is_compiling() else _row_options
    if isinstance(temperature, Tensor):
        each = checks.row_scale(temperature, shape, input)
        row = with_row_scale(make(ignore_index, label_smoothing, z_loss, logit_scale, softcap, 1.0), each)
    else:
        row = make(ignore_index, label_smoothing, z_loss, logit_scale, softcap, temperature)
    norm = None if normalizer is None else checks.normalizer_value(normalizer, reduction, input.device)
    want: tuple[str, ...] = ()
    if return_stats:
        want = STATS_WITHOUT_TARGET if probabilities else STATS
    return LossOptions(row, reduction, norm, want, probabilities, return_stats)


def with_row_scale(row: CrossEntropyOptions, row_scale: Tensor) -> CrossEntropyOptions:
    """(torch.compile does not trace dataclasses.replace of every torch.)"""
    return CrossEntropyOptions(
        row.ignore_index, row.scale, row.softcap, row_scale, row.label_smoothing, row.z_loss
    )


@functools.lru_cache(maxsize=64, typed=True)
def _row_options(
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> CrossEntropyOptions:
    if label_smoothing < 0.0 or label_smoothing > 1.0:
        raise ShapeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    return CrossEntropyOptions(
        ignore_index=int(ignore_index),
        scale=_scale(logit_scale, temperature),
        softcap=checks.softcap_value(softcap),
        label_smoothing=float(label_smoothing),
        z_loss=0.0 if z_loss == 0.0 else checks.number("z_loss", z_loss, low=0.0),
    )


def _scale(logit_scale: float, temperature: float) -> float:
    scale = 1.0 if logit_scale == 1.0 else checks.number("logit_scale", logit_scale)
    if isinstance(temperature, float) and temperature == 1.0:
        return scale
    return scale / checks.number("temperature", temperature, low=0.0, open_low=True)


def _check(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> bool:
    """Shapes and dtypes that do not fit, in PyTorch's words; True if the target holds class probabilities."""
    checks.is_floating("input", input)
    checks.is_tensor("target", target)
    dim = input.dim()
    if dim < 1:
        raise ShapeError("input: expected at least 1 dimension, got a 0-d tensor")
    if target.device != input.device:
        checks.same_device("target", target, input.device)
    vocab = input.shape[1] if dim > 1 else input.shape[0]
    probabilities = target.shape == input.shape
    if probabilities:
        if not target.is_floating_point():
            raise ShapeError(
                f"target: Expected floating point type for target with class probabilities, got {target.dtype}"
            )
        if ignore_index >= 0:
            raise ShapeError("ignore_index: ignore_index is not supported for floating point target")
    else:
        if dim > 1 and (target.dim() < 1 or target.shape[0] != input.shape[0]):
            raise ShapeError(
                f"target: Expected input batch_size ({input.shape[0]}) to match target batch_size "
                f"({target.shape[0] if target.dim() else 1})"
            )
        expected = input.shape[:1] + input.shape[2:] if dim > 1 else input.shape[:0]
        if target.dtype != torch.int64 or target.shape != expected:
            checks.index_target("target", target, tuple(expected), input.device)
    if weight is not None:
        checks.is_floating("weight", weight)
        if weight.shape != (vocab,):
            raise ShapeError(
                f"weight: weight tensor should be defined either for all {vocab} classes or no classes but got weight "
                f"tensor of shape: {list(weight.shape)}"
            )
        checks.same_device("weight", weight, input.device)
        if not probabilities:
            checks.class_weight_dtype(weight, input)
    return probabilities


def _as_rows(input: Tensor, target: Tensor, probabilities: bool) -> tuple[Tensor, Tensor]:
    """``[N, C, d1, …]`` (or ``[C]``) as rows ``[N·d1·…, C]``."""
    vocab = input.shape[1] if input.dim() > 1 else input.shape[0]
    logits = input.movedim(1, -1).flatten(0, -2) if input.dim() > 1 else input.reshape(1, vocab)
    if probabilities:
        return logits, target.movedim(1, -1).flatten(0, -2) if target.dim() > 1 else target.reshape(1, vocab)
    return logits, target.reshape(-1)


def constants_with_gradients(target: Tensor, weight: Tensor | None) -> str:
    """Why no kernel can compute a call whose target or class weights want a gradient; empty if none does."""
    if target.requires_grad and torch.is_grad_enabled():
        return "the target's own gradient is computed by the definition"
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "the class weights' own gradient is computed by the definition"
    return ""


def by_definition(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: LossOptions,
    dtype: torch.dtype,
    token_weight: Tensor | None,
) -> Any:
    """The loss of ``logits [rows, V]`` in ``dtype``, or ``(loss, TokenStats)``, in plain PyTorch."""
    if not loss.probabilities:
        backends.check_targets(target, logits.shape[-1], loss.row.ignore_index)
    row = loss.row
    shared: dict[str, Any] = {
        "ignore_index": row.ignore_index,
        "scale": row.factor,
        "softcap": row.softcap or None,
    }
    value = reference.cross_entropy(
        logits,
        target,
        weight=weight,
        reduction=loss.reduction,
        label_smoothing=row.label_smoothing,
        z_loss=row.z_loss,
        normalizer=loss.normalizer,
        token_weight=token_weight,
        **shared,
    ).to(dtype)
    if not loss.return_stats:
        return value
    with torch.no_grad():
        stats = reference.token_stats(logits, None if loss.probabilities else target, **shared)
    return value, TokenStats(**stats)


def weights_of(
    target: Tensor, weight: Tensor | None, loss: LossOptions, acc: torch.dtype, shards: Shards | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(classes or None, the row function's ``w`` of docs/engine.md): smoothed and weighted probabilities, or class weights. With
    ``shards`` the probabilities are those of this process's classes, and ``weight`` of all."""
    if not loss.probabilities:
        return (
            target if target.is_contiguous() else target.contiguous(),
            None if weight is None else weight.detach().to(acc).contiguous(),
        )
    w = target.detach().to(acc)
    smoothing = loss.row.label_smoothing
    if smoothing:
        vocab = target.shape[-1] if shards is None else shards.vocab
        w = w * (1 - smoothing) + smoothing / vocab
    if weight is not None:
        weight = weight if shards is None else shards.columns(weight)
        assert weight is not None
        w = w * weight.detach().to(acc)
    return None, w.contiguous()


def loss_factor(
    call: Call,
    classes: Tensor | None,
    w: Tensor | None,
    loss: LossOptions,
    rows: int,
    vocab: int,
    acc: torch.dtype,
    counted: int | None = None,
) -> tuple[Factor, LossOptions]:
    """The reduction's factor, and the options whose z-loss it reduces to a mean over tokens; on the way, targets are checked (on
    a GPU only with ``validate_targets(True)``). ``counted``: how many are not ignored, where that is known."""
    on_cpu = not call.traced and (classes is None or not devices.is_gpu(classes.device))
    valid, ignore_index, normalizer = rows, loss.row.ignore_index, loss.normalizer
    if classes is not None and not call.traced and (on_cpu or backends.targets_are_validated()):
        valid = backends.count_targets(classes, vocab, ignore_index)
    if normalizer is not None:
        if isinstance(normalizer, Tensor) and (call.traced or normalizer.device.type != "cpu"):
            return Factor(tensor=normalizer.to(acc).reciprocal()), loss
        if call.traced:  # a number that changes from call to call must not compile again
            one = torch.ones((), dtype=acc, device=loss_device(classes, w))
            return Factor(tensor=one / normalizer), loss
        return Factor(_reciprocal(float(normalizer))), loss
    if loss.reduction != "mean":
        return WHOLE, loss
    if classes is None:
        if call.traced:  # rows too may change from call to call
            one = torch.ones((), dtype=acc, device=loss_device(classes, w))
            return Factor(tensor=one / rows, of_count=True), loss
        return Factor(_reciprocal(rows), of_count=True), loss
    if w is None:
        if on_cpu or counted is not None:
            return Factor(_reciprocal(valid if counted is None else counted), of_count=True), loss
        if call.traced:
            return Factor(tensor=count_plainly(classes, ignore_index, acc), of_count=True), loss
        return Factor(tensor=call.backend.reciprocal_count(classes, ignore_index), of_count=True), loss
    kept = classes != ignore_index
    total = (w[classes.clamp(0, vocab - 1)] * kept).sum()
    if not on_cpu:
        return Factor(tensor=total.reciprocal(), of_count=True), loss
    summed = total.item()
    return Factor(_reciprocal(summed), of_count=True), over_tokens(loss, summed, valid)


def loss_device(classes: Tensor | None, w: Tensor | None) -> torch.device:
    known = classes if classes is not None else w
    assert known is not None
    return known.device


def over_tokens(loss: LossOptions, total: float, valid: int) -> LossOptions:
    """A z-loss has no class: where the loss is divided by ``total``, the sum of class weights, its z-loss is made so much larger
    that it is divided by ``valid``, the tokens that count."""
    if not loss.row.z_loss or not valid:
        return loss
    return replace(loss, row=replace(loss.row, z_loss=loss.row.z_loss * total / valid))


def z_loss_of_weighted_mean(loss: LossOptions, weight: Tensor | None, target: Tensor) -> str:
    """Why no kernel can compute a mean whose z-loss and classes are divided by different counts that only a device knows."""
    own_count = loss.reduction == "mean" and loss.normalizer is None and not loss.probabilities
    if weight is None or not loss.row.z_loss or not own_count or checks.host_reads(target):
        return ""
    return "z-loss beside class weights is divided by a count of its own, which the host does not know"


def _reciprocal(value: float) -> float:
    # A mean over nothing is 0 · inf = NaN, as PyTorch's; its gradient stays 0 because ignored rows are written as 0.
    return 1.0 / value if value else float("inf")


def kernel_options(loss: LossOptions) -> CrossEntropyOptions:
    """The record that a row kernel reads: the smoothing of class probabilities is in their ``w`` already."""
    smooth = loss.probabilities and loss.row.label_smoothing
    return replace(loss.row, label_smoothing=0.0) if smooth else loss.row


@dataclass(frozen=True)
class _Run:
    """What forward and backward need beside the tensors."""

    backend: Any
    loss: LossOptions
    factor: Factor
    inplace: bool
    dtype: torch.dtype  # of the loss
    needs_grad: bool


def _again(ctx: Any) -> Any:
    run: _Run = ctx.run
    if run.inplace:
        raise RuntimeError("inplace: expected False where the gradient is differentiated again, got True")
    classes, w, logits, _ = ctx.saved_tensors
    out = REFERENCE.row_cross_entropy(logits, classes, kernel_options(run.loss), w=w)["loss"]
    per_row = run.loss.reduction == "none"
    return [out if per_row else REFERENCE.sum_rows(out, run.factor)], [logits]


class CrossEntropy(torch.autograd.Function):
    """(logits, classes, w) -> loss and the wanted statistics, which are detached. The gradient is made in the forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor | None, w: Tensor | None, run: _Run) -> Any:
        ctx.run, ctx.grad = run, None
        per_row = run.loss.reduction == "none"
        if run.needs_grad and not per_row:
            ctx.grad = logits if run.inplace else new_gradient(logits.shape, logits.dtype, logits.device)
        out = _one_pass(run, logits, classes, w, ctx.grad)
        if ctx.grad is not None and run.inplace:
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(classes, w)
            ctx.grad = ctx.grad.detach()
        else:
            ctx.save_for_backward(classes, w, logits, out[LSE_PARTS] if per_row else None)
        loss = (out["loss"] if per_row else run.backend.sum_rows(out["loss"], run.factor)).to(run.dtype)
        if not run.loss.want:
            return loss
        stats = [out[name] for name in run.loss.want]
        ctx.mark_non_differentiable(*stats)
        return (loss, *stats)

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        run: _Run = ctx.run
        none = (None,) * 3
        if run.loss.reduction == "none":
            classes, w, logits, lse_parts = ctx.saved_tensors
            options = kernel_options(run.loss)
            k = of_cross_entropy(upstream, lse_parts, classes, w, logits.shape[1], options)
            out = logits.detach() if run.inplace else new_gradient(logits.shape, logits.dtype, logits.device)
            run.backend.row_grad(logits, classes, options, lse_parts=lse_parts, coefficients=k, out=out, w=w)
            if run.inplace:
                torch.autograd.graph.increment_version(logits)
            return (out, *none)
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # retain_graph: the first backward gave the buffer away
            if run.inplace:
                raise RuntimeError(
                    "inplace: a second backward through cross_entropy(inplace=True) is impossible, its logits were "
                    "overwritten by the gradient; use inplace=False with retain_graph=True"
                )
            classes, w, logits, _ = ctx.saved_tensors
            grad = new_gradient(logits.shape, logits.dtype, logits.device)
            _one_pass(run, logits, classes, w, grad)
        late = run.factor if grad.dtype in LATE_DTYPES else None
        scale = autograd.upstream_scale(run.backend, upstream, late)
        return (autograd.scale_in_place(run.backend, grad, scale), *none)


def _one_pass(
    run: _Run, logits: Tensor, classes: Tensor | None, w: Tensor | None, grad: Tensor | None
) -> dict[str, Tensor]:
    factor = WHOLE if grad is None or logits.dtype in LATE_DTYPES else run.factor
    return run.backend.row_cross_entropy(
        logits, classes, kernel_options(run.loss), factor=factor, grad=grad, want=run.loss.want, w=w
    )


# --- the commonest call with the fewest Python calls around the kernel: mean or sum over int64 targets, on the CPU, no option.
# On a tensor of a few hundred logits those calls are the whole cost. The numbers are those of the general path.

_cpu = cpu_backend()
_is_compiling = torch.compiler.is_compiling
_autocast = torch.is_autocast_enabled
_INT64 = torch.int64
_CPU = torch.device("cpu")


def _is_direct(logits: Any, target: Any, backend: str) -> bool:
    """Whether :func:`_direct` takes the call; if not, the general path checks it and says what is wrong."""
    return (
        _cpu.direct is not None
        and not _is_compiling()
        and type(logits) in backends.PLAIN
        and type(target) is Tensor
        and logits.is_cpu
        and target.is_cpu
        and logits.dtype in DIRECT_CODES
        and target.dtype is _INT64
        and len(size := logits.shape) == 2
        and target.shape == size[:1]
        and 0 not in size
        and logits.is_contiguous()
        and target.is_contiguous()
        and not _autocast("cpu")
        and backends.is_direct(backend)
    )


def _direct(logits: Tensor, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
    if logits.requires_grad and torch.is_grad_enabled():
        given = ignore_index, mean
        return autograd.made_in_forward(
            logits, None, _direct_with_gradient, _direct_defined, given, (target,)
        )
    return _direct_loss(logits, target, ignore_index, mean, None)


def _direct_loss(
    logits: Tensor, target: Tensor, ignore_index: int, mean: bool, grad: Tensor | None
) -> Tensor:
    assert _cpu.direct is not None
    loss, bad = _cpu.direct.reduced_cross_entropy(logits, target, ignore_index, mean, grad)
    if bad >= 0:
        raise checks.bad_target(target, bad, logits.size(1))
    return loss.to(torch.bfloat16) if logits.dtype is torch.bfloat16 else loss


def _direct_with_gradient(
    given: tuple[int, bool], logits: Tensor, _: None, target: Tensor
) -> tuple[Tensor, tuple[Tensor, None]]:
    if logits.nbytes >= autograd.LARGE:
        grad = new_gradient(logits.shape, logits.dtype, _CPU)
    else:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return _direct_loss(logits, target, *given, grad), (grad, None)


def _direct_defined(given: tuple[int, bool], logits: Tensor, _: None, target: Tensor) -> Tensor:
    ignore_index, mean = given
    reduction = "mean" if mean else "sum"
    return reference.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
