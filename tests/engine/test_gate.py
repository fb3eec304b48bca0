"""The gate to native code: what is plain, dense memory passes with its address, everything else is an error that names it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastloss.engine.gate import address, addresses, of_dense, of_made, to_write


def resized(elements: int, transposed: bool = False) -> Tensor:
    x = torch.ones(4, 6)
    view = x.t()[1:] if transposed else x
    x.untyped_storage().resize_(elements * x.element_size())
    return view


class Subclass(Tensor):
    pass


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "freed": (lambda: resized(0), "expected 96 bytes of storage, got 0"),
    "too small": (lambda: resized(23), "expected 96 bytes of storage, got 92"),
    "too small for its strides": (
        lambda: resized(23, transposed=True),
        "expected 96 bytes of storage, got 92",
    ),
    "negative view": (
        lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        "negative view; use .resolve_neg",
    ),
    "conjugate view": (
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        "conjugate view; use .resolve_conj",
    ),
    "zero tensor": (lambda: torch._efficientzerotensor(3), "zero tensor"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "subclass": (lambda: torch.ones(3).as_subclass(Subclass), "got Subclass"),
    "fake": (lambda: FakeTensorMode().from_tensor(torch.ones(3)), "got FakeTensor"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=list(REFUSED))
def test_refused(make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        address(make())


def test_transformed_by_torch_func() -> None:
    def f(x: Tensor) -> Tensor:
        with pytest.raises(ValueError, match=r"torch\.func"):
            address(x)
        return x.sum()

    torch.func.grad(f)(torch.ones(3))
    torch.func.vmap(f)(torch.ones(2, 3))
    torch.func.functionalize(f)(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_address_of_an_element(dtype: torch.dtype) -> None:
    x = torch.ones(5, 7).to(dtype)
    first = x.data_ptr()
    assert address(None) == 0
    assert address(x) == of_dense(x) == of_made(x) == first
    assert address(torch.nn.Parameter(x, requires_grad=False)) == first
    assert address(x[1:, 2:]) == first + 9 * x.element_size()
    assert address(x.t()[3:]) == first + 3 * x.element_size()
    assert address(x[4:, 6:]) == first + 34 * x.element_size()
    assert address(x[:1].expand(9, 7)) == first


def test_nothing_needs_no_memory() -> None:
    assert address(torch.empty(0)) == 0
    x = torch.ones(4)
    x.untyped_storage().resize_(0)
    assert address(x[:0]) == 0


def test_storage_that_came_back_passes() -> None:
    x = torch.ones(4, 6)
    x.untyped_storage().resize_(0)
    x.untyped_storage().resize_(96)
    assert address(x) == x.data_ptr() != 0


@pytest.mark.skipif(
    not hasattr(Tensor, "const_data_ptr"), reason="this torch has no address that is only read"
)
def test_a_copy_on_write_tensor_is_copied_where_it_is_written() -> None:
    x = torch.arange(4.0)
    lazy = torch._lazy_clone(x)
    assert address(lazy) == of_dense(lazy) == address(x) != 0
    assert torch._C._is_cow_tensor(lazy)
    # Read and written in one call: one memory for both, not the shared one.
    places = addresses({"logits": lazy, "of": x}, {}, grad=lazy)
    assert places["logits"] == places["grad"] == to_write(lazy) != places["of"]
    assert not torch._C._is_cow_tensor(lazy)
