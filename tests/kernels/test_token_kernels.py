"""value_loss and kl_estimate of every backend against the definition in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from backends_under_test import ALL, DEVICE, KERNELS, contract, need
from instruction_sets import ISAS, forced, threads_of
from torch import Tensor

import fastloss
from fastloss.engine.contract import Backend, ValueInputs
from fastloss.engine.definition import REFERENCE
from fastloss.tables import KL_KINDS, VALUE_PLACE

NAN = float("nan")
SIZES = (7, 2049, 5003)
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's kernels")


def make(n: int, density: float, clip: bool, share: bool, scale: bool) -> tuple[Tensor, ValueInputs]:
    """float64 that float32 holds exactly; NaN where the mask is 0."""
    g = torch.Generator().manual_seed(n)
    mask = torch.rand(n, generator=g) < density
    values, returns, moved = torch.randn(3, n, generator=g).double()
    old = values + 0.25 * moved.float().double()
    values, returns, old = (x.float().double().masked_fill(~mask, NAN) for x in (values, returns, old))
    shares = torch.rand(n, generator=g).double().masked_fill(~mask, 0)
    return values, ValueInputs(
        returns=returns,
        mask=mask.to(torch.uint8),
        old=old if clip else None,
        clip_range=0.125 if clip else math.inf,
        share=shares if share else None,
        scale=torch.tensor(0.375, dtype=torch.float64) if scale else None,
    )


def on_device(inputs: ValueInputs, dtype: torch.dtype) -> ValueInputs:
    def move(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(DEVICE, dtype)

    returns = inputs.returns.to(DEVICE, dtype)
    return replace(
        inputs, returns=returns, mask=inputs.mask.to(DEVICE), old=move(inputs.old), share=move(inputs.share),
        scale=move(inputs.scale),
    )  # fmt: skip


def defined(values: Tensor, inputs: ValueInputs) -> tuple[Tensor, Tensor]:
    """out, and the gradient of the unscaled loss."""
    leaf = values.clone().requires_grad_()
    result = REFERENCE.value_loss(leaf, inputs)
    (grad,) = torch.autograd.grad(result.loss, leaf)
    return result.out, grad / result.out[VALUE_PLACE["scale"]]


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.float64) if backend == "cpu" else (torch.float32,)


def run(backend: Backend, values: Tensor, inputs: ValueInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    result = backend.value_loss(values.to(DEVICE, dtype), on_device(inputs, dtype))
    assert result.d_values is not None and result.loss.dtype == dtype
    assert result.loss == result.out[VALUE_PLACE["loss"]] or result.loss.isnan()
    return result.out.cpu().double(), result.d_values.cpu().double()


@pytest.mark.parametrize("share", [False, True], ids=["mask", "share"])
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clip"])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.7, 1.0])
@pytest.mark.parametrize("backend", KERNELS)
def test_value_loss_agrees_with_the_definition(backend: str, density: float, clip: bool, share: bool) -> None:
    kernels = contract(backend)
    for n in SIZES:
        values, inputs = make(n, density, clip, share, scale=share)
        want, want_grad = defined(values, inputs)
        for dtype in dtypes_of(backend):
            out, grad = run(kernels, values, inputs, dtype)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(out, want, rtol=8 * eps, atol=8 * eps)
            torch.testing.assert_close(grad, want_grad, rtol=4 * eps, atol=4 * eps)


@on_cpu
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clip"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_of_the_cpu(isa: str, clip: bool) -> None:
    backend = contract("cpu")
    values, inputs = make(5003, 0.7, clip, clip, scale=False)
    want, want_grad = defined(values, inputs)
    logprobs, ref = -3 * torch.rand(2, 5003, generator=torch.Generator().manual_seed(5)).double()
    upstream = torch.ones_like(ref)
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        with forced(isa):
            out, grad = run(backend, values, inputs, dtype)
            kl = [
                backend.kl_estimate(logprobs.to(dtype), ref.to(dtype), code, up).double()
                for code in range(len(KL_KINDS))
                for up in (None, upstream.to(dtype))
            ]
        torch.testing.assert_close(out, want, rtol=8 * eps, atol=8 * eps)
        torch.testing.assert_close(grad, want_grad, rtol=4 * eps, atol=4 * eps)
        right = [
            REFERENCE.kl_estimate(logprobs, ref, code, up)
            for code in range(len(KL_KINDS))
            for up in (None, upstream)
        ]
        torch.testing.assert_close(kl, right, rtol=16 * eps, atol=4 * eps)


@pytest.mark.parametrize("backend", KERNELS)
def test_returns_that_are_all_the_same_have_no_variance(backend: str) -> None:
    values, inputs = make(5003, 0.7, False, False, False)
    inputs = replace(inputs, returns=torch.full_like(values, 0.1).float().double())
    out, _ = run(contract(backend), values, inputs, torch.float32)
    assert out[VALUE_PLACE["explained_variance"]] == 0


@pytest.mark.parametrize("backend", KERNELS)
def test_the_variance_keeps_its_digits_beside_a_large_mean(backend: str) -> None:
    values, inputs = make(5003, 0.7, False, False, False)
    far = (inputs.returns + 4096).float().double()
    inputs, values = replace(inputs, returns=far), (values + 4096).float().double()
    want, _ = defined(values, inputs)
    out, _ = run(contract(backend), values, inputs, torch.float32)
    place = VALUE_PLACE["explained_variance"]
    # The inputs are exact; R - V is rounded once.
    assert abs(out[place] - want[place]) < 1e-5


@pytest.mark.parametrize("name", ["values", "returns", "old"])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_nan_that_counts_is_seen(backend: str, name: str) -> None:
    values, inputs = make(300, 1.0, True, False, False)
    broken = (values if name == "values" else getattr(inputs, name)).clone()
    broken[250] = NAN
    values = broken if name == "values" else values
    inputs = inputs if name == "values" else replace(inputs, **{name: broken})
    for each in (REFERENCE, contract(backend)):
        result = each.value_loss(values.to(DEVICE, torch.float32), on_device(inputs, torch.float32))
        assert result.loss.isnan(), each.name
    _, grad = run(contract(backend), values, inputs, torch.float32)
    _, want = defined(values, inputs)
    assert torch.equal(grad.isnan(), want.isnan()) and grad[:250].isfinite().all()
    # Outside the clip a value is a constant, whatever the return.
    assert grad[250].isnan() or name == "returns"


@pytest.mark.parametrize("backend", KERNELS)
def test_infinite_numbers_have_the_derivatives_of_the_definition(backend: str) -> None:
    values, inputs = make(300, 1.0, True, False, False)
    for name, sign in (("values", 1), ("returns", 1), ("returns", -1), ("old", 1), ("old", -1)):
        broken = (values if name == "values" else getattr(inputs, name)).clone()
        broken[:200] = sign * math.inf
        v = broken if name == "values" else values
        given = inputs if name == "values" else replace(inputs, **{name: broken})
        _, want = defined(v, given)
        _, grad = run(contract(backend), v, given, torch.float32)
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-6, equal_nan=True, msg=f"{name} {sign}")


@on_cpu
def test_the_cpus_bits_do_not_hang_on_its_threads() -> None:
    backend = contract("cpu")
    values, inputs = make(200_003, 0.7, True, True, True)
    found = []
    for threads in (1, 2, 3):
        with threads_of(threads):
            found.append(torch.cat(run(backend, values, inputs, torch.float32)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", KL_KINDS)
@pytest.mark.parametrize("backend", KERNELS)
def test_kl_estimate_agrees_with_the_definition(backend: str, kind: str) -> None:
    kernels, code = contract(backend), KL_KINDS.index(kind)
    g = torch.Generator().manual_seed(5)
    for n in SIZES:
        logprobs, ref = (-3 * torch.rand(n, generator=g).double() for _ in range(2))
        edges = torch.tensor([[-1.0, -40.0, -0.5, -2.0, -9.0], [-1.0, -1.0, -60.0, NAN, -4.0]]).double()
        logprobs, ref = (
            torch.cat([x, e]).float().double() for x, e in zip((logprobs, ref), edges, strict=True)
        )
        upstream = torch.randn(n + 5, generator=g).double()
        want = REFERENCE.kl_estimate(logprobs, ref, code, None)
        slope = REFERENCE.kl_estimate(logprobs, ref, code, upstream)
        for dtype in dtypes_of(backend):
            given = (x.to(DEVICE, dtype) for x in (logprobs, ref, upstream))
            x, r, up = given
            eps = torch.finfo(dtype).eps
            for up_, right in ((None, want), (up, slope)):
                got = kernels.kl_estimate(x, r, code, up_).cpu().double()
                # k3 near 0 is the small difference of e^t - 1 and t, of one rounding in ref - logprob.
                torch.testing.assert_close(got, right, rtol=16 * eps, atol=4 * eps, equal_nan=True)
    with pytest.raises(ValueError, match="kind"):
        kernels.kl_estimate(logprobs.to(DEVICE).float(), ref.to(DEVICE).float(), len(KL_KINDS), None)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (3, 2, 2), (0, 4)], ids=str)
def test_any_shape_and_stride(shape: tuple[int, ...], backend: str) -> None:
    need(backend)
    g = torch.Generator().manual_seed(1)
    whole = -torch.rand(2, *reversed(shape), generator=g).to(DEVICE)
    logprobs, ref = (x.permute(*reversed(range(x.dim()))) if x.dim() else x for x in whole)
    leaf = logprobs.clone().requires_grad_()
    kl = fastloss.kl_estimate(leaf, ref, backend=backend)
    kl.sum().backward()
    want = leaf.detach().clone().requires_grad_()
    right = torch.expm1(ref - want) - (ref - want)
    right.sum().backward()
    assert kl.shape == leaf.shape and leaf.grad is not None
    torch.testing.assert_close(kl, right)
    torch.testing.assert_close(leaf.grad, want.grad)


@pytest.mark.parametrize("backend", ALL)
def test_explain_names_what_ran(backend: str) -> None:
    need(backend)
    x = torch.zeros(2, 3, device=DEVICE)
    plan = fastloss.explain(fastloss.value_loss, x, None, x, None, backend=backend)
    assert plan["backend"] == backend
    assert fastloss.explain(fastloss.kl_estimate, x, x, backend=backend)["backend"] == backend
