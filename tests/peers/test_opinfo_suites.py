"""What PyTorch's generic suites ask of an operator, asked of fastloss's functions under the two OpInfo entries of cross-entropy.

The checks are the installed torch's own (torch.testing._internal). A few samples of each entry are taken here, and all with
FASTLOSS_TEST_SLOW=1. torch_suites.py runs PyTorch's own test files, which no wheel carries, from a checkout.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss

common = pytest.importorskip("torch.testing._internal.common_methods_invocations")
compliance = pytest.importorskip("torch.testing._internal.composite_compliance")
from torch._library.custom_ops import OPDEFS  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.testing._internal.common_device_type import instantiate_device_type_tests, ops  # noqa: E402
from torch.testing._internal.common_utils import TestCase, TestGradients  # noqa: E402
from torch.testing._internal.optests import aot_autograd_check  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

SLOW = os.environ.get("FASTLOSS_TEST_SLOW", "") not in ("", "0")
# Samples of each entry, spread over them; of the checks that trace, fewer.
PART, TRACED = 5, 2
FUNCTIONS = {
    "nn.functional.cross_entropy": fastloss.cross_entropy,
    "nn.functional.linear_cross_entropy": fastloss.linear_cross_entropy,
}


def _thinned(original: Callable[..., Any], part: int, *args: Any, **kwargs: Any) -> Iterator[Any]:
    samples = list(original(*args, **kwargs))
    whole = SLOW or len(samples) <= part
    yield from samples if whole else [samples[i * len(samples) // part] for i in range(part)]


def _entries(part: int) -> list[Any]:
    """Copies of PyTorch's entries, whose operator is fastloss's and whose samples are thinned."""
    made = []
    for op in common.op_db:
        # What the chunks of torch's function cannot do is no question to ask of ours; test_opinfo.py has their values.
        if op.name in FUNCTIONS and op.variant_test_name == "":
            ours = copy.copy(op)
            ours.op = FUNCTIONS[op.name]
            ours.sample_inputs_func = functools.partial(_thinned, op.sample_inputs_func, part)
            made.append(ours)
    return made


of_double = functools.partial(ops, _entries(PART), allowed_dtypes=(torch.float64,))
of_float = functools.partial(ops, _entries(PART), allowed_dtypes=(torch.float32,))
traced = functools.partial(ops, _entries(TRACED), allowed_dtypes=(torch.float32,))


def _float_inputs(sample: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The sample as a function of its float arguments that are differentiated, and these."""
    given = [sample.input, *sample.args]
    places = [i for i, x in enumerate(given) if isinstance(x, Tensor) and x.requires_grad]

    def function(operator: Any, *values: Tensor) -> Tensor:
        arguments = list(given)
        for i, x in zip(places, values, strict=True):
            arguments[i] = x
        return operator(*arguments, **sample.kwargs)

    return function, tuple(given[i].detach() for i in places)


def _original(op: Any) -> Any:
    return getattr(torch.nn.functional, op.name.rsplit(".", 1)[1])


def _loss(operator: Any, function: Any) -> Any:
    return lambda *x: (function(operator, *x),)


def _pulled(operator: Any, function: Any) -> Any:
    def pulled(*x: Tensor) -> Any:
        out, pull = torch.func.vjp(lambda *y: function(operator, *y), *x)
        return pull(torch.ones_like(out))

    return pulled


def _pushed(operator: Any, function: Any) -> Any:
    return lambda *x: torch.func.jvp(lambda *y: function(operator, *y), x, tuple(y.cos() for y in x))


class TestOurGradients(TestGradients):  # type: ignore[misc]
    """test_ops_gradients.py and test_ops_fwd_gradients.py."""

    @of_double()
    def test_first(self, device: str, dtype: torch.dtype, op: Any) -> None:
        self._grad_test_helper(device, dtype, op, op.get_op())

    @of_double()
    def test_second(self, device: str, dtype: torch.dtype, op: Any) -> None:
        self._check_helper(device, dtype, op, op.get_op(), "bwgrad_bwgrad")

    @of_double()
    def test_forward_mode(self, device: str, dtype: torch.dtype, op: Any) -> None:
        self._grad_test_helper(
            device, dtype, op, op.get_op(), check_forward_ad=True, check_backward_ad=False,
            check_batched_grad=False, check_batched_forward_grad=op.check_batched_forward_grad,
        )  # fmt: skip

    @of_double()
    def test_forward_over_backward(self, device: str, dtype: torch.dtype, op: Any) -> None:
        self._check_helper(device, dtype, op, op.get_op(), "fwgrad_bwgrad")


