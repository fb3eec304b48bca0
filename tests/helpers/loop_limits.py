"""What each row kernel's loops are held to: at least so many 16-byte loads of logits in flight, at most so many issue slots an element.

Counted from the machine code (tools/kernel_report_loops.py). A loop that stores to global memory is the writing pass, any other the reading one. The
limits are the present kernels' worst over sm_80, sm_90, sm_100, sm_103 and sm_120 and a little more: tighten them with the kernels. Of slots they hold with the compilers that tools/gpu/loop_counts.json names.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Limit(NamedTuple):
    in_flight: int  # of loops that read global memory; from shared memory: any
    slots: float


READ, WRITE = "read", "write"
# "half" is bfloat16 and float16. row_forward: soft-cap or bias, more statistics, gradient; row_grad: soft-cap or bias, weights. divergence: its code.
CUDA: dict[str, dict[str, Limit]] = {
    "row_forward_kernel<half, 0, 0, 0>": {READ: Limit(4, 7.4)},
    "row_forward_kernel<half, 0, 0, 1>": {READ: Limit(4, 7.6), WRITE: Limit(2, 8.8)},
    "row_forward_kernel<half, 0, 1, 0>": {READ: Limit(2, 17)},
    "row_forward_kernel<half, 0, 1, 1>": {READ: Limit(2, 17.2), WRITE: Limit(2, 12.8)},
    "row_forward_kernel<half, 1, 0, 0>": {READ: Limit(2, 44.7)},
    "row_forward_kernel<half, 1, 0, 1>": {READ: Limit(2, 45.4), WRITE: Limit(2, 52.5)},
    "row_forward_kernel<half, 1, 1, 0>": {READ: Limit(2, 54.7)},
    "row_forward_kernel<half, 1, 1, 1>": {READ: Limit(2, 53.9), WRITE: Limit(2, 56.8)},
    "row_forward_kernel<float, 0, 0, 0>": {READ: Limit(4, 14.9)},
    "row_forward_kernel<float, 0, 0, 1>": {READ: Limit(4, 15.4), WRITE: Limit(2, 15.7)},
    "row_forward_kernel<float, 0, 1, 0>": {READ: Limit(2, 26.2)},
    "row_forward_kernel<float, 0, 1, 1>": {READ: Limit(2, 26.6), WRITE: Limit(2, 20.7)},
    "row_forward_kernel<float, 1, 0, 0>": {READ: Limit(4, 52.7)},
    "row_forward_kernel<float, 1, 0, 1>": {READ: Limit(4, 53), WRITE: Limit(2, 58.2)},
    "row_forward_kernel<float, 1, 1, 0>": {READ: Limit(2, 65)},
    "row_forward_kernel<float, 1, 1, 1>": {READ: Limit(2, 63.2), WRITE: Limit(2, 64)},
    "row_grad_kernel<half, 0, 0>": {WRITE: Limit(4, 10.7)},
    "row_grad_kernel<half, 0, 1>": {WRITE: Limit(2, 14.8)},
    "row_grad_kernel<half, 1, 0>": {WRITE: Limit(2, 54.5)},
    "row_grad_kernel<half, 1, 1>": {WRITE: Limit(2, 58.5)},
    "row_grad_kernel<float, 0, 0>": {WRITE: Limit(4, 17.4)},
    "row_grad_kernel<float, 0, 1>": {WRITE: Limit(4, 23.4)},
    "row_grad_kernel<float, 1, 0>": {WRITE: Limit(4, 59.5)},
    "row_grad_kernel<float, 1, 1>": {WRITE: Limit(4, 65.2)},
    "scale_kernel<half>": {WRITE: Limit(4, 4.9)},
    "scale_kernel<float>": {WRITE: Limit(4, 3.6)},
    "exponentials_kernel<half, 0>": {WRITE: Limit(4, 8.3)},
    "exponentials_kernel<half, 1>": {WRITE: Limit(2, 49.3)},
    "cluster_rows_kernel<half>": {READ: Limit(0, 7.2), WRITE: Limit(0, 8.3)},
    "cluster_rows_kernel<float>": {READ: Limit(0, 14.6), WRITE: Limit(0, 17.1)},
    "divergence_kernel<half, 0>": {READ: Limit(2, 76.3), WRITE: Limit(2, 45.8)},
    "divergence_kernel<half, 1>": {READ: Limit(2, 78), WRITE: Limit(2, 41.2)},
    "divergence_kernel<half, 2>": {READ: Limit(2, 166.7), WRITE: Limit(2, 116.5)},
    "divergence_kernel<half, 3>": {READ: Limit(2, 85.2), WRITE: Limit(2, 50.8)},
    "divergence_kernel<half, 4>": {READ: Limit(2, 191.8), WRITE: Limit(2, 99.6)},
    "divergence_kernel<half, 5>": {READ: Limit(2, 194.7), WRITE: Limit(2, 131.5)},
    "divergence_kernel<half, 6>": {READ: Limit(2, 195.5), WRITE: Limit(2, 131.3)},
    "divergence_kernel<float, 0>": {READ: Limit(2, 87.1), WRITE: Limit(2, 52.6)},
    "divergence_kernel<float, 1>": {READ: Limit(2, 87.1), WRITE: Limit(2, 47.6)},
    "divergence_kernel<float, 2>": {READ: Limit(2, 175.1), WRITE: Limit(2, 121.1)},
    "divergence_kernel<float, 3>": {READ: Limit(2, 96.1), WRITE: Limit(2, 57.6)},
    "divergence_kernel<float, 4>": {READ: Limit(2, 193.1), WRITE: Limit(2, 106.1)},
    "divergence_kernel<float, 5>": {READ: Limit(2, 195.3), WRITE: Limit(2, 136.3)},
    "divergence_kernel<float, 6>": {READ: Limit(2, 200.8), WRITE: Limit(2, 135.3)},
}
# Triton's, with rows whose length 16 divides, by options and bytes of a logit: the worst of the NVIDIA architectures and gfx942.
TRITON: dict[tuple[str, str, int], dict[str, Limit]] = {
    ("row_stats", "plain", 2): {READ: Limit(1, 8.8)},
    ("row_stats", "plain", 4): {READ: Limit(1, 20.1)},
    ("row_grad", "plain", 2): {WRITE: Limit(1, 10.1)},
    ("row_grad", "plain", 4): {WRITE: Limit(1, 16.1)},
    ("row_cross_entropy", "plain", 2): {READ: Limit(1, 8.9), WRITE: Limit(1, 10.1)},
    ("row_cross_entropy", "plain", 4): {READ: Limit(1, 20.1), WRITE: Limit(1, 16.6)},
    ("scale", "bf16 whole", 2): {WRITE: Limit(1, 9.0)},
}


def beyond(
    name: str, loops: list[dict[str, Any]], limits: dict[str, Limit], same_compiler: bool
) -> list[str]:
    """Every loop beyond its limit, and every pass that was not found, in words. Slots are those of the compiler that they were counted with."""
    found: set[str] = set()
    wrong = []
    for loop in loops:
        kind = WRITE if loop["moves"].endswith(">global") else READ
        found.add(kind)
        what = f"{name} {loop['moves']}"
        if loop["unwaited"]:
            wrong.append(
                f"{what}: {loop['unwaited']} registers are read before they are there, by this count"
            )
        if kind not in limits:
            wrong.append(f"{what}: no limit")
            continue
        if loop["moves"].startswith("global") and loop.get("in_flight global 16", 0) < limits[kind].in_flight:
            wrong.append(
                f"{what}: {loop.get('in_flight global 16', 0)} loads in flight, not {limits[kind].in_flight}"
            )
        if loop["per_element"] <= 0 or (same_compiler and loop["per_element"] > limits[kind].slots):
            wrong.append(f"{what}: {loop['per_element']} slots, not {limits[kind].slots}")
    return [*wrong, *(f"{name}: no {kind}ing loop" for kind in limits.keys() - found)]
