"""cross_entropy: PyTorch's signature, and what language models need on top."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import backend as dispatch
from fastloss.engine import checks
from fastloss.engine import cross_entropy as ce
from fastloss.engine.calls import (
    Options,
    autocasts,
    by_definition,
    compiled_backend,
    engine_call,
    is_traced,
    operands,
    refuse_inplace,
    unsupported,
    with_compiled_stats,
    with_stats,
)
from fastloss.engine.checks import ShapeError
from fastloss.engine.native_rows import acc_dtype
from fastloss.engine.plain_call import is_plain, plain_cross_entropy


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
    normalizer: int | float | Tensor | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    r"""Drop-in for :func:`torch.nn.functional.cross_entropy`: the logits are read once, their gradient written once.

    With ``z = logit_scale · softcap · tanh(input / softcap)`` and class weights ``w``, a row's loss is

    .. math:: (1-\epsilon)\,w_t(\mathrm{lse}(z) - z_t) + \tfrac{\epsilon}{V}\sum_v w_v(\mathrm{lse}(z) - z_v)
              + \zeta\,\mathrm{lse}(z)^2

    Label smoothing (``ε``): arXiv:1512.00567. z-loss (``ζ``): arXiv:2204.02311. Soft-cap: arXiv:2408.00118.

    Args:
        input: logits ``[C]``, ``[N, C]`` or ``[N, C, d1, …]`` in float32, bfloat16, float16 or float64.
        target: int64 classes, of ``input``'s shape without C; or class probabilities of ``input``'s shape.
        weight: ``[C]``, a weight per class.
        size_average, reduce: deprecated in PyTorch; honoured as there.
        ignore_index: targets of this value add nothing to the loss and get no gradient.
        reduction: "mean" (over targets not ignored, weighted by ``weight``), "sum" or "none".
        label_smoothing: in [0, 1].
        z_loss: coefficient of ``logsumexp²``, in the same reduction.
        logit_scale: a factor on the (capped) logits.
        softcap: cap the logits smoothly to ``(-softcap, softcap)``.
        normalizer: the sum is divided by this in place of the mean's count (transformers' num_items_in_batch).
        inplace: the gradient overwrites ``input``. Refused for a leaf, or a tensor that autograd still needs.
        return_stats: also a :class:`TokenStats`, detached, from the same pass.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        The loss in ``input``'s dtype (float32 under autocast), as PyTorch; or ``(loss, TokenStats)``.

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
        and normalizer is None
        and not inplace
        and not return_stats
        and is_plain(input, target, backend)
    ):
        return plain_cross_entropy(input, target, ignore_index, reduction == "mean")
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    probabilities = _check(input, target, weight, ignore_index, reduction)
    options = Options(
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        logit_scale,
        softcap,
        normalizer,
        return_stats,
        input.device,
    )
    shape = target.shape
    logits = input
    if probabilities:
        shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if input.dim() != 2:
        logits, target = _as_rows(input, target, probabilities)
    dtype = torch.float32 if autocasts(input.device.type) and input.dtype != torch.float64 else input.dtype
    result = _rows_cross_entropy(logits, target, weight, probabilities, options, inplace, dtype, backend)
    return options.shaped(result, shape)


def _check(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> bool:
    """PyTorch's errors; True if the target holds class probabilities."""
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
    return probabilities


def _as_rows(input: Tensor, target: Tensor, probabilities: bool) -> tuple[Tensor, Tensor]:
    """``[N, C, d1, …]`` (or ``[C]``) as rows ``[N·d1·…, C]``."""
    vocab = input.shape[1] if input.dim() > 1 else input.shape[0]
    logits = input.movedim(1, -1).reshape(-1, vocab) if input.dim() > 1 else input.reshape(1, vocab)
    if probabilities:
        return logits, target.movedim(1, -1).reshape(-1, vocab) if target.dim() > 1 else target.reshape(
            1, vocab
        )
    return logits, target.reshape(-1)


def _rows_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probabilities: bool,
    options: Options,
    inplace: bool,
    dtype: torch.dtype,
    backend: str,
) -> Any:
    rows, vocab = logits.shape
    traced = is_traced(logits)
    if traced:
        name = compiled_backend(backend, logits.device.type, logits.dtype)
        adapter = None
    else:
        name, adapter, _ = choice = dispatch.choose(
            backend, logits, unsupported=unsupported(logits, target=target, weight=weight)
        )
        if choice.name != "reference" and vocab == 0:
            raise ShapeError("input: expected at least one class, got 0")
        dispatch.announce("cross_entropy", choice, inplace=inplace)
    if name == "reference":
        return by_definition(reference.cross_entropy, (logits, target), weight, probabilities, options, dtype)
    if logits.stride(1) != 1 and vocab > 1:
        logits = logits.contiguous()
    elif inplace and not traced:
        refuse_inplace(logits)
    index, w, smoothing, factor = operands(
        target, weight, probabilities, options, rows, vocab, acc_dtype(logits.dtype), traced
    )
    want = options.want(probabilities)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if traced:
        from fastloss.engine import library

        out = library.cross_entropy(
            logits,
            index,
            w,
            factor.tensor,
            factor.value,
            options.reduction,
            options.ignore_index,
            smoothing,
            options.z_loss,
            options.scale,
            options.softcap,
            ",".join(want),
            needs_grad and options.reduction != "none",
            name,
        )
        return with_compiled_stats(out, dtype, want)
    call = engine_call(adapter, options, smoothing, dtype, want, inplace, needs_grad)
    return with_stats(ce.CrossEntropy.apply(logits, index, w, call, factor), want)
