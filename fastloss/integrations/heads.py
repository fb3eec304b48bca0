"""Vocabulary heads that hand out lazy logits while they are told to: what every integration with a model in hand uses."""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastloss.lazy_logits import lazy

__all__ = ["lazy_heads"]

LAZY = "_fastloss_lazy"


@contextlib.contextmanager
def lazy_heads(*heads: nn.Module) -> Iterator[None]:
    """In the block, these heads (``nn.Linear``, or modules around one) give :class:`fastloss.LazyLogits`.

    >>> import torch
    >>> from fastloss.integrations.heads import lazy_heads
    >>> head = torch.nn.Linear(8, 50)
    >>> with lazy_heads(head):
    ...     logits = head(torch.zeros(3, 8))
    >>> logits
    LazyLogits(shape=[3, 50], dtype=torch.float32, not multiplied out)
    """
    active = activate(heads)
    try:
        yield
    finally:
        deactivate(active)


def activate(heads: Iterable[Any]) -> list[Any]:
    active = [head for head in heads if _can_be_lazy(head)]
    for head in active:
        patch_head(head)  # the first time; or built, or wrapped by an adapter, since
        head._fastloss_active = True
    return active


def deactivate(heads: Iterable[Any]) -> None:
    for head in heads:
        head._fastloss_active = False


def is_lazy(cls: type) -> bool:
    return any(LAZY in c.__dict__ for c in cls.__mro__)


def patch_head(head: Any) -> None:
    if not is_lazy(type(head)):
        head_class: Any = type(head)
        head.__class__ = _lazy_head_class(head_class)


def take_back(module: Any) -> None:
    """The class that the module had."""
    if LAZY in type(module).__dict__:
        module.__class__ = type(module)._fastloss_original
        module.__dict__.pop("_fastloss_active", None)


def _can_be_lazy(head: Any) -> bool:
    """Not for a packed weight (quantised), nor for one that is there during the head's own call alone (ZeRO-3)."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return False
    if hasattr(head, "set_reshard_after_forward"):
        # FSDP2 on the head itself: the weight stays until the loss is computed.
        head.set_reshard_after_forward(False)
    return not hasattr(weight, "ds_id")


@functools.cache
def _lazy_head_class(cls: Any) -> Any:
    inner = cls.forward
    plain = inner is nn.Linear.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A weight in parts (a DTensor under tensor parallelism) keeps the head's own product.
        if not self.__dict__.get("_fastloss_active", False) or type(self.weight) not in (
            Tensor,
            nn.Parameter,
        ):
            return inner(self, *args, **kwargs)
        if plain:
            return lazy(args[0] if args else kwargs["input"], self.weight, self.bias)
        # A head with a forward of its own (a scale per class, a low-rank adapter): its products with [V, …] are lazy.
        with _LazyProducts(self.weight.shape[0]):
            return inner(self, *args, **kwargs)

    return subclass(cls, forward, _lazy_head_class)


class _LazyProducts(TorchFunctionMode):
    """F.linear with a weight of ``vocab`` rows gives lazy logits."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and args[1].shape[0] == self.vocab and type(args[0]) is Tensor:
            return lazy(*args, **kwargs)
        return func(*args, **kwargs)


def subclass(cls: Any, forward: Any, maker: Callable[[Any], Any]) -> Any:
    """A subclass of ``cls`` under its own name, that copies and pickles as an instance of ``cls`` would."""

    def reduce(self: Any, protocol: Any) -> Any:
        made = super(made_class, self).__reduce_ex__(protocol)
        if made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (cls, maker), *made[2:])
        return made

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fastloss_original": cls,
        LAZY: True,
    }
    made_class = type(cls)(cls.__name__, (cls,), body)
    return made_class


def _blank(cls: Any, maker: Callable[[Any], Any]) -> Any:
    made = maker(cls)
    return made.__new__(made)
