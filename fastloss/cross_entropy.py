"""cross_entropy and linear_cross_entropy: PyTorch's signatures, and what language models need on top."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss import checks, dispatch, head, reference
from fastloss.checks import ShapeError
from fastloss.head import Needs
from fastloss.ops import cross_entropy as ce
from fastloss.ops import linear
from fastloss.ops.native_rows import acc_dtype
from fastloss.token_stats import TokenStats, from_engine

_STATS = ("logprob", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "is_top1")
_STATS_WITHOUT_TARGET = ("entropy", "logsumexp", "log_sum_sq_probs", "mean_logit")


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
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    probabilities = _check(input, target, weight, ignore_index, reduction)
    options = _Options(
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
    dtype = torch.float32 if _autocast(input.device.type) and input.dtype != torch.float64 else input.dtype
    result = _rows_cross_entropy(logits, target, weight, probabilities, options, inplace, dtype, backend)
    return options.shaped(result, shape)


class _Options:
    """The checked options of a call."""

    __slots__ = (
        "ignore_index",
        "label_smoothing",
        "normalizer",
        "reduction",
        "return_stats",
        "scale",
        "softcap",
        "z_loss",
    )

    def __init__(
        self,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        logit_scale: float,
        softcap: float | None,
        normalizer: Any,
        return_stats: bool,
        device: torch.device,
    ):
        if reduction not in checks.REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")  # PyTorch's words
        if label_smoothing < 0.0 or label_smoothing > 1.0:
            raise ShapeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
        self.reduction = reduction
        self.ignore_index = int(ignore_index)
        self.label_smoothing = float(label_smoothing)
        self.z_loss = 0.0 if z_loss == 0.0 else checks.number("z_loss", z_loss, low=0.0)
        self.scale = 1.0 if logit_scale == 1.0 else checks.number("logit_scale", logit_scale)
        self.softcap = 0.0 if softcap is None else checks.softcap_value(softcap)
        self.normalizer = (
            None if normalizer is None else checks.normalizer_value(normalizer, reduction, device)
        )
        self.return_stats = return_stats

    def want(self, probabilities: bool) -> tuple[str, ...]:
        if not self.return_stats:
            return ()
        return _STATS_WITHOUT_TARGET if probabilities else _STATS

    def shaped(self, result: Any, shape: torch.Size) -> Any:
        """Rows back to the caller's shape."""
        if not self.return_stats:
            return result if self.reduction != "none" or len(shape) == 1 else result.reshape(shape)
        loss, stats = result
        stats = TokenStats(*(None if s is None else s.reshape(shape) for s in stats))
        return (loss.reshape(shape) if self.reduction == "none" else loss), stats

    def reference(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "scale": self.scale,
            "softcap": self.softcap or None,
            "normalizer": self.normalizer,
        }


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


def _autocast(device: str) -> bool:
    return torch.is_autocast_enabled(device)


