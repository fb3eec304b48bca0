"""What the public functions share on their way to the engine: options, targets and weights, dtypes, the compiled path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import backend as dispatch
from fastloss.engine import checks
from fastloss.engine import cross_entropy as ce
from fastloss.engine.checks import ShapeError
from fastloss.engine.native_rows import STATS
from fastloss.losses.token_stats_type import TokenStats, from_engine

_WANT = ("logprob", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "is_top1")
_WANT_WITHOUT_TARGET = ("entropy", "logsumexp", "log_sum_sq_probs", "mean_logit")


class Options:
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
        return _WANT_WITHOUT_TARGET if probabilities else _WANT

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


def autocasts(device: str) -> bool:
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


def unsupported(*tensors: Tensor | None, target: Tensor, weight: Tensor | None) -> str:
    if target.requires_grad and torch.is_grad_enabled():
        return "the target's own gradient is computed by the definition"
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "the class weights' own gradient is computed by the definition"
    return dispatch.tracing_reason(*tensors, target, weight)


@torch.compiler.assume_constant_result
def compiled_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend while torch.compile traces: from the kind of tensor alone."""
    if device == "cpu" or torch.cuda.is_available():
        return dispatch.choose(backend, torch.empty(0, dtype=dtype, device=device)).name
    return "reference"


def is_traced(tensor: Tensor) -> bool:
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


def by_definition(
    function: Any,
    operands: tuple[Tensor, ...],
    weight: Tensor | None,
    probabilities: bool,
    options: Options,
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
    if isinstance(saved, Tensor) and saved.data_ptr() == logits.data_ptr():
        raise ValueError(f"inplace: {node.name() if node else ''} needs the logits for its own backward")


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
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
    if not autocasts(input.device.type) and input.dtype != linear_weight.dtype:
        raise checks.ShapeError(
            f"linear_weight: expected {input.dtype} as input, got {linear_weight.dtype} (autocast would cast them)"
        )


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the head's GEMMs."""
    device = input.device.type
    return (
        torch.get_autocast_dtype(device)
        if autocasts(device) and input.dtype != torch.float64
        else input.dtype
    )


class Operands(NamedTuple):
    """What the engine reads besides the logits: the targets' classes or None, ``w`` of docs/engine.md, the reduction's factor."""

    classes: Tensor | None
    w: Tensor | None
    smoothing: float
    factor: ce.Factor


def operands(
    target: Tensor,
    weight: Tensor | None,
    probabilities: bool,
    options: Options,
    rows: int,
    vocab: int,
    acc: torch.dtype,
    traced: bool,
) -> Operands:
    """Of a cross-entropy, from its targets and class weights; bad targets are refused here."""
    index, w = row_weights(target, weight, probabilities, options.label_smoothing, acc)
    factor = ce.loss_factor(
        index,
        None if index is None else w,
        options.reduction,
        options.normalizer,
        rows,
        vocab,
        options.ignore_index,
        acc,
        traced,
    )
    return Operands(index, w, 0.0 if probabilities else options.label_smoothing, factor)


def engine_call(
    adapter: Any,
    options: Options,
    smoothing: float,
    loss_dtype: torch.dtype,
    want: tuple[str, ...],
    inplace: bool = False,
    needs_grad: bool = True,
) -> ce.CrossEntropyCall:
    return ce.CrossEntropyCall(
        adapter,
        options.reduction,
        options.ignore_index,
        smoothing,
        options.z_loss,
        options.scale,
        options.softcap,
        inplace,
        loss_dtype,
        want,
        needs_grad,
    )


def with_stats(result: Any, want: tuple[str, ...]) -> Any:
    """The loss, or ``(loss, TokenStats)``, from what an autograd function returned."""
    return (result[0], from_engine(dict(zip(want, result[1:], strict=True)), want)) if want else result


def with_compiled_stats(out: list[Tensor], dtype: torch.dtype, want: tuple[str, ...]) -> Any:
    """The same from what a torch.library operator returned."""
    loss = out[0].to(dtype)
    if not want:
        return loss
    return loss, from_engine(dict(zip(STATS, (x.detach() for x in out[1:7]), strict=True)), want)
