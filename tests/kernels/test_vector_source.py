"""The C++ under the CPU kernels without Python around it: vectors, tiles, rows and head, against double arithmetic.

One program (tests/helpers/vector_check) for each instruction set: aarch64's are made by a cross compiler and run by qemu where
those are installed (Debian: g++-aarch64-linux-gnu, qemu-user). x86's run the same checks, and one runs the tiles of bfmmla on an
emulation of that instruction.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "csrc" / "cpu").exists():
    pytest.skip("the installed package has no sources", allow_module_level=True)

import build_native  # noqa: E402
from instruction_sets import ISAS  # noqa: E402

# GCC 12 warns of its own AVX-512 headers, and where there is no OpenMP of what is for it.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas",
            "-Wno-unused-parameter", "-Wno-uninitialized", "-Wno-missing-field-initializers"]  # fmt: skip
FLAGS = ["-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", *WARNINGS, "-Icsrc"]
IS_ARM = platform.machine() in ("aarch64", "arm64")
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"


@dataclass(frozen=True)
class Build:
    """A program: the instruction set it is compiled for, and how."""

    isa: str
    flags: tuple[str, ...] = ()
    has_fma: bool = True
    needs: str = ""  # an instruction set that the processor must have

    @property
    def for_arm(self) -> bool:
        return self.isa in build_native.ARM_ISAS


def x86(isa: str, *flags: str, **options: object) -> Build:
    return Build(isa, (*build_native.X86_ISAS[isa], *flags), **options)  # type: ignore[arg-type]


BUILDS = {
    "neon_bf16": Build("neon_bf16", tuple(build_native.ARM_ISAS["neon_bf16"])),
    "neon": Build("neon"),
    "bfmmla emulated": x86("generic", "-DFASTLOSS_EMULATE_QUADS", has_fma=False),
    "generic": x86("generic", has_fma=False),
    "avx2": x86("avx2", needs="avx2"),
    "avx512": x86("avx512", needs="avx512"),
    # AVX-512's source compiled for AVX2.
    "wide16": Build("wide16", (*build_native.X86_ISAS["avx2"], "-DFASTLOSS_VECTOR_BYTES=64"), needs="avx2"),
}
QUICK = ("neon_bf16", "bfmmla emulated")


def tools(build: Build) -> tuple[list[str], list[str]]:
    """(the compiler, what runs its programs); skips with the reason where one is missing."""
    if build.for_arm and not IS_ARM:
        missing = [tool for tool in (CROSS, QEMU) if shutil.which(tool) is None]
        if missing:
            pytest.skip(f"no {' and no '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
        return [CROSS], [QEMU, "-cpu", "max"]
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if build.for_arm:
        if build.isa not in ISAS:
            pytest.skip(f"this processor has no {build.isa}")
        return ["g++"], []
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86-64 processor")
    if build.needs and build.needs not in ISAS:
        pytest.skip(f"this processor has no {build.needs}, or the native CPU module is not built")
    return ["g++"], []


def run(words: list[str]) -> str:
    done = subprocess.run(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def lacks_pairs(build: Build) -> bool:
    """AVX-512 without AVX512_BF16, whose instruction that build has for pairs."""
    if build.isa != "avx512":
        return False
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" not in flags


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BUILDS]
)
def test_against_double_arithmetic(name: str, tmp_path: Path) -> None:
    build = BUILDS[name]
    compiler, runner = tools(build)
    # From -O2 on GCC fuses multiplications with additions, as in the module.
    flags = [
        "-O2" if build.has_fma else "-O1", *FLAGS, *build.flags, f"-DFASTLOSS_ISA={build.isa}", f"-DFASTLOSS_CHECK_HAS_FMA={int(build.has_fma)}",
        f"-DFASTLOSS_CHECK_STRIDE={61 if name not in QUICK else 997}",
        *(["-DFASTLOSS_CHECK_NO_PAIRS"] if lacks_pairs(build) else []),
    ]  # fmt: skip
    objects = []
    for source in (
        "csrc/cpu/head.cpp",
        "csrc/cpu/rows.cpp",
        "csrc/cpu/gemm.cpp",
        "tests/helpers/vector_check/main.cpp",
    ):
        objects.append(str(tmp_path / f"{Path(source).stem}.o"))
        run([*compiler, *flags, "-c", source, "-o", objects[-1]])
    program = str(tmp_path / "check")
    run([*compiler, "-static", *objects, "-o", program])
    assert run([*runner, program]) == f"{build.isa}: 0 failures\n"


@pytest.mark.slow
def test_all_of_the_module_compiles_for_arm() -> None:
    compiler = [CROSS] if not IS_ARM else ["g++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]} (Debian: g++-aarch64-linux-gnu)")
    pybind11 = pytest.importorskip("pybind11")
    # This Python's headers: of another processor, but of the same sizes.
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        source = f"csrc/cpu/{path.name}"
        if path.name not in build_native.PER_ISA:
            run([*compiler, *FLAGS, *python, "-fsyntax-only", source])
            continue
        for isa, flags in build_native.ARM_ISAS.items():
            run([*compiler, *FLAGS, *flags, f"-DFASTLOSS_ISA={isa}", "-fsyntax-only", source])