def row_weights(
    target: Tensor, weight: Tensor | None, probabilities: bool, label_smoothing: float, acc: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(index target or None, the engine's ``w``) of a call."""
    if not probabilities:
        return (
            target if target.is_contiguous() else target.contiguous(),
            None if weight is None else weight.detach().to(acc).contiguous(),
        )
    w = target.detach().to(acc)
    if label_smoothing:
        w = w * (1 - label_smoothing) + label_smoothing / target.shape[-1]
    if weight is not None:
        w = w * weight.detach().to(acc)
    return None, w.contiguous()


def _unsupported(*tensors: Tensor | None, target: Tensor, weight: Tensor | None) -> str:
    if target.requires_grad and torch.is_grad_enabled():
        return "the target's own gradient is computed by the definition"
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "the class weights' own gradient is computed by the definition"
    return dispatch.tracing_reason(*tensors, target, weight)


@torch.compiler.assume_constant_result
def _compiled_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend while torch.compile traces: from the kind of tensor alone."""
    if device == "cpu" or torch.cuda.is_available():
        return dispatch.choose(backend, torch.empty(0, dtype=dtype, device=device)).name
    return "reference"


def _rows_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probabilities: bool,
    options: _Options,
    inplace: bool,
    dtype: torch.dtype,
    backend: str,
) -> Any:
    rows, vocab = logits.shape
    traced = _is_traced(logits)
    if traced:
        name = _compiled_backend(backend, logits.device.type, logits.dtype)
        adapter = None
    else:
        name, adapter, _ = choice = dispatch.choose(
            backend, logits, unsupported=_unsupported(logits, target=target, weight=weight)
        )
        if choice.name != "reference" and vocab == 0:
            raise ShapeError("input: expected at least one class, got 0")
        dispatch.announce("cross_entropy", choice, inplace=inplace)
    if name == "reference":
        return _reference(reference.cross_entropy, (logits, target), weight, probabilities, options, dtype)
    if logits.stride(1) != 1 and vocab > 1:
        logits = logits.contiguous()
    elif inplace and not traced:
        _refuse_inplace(logits)
    acc = acc_dtype(logits.dtype)
    index, w = row_weights(target, weight, probabilities, options.label_smoothing, acc)
    smoothing = 0.0 if probabilities else options.label_smoothing
    factor = ce.loss_factor(
        index,
        w if index is not None else None,
        options.reduction,
        options.normalizer,
        rows,
        vocab,
        options.ignore_index,
        acc,
        traced,
    )
    want = options.want(probabilities)
    if traced:
        from fastloss.ops import library

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
            torch.is_grad_enabled() and logits.requires_grad and options.reduction != "none",
            name,
        )
        loss = out[0].to(dtype)
        return (
            (loss, from_engine(dict(zip(ce_stats(), (s.detach() for s in out[1:7]), strict=True)), want))
            if want
            else loss
        )
    call = ce.CrossEntropyCall(
        adapter,
        options.reduction,
        options.ignore_index,
        smoothing,
        options.z_loss,
        options.scale,
        options.softcap,
        inplace,
        dtype,
        want,
        torch.is_grad_enabled() and logits.requires_grad,
    )
    result = ce.CrossEntropy.apply(logits, index, w, call, factor)
    if not want:
        return result
    return result[0], from_engine(dict(zip(want, result[1:], strict=True)), want)


def ce_stats() -> tuple[str, ...]:
    from fastloss.ops.native_rows import STATS

    return STATS


def _is_traced(tensor: Tensor) -> bool:
    """torch.compile, export or a fake tensor: the call goes through the torch.library operators."""
    if torch.compiler.is_compiling():
        return True
    kind = type(tensor)
    return (
        kind is not Tensor
        and kind is not torch.nn.Parameter
        and isinstance(
            tensor,
            (torch._subclasses.fake_tensor.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor),
        )
    )


def _reference(
    function: Any,
    operands: tuple[Tensor, ...],
    weight: Tensor | None,
    probabilities: bool,
    options: _Options,
    dtype: torch.dtype,
    **more: Any,
) -> Any:
    """The definition, with the errors and dtypes of the fast paths."""
    target = operands[-1]
    if (
        not probabilities
        and not torch.compiler.is_compiling()
        and dispatch.tracing_reason(*operands) == ""
        and (target.device.type == "cpu" or dispatch.targets_are_validated())
    ):
        vocab = operands[0].shape[-1] if len(operands) == 2 else operands[1].shape[0]
        checks.reject_bad_targets(target, vocab, options.ignore_index)
    loss = function(*operands, weight=weight, **options.reference(), **more).to(dtype)
    if not options.return_stats:
        return loss
    stats_of = reference.token_stats if len(operands) == 2 else reference.linear_token_stats
    if "bias" in more:
        more = {"bias": more["bias"]}
    with torch.no_grad():
        stats = stats_of(  # type: ignore[call-arg]
            *operands[:-1],
            None if probabilities else target,
            scale=options.scale,
            softcap=options.softcap or None,
            ignore_index=options.ignore_index,
            **more,
        )
    return loss, TokenStats(**stats)


def _refuse_inplace(logits: Tensor) -> None:
    """inplace=True must not give anybody a wrong gradient."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return
    if logits.is_leaf:
        raise ValueError("inplace: expected logits made by an operation, got a leaf that requires grad")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError("inplace: expected logits with memory of their own, got an expanded tensor")
    node = logits.grad_fn
    saved = getattr(node, "_saved_result", None)
    if isinstance(saved, Tensor) and saved.data_ptr() == logits.data_ptr():
        raise ValueError(f"inplace: {node.name() if node else ''} needs the logits for its own backward")


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
    _check_linear(input, linear_weight, linear_bias)
    vocab = linear_weight.shape[0]
    places = linear_weight.shape[1:-1]
    probabilities = target.shape == (*lead, vocab, *places)
    if probabilities and ignore_index is not None:
        raise ShapeError("ignore_index cannot be specified when target contains probabilities")
    if chunk_size is None and options is not None:
        chunk_size = getattr(options, "batch_chunk_size", None)
    checks.chunk_size_value(chunk_size)
    opts = _Options(
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
        from fastloss.k_dimensional import k_dimensional

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


def _check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """PyTorch's errors, in its words."""
    if input.dim() < 1 or input.dim() > 2:
        raise ShapeError(f"input: expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise ShapeError(
            f"linear_weight: expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise ShapeError(
            "input: expected equal input and linear_weight last dimensions (in_features), got "
            f"{input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    checks.same_device("linear_weight", linear_weight, input.device)
    if linear_bias is not None:
        checks.is_floating("linear_bias", linear_bias)
        checks.same_device("linear_bias", linear_bias, input.device)
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise ShapeError(
                f"linear_bias: expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
            )
    if input.dim() == 1 and linear_weight.dim() > 2:
        raise ShapeError(
            f"input: K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched "
            f"input, (N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    if not _autocast(input.device.type) and input.dtype != linear_weight.dtype:
        raise checks.ShapeError(
            f"linear_weight: expected {input.dtype} as input, got {linear_weight.dtype} (autocast would cast them)"
        )


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


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the head's GEMMs."""
    device = input.device.type
    return (
        torch.get_autocast_dtype(device)
        if _autocast(device) and input.dtype != torch.float64
        else input.dtype
    )


def _head_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    probabilities: bool,
    options: _Options,
    chunk_size: int | None,
    backend: str,
) -> Any:
    rows, vocab = input.shape[0], linear_weight.shape[0]
    autocast = _autocast(input.device.type)
    dtype = compute_dtype(input)
    loss_dtype = torch.float32 if autocast and dtype != torch.float64 else dtype
    grad_on = torch.is_grad_enabled()
    needs = Needs(
        grad_on and input.requires_grad,
        grad_on and linear_weight.requires_grad,
        linear_bias is not None and grad_on and linear_bias.requires_grad,
    )
    traced = _is_traced(input)
    if traced:
        name, adapter = _compiled_backend(backend, input.device.type, dtype), None
    else:
        name, adapter, _ = choice = dispatch.choose(
            backend,
            input,
            unsupported=_unsupported(input, linear_weight, linear_bias, target=target, weight=weight),
        )
        chunk = chunk_size or head.default_chunk(rows, vocab, dtype, input.device)
        recompute = options.reduction == "none" and (needs.weight or needs.bias)
        dispatch.announce(
            "linear_cross_entropy",
            choice,
            **(
                {}
                if name == "reference"
                else {
                    "gemms": head.gemm_count(needs, recompute),
                    "chunk_rows": min(chunk, rows),
                    "buffer_bytes": head.Head(
                        input, linear_weight, None, dtype, min(chunk, rows)
                    ).buffer_bytes,
                }
            ),
        )
    if name == "reference":
        return _reference(
            reference.linear_cross_entropy,
            (input, linear_weight, target),
            weight,
            probabilities,
            options,
            loss_dtype,
            linear_bias=linear_bias,
        )
    acc = acc_dtype(dtype)
    index, w = row_weights(target, weight, probabilities, options.label_smoothing, acc)
    smoothing = 0.0 if probabilities else options.label_smoothing
    factor = ce.loss_factor(
        index,
        w if index is not None else None,
        options.reduction,
        options.normalizer,
        rows,
        vocab,
        options.ignore_index,
        acc,
        traced,
    )
    want = options.want(probabilities)
    if traced:
        from fastloss.ops import library

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
        loss = out[0].to(loss_dtype)
        return (
            (loss, from_engine(dict(zip(ce_stats(), (s.detach() for s in out[1:7]), strict=True)), want))
            if want
            else loss
        )
    call = ce.CrossEntropyCall(
        adapter,
        options.reduction,
        options.ignore_index,
        smoothing,
        options.z_loss,
        options.scale,
        options.softcap,
        False,
        loss_dtype,
        want,
    )
    result = linear.LinearCrossEntropy.apply(
        input, linear_weight, linear_bias, index, w, call, factor, dtype, min(chunk, max(rows, 1)), needs
    )
    if not want:
        return result
    return result[0], from_engine(dict(zip(want, result[1:], strict=True)), want)
