"""Every Triton kernel compiles for every target, with no spill, no local memory and loops within their limits: read from the machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import loop_limits
import pytest
from gpu import count_loops

TOOLS = Path(__file__).resolve().parents[2] / "tools"
REPORT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import kernel_report_triton
if __name__ == "__main__":
    print(json.dumps(kernel_report_triton.collect([sys.argv[2]])))
"""


SLOW = ("sm_80", "sm_100", "sm_103", "sm_120", "gfx942")  # half a minute each


@pytest.mark.parametrize(
    "target",
    ["sm_90", *(pytest.param(target, marks=pytest.mark.slow) for target in SLOW)],
)
def test_no_spills(target: str) -> None:
    triton = pytest.importorskip("triton")
    import kernel_report_triton

    env = {
        k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"
    }  # the interpreter has no machine code
    command = [sys.executable, "-c", REPORT, str(TOOLS), target]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["kernel"] for row in rows} >= {
        "row_stats", "row_grad", "row_cross_entropy", "segment_sum", "segment_expand", "pair_loss", "unpaired_loss",
        "policy_loss", "policy_total", "scan", "value_loss", "value_total", "kl_estimate", "scale", "sum_rows",
        "reciprocal_count", "divergence", "logits", "exponentials",
    }  # fmt: skip
    assert [row for row in rows if kernel_report_triton.offends(row)] == []
    assert [loop for row in rows for loop in row["loops"] if loop["unwaited"]] == []
    same_compiler = triton.__version__ == count_loops.counted_by("triton")
    held = set()
    for row in rows:
        key = row["kernel"], row["options"], 4 if row["dtype"] == "fp32" else 2
        if key in loop_limits.TRITON and row.get("vocab", count_loops.LONG) == count_loops.LONG:
            held.add(key)
            limits = loop_limits.TRITON[key]
            assert loop_limits.beyond(f"{target} {key}", row["loops"], limits, same_compiler) == []
    assert held == loop_limits.TRITON.keys()
    if same_compiler:  # the estimates of docs/gpu.md are of these kernels
        assert count_loops.drift("triton kernels", target, count_loops.of_triton(rows)) == []


UNKNOWN = """
import sys
sys.path.insert(0, sys.argv[1])
import kernel_report_triton
import kernel_report_pointwise as pointwise
from fastloss import tables

def with_code(kernel, like, **constants):
    given, usual = pointwise.CASES[kernel][like]
    pointwise.CASES[kernel]["unknown"] = given, {**usual, **constants}
    try:
        pointwise.compile_case((sys.argv[2], *kernel, "unknown"))
    except Exception as error:
        said = ""
        while error is not None:  # the kernel's error, then that of the function which it calls
            said, error = said + str(error), error.__cause__
        print("error" if "without a formula here" in said else said)
    else:
        print("compiled", kernel, constants)

with_code(("pairs", "pair_loss_kernel"), "sigmoid", TERMS=(len(tables.PAIR_TERMS),))
with_code(("pairs", "pair_loss_kernel"), "sigmoid", DIVERGENCE=len(tables.DIVERGENCES))
with_code(("pairs", "unpaired_loss_kernel"), "kto", CODE=len(tables.UNPAIRED_TERMS))
policy = ("policy", "policy_loss_kernel")
with_code(policy, "clip", SURROGATE=len(tables.SURROGATES))
with_code(policy, "clip", LEVEL=len(tables.LEVELS))
with_code(policy, "clip", AGGREGATION=len(tables.AGGREGATIONS))
with_code(policy, "k3", KL_KIND=len(tables.KL_KINDS))
with_code(policy, "token_mask", CORRECTION=len(tables.CORRECTIONS))
with_code(("divergences", "divergence_kernel"), "jsd fp32", KIND=len(tables.DISTILLATION_DIVERGENCES))
with_code(("policy", "policy_total_kernel"), "token-mean", AGGREGATION=len(tables.AGGREGATIONS))
"""


def test_unknown_codes_do_not_compile() -> None:
    """A code without a branch in a kernel takes no other loss's formula."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", UNKNOWN, str(TOOLS), "sm_90"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["error"] * 10, done.stdout
