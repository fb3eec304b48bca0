"""Every sample input of PyTorch's own OpInfo gives PyTorch's result: values, gradients, errors.

The GPU backends run interpreted (triton) and emulated (cuda). The interpreter gets a part of the samples, spread over
them; FASTLOSS_OPINFO_ALL=1 gives it all.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, dtypes, need
from torch import Tensor

import fastloss

common = pytest.importorskip("torch.testing._internal.common_methods_invocations")

FUNCTIONS = {
    "nn.functional.cross_entropy": fastloss.cross_entropy,
    "nn.functional.linear_cross_entropy": fastloss.linear_cross_entropy,
}
OPS = [op for op in common.op_db if op.name in FUNCTIONS]
assert OPS


# The place of the target among the arguments beside the input.
TARGET = {"nn.functional.cross_entropy": 0, "nn.functional.linear_cross_entropy": 1}
# Asked for by name they refuse to differentiate class probabilities; auto falls back to the definition.
KERNELS_ALONE = ("triton", "cuda")
PART = 12  # of the samples, interpreted
USUAL = (torch.float32, torch.float64, torch.bfloat16)
CASES = [(backend, dtype) for backend in ("auto", "reference") for dtype in USUAL]
CASES += [(backend, dtype) for backend in KERNELS_ALONE for dtype in dtypes(backend)]


def _assert_no_further(got: Tensor, allowed: list[Tensor], exact: Tensor) -> None:
    """Not further from the float64 result than the worst of ``allowed``, and a rounding."""
    assert torch.equal(got.isnan(), exact.isnan())
    error, *theirs = (float((x.double() - exact).nan_to_num().norm()) for x in (got, *allowed))
    assert error <= max(theirs) + torch.finfo(got.dtype).eps * float(exact.nan_to_num().norm())


def _of_rounded_logits(dtype: torch.dtype) -> Any:
    """The linear function whose logits alone are rounded to ``dtype``: what that costs is the same for every implementation."""

    def function(
        input, linear_weight, target, *, linear_bias=None, ignore_index=None, options=None, **kwargs
    ):  # type: ignore[no-untyped-def]
        bias = None if linear_bias is None else linear_bias.reshape(-1)
        logits = torch.nn.functional.linear(input, linear_weight.reshape(-1, input.shape[-1]), bias)
        logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1]).to(dtype).to(input.dtype)
        kept = {} if ignore_index is None else {"ignore_index": ignore_index}
        return torch.nn.functional.cross_entropy(logits, target, **kept, **kwargs)

    return function


class Call:
    """A sample's arguments, as leaves of their own."""

    def __init__(self, sample: Any, place: int, dtype: torch.dtype, differentiate_target: bool):
        target = sample.args[place]
        self.args = [
            self.leaf(x, dtype, x is not target or differentiate_target) for x in (sample.input, *sample.args)
        ]
        self.kwargs = {name: self.leaf(x, dtype, True) for name, x in sample.kwargs.items()}

    @staticmethod
    def leaf(x: Any, dtype: torch.dtype, differentiate: bool) -> Any:
        if not isinstance(x, Tensor):
            return x
        x, wanted = x.detach().clone(), x.requires_grad and differentiate
        return (x.to(dtype) if x.is_floating_point() else x).requires_grad_(wanted)

    def gradients(self) -> list[Tensor]:
        leaves = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
        return [x.grad for x in leaves if x.grad is not None]


def _samples(op: Any, dtype: torch.dtype, backend: str) -> list[Any]:
    device = DEVICE if backend in KERNELS_ALONE else "cpu"
    samples = list(op.sample_inputs(device, dtype, requires_grad=True))
    if (
        backend != "triton"
        or DEVICE != "cpu"
        or os.environ.get("FASTLOSS_OPINFO_ALL")
        or len(samples) <= PART
    ):
        return samples
    return [samples[i * len(samples) // PART] for i in range(PART)]


@pytest.mark.parametrize("op", OPS, ids=[f"{op.name}-{op.variant_test_name}" for op in OPS])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=[f"{b}-{d}" for b, d in CASES])
def test_samples(op, backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernels_alone = backend in (
        "triton",
        "cuda",
    )  # auto and the definition differentiate class probabilities too
    if kernels_alone:
        need(backend)
    place, function = TARGET[op.name], FUNCTIONS[op.name]
    samples = _samples(op, dtype, backend)
    assert len(samples) > 5
    for sample in samples:
        if kernels_alone and sample.args[place].requires_grad:
            refused = Call(sample, place, dtype, True)
            with pytest.raises(RuntimeError, match="the target's own gradient"):
                function(*refused.args, **refused.kwargs, backend=backend)
        ours, theirs = (Call(sample, place, dtype, not kernels_alone) for _ in range(2))
        low = dtype in (torch.bfloat16, torch.float16)
        if low:
            # The kernels promise to be no worse than PyTorch's expression over logits of that dtype. The chunks of torch 2.15
            # keep float32 logits, and are better than both where logits are large.
            theirs.kwargs.pop("options", None)
        got = function(*ours.args, **ours.kwargs, backend=backend)
        expected = op.op(*theirs.args, **theirs.kwargs)
        upstream = torch.randn_like(expected)
        got.backward(upstream)
        expected.backward(upstream)
        results, peers = [got.detach(), *ours.gradients()], [expected.detach(), *theirs.gradients()]
        if not low:
            for mine, peer in zip(results, peers, strict=True):
                torch.testing.assert_close(mine, peer)
            continue
        # PyTorch's own result is off by more than assert_close takes: float64 judges both, by the definition, which is
        # PyTorch's there (above).
        truth, rounded = (Call(sample, place, torch.float64, not kernels_alone) for _ in range(2))
        exact = function(*truth.args, **truth.kwargs, backend="reference")
        linear = function is fastloss.linear_cross_entropy
        other = (_of_rounded_logits(dtype) if linear else op.op)(*rounded.args, **rounded.kwargs)
        exact.backward(upstream.double())
        other.backward(upstream.double())
        judges = [exact.detach(), *truth.gradients()], [other.detach(), *rounded.gradients()]
        for mine, peer, right, inexact in zip(results, peers, *judges, strict=True):
            _assert_no_further(mine, [peer, inexact], right)


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
