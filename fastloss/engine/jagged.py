"""Jagged (nested) tensors at the door of a public function: one ragged dimension, the sequences', becomes the packed form."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.checks import ShapeError

F = TypeVar("F", bound=Callable[..., Any])


def _class() -> Any:
    """PyTorch's jagged tensor, or None where nobody has imported it: then no argument is one."""
    module = sys.modules.get("torch.nested._internal.nested_tensor")
    return None if module is None else getattr(module, "NestedTensor", None)


def takes_jagged(*per_token: type) -> Callable[[F], F]:
    """The function with jagged tensors ``[B, *, …]`` accepted where its first argument is one: the others of the same lengths are
    packed with it, and where it has ``cu_seqlens`` these are the offsets. Results per token are jagged, too: plain tensors, and
    those in a tuple or in one of the types ``per_token``."""

    def wrap(function: F) -> F:
        parameters = inspect.signature(function).parameters
        names, packs = list(parameters), "cu_seqlens" in parameters

        @functools.wraps(function)
        def of_any(*args: Any, **kwargs: Any) -> Any:
            kind = _class()
            if kind is None or type(args[0] if args else kwargs.get(names[0])) is not kind:
                return function(*args, **kwargs)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return _of_jagged(function, given, names[0], kind, packs, (tuple, *per_token))

        return of_any  # type: ignore[return-value]

    return wrap


def _of_jagged(
    function: Any, given: dict[str, Any], first: str, kind: Any, packs: bool, per_token: tuple[type, ...]
) -> Any:
    like = given[first]
    offsets = like.offsets()
    if packs:
        if given.get("cu_seqlens") is not None:
            raise ShapeError(f"cu_seqlens: expected None beside a jagged {first}, got a tensor")
        given = {**given, "cu_seqlens": offsets}
    flat = {name: _values(name, x, first, offsets) if type(x) is kind else x for name, x in given.items()}
    return _with_lengths(function(**flat), flat[first].shape[0], offsets, per_token)


def _values(name: str, x: Any, first: str, offsets: Tensor) -> Tensor:
    if x.lengths() is not None or x._ragged_idx != 1:
        raise ShapeError(f"{name}: expected a jagged tensor [B, *, …] without holes, got {list(x.shape)}")
    own = x.offsets()
    if own is not offsets and (
        own.shape != offsets.shape or (checks.host_reads(own) and not torch.equal(own, offsets))
    ):
        raise ShapeError(f"{name}: expected the lengths of {first}, got others")
    out: Tensor = x.values()
    return out


def _with_lengths(result: Any, tokens: int, offsets: Tensor, per_token: tuple[type, ...]) -> Any:
    if type(result) in per_token:
        parts = [_with_lengths(x, tokens, offsets, per_token) for x in result]
        return tuple(parts) if type(result) is tuple else type(result)(*parts)
    if isinstance(result, Tensor) and result.dim() and result.shape[0] == tokens:
        return torch.nested.nested_tensor_from_jagged(result, offsets)
    return result
