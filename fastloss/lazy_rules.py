"""What lazy logits follow: a formula of a head's logits, and one rule per function that changes it or is computed from it.

A rule takes the formula and the function's other arguments. It returns another formula (the logits stay lazy), a tensor
(a loss or a statistic, computed from the head), or NotImplemented: then the real logits are made.
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
from torch.nn._reduction import legacy_get_string

import fastloss
from fastloss.engine.checks import as_rows

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadLogits:
    """The numbers of a head's logits, as a formula: ``after · tanh(before · x)`` where capped, else ``after · x``,
    with ``x = hidden @ weight.T + bias``; with a low-rank adapter the last columns of ``hidden`` are u, and ``u @ low_rank.T`` is added."""

    hidden: Tensor  # [..., D], or [..., D + r]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    head_dtype: torch.dtype  # of the head's own GEMM: autocast's, or the operands'
    dtype: torch.dtype  # what the logits say of themselves
    before: float = 1.0
    capped: bool = False
    after: float = 1.0
    classes_second: bool = False  # [B, V, ...] as cross_entropy takes them, in place of [B, ..., V]
    log_softmax: bool = False
    low_rank: Tensor | None = None  # [V, r]

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
        return replace(self, hidden=nothing, weight=nothing, bias=None, low_rank=None)

    def scaled(self, by: float) -> HeadLogits:
        return replace(self, after=self.after * by)

    def with_tanh(self) -> HeadLogits:
        return replace(self, before=self.after, after=1.0, capped=True)

    def to_dtype(self, dtype: torch.dtype) -> HeadLogits:
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def operands(self) -> dict[str, Any]:
        """As a loss from a head takes them."""
        dim = self.weight.shape[1]
        of_head: dict[str, Any] = {"linear_weight": self.weight, "linear_bias": self.bias}
        if self.low_rank is not None:
            of_head["lora"] = (self.hidden[..., dim:], self.low_rank)
        hidden = self.hidden if self.low_rank is None else self.hidden[..., :dim]
        return {"input": hidden, **of_head, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def product(self, hidden: Tensor) -> Tensor:
        """The raw logits of some hidden states, under :meth:`autocast`."""
        if self.low_rank is None:
            return F.linear(hidden, self.weight, self.bias)
        dim = self.weight.shape[1]
        return F.linear(hidden[..., :dim], self.weight, self.bias) + F.linear(
            hidden[..., dim:], self.low_rank
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the head's GEMM, wherever the loss is computed. In it a low-precision head's loss is float32."""
        device = self.hidden.device.type
        if self.head_dtype in LOW_PRECISION:
            return torch.autocast(device, dtype=self.head_dtype)
        return torch.autocast(device, enabled=False)


class Lazy:
    """What is lazy: it has a formula."""

    formula: HeadLogits


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


def multiplied_out(z: HeadLogits) -> Tensor:
    """The real logits of a formula."""
    with z.autocast():
        x = z.product(z.hidden)
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
            target=target,
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
    if (
        z.log_softmax
        or z.classes_second
        or options.get("softcap") is not None
        or options.pop("inplace", False)
        or (z.low_rank is not None and options.get("support") is not None)
    ):
        return NotImplemented
    operands = z.operands()
    operands["logit_scale"] *= options.pop("logit_scale", 1.0)
    options.pop("softcap", None)
    with z.autocast():
        return fastloss.linear_token_stats(target=target, **operands, **options)


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
    dim, hidden = z.weight.shape[1], z.hidden.unsqueeze(-2).to(wide)
    x = (F.embedding(index, z.weight).to(wide) * hidden[..., :dim]).sum(-1)
    if z.low_rank is not None:
        x = x + (F.embedding(index, z.low_rank).to(wide) * hidden[..., dim:]).sum(-1)
    if z.bias is not None:
        x = x + z.bias[index].to(wide)
    return z.after * (torch.tanh(z.before * x) if z.capped else x)


