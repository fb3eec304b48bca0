"""Every CUDA kernel of the built module, for every architecture: no spilled register, no stack, and loops within their limits."""

from __future__ import annotations

import importlib.util
from typing import Any

import kernel_report_cuda as report
import loop_limits
import pytest
from gpu import count_loops

import fastloss._build_info as build_info

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
        *(
            f"divergence_kernel<{dtype}, {kind}>"
            for dtype in ("float", "bfloat16", "float16")
            for kind in range(7)
        ),
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
    assert beyond_limits(kernels, arch) == []
    if same_compiler():  # the estimates of docs/gpu.md are of these kernels
        assert count_loops.drift("cuda", arch, count_loops.of_cuda(kernels)) == []


def same_compiler() -> bool:
    return build_info.CUDA["nvcc"] == count_loops.counted_by("nvcc")


def beyond_limits(kernels: list[dict[str, Any]], arch: str) -> list[str]:
    """Both ways: a kernel without a limit is wrong as well as a limit without a kernel."""
    wrong, seen = [], set()
    for kernel in kernels:
        of = kernel["kernel"].replace("bfloat16", "half").replace("float16", "half")
        if of not in loop_limits.CUDA:
            if of.startswith(tuple(report.OVER_LOGITS)):
                wrong.append(f"{of}: no limits")
            continue
        seen.add(of)
        if of.startswith("cluster_") and int(arch.removeprefix("sm_")) < 90:
            continue  # an empty kernel there
        name = f"{arch} {kernel['kernel']}"
        wrong += loop_limits.beyond(name, kernel["loops"], loop_limits.CUDA[of], same_compiler())
    return [*wrong, *(f"{of}: not there" for of in loop_limits.CUDA.keys() - seen)]


@pytest.mark.slow  # half a minute of nvcc: the module as it is built by default has no code for it
@pytest.mark.skipif(report.find_tool("nvcc") is None, reason="no nvcc")
def test_sm_103_is_within_the_limits() -> None:
    kernels = report.collect(("sm_103",))
    assert report.faults(kernels) == []
    assert beyond_limits(kernels, "sm_103") == []
