"""Registers, spills, stack and loops of every GPU kernel for every target, from the machine code; needs no GPU.

    python tools/kernel_report.py [--out FILE]        make kernels

Exits with status 1 if a kernel spills or uses local memory. kernel_report_cuda.py and kernel_report_triton.py collect
the rows: one dict per kernel, target and set of options. What is counted of a loop is in kernel_report_loops.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no machine code; before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parent))

Row = dict[str, Any]
GATE = (
    "stack",
    "local",
    "spills",
    "spill_stores",
    "spill_loads",
    "ldl",
    "stl",
)  # LDL, STL: local loads and stores


def collect() -> dict[str, list[Row]]:
    import kernel_report_cuda
    import kernel_report_triton

    return {"cuda": list(kernel_report_cuda.collect()), "triton": list(kernel_report_triton.collect())}


def offends(row: Row) -> bool:
    """A register spilled or a byte of local memory."""
    return any(isinstance(row.get(key), int) and row[key] > 0 for key in GATE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    import kernel_report_loops

    report = collect()
    bad = 0
    for backend, rows in report.items():
        offenders = [row for row in rows if offends(row)]
        bad += len(offenders)
        print(f"{backend}: {len(rows)} kernels, {len(offenders)} with spills or local memory")
        print(kernel_report_loops.table(rows), end="\n\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if bad or not all(report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
