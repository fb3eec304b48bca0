"""Every CUDA kernel compiles for every architecture, and none spills a register or has a stack."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "kernel_report_cuda", Path(__file__).resolve().parents[2] / "tools" / "kernel_report_cuda.py"
)
assert _spec is not None and _spec.loader is not None
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)


QUICK = ("sm_80", "sm_90")


@pytest.mark.skipif(report.find_tool("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    "arch", [a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in report.ARCHES]
)
def test_no_kernel_touches_local_memory(arch: str) -> None:
    kernels = report.collect_arch(arch)
    names = [kernel["kernel"] for kernel in kernels]
    assert {
        "segment_sum_kernel",
        "segment_expand_kernel",
        "pair_loss_kernel",
        "unpaired_loss_kernel",
        "policy_loss_kernel",
        "scale_kernel<float>",
        "scale_kernel<bfloat16>",
        "scale_kernel<float16>",
        "sum_rows_kernel",
        "reciprocal_count_kernel",
        "scan_kernel<float, 0>",
        "scan_kernel<float, 1>",
        "value_loss_kernel",
        "kl_estimate_kernel<float, 0>",
        "kl_estimate_kernel<float, 1>",
        "divergence_kernel<float>",
        "divergence_kernel<bfloat16>",
        "divergence_kernel<float16>",
        "exponentials_kernel<bfloat16, 0>",
        "exponentials_kernel<bfloat16, 1>",
    } <= set(names)
    assert (
        sum(name.startswith("row_") for name in names) == 36
    )  # dtypes × (forward: general, extra, grad; gradient: general, weights)
    assert report.faults(kernels) == []
    # Logits are read 16 bytes at a time, by at least four such loads: unrolled, so that they are in flight together.
    over_logits = ("row_", "exponentials_", "scale_")
    narrow = [k["kernel"] for k in kernels if k["kernel"].startswith(over_logits) and k["wide_loads"] < 4]
    assert narrow == []
