"""Registers, stack, spills, shared memory and loops of every Triton kernel, compiled ahead of time: no GPU is needed.

    python tools/kernel_report_triton.py

Compiles each kernel for every target, dtype and a plain and a full set of options, with the launch shapes of
kernels/, and reads the machine code. Exits with status 1 if one spills or uses local memory.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import kernel_report_loops
import kernel_report_pointwise
from kernel_report_compile import compile_kernel

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no machine code
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # and, through multiprocessing, in the workers

from fastloss import tables  # noqa: E402

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942")
DTYPES = ("fp32", "bf16", "fp16")
LONG, ODD, SHORT = 32768, 50257, 1000  # many blocks; many without alignment; one block, not divisible by 16
GATE = ("stack", "local", "ldl", "stl", "spills")  # LDL, STL: loads and stores of local memory

# kernel -> option set -> arguments that are given (pointers) and flags that are on. The fullest sets are there with and
# without a soft-cap, because the launch shape depends on it.
STATS = tuple(f"{name}_ptr" for name in tables.STATS)
CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "row_stats_kernel": {
        "plain": ("target_ptr", "logsumexp_ptr", "logprobs_ptr"),
        "full": ("target_ptr", "bias_ptr", "HAS_SOFTCAP", *STATS),
        "uncapped": ("target_ptr", "bias_ptr", *STATS),
    },
    "row_grad_kernel": {
        "plain": ("target_ptr", "a_ptr", "b_ptr"),
        "full": ("target_ptr", "bias_ptr", "HAS_SOFTCAP", "a_ptr", "b_ptr", "c_ptr", "d_ptr", "w_ptr"),
        "uncapped": ("target_ptr", "bias_ptr", "a_ptr", "b_ptr", "c_ptr", "d_ptr", "w_ptr"),
    },
    "row_cross_entropy_kernel": {
        "loss": ("target_ptr", "lse_parts_ptr"),
        "plain": ("target_ptr", "lse_parts_ptr", "grad_ptr"),
        "smoothed": ("target_ptr", "lse_parts_ptr", "grad_ptr", "grad_scale_ptr", "SPREAD"),
        "full": (
            "target_ptr",
            "bias_ptr",
            "w_ptr",
            "grad_ptr",
            "grad_scale_ptr",
            "HAS_SOFTCAP",
            "SPREAD",
            *STATS,
        ),
        "uncapped": ("target_ptr", "bias_ptr", "w_ptr", "grad_ptr", "grad_scale_ptr", "SPREAD", *STATS),
        "probabilities": ("bias_ptr", "w_ptr", "grad_ptr", "HAS_SOFTCAP", "SPREAD", *STATS),
    },
}
ALWAYS = ("x_ptr", "out_ptr", "lse_parts_ptr", "loss_ptr")
IN_LOGITS_DTYPE = ("x_ptr", "out_ptr", "grad_ptr")
ALIGNED = ("vocab", "row_stride", "out_row_stride", "grad_row_stride", "w_row_stride")


def _type_of(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        return {"target_ptr": "*i64", "is_top1_ptr": "*u8"}.get(
            name, f"*{dtype if name in IN_LOGITS_DTYPE else 'fp32'}"
        )
    return "i32" if name in ALIGNED or name == "ignore_index" else "fp32"


def compile_case(case: tuple[str, str, str, str, int]) -> dict[str, Any]:
    """Compile (target, kernel, options, dtype, vocab) and return its row of the report."""
    from kernels import rows

    if rows.INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter has no machine code")
    target, name, options, dtype, vocab = case
    kernel, given = getattr(rows, name), CASES[name][options]
    warp = 64 if target.startswith("gfx") else 32
    size = 4 if dtype == "fp32" else 2
    shape = rows.launch_shape(vocab, "HAS_SOFTCAP" in given, size, warp)
    if name == "row_grad_kernel":
        both = {"bias_ptr", "w_ptr"} <= {*given}
        shape = rows.gradient_shape(vocab, "HAS_SOFTCAP" in given, size, both, warp)
    raw = dtype != "fp32" and not {"bias_ptr", "HAS_SOFTCAP"} & {*given}
    constants = {**shape, **dict.fromkeys(given, True), "RAW": raw}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attributes = {}
    for i, arg in enumerate(kernel.arg_names):
        if arg.isupper() or (arg.endswith("_ptr") and arg not in (*ALWAYS, *given)):
            signature[arg] = "constexpr"
            constexprs[arg] = constants.get(arg, False) if arg.isupper() else None
            continue
        signature[arg] = _type_of(arg, dtype)
        if arg.endswith("_ptr") or (arg in ALIGNED and vocab % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    beside = 4 * sum(vector in given for vector in ("bias_ptr", "w_ptr"))  # bytes that come with each logit
    numbers = compile_kernel(
        kernel, signature, constexprs, attributes, shape, target, (4 if dtype == "fp32" else 2) + beside
    )
    return {"kernel": name.removesuffix("_kernel"), "target": target, "dtype": dtype, "options": options,
            "vocab": vocab, "block": shape["BLOCK"], "warps": shape["num_warps"]} | numbers  # fmt: skip


def cases(targets: Sequence[str]) -> Iterator[tuple[str, str, str, str, int]]:
    for target in targets:
        for name, option_sets in CASES.items():
            for options in option_sets:
                for dtype in DTYPES:
                    yield target, name, options, dtype, LONG
                yield target, name, options, "bf16", ODD
                yield target, name, options, "bf16", SHORT


def collect(targets: Sequence[str] = TARGETS) -> list[dict[str, Any]]:
    """One dict per compiled kernel; the cores share the work."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter has no machine code")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # and, through multiprocessing, in the workers
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pointwise = pool.map(kernel_report_pointwise.compile_case, kernel_report_pointwise.cases(targets))
        return [*pool.map(compile_case, cases(targets), chunksize=4), *pointwise]


def offends(row: dict[str, Any]) -> bool:
    return any(row.get(name, 0) > 0 for name in GATE)


def main() -> int:
    report = collect(sys.argv[1:] or TARGETS)
    print(kernel_report_loops.table(report))
    bad = sum(map(offends, report))
    print(f"{len(report)} kernels, {bad} with spills or local memory")
    return 1 if bad or not report else 0


if __name__ == "__main__":
    sys.exit(main())
