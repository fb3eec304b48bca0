"""Every Triton kernel compiles for every target, with no spill and no local memory: read from the machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
REPORT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import kernel_report_triton
if __name__ == "__main__":
    print(json.dumps(kernel_report_triton.collect([sys.argv[2]])))
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_spills(target: str) -> None:
    pytest.importorskip("triton")
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
        "policy_loss", "policy_total", "scan", "scale",
    }  # fmt: skip
    assert [row for row in rows if kernel_report_triton.offends(row)] == []
