"""LazyLogits: logits that are not multiplied out until somebody needs the numbers.

A language model ends in ``logits = hidden @ weight.T + bias`` and a few steps on them (a slice, a scale, a soft-cap, a
cast, a view), and then a loss. Lazy logits keep ``hidden``, ``weight`` and ``bias`` and follow those steps; a loss of
them is fastloss's loss of the linear head. Whatever else is asked of them makes the real logits, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import fastloss
from fastloss.lazy_rules import RULES, HeadLogits, Lazy, describe, multiplied_out

__all__ = ["LazyLogits"]

T = torch.Tensor
# In place, lazily: a scale; its out-of-place form is what the real logits replay.
IN_PLACE: dict[Any, Any] = {
    T.mul_: T.mul,
    T.__imul__: T.mul,
    T.div_: T.div,
    T.__itruediv__: T.div,
    T.__idiv__: T.div,
}
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
    def forward(
        ctx: Any, formula: HeadLogits, hidden: Tensor, weight: Tensor, bias: Any, low_rank: Any
    ) -> Any:
        ctx.save_for_backward(hidden, weight, bias, low_rank)
        ctx.formula = formula.without_tensors()
        return torch.Tensor._make_wrapper_subclass(
            LazyLogits, formula.shape, dtype=formula.dtype, device=hidden.device
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        hidden, weight, bias, low_rank = leaves
        with torch.enable_grad():
            formula = replace(ctx.formula, hidden=hidden, weight=weight, bias=bias, low_rank=low_rank)
            z = multiplied_out(formula)
        needs = ctx.needs_input_grad[1:]
        grads = iter(torch.autograd.grad(z, [t for t, need in zip(leaves, needs) if need], grad))
        return None, *(next(grads) if need else None for need in needs)


class LazyLogits(torch.Tensor, Lazy):
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
            self: Any = _Connect.apply(z, z.hidden, z.weight, z.bias, z.low_rank)
        self._node, self._changed, self._contiguous = node, None, contiguous
        self._memory, self._seen = memory, memory.owner
        return self

    @property
    def formula(self) -> HeadLogits:  # type: ignore[override]
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

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
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
        if func is T.register_hook and _is_of_fsdp(rest):
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
            if (
                result is node.formula
                and func in NO_COPY_IF_SAME
                and (z._contiguous or func is not T.contiguous)
            ):
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
            # With its graph, even where the change itself is made without one.
            with torch.set_grad_enabled(self._node.with_graph):
                self._changed = self._node.dense().clone() if self._node.has_real() else self._node.make()
        self._memory.owner = self._seen = object()
        real = self._changed
        out = func(real, *_dense(rest), **_dense(kwargs))
        return self if out is real else out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached from C++ alone, past __torch_function__: there, too, the numbers are the real logits'.
        return func(*_dense(args), **_dense(kwargs or {}))


class _TracedLogits(Lazy):
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
    """LazyLogits, or what stands for them where those cannot be: while torch.compile traces; under torch.func, real ones."""
    if torch.compiler.is_compiling():
        return _TracedLogits(describe(hidden, weight, bias))
    if torch._C._are_functorch_transforms_active():
        return F.linear(hidden, weight, bias)
    return LazyLogits(hidden, weight, bias)


def ask(function: Callable[..., Any], logits: Any, *args: Any, **kwargs: Any) -> Any:
    """A function of fastloss on logits that may be lazy."""
    if isinstance(logits, Lazy):
        kind: Any = type(logits)
        return kind.__torch_function__(function, (kind,), (logits, *args), kwargs)
    return function(logits, *args, **kwargs)


COMMUTES = {torch.mul, torch.add, T.mul, T.add, T.__mul__, T.__rmul__, T.__add__, T.__radd__}
METADATA = {
    getattr(T, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_leaf", "requires_grad",
                 "grad_fn", "is_sparse", "is_quantized", "is_meta", "is_mps", "is_xpu", "is_nested", "names",
                 "itemsize", "nbytes", "_base", "output_nr", "retains_grad", "grad")
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


def _is_of_fsdp(hooks: Any) -> bool:
    """FSDP2 hangs a hook on every output of a module, to be told that the backward begins; the loss tells it as well."""
    owner = getattr(hooks[0], "__self__", None) if hooks else None
    return type(owner).__module__.startswith("torch.distributed.fsdp")


def _item(n: int, func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)[n]


def _versions(z: HeadLogits) -> tuple[int | None, ...]:
    operands = [t for t in (z.hidden, z.weight, z.low_rank) if t is not None]
    return tuple(None if t.is_inference() else t._version for t in operands)


def _dense(value: Any) -> Any:
    if isinstance(value, (LazyLogits, _TracedLogits, _Node)):
        return value.dense()
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        made = [_dense(v) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {k: _dense(v) for k, v in value.items()}
    return value
