"""Every sample input of PyTorch's own OpInfo gives PyTorch's result: values, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastloss

common = pytest.importorskip("torch.testing._internal.common_methods_invocations")

FUNCTIONS = {
    "nn.functional.cross_entropy": fastloss.cross_entropy,
    "nn.functional.linear_cross_entropy": fastloss.linear_cross_entropy,
}
OPS = [op for op in common.op_db if op.name in FUNCTIONS]
assert OPS


def _assert_same(got: Tensor, expected: Tensor) -> None:
    # PyTorch's bfloat16 result is rounded several times on its way; fastloss's once.
    size = expected.detach().abs().max().item() if expected.numel() else 0.0
    loose = {"rtol": 2e-2, "atol": 2e-2 * max(size, 1.0)} if expected.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, expected, **loose)


def _leaves(tensors: list) -> list:
    return [
        t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in tensors
    ]


@pytest.mark.parametrize("op", OPS, ids=[f"{op.name}-{op.variant_test_name}" for op in OPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_samples(op, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        args = [sample.input, *sample.args]
        kwargs = dict(sample.kwargs)
        theirs, ours = _leaves(args), _leaves(args)
        keys = list(kwargs)
        their_kwargs = dict(zip(keys, _leaves(list(kwargs.values())), strict=True))
        our_kwargs = dict(zip(keys, _leaves(list(kwargs.values())), strict=True))
        expected = op.op(*theirs, **their_kwargs)
        got = FUNCTIONS[op.name](*ours, **our_kwargs, backend=backend)
        _assert_same(got, expected)
        upstream = torch.randn_like(expected)
        expected.backward(upstream)
        got.backward(upstream)
        for a, b in zip([*ours, *our_kwargs.values()], [*theirs, *their_kwargs.values()], strict=True):
            if isinstance(b, Tensor) and b.requires_grad:
                _assert_same(a.grad, b.grad)
        count += 1
    assert count > 5


@pytest.mark.parametrize(
    "op", [op for op in OPS if op.error_inputs_func], ids=lambda op: f"{op.name}-{op.variant_test_name}"
)
def test_errors(op) -> None:
    count = 0
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            FUNCTIONS[op.name](sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count
