"""The one gate to native code, which believes every address it is given: what is not plain, dense memory is refused here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_PARAMETER = torch.nn.Parameter


class LazyView(ValueError):
    """A negative or conjugate view: its elements are not what lies in memory, and one copy away from it. Every public function
    that has kernels takes them (``resolves_views`` of engine/backend.py)."""


# Of a tensor that the caller has from torch.empty or its like, and nobody else has seen: there is nothing to ask. Gradients must come
# through here: a storage that Python has seen, as address() makes it, has one owner more, and then autograd adds the gradients
# of a tensor that is used twice (a tied weight) into a third tensor and not into one of the two.
of_made = Tensor.data_ptr

# Of a tensor that is only read. Where torch has this question (2.8 has not) a copy-on-write tensor stays one: data_ptr copies it.
_of_read = getattr(Tensor, "const_data_ptr", Tensor.data_ptr)


def of_dense(tensor: Tensor | None) -> int:
    """:func:`address` of a plain tensor that is only read and that the caller has seen to be contiguous and of a real dtype: fewer questions are left,
    for calls so small that each of them counts."""
    if tensor is None:
        return 0
    place = _of_read(tensor)
    # Freed storage begins at address 0.
    if place == tensor.storage_offset() * tensor.itemsize or tensor.is_neg():
        check(tensor)
    return place


def address(tensor: Tensor | None) -> int:
    """Where ``tensor`` lies in memory, to be read; 0 for None. No address of a tensor is taken outside this module.

    Raises:
        ValueError: it is not what its elements are in memory (a subclass, a wrapper of torch.func, a fake, meta, sparse, nested or
            zero tensor, a negative or conjugate view), or its storage was freed or is smaller than the tensor.
    """
    return 0 if tensor is None else _checked(tensor, _of_read)


def to_write(tensor: Tensor | None) -> int:
    """:func:`address` of a tensor that is written, also one that somebody else has seen: a copy-on-write tensor gets memory of its
    own. Where it is read in the same call too, it is asked first."""
    return 0 if tensor is None else _checked(tensor, of_made)


def _checked(tensor: Tensor, place_of: Callable[[Tensor], int]) -> int:
    kind = type(tensor)
    if kind is Tensor or kind is _PARAMETER:
        try:
            place = place_of(tensor)
            # The common case with the fewest questions; check() asks all of them.
            if (
                place
                and tensor.is_contiguous()
                and not (tensor.is_conj() or tensor.is_nested or tensor.is_neg())
            ):
                before = tensor.storage_offset() * tensor.itemsize  # a storage's own data_ptr would copy it
                if before + tensor.nbytes <= tensor.untyped_storage().nbytes():
                    return place
        except (RuntimeError, NotImplementedError):  # it has no storage: check() says why
            place = 0
        check(tensor)
        return place
    check(tensor)
    raise AssertionError("check() lets no other type through")


def addresses(
    given: dict[str, Tensor | None], made: dict[str, Tensor | None], **written: Tensor | None
) -> dict[str, int]:
    """Of the arguments of one native call, by name: ``given`` to be read, ``written``, and just ``made``, which nobody else has seen."""
    out = {name: to_write(tensor) for name, tensor in written.items()}
    for name, tensor in given.items():
        out[name] = address(tensor)
    for name, tensor in made.items():
        out[name] = 0 if tensor is None else of_made(tensor)
    return out


def check(tensor: Tensor) -> Tensor:
    """``tensor``, whose elements lie in memory as its strides say; ValueError as in :func:`address` where they do not."""
    kind = type(tensor)
    if kind is not Tensor and kind is not _PARAMETER:
        raise ValueError(
            f"tensor: expected a plain torch.Tensor, got {kind.__name__}; give the one it holds, or use backend='reference'"
        )
    if reason := _why_not(tensor):
        error = LazyView if reason.startswith(_LAZY) else ValueError
        raise error(f"tensor: expected {reason}")
    return tensor


_LAZY = "its elements in memory"


def _why_not(tensor: Tensor) -> str:
    """What was expected, what was got and the way out; empty if the tensor is dense and in memory."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a plain tensor, got one that torch.func transforms; use backend='reference'"
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        return f"a dense one, got layout {layout}; use .to_dense() or .to_padded_tensor()"
    if tensor.is_meta:
        return "one with memory, got a meta tensor; make it with .to_empty(device=...)"
    if tensor._is_zerotensor():
        return "one with memory, got a zero tensor of autograd; use .clone()"
    if tensor.is_neg():
        return f"{_LAZY}, got a negative view; use .resolve_neg()"
    if tensor.is_conj():
        return f"{_LAZY}, got a conjugate view; use .resolve_conj()"
    if not tensor.numel():
        return ""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + steps + 1) * tensor.element_size()
    try:
        there = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return "one with memory, got one without storage; use backend='reference'"
    if needed > there:
        return (
            f"{needed} bytes of storage, got {there}: it was freed or resized, as FSDP does with parameters between uses;"
            " use the tensor while its memory is there"
        )
    return ""