class RepeatedOnMeta(TorchDispatchMode):
    """Every operator that is called is called on meta tensors too, which must give the same shapes, strides and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_meta = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        out = func(*args, **kwargs)
        if func.namespace == "fastloss":
            self.ours.add(str(func))
            got = func(*on_meta[0], **on_meta[1])
            for x, y in zip(tree_leaves(got), tree_leaves(out), strict=True):
                if isinstance(y, Tensor):
                    assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype), func
        return out


def test_every_operator_has_a_meta_kernel() -> None:
    ours = {name: op for name, op in OPDEFS.items() if name.startswith("fastloss::")}
    assert len(ours) > 3 and [name for name, op in ours.items() if op._abstract_fn is None] == []


class TestOurComposition(TestCase):  # type: ignore[misc]
    """test_ops.py, test_meta.py, test_proxy_tensor.py, test_decomp.py and those of functorch, in what concerns one operator."""

    @of_float()
    def test_composite_operator(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in op.sample_inputs(device, dtype, requires_grad=False):
            args = [sample.input, *sample.args]
            compliance.check_with_mode(op, args, sample.kwargs, self.assertEqual)
            compliance.check_all_permutations(op, args, sample.kwargs, self.assertEqual)

    @of_float()
    def test_composite_backward(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            args = [sample.input, *sample.args]
            compliance.check_backward_formula(
                op.get_op(),
                args,
                sample.kwargs,
                sample.output_process_fn_grad,
                op.gradcheck_wrapper,
                self.assertEqual,
            )

    @traced()
    def test_composite_forward_mode(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            args = [sample.input, *sample.args]
            compliance.check_forward_ad_formula(
                op.get_op(), args, sample.kwargs, op.gradcheck_wrapper, self.assertEqual
            )

    @of_double()
    def test_negative_view(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            function, values = _float_inputs(sample)
            views = [torch._neg_view(-x).requires_grad_() for x in values]
            leaves = [x.clone().requires_grad_() for x in values]
            got, want = function(op, *views), function(_original(op), *leaves)
            self.assertEqual(got, want)
            upstream = torch.randn_like(want)
            grads = torch.autograd.grad(got, views, torch._neg_view(-upstream))
            self.assertEqual(grads, torch.autograd.grad(want, leaves, upstream))

    @of_float()
    def test_meta(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            on_meta = sample.transform(lambda x: x.to("meta") if isinstance(x, Tensor) else x)
            leaf = on_meta.input.detach().requires_grad_()
            got = op(leaf, *on_meta.args, **on_meta.kwargs)
            want = _original(op)(sample.input, *sample.args, **sample.kwargs)
            assert got.is_meta and got.shape == want.shape and got.dtype == want.dtype
            (grad,) = torch.autograd.grad(got.sum(), leaf)
            assert grad.is_meta and grad.shape == sample.input.shape

    @of_float()
    def test_operators_on_meta(self, device: str, dtype: torch.dtype, op: Any) -> None:
        with RepeatedOnMeta() as mode:
            for sample in op.sample_inputs(device, dtype, requires_grad=True):
                op(sample.input, *sample.args, **sample.kwargs).sum().backward()
        assert "linear" not in op.name or "fastloss.head_gemms.default" in mode.ours

    @traced()
    def test_make_fx(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            function, values = _float_inputs(sample)

            def both(*values: Tensor, function: Any = function) -> Any:
                leaves = [x.detach().requires_grad_() for x in values]
                out = function(op, *leaves)
                return out, torch.autograd.grad(out.sum(), leaves)

            others = [x + torch.rand_like(x) for x in values]
            for mode in ("real", "fake", "symbolic"):
                recorded = make_fx(both, tracing_mode=mode, _allow_non_fake_inputs=True)(*values)
                self.assertEqual(recorded(*others), both(*others), msg=mode)

    @traced()
    def test_aot_autograd(self, device: str, dtype: torch.dtype, op: Any) -> None:
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            for dynamic in (False, True):
                args = [sample.input, *sample.args]
                aot_autograd_check(
                    op.op, args, sample.kwargs, dynamic, self.assertRaisesRegex, self.assertEqual,
                    check_gradients=True, try_check_data_specialization=False,
                )  # fmt: skip

    @of_double()
    def test_grad_vjp_jvp(self, device: str, dtype: torch.dtype, op: Any) -> None:
        """Each transform, and the pairs vjp of vjp, jvp of vjp, jvp of jvp: what PyTorch's own function gives."""
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            function, values = _float_inputs(sample)
            tangents = tuple(torch.randn_like(x) for x in values)
            out = function(_original(op), *values)
            upstream = torch.randn_like(out)
            self._assert_transforms_equal(op, function, values, tangents, upstream)

    def _assert_transforms_equal(
        self, op: Any, function: Any, values: Any, tangents: Any, upstream: Tensor
    ) -> None:
        def results(operator: Any) -> list[Any]:
            def loss(*x: Tensor) -> Tensor:
                return function(operator, *x)

            def pulled(*x: Tensor) -> Any:
                return torch.func.vjp(loss, *x)[1](upstream)

            def pushed(*x: Tensor) -> Any:
                return torch.func.jvp(loss, x, tangents)[1]

            every = tuple(range(len(values)))
            return [
                torch.func.grad(lambda *x: loss(*x).sum(), argnums=every)(*values),
                pulled(*values),
                pushed(*values),
                torch.func.vjp(pulled, *values)[1](tangents),
                torch.func.jvp(pulled, values, tangents),
                torch.func.jvp(pushed, values, tangents),
            ]

        self.assertEqual(results(op), results(_original(op)))

    @of_double()
    def test_vmap(self, device: str, dtype: torch.dtype, op: Any) -> None:
        """Of the function, of its vjp and of its jvp, over each of the arguments and over all of them."""
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            function, values = _float_inputs(sample)
            batched = [torch.stack([x, x + 0.5, -x]) for x in values]
            every = tuple(0 for _ in values)
            some = {
                every,
                *(tuple(0 if i == j else None for j in range(len(values))) for i in range(len(values))),
            }
            for dims in some:
                inputs = [b if d == 0 else x for b, d, x in zip(batched, dims, values, strict=True)]
                for made in (_loss, _pulled, _pushed):
                    each = made(op, function)
                    want = [
                        made(_original(op), function)(*(b[i] if d == 0 else x for b, d, x in zip(batched, dims, values, strict=True)))
                        for i in range(3)
                    ]  # fmt: skip
                    got = torch.func.vmap(each, in_dims=dims)(*inputs)
                    self.assertEqual(got, tuple(torch.stack(x) for x in zip(*want, strict=True)))


instantiate_device_type_tests(TestOurGradients, globals(), only_for="cpu")
instantiate_device_type_tests(TestOurComposition, globals(), only_for="cpu")
