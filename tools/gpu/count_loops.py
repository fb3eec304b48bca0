"""Counts, from the machine code, what the estimates of docs/gpu.md are made of, and writes it to loop_counts.json beside this file.

    python tools/gpu/count_loops.py [--module MODULE.so]

Of the plain row kernels for each card's architecture: registers, and of each loop the issue slots, special functions and float32 operations
an element and the bytes in flight a thread (tools/kernel_report_loops.py). CUDA's are read from the built module, Triton's
are compiled. Needs no GPU. tests/kernels/test_cuda_compiles.py compares; `python tools/gpu/floors.py --write` makes the page of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no machine code
HERE = Path(__file__).resolve().parent
FILE = HERE / "loop_counts.json"
ARCHES = ("sm_80", "sm_90", "sm_100")
CUDA = (
    "row_forward_kernel<{}, 0, 0, 0>",
    "row_forward_kernel<{}, 0, 0, 1>",
    "row_grad_kernel<{}, 0, 0>",
    "scale_kernel<{}>",
    "cluster_rows_kernel<{}>",
    "exponentials_kernel<{}, 0>",
    "divergence_kernel<{}, 0>",  # forward KL
    "divergence_kernel<{}, 2>",  # Jensen-Shannon
)
LONG = 32768  # a vocabulary of many blocks, which 16 divides


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row of the kernels' report."""
    loops = {
        loop["moves"]: {
            "slots": loop["per_element"],
            **{kind: loop[kind] for kind in ("mufu", "fp32")},
            "bytes_in_flight": loop["bytes_in_flight"],
        }
        for loop in row["loops"]
    }
    return {"registers": row["registers"], "loops": loops}


def of_cuda(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By kernel, with the dtype's name in the place of the type's. ``rows`` are of one architecture."""
    types = {"bfloat16": "bfloat16", "float": "float32"}
    wanted = {name.format(t): name.format(dtype) for t, dtype in types.items() for name in CUDA}
    found = {wanted[row["kernel"]]: numbers(row) for row in rows if row["kernel"] in wanted}
    return {name: kernel for name, kernel in sorted(found.items()) if kernel["loops"]}


def of_triton(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By kernel and dtype. ``rows`` are of one architecture."""
    types = {"bf16": "bfloat16", "fp32": "float32"}
    wanted: set[tuple[str, str, int | None]] = {
        (row, "plain", LONG) for row in ("row_stats", "row_cross_entropy", "row_grad")
    }
    wanted |= {("scale", f"{short} whole", None) for short in types}
    wanted.add(("exponentials", f"plain, {LONG}", None))
    return {
        f"{row['kernel']}_kernel<{types[row['dtype']]}>": numbers(row)
        for row in sorted(rows, key=lambda row: (row["kernel"], row["dtype"]))
        if (row["kernel"], row["options"], row.get("vocab")) in wanted and row["dtype"] in types
    }


def compiled(arch: str) -> list[dict[str, Any]]:
    """The Triton kernels that of_triton wants, and no other."""
    import kernel_report_pointwise as pointwise
    import kernel_report_triton as rows

    found = []
    for short in ("bf16", "fp32"):
        for name in ("row_stats_kernel", "row_cross_entropy_kernel", "row_grad_kernel"):
            found.append(rows.compile_case((arch, name, "plain", short, LONG)))
        found.append(pointwise.compile_case((arch, "scale", "scale_kernel", f"{short} whole")))
    case = (arch, "exponentials", "exponentials_kernel", f"plain, {LONG}")
    return [*found, pointwise.compile_case(case)]


def counted_by(compiler: str) -> str:
    """The version of nvcc or triton that the file's counts are of: another one makes other code."""
    return str(json.loads(FILE.read_text())[compiler])


def drift(backend: str, arch: str, counted: dict[str, Any]) -> list[str]:
    """Where the file is more than a tenth off, or knows another kernel or loop, in words. Empty for an architecture that it has not."""
    recorded = json.loads(FILE.read_text())[backend].get(arch)
    if recorded is None:
        return []
    wrong = [f"{arch} {name}: in one of both alone" for name in recorded.keys() ^ counted.keys()]
    for name in recorded.keys() & counted.keys():
        old, new = recorded[name]["loops"], counted[name]["loops"]
        if old.keys() != new.keys():
            wrong.append(f"{arch} {name}: loops {sorted(new)}, not {sorted(old)}")
        for moves in old.keys() & new.keys():
            for what, before in old[moves].items():
                if abs(new[moves][what] - before) > 0.1 * before:
                    wrong.append(f"{arch} {name} {moves}: {what} {new[moves][what]}, not {before}")
    return [f"{line}: run tools/gpu/count_loops.py, then tools/gpu/floors.py --write" for line in wrong]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", help="a built fastloss._cuda; default: the one that is imported")
    given = parser.parse_args()
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
    import kernel_report_cuda
    import triton

    import fastloss._build_info as build

    module = given.module
    if module is None:
        spec = importlib.util.find_spec("fastloss._cuda")
        if spec is None or spec.origin is None:
            raise SystemExit("fastloss._cuda is not built")
        module = spec.origin
    counted = {
        "nvcc": build.CUDA["nvcc"],
        "triton": triton.__version__,
        "cuda": {arch: of_cuda(kernel_report_cuda.collect_module(module, arch)) for arch in ARCHES},
        "triton kernels": {arch: of_triton(compiled(arch)) for arch in ARCHES},
    }
    FILE.write_text(json.dumps(counted, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
