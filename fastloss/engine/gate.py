"""The one gate to native code: what is not plain, dense memory is refused here."""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def check(tensor: Tensor) -> Tensor:
    """``tensor``, whose elements lie in memory as its strides say.

    Raises:
        TypeError: a subclass (FakeTensor, DTensor, an asynchronous collective's result), a wrapper of torch.func, a tensor
            without memory (meta, sparse, nested, zero), or a view whose elements are negated or conjugated on the way.
    """
    if type(tensor) not in PLAIN:
        raise TypeError(f"expected a plain tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor._is_zerotensor():
        raise TypeError(f"expected a tensor with dense memory, got {tensor.layout} on {tensor.device}")
    if tensor.is_neg() or tensor.is_conj():
        raise TypeError("expected a tensor as it lies in memory, got a negative or conjugate view")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError("expected a plain tensor, got one that torch.func transforms")
    return tensor


def address(tensor: Tensor | None) -> int:
    """Of a tensor that passed :func:`check`; 0 for None."""
    return 0 if tensor is None else check(tensor).data_ptr()
