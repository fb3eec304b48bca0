"""linear_cross_entropy: cross-entropy of the logits of a linear head that are never all there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import backend as dispatch
from fastloss.engine import checks, head, linear
from fastloss.engine.calls import (
    Options,
    autocasts,
    by_definition,
    check_linear,
    compiled_backend,
    compute_dtype,
    engine_call,
    is_traced,
    operands,
    unsupported,
    with_compiled_stats,
    with_stats,
)
from fastloss.engine.checks import ShapeError
from fastloss.engine.head import Needs
from fastloss.engine.native_rows import acc_dtype
from fastloss.losses.token_stats_type import TokenStats


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    normalizer: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    """Drop-in for ``torch.nn.functional.linear_cross_entropy`` (torch 2.13) that never holds the whole logits.

    Equal to ``cross_entropy(input @ linear_weight.T + linear_bias, target, …)``, in 3 GEMMs (2 with a frozen weight,
    1 without gradient); the weight's gradient is accumulated in float32. Follows autocast.

    Args:
        input: hidden states ``[D]``, ``[N, D]``, or ``[…, D]`` with an int64 target of shape ``[…]``.
        linear_weight: ``[C, D]``; ``[C, d1, …, D]`` for a K-dimensional loss, as in PyTorch.
        target: int64 classes ``[N]`` (``[N, d1, …]``), or class probabilities ``[N, C]``.
        linear_bias: ``[C]`` (``[C, d1, …]``).
        weight, reduction, label_smoothing, z_loss, logit_scale, softcap, normalizer, return_stats, backend: as in
            :func:`cross_entropy`.
        ignore_index: None is -100 for classes; it must be None for class probabilities.
        options: torch's LinearCrossEntropyOptions; its ``batch_chunk_size``, where set, is honoured.
        chunk_size: rows of logits in memory at once; None chooses. ``fastloss.explain`` shows the choice.

    Raises:
        ValueError, IndexError: as :func:`cross_entropy`.

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(3, 8), torch.zeros(5, 8, requires_grad=True)
    >>> round(fastloss.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2])).item(), 4)
    1.6094
    """
    checks.is_floating("input", input)
    checks.is_floating("linear_weight", linear_weight)
    checks.is_tensor("target", target)
    lead = input.shape[:-1]
    if input.dim() > 2 and target.dtype == torch.int64 and target.shape == lead and linear_weight.dim() == 2:
        result = linear_cross_entropy(
            input.reshape(-1, input.shape[-1]),
            linear_weight,
            target.reshape(-1),
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            normalizer=normalizer,
            chunk_size=chunk_size,
            return_stats=return_stats,
            backend=backend,
        )
        return _unflatten(result, lead, reduction, return_stats)
    check_linear(input, linear_weight, linear_bias)
    vocab = linear_weight.shape[0]
    places = linear_weight.shape[1:-1]
    probabilities = target.shape == (*lead, vocab, *places)
    if probabilities and ignore_index is not None:
        raise ShapeError("ignore_index cannot be specified when target contains probabilities")
    if chunk_size is None and options is not None:
        chunk_size = getattr(options, "batch_chunk_size", None)
    checks.chunk_size_value(chunk_size)
    opts = Options(
        reduction,
        -100 if ignore_index is None else ignore_index,
        label_smoothing,
        z_loss,
        logit_scale,
        softcap,
        normalizer,
        return_stats,
        input.device,
    )
    logits_shape = torch.empty((), device="meta").expand(*lead, vocab, *places)
    _check_target(logits_shape, target, weight, probabilities, opts.ignore_index, input)
    if places:
        from fastloss.losses.k_dimensional import k_dimensional

        return k_dimensional(
            input, linear_weight, target, linear_bias, weight, probabilities, opts, chunk_size, backend
        )
    shape = lead
    if input.dim() == 1:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    result = _head_cross_entropy(
        input, linear_weight, target, linear_bias, weight, probabilities, opts, chunk_size, backend
    )
    return opts.shaped(result, shape)


def _unflatten(result: Any, lead: torch.Size, reduction: str, return_stats: bool) -> Any:
    loss, stats = result if return_stats else (result, None)
    if reduction == "none":
        loss = loss.reshape(lead)
    if not return_stats:
        return loss
    assert stats is not None
    return loss, TokenStats(*(None if s is None else s.reshape(lead) for s in stats))


def _check_target(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probabilities: bool,
    ignore_index: int,
    input: Tensor,
) -> None:
    checks.same_device("target", target, input.device)
    expected = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else logits.shape[:0]
    if probabilities:
        if not target.is_floating_point():
            raise ShapeError(
                f"target: Expected floating point type for target with class probabilities, got {target.dtype}"
            )
    else:
        checks.index_target("target", target, tuple(expected), input.device)
    if weight is not None:
        checks.is_floating("weight", weight)
        checks.same_device("weight", weight, input.device)
        checks.has_shape("weight", weight, (logits.shape[1] if logits.dim() > 1 else logits.shape[0],))


def _head_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    probabilities: bool,
    options: Options,
    chunk_size: int | None,
    backend: str,
) -> Any:
    rows, vocab = input.shape[0], linear_weight.shape[0]
    autocast = autocasts(input.device.type)
    dtype = compute_dtype(input)
    loss_dtype = torch.float32 if autocast and dtype != torch.float64 else dtype
    grad_on = torch.is_grad_enabled()
    needs = Needs(
        grad_on and input.requires_grad,
        grad_on and linear_weight.requires_grad,
        linear_bias is not None and grad_on and linear_bias.requires_grad,
    )
    traced = is_traced(input)
    if traced:
        name, adapter = compiled_backend(backend, input.device.type, dtype), None
    else:
        name, adapter, _ = choice = dispatch.choose(
            backend,
            input,
            unsupported=unsupported(input, linear_weight, linear_bias, target=target, weight=weight),
        )
        computed = rows if probabilities else head.count_kept(rows, target, options.ignore_index)
        per_row = options.reduction == "none"
        chunk = linear.chunk_of_cross_entropy(
            name, dtype, linear_weight, computed, needs, chunk_size, per_row,
            probabilities or options.label_smoothing > 0,
        )  # fmt: skip
        recompute = per_row and (needs.weight or needs.bias)
        plan = linear.plan(input, linear_weight, dtype, chunk, computed, needs, recompute)
        dispatch.announce("linear_cross_entropy", choice, **({} if name == "reference" else plan))
    if name == "reference":
        return by_definition(
            reference.linear_cross_entropy,
            (input, linear_weight, target),
            weight,
            probabilities,
            options,
            loss_dtype,
            linear_bias=linear_bias,
        )
    index, w, smoothing, factor = operands(
        target, weight, probabilities, options, rows, vocab, acc_dtype(dtype), traced
    )
    want = options.want(probabilities)
    if traced:
        from fastloss.engine import library

        ahead = options.reduction != "none" or not (needs.weight or needs.bias)
        out = library.linear_cross_entropy(
            input,
            linear_weight,
            linear_bias,
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
            list(needs) if ahead else [False, False, False],
            dtype,
            chunk_size or 0,
            name,
        )
        return with_compiled_stats(out, loss_dtype, want)
    call = engine_call(adapter, options, smoothing, loss_dtype, want)
    result = linear.LinearCrossEntropy.apply(
        input, linear_weight, linear_bias, index, w, call, factor, dtype, chunk, needs
    )
    return with_stats(result, want)
