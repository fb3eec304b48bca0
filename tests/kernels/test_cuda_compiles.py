"""Every CUDA kernel of the built module, for every architecture: none spills a register or has a stack."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import fastloss._build_info as build_info

_spec = importlib.util.spec_from_file_location(
    "kernel_report_cuda", Path(__file__).resolve().parents[2] / "tools" / "kernel_report_cuda.py"
)
assert _spec is not None and _spec.loader is not None
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)


module = importlib.util.find_spec("fastloss._cuda")


@pytest.mark.skipif(module is None, reason="fastloss._cuda is not built")
@pytest.mark.skipif(report.find_tool("cuobjdump") is None, reason="no cuobjdump")
@pytest.mark.parametrize("arch", report.ARCHES)
def test_no_kernel_touches_local_memory(arch: str) -> None:
    assert module is not None and module.origin is not None
    if arch.removeprefix("sm_") not in build_info.CUDA["archs"].split(", "):
        pytest.skip(f"fastloss._cuda was built for {build_info.CUDA['archs']}")
    kernels = report.collect_module(module.origin, arch)
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
    # A row of a cluster comes by bulk copies alone, the first and the next.
    bulk = {
        k["kernel"]: (k["bulk_copies"], k["wide_loads"])
        for k in kernels
        if k["kernel"].startswith("cluster_")
    }
    copies = 2 if int(arch.removeprefix("sm_")) >= 90 else 0
    assert bulk == {
        f"cluster_rows_kernel<{dtype}>": (copies, 0) for dtype in ("float", "bfloat16", "float16")
    }
    # Logits are read 16 bytes at a time, by at least four such loads: unrolled, so that they are in flight together.
    over_logits = ("row_", "exponentials_", "scale_")
    narrow = [k["kernel"] for k in kernels if k["kernel"].startswith(over_logits) and k["wide_loads"] < 4]
    assert narrow == []
