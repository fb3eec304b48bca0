"""LazyLogits: logits that are not multiplied out until somebody needs the numbers.

A language model ends in ``logits = hidden @ weight.T + bias`` and a few steps on them (a slice, a scale, a soft-cap, a
cast, a view), and then a loss. Lazy logits keep ``hidden``, ``weight`` and ``bias`` and follow those steps; a loss of
them is fastloss's loss of the linear head. Whatever else is asked of them makes the real logits, once.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn._reduction import legacy_get_string

import fastloss

__all__ = ["LazyLogits"]

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadLogits:
    """The numbers of a head's logits, as a formula: ``after · tanh(before · x)`` where capped, else ``after · x``,
    with ``x = hidden @ weight.T + bias``."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    head_dtype: torch.dtype  # of the head's own GEMM: autocast's, or the operands'
    dtype: torch.dtype  # what the logits say of themselves
    before: float = 1.0
    capped: bool = False
    after: float = 1.0
    classes_second: bool = False  # [B, V, ...] as cross_entropy takes them, in place of [B, ..., V]
    log_softmax: bool = False

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def shape(self) -> torch.Size:
        lead = self.hidden.shape[:-1]
        if self.classes_second:
            return torch.Size((lead[0], self.vocab, *lead[1:]))
        return torch.Size((*lead, self.vocab))

    @property
    def softcap(self) -> float | None:
        return 1.0 / self.before if self.capped else None

    @property
    def logit_scale(self) -> float:
        # logit_scale · softcap · tanh(x / softcap) is the library's order
        return self.after * self.before if self.capped else self.after

    def without_tensors(self) -> HeadLogits:
        nothing: Any = None
        return replace(self, hidden=nothing, weight=nothing, bias=None)

    def scaled(self, by: float) -> HeadLogits:
        return replace(self, after=self.after * by)

    def with_tanh(self) -> HeadLogits:
        return replace(self, before=self.after, after=1.0, capped=True)

    def to_dtype(self, dtype: torch.dtype) -> HeadLogits:
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def operands(self) -> dict[str, Any]:
        return {"linear_bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the head's GEMM, wherever the loss is computed. In it a low-precision head's loss is float32."""
        device = self.hidden.device.type
        if self.head_dtype in LOW_PRECISION:
            return torch.autocast(device, dtype=self.head_dtype)
        return torch.autocast(device, enabled=False)


def describe(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadLogits:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected shape [V, {hidden.shape[-1] if hidden.dim() else 'D'}], got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    device = hidden.device.type
    if weight.device != hidden.device:
        raise ValueError(f"weight: expected device {hidden.device}, got {weight.device}")
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype:
        raise ValueError(f"weight: expected dtype {dtype}, got {weight.dtype}")
    return HeadLogits(hidden, weight, bias, dtype, dtype)


# -- losses and statistics ---------------------------------------------------------------------------------------------


def cross_entropy(
    z: HeadLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **ours: Any,
) -> Any:
    """F.cross_entropy's signature; ``ours`` are the further options of fastloss.cross_entropy."""
    lead = z.hidden.shape[:-1]
    probabilities = target.is_floating_point()
    if z.log_softmax or (probabilities and len(lead) > 1) or not (z.classes_second or len(lead) <= 1):
        return NotImplemented
    if ours.get("softcap") is not None or ours.get("inplace"):
        return NotImplemented
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    operands = z.operands()
    operands["logit_scale"] *= ours.pop("logit_scale", 1.0)
    ours.pop("softcap", None), ours.pop("inplace", None)
    with z.autocast():
        result = fastloss.linear_cross_entropy(
            z.hidden,
            z.weight,
            target,
            weight=weight,
            reduction=reduction,
            ignore_index=None if probabilities else ignore_index,
            label_smoothing=label_smoothing,
            **operands,
            **ours,
        )
    if torch.is_autocast_enabled(z.hidden.device.type):
        return result  # float32, as autocast makes F.cross_entropy
    if isinstance(result, tuple):
        return (result[0].to(z.dtype), *result[1:])
    return result.to(z.dtype)


def token_stats(z: HeadLogits, target: Tensor | None, **options: Any) -> Any:
    if z.log_softmax or z.classes_second or options.get("softcap") is not None or options.pop("inplace", False):
        return NotImplemented
    operands = z.operands()
    operands["logit_scale"] *= options.pop("logit_scale", 1.0)
    options.pop("softcap", None)
    with z.autocast():
        return fastloss.linear_token_stats(z.hidden, z.weight, target, **operands, **options)


def log_probs(z: HeadLogits, index: Tensor, temperature: float = 1.0) -> Any:
    """log_softmax(z / temperature) gathered at ``index`` [...] or [..., K]."""
    if index.dim() == z.hidden.dim() - 1:
        stats = token_stats(z, index, temperature=temperature, ignore_index=-(2**63))
        return NotImplemented if stats is NotImplemented else stats.logprobs
    if index.shape[-1] == 1:
        one = log_probs(z, index.squeeze(-1), temperature)
        return NotImplemented if one is NotImplemented else one.unsqueeze(-1)
    chosen = chosen_logits(z, index)
    lse = token_stats(z, None, temperature=temperature, outputs=("logsumexp",))
    if chosen is NotImplemented or lse is NotImplemented:
        return NotImplemented
    return chosen.to(lse.logsumexp.dtype) / temperature - lse.logsumexp.unsqueeze(-1)


def chosen_logits(z: HeadLogits, index: Tensor) -> Any:
    """The logits at ``index`` [..., K] alone: no GEMM."""
    if z.classes_second or index.shape[:-1] != z.hidden.shape[:-1] or index.shape[-1] > 16:
        return NotImplemented
    wide = z.head_dtype if z.head_dtype == torch.float64 else torch.float32
    x = (F.embedding(index, z.weight).to(wide) * z.hidden.unsqueeze(-2).to(wide)).sum(-1)
    if z.bias is not None:
        x = x + z.bias[index].to(wide)
    return z.after * (torch.tanh(z.before * x) if z.capped else x)


def argmax(z: HeadLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    """The arg-max of each row, a block of rows at a time."""
    if z.classes_second or dim is None or dim % (z.hidden.dim()) != z.hidden.dim() - 1 or z.after <= 0:
        return NotImplemented
    hidden = z.hidden.reshape(-1, z.hidden.shape[-1])
    block = max(64, 2**22 // z.vocab)
    with torch.no_grad(), z.autocast():
        parts = [F.linear(rows, z.weight, z.bias).argmax(-1) for rows in hidden.split(block)]
    best = torch.cat(parts).reshape(z.hidden.shape[:-1])
    return best.unsqueeze(-1) if keepdim else best


# -- steps that stay lazy ----------------------------------------------------------------------------------------------
# A rule is (formula, *args, **kwargs) -> HeadLogits, a Tensor, or NotImplemented: then the real logits are made.


def _on_rows(change: Callable[..., Tensor]) -> Callable[..., Any]:
    """A rule that does to the hidden states what was asked of the logits: the class dimension is not touched."""

    def rule(z: HeadLogits, *args: Any, **kwargs: Any) -> Any:
        if z.classes_second:
            return NotImplemented
        hidden = change(z, *args, **kwargs)
        return hidden if hidden is NotImplemented else replace(z, hidden=hidden)

    return rule


def _view(z: HeadLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
        shape = tuple(shape[0])
    if not shape or any(isinstance(s, torch.dtype) for s in shape):
        return NotImplemented
    *lead, last = shape
    hidden = z.hidden
    if last == z.vocab:
        return hidden.reshape(*lead, hidden.shape[-1])
    if last == -1 and math.prod(lead) == math.prod(hidden.shape[:-1]):
        return hidden.reshape(*lead, hidden.shape[-1])
    return NotImplemented


def _dim(z: HeadLogits, dim: int, extra: int = 0) -> int:
    return dim % (z.hidden.dim() + extra)


def _flatten(z: HeadLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    if _dim(z, end_dim) == z.hidden.dim() - 1 and _dim(z, start_dim) != z.hidden.dim() - 1:
        return NotImplemented
    return z.hidden.flatten(start_dim, end_dim)


def _squeeze(z: HeadLogits, *dims: int) -> Any:
    if len(dims) != 1 or not isinstance(dims[0], int) or _dim(z, dims[0]) == z.hidden.dim() - 1:
        if dims or 1 in z.hidden.shape[-1:] or z.vocab == 1:
            return NotImplemented
    return z.hidden.squeeze(*dims)


def _unsqueeze(z: HeadLogits, dim: int) -> Any:
    dim = _dim(z, dim, 1)
    return NotImplemented if dim == z.hidden.dim() else z.hidden.unsqueeze(dim)


def getitem(z: HeadLogits, index: Any) -> Any:
    if z.classes_second:
        return NotImplemented
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, (list, LazyLogits)) for i in items):
        return NotImplemented
    uses = [_dims_used(i) for i in items]
    ndim = z.hidden.dim()
    if any(i is Ellipsis for i in items):
        if sum(i is Ellipsis for i in items) > 1:
            return NotImplemented
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        fill = ndim - sum(uses)
        items[at : at + 1] = [slice(None)] * fill
        uses[at : at + 1] = [1] * fill
    used = sum(uses)
    if used > ndim:
        return NotImplemented
    if used < ndim:
        return replace(z, hidden=z.hidden[tuple(items)])
    *lead, last = items  # the vocabulary too
    if not isinstance(last, slice) or last.step not in (None, 1):
        return NotImplemented
    hidden = z.hidden if all(isinstance(i, slice) and i == slice(None) for i in lead) else z.hidden[tuple(lead)]
    if last == slice(None):
        return replace(z, hidden=hidden)
    if z.log_softmax:
        return NotImplemented  # normalised over the classes that the slice leaves out
    return replace(z, hidden=hidden, weight=z.weight[last], bias=None if z.bias is None else z.bias[last])


def _dims_used(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def _broadcasts_over_classes(z: HeadLogits, value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, LazyLogits)
        and not z.classes_second
        and 1 <= value.dim() <= z.hidden.dim()
        and value.shape[-1] == z.vocab
        and value.numel() == z.vocab
    )


def scale(z: HeadLogits, by: Any, divide: bool = False) -> Any:
    if z.log_softmax:
        return NotImplemented
    if isinstance(by, bool) or isinstance(by, (int, float)):
        by = float(by)
        if by == 0.0 or not math.isfinite(by):
            return NotImplemented
        return z.scaled(1.0 / by if divide else by)
    if z.capped or not isinstance(by, Tensor) or isinstance(by, (LazyLogits, _TracedLogits)):
        return NotImplemented
    if not by.is_floating_point():
        return NotImplemented
    factor = 1.0 / by if divide else by
    if by.numel() == 1 and by.dim() <= z.hidden.dim():
        # Its gradient flows through the hidden states (and the bias).
        factor = factor.reshape(())
        bias = None if z.bias is None else z.bias * factor.to(z.bias.dtype)
        return replace(z, hidden=z.hidden * factor.to(z.hidden.dtype), bias=bias)
    if _broadcasts_over_classes(z, by):  # a scale of each class
        factor = factor.reshape(-1)
        weight = z.weight * factor.to(z.weight.dtype).unsqueeze(-1)
        return replace(z, weight=weight, bias=None if z.bias is None else z.bias * factor.to(z.bias.dtype))
    return NotImplemented


def add(z: HeadLogits, other: Any, *, alpha: float = 1, sign: float = 1.0) -> Any:
    if z.log_softmax or z.capped or z.classes_second or alpha != 1:
        return NotImplemented
    if isinstance(other, (LazyLogits, _TracedLogits)):
        return _add_heads(z, other.formula, sign)
    if not _broadcasts_over_classes(z, other):
        return NotImplemented
    bias = other.reshape(-1) * (sign / z.after)
    if z.bias is not None:
        bias = z.bias + bias
    return replace(z, bias=bias.to(z.weight.dtype))


def _add_heads(a: HeadLogits, b: HeadLogits, sign: float) -> Any:
    """Two heads' sum is one head of both their hidden states side by side: a low-rank adapter beside the head."""
    if b.log_softmax or b.capped or b.classes_second or b.shape != a.shape or b.hidden.dtype != a.hidden.dtype:
        return NotImplemented
    factor = sign * b.after / a.after
    hidden = torch.cat([a.hidden, b.hidden * factor], -1)
    weight = torch.cat([a.weight, b.weight.to(a.weight.dtype)], -1)
    bias = a.bias
    if b.bias is not None:
        bias = b.bias * factor if bias is None else bias + b.bias * factor
    return replace(a, hidden=hidden, weight=weight, bias=bias)


def _tanh(z: HeadLogits) -> Any:
    if z.capped or z.log_softmax or z.after <= 0:
        return NotImplemented
    return z.with_tanh()


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda z, **kwargs: z.to_dtype(dtype) if _may_cast(z, dtype) else NotImplemented


def _may_cast(z: HeadLogits, dtype: torch.dtype) -> bool:
    return dtype == z.dtype or (dtype in (torch.float32, *LOW_PRECISION) and z.head_dtype != torch.float64)


def _to(z: HeadLogits, *args: Any, **kwargs: Any) -> Any:
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
    kwargs.pop("copy", None), kwargs.pop("non_blocking", None)
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            dtype, device = arg.dtype, arg.device
        elif isinstance(arg, (str, torch.device, int)) and not isinstance(arg, bool):
            device = arg
    if device is not None:
        device = torch.device(device)
        if device.type != z.hidden.device.type or device.index not in (None, z.hidden.device.index):
            return NotImplemented
    if kwargs.get("memory_format", torch.preserve_format) not in (torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    dtype = z.dtype if dtype is None else dtype
    return z.to_dtype(dtype) if _may_cast(z, dtype) else NotImplemented


def _same(z: HeadLogits, *args: Any, **kwargs: Any) -> Any:
    return z


def _detach(z: HeadLogits) -> HeadLogits:
    bias = None if z.bias is None else z.bias.detach()
    return replace(z, hidden=z.hidden.detach(), weight=z.weight.detach(), bias=bias)


def _transpose(z: HeadLogits, dim0: int, dim1: int) -> Any:
    ndim = z.hidden.dim()
    if ndim != 3 or {dim0 % ndim, dim1 % ndim} != {1, 2}:
        return NotImplemented
    return replace(z, classes_second=not z.classes_second)


def _permute(z: HeadLogits, *dims: Any) -> Any:
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    ndim = z.hidden.dim()
    order = tuple(d % ndim for d in dims)
    if ndim > 2 and not z.classes_second and order == (0, ndim - 1, *range(1, ndim - 1)):
        return replace(z, classes_second=True)
    return NotImplemented


def _log_softmax(z: HeadLogits, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if z.log_softmax or z.classes_second or dim is None or _dim(z, dim) != z.hidden.dim() - 1:
        return NotImplemented
    if dtype is None and torch.is_autocast_enabled(z.hidden.device.type):
        dtype = torch.float32
    if dtype is not None and not _may_cast(z, dtype):
        return NotImplemented
    return replace(z, log_softmax=True, dtype=dtype or z.dtype)


def _gather(z: HeadLogits, dim: int, index: Tensor, **kwargs: Any) -> Any:
    if z.classes_second or _dim(z, dim) != z.hidden.dim() - 1 or index.shape[:-1] != z.hidden.shape[:-1]:
        return NotImplemented
    if not z.log_softmax:
        out = chosen_logits(z, index)
    else:
        out = log_probs(replace(z, log_softmax=False), index)
    return out if out is NotImplemented else out.to(z.dtype)


def _nll_loss(
    z: HeadLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if not z.log_softmax or target.is_floating_point():
        return NotImplemented
    plain = replace(z, log_softmax=False)
    return cross_entropy(plain, target, weight, size_average, ignore_index, reduce, reduction)


def _logsumexp(z: HeadLogits, dim: Any, keepdim: bool = False) -> Any:
    if isinstance(dim, (tuple, list)):
        dim = dim[0] if len(dim) == 1 else 0
    if z.classes_second or z.log_softmax or _dim(z, dim) != z.hidden.dim() - 1:
        return NotImplemented
    lse = token_stats(z, None, outputs=("logsumexp",)).logsumexp.to(z.dtype)
    return lse.unsqueeze(-1) if keepdim else lse


def _pieces(name: str) -> Callable[..., Any]:
    def rule(z: HeadLogits, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) if name != "unbind" else (args or (0,))[0]
        if z.classes_second or _dim(z, dim) == z.hidden.dim() - 1:
            return NotImplemented
        return tuple(replace(z, hidden=h) for h in getattr(z.hidden, name)(*args, **kwargs))

    return rule


def _linear_entropy(z: HeadLogits, **options: Any) -> Any:
    stats = token_stats(z, None, outputs=("entropy",), **options)
    return stats if stats is NotImplemented else stats.entropy


def _selective(z: HeadLogits, index: Tensor, temperature: float = 1.0, **options: Any) -> Any:
    return NotImplemented if z.log_softmax else log_probs(z, index, temperature)


T = torch.Tensor
RULES: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: cross_entropy,
    F.nll_loss: _nll_loss,
    F.log_softmax: _log_softmax,
    fastloss.cross_entropy: cross_entropy,
    fastloss.token_stats: token_stats,
    fastloss.selective_log_softmax: _selective,
    fastloss.entropy_from_logits: _linear_entropy,
    T.float: _cast(torch.float32),
    T.bfloat16: _cast(torch.bfloat16),
    T.half: _cast(torch.float16),
    T.to: _to,
    T.type_as: _to,
    T.__getitem__: getitem,
}
# Each of these has two names, torch.f and Tensor.f.
for _name, _rule in {
    "log_softmax": _log_softmax, "tanh": _tanh, "gather": _gather, "logsumexp": _logsumexp, "argmax": argmax,
    "clone": _same, "detach": _detach, "contiguous": _same, "alias": _same,
    "view": _on_rows(_view), "reshape": _on_rows(_view), "flatten": _on_rows(_flatten),
    "squeeze": _on_rows(_squeeze), "unsqueeze": _on_rows(_unsqueeze),
    "transpose": _transpose, "swapaxes": _transpose, "swapdims": _transpose, "permute": _permute,
    "split": _pieces("split"), "chunk": _pieces("chunk"), "unbind": _pieces("unbind"),
    "mul": scale, "multiply": scale, "__mul__": scale, "__rmul__": scale,
    "neg": lambda z: scale(z, -1.0), "__neg__": lambda z: scale(z, -1.0),
    "add": add, "__add__": add, "__radd__": add,
    "sub": functools.partial(add, sign=-1.0), "__sub__": functools.partial(add, sign=-1.0),
}.items():  # fmt: skip
    for _owner in (torch, T):
        if hasattr(_owner, _name):
            RULES[getattr(_owner, _name)] = _rule
for _function in (T.div, T.divide, T.true_divide, T.__truediv__, T.__div__, torch.div, torch.divide, torch.true_divide):
    RULES[_function] = lambda z, by, rounding_mode=None: (
        NotImplemented if rounding_mode else scale(z, by, divide=True)
    )
# In place, lazily: a scale; its out-of-place form is what the real logits replay.
IN_PLACE: dict[Any, Any] = {T.mul_: T.mul, T.__imul__: T.mul, T.div_: T.div, T.__itruediv__: T.div, T.__idiv__: T.div}
# What shares memory with the tensor it was asked of: a change in place of one is a change of the other. The parts are
# not contiguous; a copy of them is.
WHOLE_VIEWS = {getattr(T, n) for n in ("view", "reshape", "flatten", "squeeze", "unsqueeze", "detach", "alias")
               if hasattr(T, n)} | {getattr(torch, n) for n in ("reshape", "flatten", "squeeze", "unsqueeze", "detach")}  # fmt: skip
PART_VIEWS = {getattr(owner, n) for owner in (torch, T) for n in
              ("transpose", "swapaxes", "swapdims", "permute", "split", "chunk", "unbind", "__getitem__")
              if hasattr(owner, n)}  # fmt: skip
NO_COPY_IF_SAME = {T.contiguous, T.float, T.half, T.bfloat16, T.to, T.type_as}


class _Memory:
    """Stands for the memory that a tensor and its views would share: which of them changed it last, in place."""

    def __init__(self) -> None:
        self.owner: Any = None


class _Node:
    """How lazy logits were made: of a head, or by a function of other lazy logits. It never changes."""

    def __init__(self, formula: HeadLogits, origin: tuple[Any, Any, Any] | None) -> None:
        self.formula = formula
        self.origin = origin
        self.real: Tensor | None = None
        self.real_has_graph = False
        self.with_graph = torch.is_grad_enabled()
        self.versions = _versions(formula)

    def has_real(self) -> bool:
        graph = self.with_graph and torch.is_grad_enabled()
        return self.real is not None and (self.real_has_graph or not graph)

    def dense(self) -> Tensor:
        if not self.has_real():
            self.real = self.make()
            self.real_has_graph = self.with_graph and torch.is_grad_enabled()
        assert self.real is not None
        return self.real

    def make(self) -> Tensor:
        self.check()
        with torch.set_grad_enabled(self.with_graph and torch.is_grad_enabled()):
            if self.origin is None:
                with self.formula.autocast():
                    return F.linear(self.formula.hidden, self.formula.weight, self.formula.bias)
            # What the caller did, done to real logits: their bits are those of a model without lazy logits.
            function, args, kwargs = self.origin
            real: Tensor = function(*_dense(args), **_dense(kwargs))
            return real

    def check(self) -> None:
        if self.versions != _versions(self.formula):
            raise RuntimeError(
                "lazy logits: the head's weight or its input was changed in place after the logits were made "
                "(an optimizer step?); ask for them earlier"
            )
        weight = self.formula.weight
        if weight.device.type != "meta" and weight.untyped_storage().nbytes() < weight.nbytes:
            raise RuntimeError(
                "lazy logits: the head's weight was gathered for the head's call alone and is gone; "
                "keep it until the loss is computed (FSDP2: reshard_after_forward=False for the head)"
            )


class _Connect(torch.autograd.Function):
    """Lazy logits as a node of the graph: a gradient that somebody's own autograd function sends back to them reaches
    the hidden states, the weight and the bias."""

    @staticmethod
    def forward(ctx: Any, formula: HeadLogits, hidden: Tensor, weight: Tensor, bias: Any) -> Any:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.formula = formula.without_tensors()
        return torch.Tensor._make_wrapper_subclass(
            LazyLogits, formula.shape, dtype=formula.dtype, device=hidden.device
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        leaves = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        hidden, weight, bias = leaves
        with torch.enable_grad():
            z = multiplied_out(replace(ctx.formula, hidden=hidden, weight=weight, bias=bias))
        needs = ctx.needs_input_grad[1:]
        grads = iter(torch.autograd.grad(z, [t for t, need in zip(leaves, needs) if need], grad))
        return None, *(next(grads) if need else None for need in needs)


def multiplied_out(z: HeadLogits) -> Tensor:
    """The real logits of a formula."""
    with z.autocast():
        x = F.linear(z.hidden, z.weight, z.bias)
    x = x.to(z.dtype)
    if z.before != 1.0 and z.capped:
        x = x * z.before
    if z.capped:
        x = x.tanh()
    if z.after != 1.0:
        x = x * z.after
    if z.log_softmax:
        x = x.log_softmax(-1)
    return x.movedim(-1, 1) if z.classes_second else x


class LazyLogits(torch.Tensor):
    """``hidden @ weight.T + bias``, not multiplied out: a tensor of shape ``[..., V]`` that holds no logits.

    Slices of rows or of the vocabulary, views, casts, scales (a number, a tensor of one element, one per class), an
    added bias, ``cap · tanh(logits / cap)`` and ``log_softmax`` are followed. ``F.cross_entropy`` (and
    ``nn.CrossEntropyLoss``, ``F.nll_loss``), ``gather`` of log-probabilities, ``logsumexp`` and ``argmax`` are computed
    from the head, never with whole logits in memory. Every other operation makes the real logits, keeps them, and is
    right, gradients included.

    Args:
        hidden: ``[..., D]``, float.
        weight: ``[V, D]`` of the same dtype (under autocast, any).
        bias: ``[V]`` or None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: on use, if the weight was changed in place since (an optimizer step), or its memory was given back
            (a sharded weight that was gathered for the head's call alone).

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(50, 8, requires_grad=True)
    >>> logits = fastloss.LazyLogits(hidden, weight)
    >>> logits.shape
    torch.Size([2, 3, 50])
    >>> loss = torch.nn.functional.cross_entropy(logits.float().view(-1, 50), torch.zeros(6, dtype=torch.long))
    >>> round(loss.item(), 4)
    3.912
    """

    _node: _Node
    _changed: Tensor | None  # real logits that were changed in place, or hooked: they count from then on
    _contiguous: bool
    _memory: _Memory
    _seen: Any

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return cls._make(_Node(describe(hidden, weight, bias), None), _Memory(), True)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def _make(cls, node: _Node, memory: _Memory, contiguous: bool) -> Any:
        z = node.formula
        with torch._C.DisableTorchFunctionSubclass():
            self: Any = _Connect.apply(z, z.hidden, z.weight, z.bias)
        self._node, self._changed, self._contiguous = node, None, contiguous
        self._memory, self._seen = memory, memory.owner
        return self

    @property
    def formula(self) -> HeadLogits:
        """What these logits are of."""
        return self._node.formula

    @property
    def is_lazy(self) -> bool:
        """Whether nobody has needed the real logits yet."""
        return self._changed is None and self._node.real is None

    def dense(self) -> Tensor:
        """The real logits; made at the first call and kept.

        >>> import torch, fastloss
        >>> fastloss.LazyLogits(torch.ones(1, 2), torch.ones(3, 2)).dense()
        tensor([[2., 2., 2.]])
        """
        self._check()
        return self._node.dense() if self._changed is None else self._changed

    def cross_entropy(self, target: Tensor, **options: Any) -> Any:
        """:func:`fastloss.cross_entropy` of these logits, from the head.

        >>> import torch, fastloss
        >>> z = fastloss.LazyLogits(torch.zeros(1, 2), torch.zeros(4, 2))
        >>> z.cross_entropy(torch.tensor([1]), z_loss=0.1).shape
        torch.Size([])
        """
        return ask(fastloss.cross_entropy, self, target, **options)

    def token_stats(self, target: Tensor | None, **options: Any) -> Any:
        """:func:`fastloss.token_stats` of these logits, from the head.

        >>> import torch, fastloss
        >>> z = fastloss.LazyLogits(torch.zeros(1, 2), torch.zeros(4, 2))
        >>> z.token_stats(torch.tensor([1])).logprobs
        tensor([-1.3863])
        """
        return ask(fastloss.token_stats, self, target, **options)

    def _check(self) -> None:
        if self._seen is not self._memory.owner:
            raise RuntimeError(
                "lazy logits: a view of them was changed in place; change a copy, or call .dense() on them before"
            )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        state = "not multiplied out" if self.is_lazy else "multiplied out"
        return f"LazyLogits(shape={list(self.formula.shape)}, dtype={self.formula.dtype}, {state})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args:  # everything by name
            name = "input" if "input" in kwargs else "self"
            args, kwargs = (kwargs.get(name),), {k: v for k, v in kwargs.items() if k != name}
            if args[0] is None:
                return func(**_dense(kwargs))
        z, rest = args[0], args[1:]
        if not isinstance(z, LazyLogits):
            if func in COMMUTES and len(rest) == 1 and isinstance(rest[0], LazyLogits):
                return cls.__torch_function__(func, types, (rest[0], z), kwargs)
            return func(*_dense(args), **_dense(kwargs))
        if func in METADATA and z._changed is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if _is_in_place(func, kwargs):
            return z._in_place(func, rest, kwargs)
        node = z._node
        rule = RULES.get(func)
        if rule is None or z._changed is not None or node.has_real():
            return func(*_dense(args), **_dense(kwargs))
        z._check()
        node.check()
        with torch.set_grad_enabled(node.with_graph and torch.is_grad_enabled()):
            result = rule(node.formula, *rest, **kwargs)
            if result is NotImplemented:
                return func(*_dense(args), **_dense(kwargs))
            if result is node.formula and func in NO_COPY_IF_SAME and (z._contiguous or func is not T.contiguous):
                return z
            return z._wrap(result, func, args, kwargs)

    def _wrap(self, result: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Formulas as lazy logits that know where they come from; anything else as it is."""
        part = func in PART_VIEWS
        shared = part or (func in WHOLE_VIEWS and self._contiguous)
        memory = self._memory if shared else _Memory()
        args = tuple(a._node if isinstance(a, LazyLogits) else a for a in args)
        if isinstance(result, HeadLogits):
            return self._make(_Node(result, (func, args, kwargs)), memory, not part)
        if type(result) is tuple and result and isinstance(result[0], HeadLogits):
            made = []
            for n, formula in enumerate(result):
                node = _Node(formula, (functools.partial(_item, n, func), args, kwargs))
                made.append(self._make(node, memory, False))
            return tuple(made)
        return result

    def _in_place(self, func: Any, rest: Any, kwargs: Any) -> Any:
        """A change of these logits alone: what was made of them before keeps the node that it was made of."""
        self._check()
        if func in IN_PLACE and len(rest) == 1 and self.is_lazy and not isinstance(rest[0], Tensor):
            function = IN_PLACE[func]
            self._node.check()
            result = RULES[function](self.formula, rest[0], **kwargs)
            if result is not NotImplemented:
                self._node = _Node(result, (function, (self._node, rest[0]), kwargs))
                self._memory.owner = self._seen = object()
                return self
        if self._changed is None:
            self._changed = self._node.dense().clone() if self._node.has_real() else self._node.make()
        self._memory.owner = self._seen = object()
        real = self._changed
        out = func(real, *_dense(rest), **_dense(kwargs))
        return self if out is real else out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reached from C++ alone, past __torch_function__: there, too, the numbers are the real logits'.
        return func(*_dense(args), **_dense(kwargs or {}))


class _TracedLogits:
    """LazyLogits while torch.compile traces: the same rules, in a class that it can follow (no tensor of its own kind)."""

    def __init__(self, formula: HeadLogits) -> None:
        self.formula = formula

    def dense(self) -> Tensor:
        return multiplied_out(self.formula)

    @property
    def shape(self) -> torch.Size:
        return self.formula.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.formula.dtype

    @property
    def device(self) -> torch.device:
        return self.formula.hidden.device

    @property
    def ndim(self) -> int:
        return self.formula.hidden.dim()

    def dim(self) -> int:
        return self.formula.hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.formula.shape if dim is None else self.formula.shape[dim]

    def __len__(self) -> int:
        return self.formula.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "formula":
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], _TracedLogits):
            rule = RULES.get(func)
            if rule is not None:
                result = rule(args[0].formula, *args[1:], **kwargs)
                if result is not NotImplemented:
                    return _wrap_traced(result)
        return func(*_dense(args), **_dense(kwargs))


def _wrap_traced(result: Any) -> Any:
    if isinstance(result, HeadLogits):
        return _TracedLogits(result)
    if type(result) is tuple and result and isinstance(result[0], HeadLogits):
        return tuple(_TracedLogits(z) for z in result)
    return result


def _traced_method(name: str) -> Callable[..., Any]:
    function = getattr(T, name)
    rule = RULES[function]

    def method(self: _TracedLogits, *args: Any, **kwargs: Any) -> Any:
        result = rule(self.formula, *args, **kwargs)
        if result is NotImplemented:
            return function(self.dense(), *_dense(args), **_dense(kwargs))
        return _wrap_traced(result)

    return method


for _name in (
    "float", "bfloat16", "half", "to", "type_as", "__getitem__", "log_softmax", "tanh", "gather", "logsumexp", "argmax",
    "clone", "detach", "contiguous", "view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute",
    "split", "chunk", "unbind", "mul", "div", "add", "sub", "__mul__", "__rmul__", "__truediv__", "__add__",
    "__radd__", "__sub__", "__neg__",
):  # fmt: skip
    setattr(_TracedLogits, _name, _traced_method(_name))


def lazy(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """LazyLogits, or, while torch.compile traces, what stands for them there."""
    if torch.compiler.is_compiling():
        return _TracedLogits(describe(hidden, weight, bias))
    return LazyLogits(hidden, weight, bias)


def ask(function: Callable[..., Any], logits: Any, *args: Any, **kwargs: Any) -> Any:
    """A function of fastloss on logits that may be lazy."""
    if isinstance(logits, (LazyLogits, _TracedLogits)):
        return type(logits).__torch_function__(function, (type(logits),), (logits, *args), kwargs)
    return function(logits, *args, **kwargs)


COMMUTES = {torch.mul, torch.add, T.mul, T.add, T.__mul__, T.__rmul__, T.__add__, T.__radd__}
METADATA = {
    getattr(T, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_leaf", "requires_grad",
                 "grad_fn", "is_sparse", "is_quantized", "is_meta", "is_mps", "is_xpu", "is_nested", "names",
                 "itemsize", "nbytes")
    if hasattr(T, name)
} | {
    getattr(T, name)
    for name in ("size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex", "is_contiguous",
                 "element_size", "__len__", "storage_offset", "ndimension", "get_device", "is_inference",
                 "is_same_size")
    if hasattr(T, name)
} | {torch.is_floating_point, torch.is_complex, torch.numel}  # fmt: skip
IN_PLACE_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "pow", "mod",
                                                  "and", "or", "xor", "lshift", "rshift")}  # fmt: skip
HOOKS = {"requires_grad_", "register_hook", "retain_grad"}


def _is_in_place(func: Any, kwargs: Any) -> bool:
    name = getattr(func, "__name__", "")
    if kwargs.get("out") is not None or name == "__setitem__" or name in IN_PLACE_OPERATORS or name in HOOKS:
        return True
    return name.endswith("_") and not name.endswith("__")


def _item(n: int, func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)[n]


def _versions(z: HeadLogits) -> tuple[int | None, ...]:
    return tuple(None if t.is_inference() else t._version for t in (z.hidden, z.weight))


def _dense(value: Any) -> Any:
    if isinstance(value, (LazyLogits, _TracedLogits, _Node)):
        return value.dense()
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        made = [_dense(v) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {k: _dense(v) for k, v in value.items()}
    return value
