"""scale_in_place of the GPU backends: the product in float64, what is not touched, and the backwards that use it."""

from __future__ import annotations

import math

import pytest
import torch
from backends_under_test import ALL, DEVICE, KERNELS, contract, dtypes, need
from torch import Tensor

import fastloss
from fastloss.engine.autograd import scale_in_place
from fastloss.engine.contract import ONE_BLOCK, Factor

GPU_KERNELS = [name for name in KERNELS if name != "cpu"]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SIGNALING_NAN = {torch.float32: 0x7F800001, torch.bfloat16: 0x7F81, torch.float16: 0x7C01}
NAN, INF = float("nan"), float("inf")


def number(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def make(rows: int, width: int, stride: int, shift: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[rows, width], ``stride`` apart, ``shift`` past the start of its memory; and that memory."""
    memory = torch.randn(rows * stride + shift + 8).to(dtype).to(DEVICE)
    return memory.as_strided((rows, width), (stride, 1), shift), memory


@pytest.mark.parametrize("layout", [(1, 1), (3, 5), (3, 64), (2, 1031), (5, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("gap", [(0, 0), (1, 0), (5, 3)], ids=["dense", "odd stride", "odd start"])
@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_product(backend: str, dtype: torch.dtype, gap: tuple[int, int], layout: tuple[int, int]) -> None:
    kernels = contract(backend)
    for scale in (1.0, 0.5, 1 / 3, 0.0, -7.25, NAN, INF):
        x, memory = make(*layout, layout[1] + gap[0], gap[1], dtype)
        before, factor = memory.clone(), number(scale)
        expected = x.double() * factor.double()
        assert scale_in_place(kernels, x, factor) is x
        # Half a unit of rounding, and nothing for the scale, which float32 holds.
        tolerance = 0.501 * torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        torch.testing.assert_close(x.double(), expected, rtol=tolerance[0], atol=tolerance[1], equal_nan=True)
        beside = torch.ones(len(memory), dtype=torch.bool, device=DEVICE)
        beside.as_strided(x.shape, x.stride(), gap[1]).fill_(False)
        assert torch.equal(memory[beside], before[beside])


@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_scale_of_1_writes_nothing(backend: str, dtype: torch.dtype) -> None:
    # Arithmetic makes a signaling NaN a quiet one: its bits tell whether they have been through it.
    x = torch.full((3, 100), SIGNALING_NAN[dtype], dtype=BITS[dtype], device=DEVICE).view(dtype)
    before = x.view(BITS[dtype]).clone()
    scale_in_place(contract(backend), x, number(1.0))
    assert torch.equal(x.view(BITS[dtype]), before)
    scale_in_place(contract(backend), x, number(math.nextafter(1.0, 2.0)).float() * 2)
    assert not torch.equal(x.view(BITS[dtype]), before)


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_rows_further_apart_than_32_bits(backend: str) -> None:
    stride = 2**31 + 1  # pages that nobody touches take no memory
    memory = torch.empty(stride + 64, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((2, 50), (stride, 1))
    x.copy_(torch.arange(100.0).view(2, 50))
    scale_in_place(contract(backend), x, number(2.0))
    assert torch.equal(x.float().cpu(), 2 * torch.arange(100.0).view(2, 50))


@pytest.mark.parametrize("factor", [Factor(), Factor(0.25), Factor(0.5, torch.tensor(0.125))], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_sum_of_the_rows(backend: str, factor: Factor) -> None:
    factor = factor if factor.tensor is None else factor._replace(tensor=factor.tensor.to(DEVICE))
    whole = factor.value * (1.0 if factor.tensor is None else float(factor.tensor))
    for count in (0, 1, 1001, ONE_BLOCK + 1):
        values = torch.rand(count, device=DEVICE)
        total = contract(backend).sum_rows(values, factor)
        assert total.shape == () and total.dtype == torch.float32
        torch.testing.assert_close(
            total.double().cpu(), values.double().sum().cpu() * whole, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("backend", ALL)
def test_one_over_the_targets_that_count(backend: str) -> None:
    kernels = contract(backend)
    for rows in (0, 1, 3, 448, 5000, ONE_BLOCK + 1):
        target = torch.randint(0, 5, (rows,), device=DEVICE)
        for ignored in (4, -100):
            factor = kernels.reciprocal_count(target, ignored)
            count = int((target != ignored).sum())
            assert factor.shape == () and factor.device.type == DEVICE
            assert float(factor) == pytest.approx(1 / count if count else math.inf, rel=1e-7)
    assert float(kernels.reciprocal_count(torch.full((7,), 2, device=DEVICE), 2)) == math.inf


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_a_sum_of_nothing_times_infinity_is_nan(backend: str) -> None:
    """A mean over no targets, as PyTorch's."""
    nothing = Factor(tensor=number(INF))
    for values in (torch.zeros(5, device=DEVICE), torch.zeros(0, device=DEVICE)):
        assert contract(backend).sum_rows(values, nothing).isnan()


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_what_no_kernel_takes(backend: str) -> None:
    kernels = contract(backend)
    for x in (torch.randn(4, 6, device=DEVICE).t(), torch.randn(3, 4, device=DEVICE).double()):
        expected = x * 0.5
        assert torch.equal(scale_in_place(kernels, x, number(0.5)), expected)
    x = torch.randn(3, 4, device=DEVICE)
    column = torch.rand(3, 1, device=DEVICE)
    expected = x * column
    assert torch.equal(scale_in_place(kernels, x, column), expected)


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_autograd_sees_the_write(backend: str) -> None:
    x = torch.randn(2, 3, device=DEVICE)
    version = x._version
    scale_in_place(contract(backend), x, number(1.0))
    assert x._version > version


@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_backward_scales_once_each_time(backend: str, dtype: torch.dtype) -> None:
    need(backend)
    x = torch.randn(5, 37, device=DEVICE).to(dtype).requires_grad_()
    target = torch.randint(0, 37, (5,), device=DEVICE)
    exact = x.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(exact, target).backward()
    assert exact.grad is not None
    for inplace in (False, True):
        # A number of 16 bits: rounded to the gradient's dtype first it would be off by up to half a unit more.
        for upstream in (1.0, 1.00390625, 0.0, 1024.0, NAN):
            loss = fastloss.cross_entropy(x * 1 if inplace else x, target, inplace=inplace, backend=backend)
            (grad,) = torch.autograd.grad(loss.float() * upstream, x, retain_graph=not inplace)
            torch.testing.assert_close(
                grad.double(),
                exact.grad * upstream,
                rtol=1.1 * torch.finfo(dtype).eps,
                atol=1e-6,
                equal_nan=True,
            )
            if not inplace:
                for other in (1.0, -0.5):
                    (again,) = torch.autograd.grad(loss.float() * other, x, retain_graph=True)
                    torch.testing.assert_close(
                        again.double(), exact.grad * other, rtol=1.1 * torch.finfo(dtype).eps, atol=1e-6
                    )


@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_gradients_of_the_head_are_scaled_once(backend: str, dtype: torch.dtype) -> None:
    """d hidden, d weight and d bias in one backward, the weight's in another dtype than the hidden states'."""
    need(backend)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=generator).to(dtype)
    weight, bias = torch.randn(9, 8, generator=generator).to(dtype), torch.randn(9, generator=generator)
    target = torch.tensor([0, 8, 3, 3], device=DEVICE)

    def gradients(upstream: float) -> list[Tensor]:
        leaves = [x.to(DEVICE).requires_grad_() for x in (hidden, weight, bias)]
        loss = fastloss.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], backend=backend
        )
        return list(
            torch.autograd.grad(loss, leaves, torch.tensor(upstream, dtype=loss.dtype, device=DEVICE))
        )

    for one, scaled in zip(gradients(1.0), gradients(0.25), strict=True):
        eps = torch.finfo(one.dtype).eps if dtype == torch.float16 else 0.0  # float16 rounds after the scale
        atol = 1e-7 if dtype == torch.float16 else 0.0
        torch.testing.assert_close(scaled.float(), one.float() * 0.25, rtol=eps, atol=atol)