def argmax(z: HeadLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    """The arg-max of each row, a block of rows at a time."""
    if z.classes_second or dim is None or dim % (z.hidden.dim()) != z.hidden.dim() - 1 or z.after <= 0:
        return NotImplemented
    hidden = as_rows(z.hidden)
    block = max(64, 2**22 // z.vocab)
    with torch.no_grad(), z.autocast():
        parts = [z.product(rows).argmax(-1) for rows in hidden.split(block)]
    best = torch.cat(parts).reshape(z.hidden.shape[:-1])
    return best.unsqueeze(-1) if keepdim else best


# -- steps that stay lazy ----------------------------------------------------------------------------------------------


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
    if any(isinstance(i, (list, Lazy)) for i in items):
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
    hidden = (
        z.hidden if all(isinstance(i, slice) and i == slice(None) for i in lead) else z.hidden[tuple(lead)]
    )
    if last == slice(None):
        return replace(z, hidden=hidden)
    if z.log_softmax:
        return NotImplemented  # normalised over the classes that the slice leaves out
    bias, low_rank = (None if x is None else x[last] for x in (z.bias, z.low_rank))
    return replace(z, hidden=hidden, weight=z.weight[last], bias=bias, low_rank=low_rank)


def _dims_used(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def _broadcasts_over_classes(z: HeadLogits, value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, Lazy)
        and not z.classes_second
        and 1 <= value.dim() <= z.hidden.dim()
        and value.shape[-1] == z.vocab
        and value.numel() == z.vocab
    )


def scale(z: HeadLogits, by: Any, divide: bool = False) -> Any:
    if z.log_softmax:
        return NotImplemented
    if isinstance(by, (int, float)):
        by = float(by)
        if by == 0.0 or not math.isfinite(by):
            return NotImplemented
        return z.scaled(1.0 / by if divide else by)
    if z.capped or not isinstance(by, Tensor) or isinstance(by, Lazy):
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
        low_rank = None if z.low_rank is None else z.low_rank * factor.to(z.low_rank.dtype).unsqueeze(-1)
        bias = None if z.bias is None else z.bias * factor.to(z.bias.dtype)
        return replace(z, weight=weight, bias=bias, low_rank=low_rank)
    return NotImplemented


def add(z: HeadLogits, other: Any, *, alpha: float = 1, sign: float = 1.0) -> Any:
    if z.log_softmax or z.capped or z.classes_second or alpha != 1:
        return NotImplemented
    if isinstance(other, Lazy):
        return _add_heads(z, other.formula, sign)
    if not _broadcasts_over_classes(z, other):
        return NotImplemented
    bias = other.reshape(-1) * (sign / z.after)
    if z.bias is not None:
        bias = z.bias + bias
    return replace(z, bias=bias.to(z.weight.dtype))


def _add_heads(a: HeadLogits, b: HeadLogits, sign: float) -> Any:
    """Two heads' sum is one head with a low-rank adapter: the thinner of them, whose hidden states go beside the other's."""
    if b.log_softmax or b.capped or b.classes_second or b.shape != a.shape:
        return NotImplemented
    dtype = torch.promote_types(a.dtype, b.dtype)
    b = b.scaled(sign)
    if b.weight.shape[1] > a.weight.shape[1]:
        a, b = b, a
    # An adapter may be in float32 beside a head in low precision (PEFT's).
    wider = b.hidden.dtype == torch.float32 and a.hidden.dtype in LOW_PRECISION
    if b.hidden.dtype != a.hidden.dtype and not wider:
        return NotImplemented
    factor = b.after / a.after
    hidden = torch.cat([a.hidden, (b.hidden * factor).to(a.hidden.dtype)], -1)
    thin = [x for x in (a.low_rank, b.weight, b.low_rank) if x is not None]
    bias = a.bias
    if b.bias is not None:
        bias = b.bias * factor if bias is None else bias + b.bias * factor
    return replace(a, hidden=hidden, bias=bias, low_rank=torch.cat(thin, -1), dtype=dtype)


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
    if kwargs.get("memory_format", torch.preserve_format) not in (
        torch.preserve_format,
        torch.contiguous_format,
    ):
        return NotImplemented
    dtype = z.dtype if dtype is None else dtype
    return z.to_dtype(dtype) if _may_cast(z, dtype) else NotImplemented


def _same(z: HeadLogits, *args: Any, **kwargs: Any) -> Any:
    return z


def _detach(z: HeadLogits) -> HeadLogits:
    bias, low_rank = (None if x is None else x.detach() for x in (z.bias, z.low_rank))
    return replace(z, hidden=z.hidden.detach(), weight=z.weight.detach(), bias=bias, low_rank=low_rank)


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
_TWICE: dict[str, Callable[..., Any]] = {
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
}  # fmt: skip
for _name, _rule in _TWICE.items():
    for _owner in (torch, T):
        if hasattr(_owner, _name):
            RULES[getattr(_owner, _name)] = _rule
for _function in (
    T.div,
    T.divide,
    T.true_divide,
    T.__truediv__,
    T.__div__,
    torch.div,
    torch.divide,
    torch.true_divide,
):
    RULES[_function] = lambda z, by, rounding_mode=None: (
        NotImplemented if rounding_mode else scale(z, by, divide=True)
    )
