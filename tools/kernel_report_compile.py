"""One Triton kernel to the numbers of its machine code: what kernel_report_triton.py and kernel_report_pointwise.py share."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import kernel_report_amdgcn
import kernel_report_loops
import kernel_report_sass
from kernel_report_loops import Instruction


def compile_kernel(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], attributes: dict[Any, Any], shape: dict[str, Any],
    target: str, element_bytes: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Shared memory, registers, stack, spills and loops of one kernel compiled for ``target``; what an element of a loop is read from, in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=gpu, options={k: v for k, v in shape.items() if not k.isupper()})
    asm = compiled.asm
    numbers, program = _amd_numbers(asm["amdgcn"]) if amd else _nvidia_numbers(asm["cubin"])
    loops = [loop.row() for loop in kernel_report_loops.analyse(program, element_bytes)]
    return {"shared": compiled.metadata.shared} | numbers | {"loops": loops}


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


def _nvidia_numbers(cubin: bytes) -> tuple[dict[str, int], list[Instruction]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        code = _run(_tool("cuobjdump"), "-sass", file.name)
    numbers = {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),
        "local": _number(r"LOCAL:(\d+)", usage),
        "ldl": len(re.findall(r"\bLDL\b", code)),
        "stl": len(re.findall(r"\bSTL\b", code)),
    }
    return numbers, kernel_report_sass.parse(code)


def _amd_numbers(assembly: str) -> tuple[dict[str, int], list[Instruction]]:
    numbers = {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        + _number(r"\.sgpr_spill_count:\s+(\d+)", assembly),
    }
    return numbers, kernel_report_amdgcn.parse(assembly)
