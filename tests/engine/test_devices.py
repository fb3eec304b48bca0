"""Products on devices as they are: with a library that accumulates in float32, without one, and beside the CPU's own GEMM."""

from __future__ import annotations

import pytest
import torch

from fastloss.engine import devices, head_rows
from fastloss.engine.backend import get_backend
from fastloss.engine.head_types import Head, Needs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("library", [True, False])
def test_products_are_added_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, library: bool
) -> None:
    """Chunk after chunk; with and without the library's own accumulation, in blocks with a rest."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 8, 37, generator=generator).to(dtype)  # [chunks, rows, V]
    b = torch.randn(3, 8, 5, generator=generator).to(dtype)  # [chunks, rows, D]
    monkeypatch.setattr(devices, "CONVERT_BLOCK", 16)
    monkeypatch.setattr(devices, "accumulates", lambda *_: library)
    addmm, asked = torch.addmm, []

    def library_addmm(start, x, y, *, beta=1, out_dtype=None, **given):
        if out_dtype is not None:
            asked.append(out_dtype)
            x, y = x.to(out_dtype), y.to(out_dtype)
        return addmm(start, x, y, beta=beta, **given)

    monkeypatch.setattr(torch, "addmm", library_addmm)
    out = torch.full((37, 5), float("nan"))
    for chunk in range(3):
        devices.add_transposed(out, a[chunk], b[chunk], accumulate=chunk > 0)
    exact = torch.einsum("crv,crd->vd", a.double(), b.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    assert len(asked) == (3 if library else 0)


def test_the_probe_asks_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    devices.accumulates.cache_clear()
    calls = []

    def refuses(*given, **options):
        calls.append(options)
        raise RuntimeError("out_dtype is not supported")

    monkeypatch.setattr(torch, "addmm", refuses)
    for _ in range(3):
        assert not devices.accumulates(torch.device("cpu"), torch.bfloat16, torch.float32)
    assert len(calls) == 1
    devices.accumulates.cache_clear()


@pytest.mark.parametrize("probe", ["accumulates", "multiplies_wide"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["memory", "capture", "handle"],
)
def test_a_bad_moment_is_no_answer(monkeypatch: pytest.MonkeyPatch, probe: str, error: Exception) -> None:
    """A full memory at the first call made every later head convert its operands in blocks."""
    name = "addmm" if probe == "accumulates" else "mm"
    ask = getattr(devices, probe)
    asked = (torch.device("cpu"), torch.bfloat16, *((torch.float32,) if probe == "accumulates" else ()))
    ask.cache_clear()
    calls = []

    def answers(*given, **options):
        calls.append(name)
        if len(calls) == 1:
            raise error

    monkeypatch.setattr(torch, name, answers)
    with pytest.raises(type(error), match=r"memory|capturing|ALLOC_FAILED"):
        ask(*asked)
    assert ask(*asked) and ask(*asked) and len(calls) == 2
    ask.cache_clear()


def test_cpu_code_sees_cpu_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is neither a CPU nor CUDA (meta stands for XPU): its addresses reach no GEMM of ours."""

    def forbidden(*given, **options):
        raise AssertionError("CPU code was handed another device's tensor")

    monkeypatch.setattr(head_rows, "gemm_bf16", forbidden)
    monkeypatch.setattr(head_rows, "supports_gemm_bf16", lambda: True)
    hidden, weight = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((4, 8), (16, 8)))
    head = Head(get_backend("reference"), hidden, weight, None, torch.bfloat16)
    for chunks, made in ((1, torch.bfloat16), (2, torch.float32)):
        gemms = head_rows._Gemms(head, Needs(True, True, False), None, 4, chunks)
        gemms.gradients(gemms.logits(0, 4), 0, 4)
        assert gemms.finish().weight.dtype == made
