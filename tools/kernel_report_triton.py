"""Registers, stack, spills and shared memory of every Triton kernel, compiled ahead of time: no GPU is needed.

    python tools/kernel_report_triton.py

Compiles each kernel for every target, dtype and a plain and a full set of options, with the launch shapes of
kernels/launch.py, and reads the machine code. Exits with status 1 if one spills or uses local memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no machine code
ROOT = Path(__file__).resolve().parent.parent

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("fp32", "bf16", "fp16")
VOCABS = (32768, 1000)  # a long row's loop over blocks, and a row that is one block
GATE = ("stack", "local", "ldl", "stl", "spills")  # LDL, STL: loads and stores of local memory

# kernel -> option set -> arguments that are given (pointers) and flags that are on. A full set has two blocks for row_grad
# and row_cross_entropy: index targets, and class probabilities with a dense w.
STATS = ("logsumexp_ptr", "logprob_ptr", "entropy_ptr", "log_sum_sq_probs_ptr", "mean_logit_ptr", "is_top1_ptr")
CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "row_stats_kernel": {
        "plain": ("target_ptr", "logsumexp_ptr", "logprob_ptr"),
        "full": ("target_ptr", "bias_ptr", "HAS_SOFTCAP", *STATS),
    },
    "row_grad_kernel": {
        "plain": ("target_ptr", "a_ptr", "b_ptr"),
        "full": ("target_ptr", "bias_ptr", "HAS_SOFTCAP", "a_ptr", "b_ptr", "c_ptr", "d_ptr", "w_ptr"),
    },
    "row_cross_entropy_kernel": {
        "loss": ("target_ptr", "logsumexp_ptr"),
        "plain": ("target_ptr", "logsumexp_ptr", "grad_ptr"),
        "smoothed": ("target_ptr", "logsumexp_ptr", "grad_ptr", "grad_scale_ptr", "SPREAD"),
        "full": ("target_ptr", "bias_ptr", "w_ptr", "grad_ptr", "grad_scale_ptr", "HAS_SOFTCAP", "SPREAD", *STATS),
        "probabilities": ("bias_ptr", "w_ptr", "grad_ptr", "HAS_SOFTCAP", "SPREAD", *STATS),
    },
}
ALWAYS = ("x_ptr", "out_ptr", "lse_ptr", "loss_ptr")
IN_LOGITS_DTYPE = ("x_ptr", "out_ptr", "grad_ptr")
ALIGNED = ("vocab", "row_stride", "out_row_stride", "grad_row_stride", "w_row_stride")


def _type_of(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        return {"target_ptr": "*i64", "is_top1_ptr": "*u8"}.get(name, f"*{dtype if name in IN_LOGITS_DTYPE else 'fp32'}")
    return "i32" if name in ALIGNED or name == "ignore_index" else "fp32"


def _compile(kernel: Any, given: Sequence[str], dtype: str, vocab: int, target: str) -> tuple[Any, dict[str, int]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.launch import launch_shape

    amd = target.startswith("gfx")
    warp = 64 if amd else 32
    shape = launch_shape(vocab, warp)
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name.isupper() or (name.endswith("_ptr") and name not in (*ALWAYS, *given)):
            signature[name] = "constexpr"
            constexprs[name] = shape["BLOCK"] if name == "BLOCK" else name in given if name.isupper() else None
            continue
        signature[name] = _type_of(name, dtype)
        if name.endswith("_ptr") or (name in ALIGNED and vocab % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    gpu = GPUTarget("hip", target, warp) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), warp)
    return triton.compile(source, target=gpu, options={"num_warps": shape["num_warps"]}), shape


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"expected {pattern!r} in {text[:2000]!r}")
    return int(found.group(1))


def _nvidia_numbers(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        code = _run(_tool("nvdisasm"), "-c", file.name)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),
        "local": _number(r"LOCAL:(\d+)", usage),
        "ldl": len(re.findall(r"\bLDL\b", code)),
        "stl": len(re.findall(r"\bSTL\b", code)),
    }


def _amd_numbers(assembly: str) -> dict[str, int]:
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        + _number(r"\.sgpr_spill_count:\s+(\d+)", assembly),
    }


def collect(targets: Sequence[str] = TARGETS) -> list[dict[str, Any]]:
    """One dict per compiled kernel."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from kernels import rows

    if rows.ROUND_BY_HAND.value:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter has no machine code")
    report = []
    for target in targets:
        for name, cases in CASES.items():
            for options, given in cases.items():
                for dtype in DTYPES:
                    for vocab in VOCABS:
                        compiled, shape = _compile(getattr(rows, name), given, dtype, vocab, target)
                        row = {"kernel": name.removesuffix("_kernel"), "target": target, "dtype": dtype,
                               "options": options, "block": shape["BLOCK"], "warps": shape["num_warps"],
                               "shared": compiled.metadata.shared}  # fmt: skip
                        asm = compiled.asm
                        row |= _amd_numbers(asm["amdgcn"]) if "amdgcn" in asm else _nvidia_numbers(asm["cubin"])
                        report.append(row)
    return report


def offends(row: dict[str, Any]) -> bool:
    return any(row.get(name, 0) > 0 for name in GATE)


def main() -> int:
    report = collect(sys.argv[1:] or TARGETS)
    names = list(dict.fromkeys(name for row in report for name in row))
    print("\t".join(names))
    for row in report:
        print("\t".join(str(row.get(name, "")) for name in names), "  <-- spills" if offends(row) else "")
    bad = sum(map(offends, report))
    print(f"{len(report)} kernels, {bad} with spills or local memory")
    return 1 if bad or not report else 0


if __name__ == "__main__":
    sys.exit(main())
