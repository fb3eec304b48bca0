"""Registers, spills, stack, local-memory instructions, 16-byte loads and loops of every CUDA kernel, read from the machine code.

python tools/kernel_report_cuda.py [sm_90 ...]                     compiles csrc/cuda, exits 1 if any kernel touches local memory
python tools/kernel_report_cuda.py --module MODULE.so [sm_90 ...]  reads a built module: seconds in place of minutes, but
                                                                   without the bytes that the compiler says it spilled
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel_report_loops
import kernel_report_sass

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHES = ("sm_80", "sm_90", "sm_100", "sm_103", "sm_120")
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
FAULTS = ("stack", "spill_stores", "spill_loads", "ldl", "stl")
# Kernels whose loops are over logits, and how many tensors of them each reads.
OVER_LOGITS = {"row_": 1, "exponentials_": 1, "scale_": 1, "cluster_": 1, "divergence_": 2}


@functools.cache
def find_tool(name: str) -> str | None:
    """A CUDA tool: of CUDA_HOME, of the usual place, on PATH, or (cuobjdump) of triton's package."""
    places = [Path(os.environ[k]) / "bin" for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    places.append(Path("/usr/local/cuda/bin"))
    for place in places:
        if (place / name).is_file():
            return str(place / name)
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    for place in triton.submodule_search_locations or [] if triton else []:
        tool = Path(place) / "backends" / "nvidia" / "bin" / name
        if tool.is_file():
            return str(tool)
    return None


def _run(name: str, *arguments: str) -> str:
    tool = find_tool(name)
    if tool is None:
        raise FileNotFoundError(f"no {name}: set CUDA_HOME or install triton")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)}\n{done.stderr}")
    return done.stdout + done.stderr


def _readable(symbol: str) -> str:
    """row_grad_kernel<float16, 0, 1> from the mangled name; the names here are simple enough for two patterns."""
    name = re.search(r"(?<=\d)([a-z_]+_kernel)", symbol)
    if name is None:
        return symbol
    if symbol[name.end()] != "I":  # not a template
        return name[1]
    arguments = symbol[name.end() : symbol.index("EEv", name.end())]
    dtype = next((t for t in ("bfloat16", "float16") if t in arguments), "float")
    return f"{name[1]}<{', '.join([dtype, *re.findall(r'L(?:b|N.*?E)([0-9]+)(?=E|$)', arguments)])}>"  # flags and codes


def _bytes_of(kernel: str) -> float | None:
    """Bytes that an element of its loops is read from."""
    tensors = next((n for prefix, n in OVER_LOGITS.items() if kernel.startswith(prefix)), None)
    return None if tensors is None else tensors * (2 if "float16" in kernel else 4)


def _section(text: str, pattern: str) -> dict[str, str]:
    """The text after each match of ``pattern``, by its group."""
    pieces = re.split(pattern, text)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _collect_source(arch: str, source: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / f"{source.stem}.cubin")
        log = _run(
            "nvcc",
            *NVCC_FLAGS,
            "-cubin",
            f"-arch={arch}",
            f"-I{SOURCES.parent}",
            "-Xptxas",
            "-v",
            str(source),
            "-o",
            cubin,
        )
        kernels = _read(cubin, arch)
    spills = _section(log, r"Function properties for (\w+)")
    if not set(kernels) <= set(spills):
        raise RuntimeError(f"{arch} {source.name}: the compiler and the machine code list different kernels")
    for symbol, kernel in kernels.items():
        kernel["spill_stores"] = _number(r"(\d+) bytes spill stores", spills[symbol])
        kernel["spill_loads"] = _number(r"(\d+) bytes spill loads", spills[symbol])
    return list(kernels.values())


def collect_module(module: str, arch: str) -> list[dict[str, Any]]:
    """Every kernel that a built module has for an architecture. A spill shows as a stack, or as LDL and STL."""
    return list(_read(module, arch).values())


def _read(program: str, arch: str) -> dict[str, dict[str, Any]]:
    """What the machine code says of each kernel, by the kernel's mangled name."""
    usage = _section(_run("cuobjdump", "-arch", arch, "--dump-resource-usage", program), r"Function (\w+):")
    code = _section(_run("cuobjdump", "-arch", arch, "-sass", program), r"Function : (\w+)")
    if not usage or set(usage) != set(code):
        raise RuntimeError(f"{arch} {Path(program).name}: the tools list different kernels")
    return {symbol: _row(arch, _readable(symbol), text, code[symbol]) for symbol, text in usage.items()}


def _row(arch: str, kernel: str, usage: str, code: str) -> dict[str, Any]:
    program = kernel_report_sass.parse(code)
    opcodes = Counter(i.opcode.split(".")[0] for i in program)
    wide = Counter(i.opcode.split(".")[0] for i in program if ".128" in i.opcode)
    return {
        "arch": arch,
        "kernel": kernel,
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        "shared": _number(r"SHARED:(\d+)", usage),
        "ldl": opcodes["LDL"],
        "stl": opcodes["STL"],
        "wide_loads": wide["LDG"],
        "wide_shared_loads": wide["LDS"],
        "bulk_copies": opcodes["UBLKCP"],
        "instructions": len(program),
        "loops": [loop.row() for loop in kernel_report_loops.analyse(program, _bytes_of(kernel))],
    }


def collect(arches: tuple[str, ...] = ARCHES) -> list[dict[str, Any]]:
    """Every kernel for every architecture; the cores share the compilers."""
    jobs = list(itertools.product(arches, sorted(SOURCES.glob("*.cu"))))
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        return [
            kernel for kernels in pool.map(_collect_source, *zip(*jobs, strict=True)) for kernel in kernels
        ]


def faults(kernels: list[dict[str, Any]]) -> list[str]:
    """Every use of local memory, in words."""
    return [f"{k['arch']} {k['kernel']}: {name} {k[name]}" for k in kernels for name in FAULTS if k.get(name)]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--module"]:
        module, *arches = arguments[1:]
        kernels = [kernel for arch in arches or ARCHES for kernel in collect_module(module, arch)]
    else:
        kernels = collect(tuple(arguments) or ARCHES)
    print(kernel_report_loops.table(kernels))
    for fault in faults(kernels):
        print("local memory:", fault)
    return 1 if faults(kernels) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
