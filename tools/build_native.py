"""Builds fastloss._cpu and fastloss._cuda: finds the tools, writes a build.ninja, runs ninja.

    python tools/build_native.py        builds into fastloss/, where an editable install looks

setup.py calls the same functions. Neither module includes a PyTorch header, so torch need not be there.
A tool that is missing leaves its half out, and fastloss/_build_info.py says why; an error in our own source
stops the build. docs/building.md lists the environment variables.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import platform
import pprint
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import old_glibc

ROOT = Path(__file__).resolve().parent.parent
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CXX_FLAGS = [
    "-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-fPIC", "-Wall", "-Werror=switch",
    "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized",  # GCC 12's own AVX-512 headers warn
]  # fmt: skip
# -fmad=false: the only fused multiply-adds are the ones that are written, as in the emulation of the tests.
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Werror=switch"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
X86_ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2],
    "avx2": AVX2,
    "generic": [],
}
ARM_ISAS = {"neon_bf16": ["-march=armv8.2-a+bf16"], "neon": []}  # every aarch64 has NEON
CUDA_ARCHS = "80;90;100;120+PTX"
# Objects that see no Python header: made once for all Pythons that build in this tree.
SHARED = f"build/native-{sysconfig.get_platform()}"
# csrc/cpu sources compiled once per instruction set, each in its own namespace; every other one is plain C++.
PER_ISA = (
    "rows.cpp",
    "policy.cpp",
    "tokens.cpp",
    "gemm.cpp",
    "vocab_blocks.cpp",
    "head.cpp",
    "divergences.cpp",
    "gather.cpp",
)


class Missing(Exception):
    """A tool is not there, or cannot compile an empty program: its half is left out."""


class BuildError(Exception):
    """The build must stop: our source does not compile, or FASTLOSS_REQUIRE_NATIVE=1 and a half is missing."""


@dataclass
class Half:
    """One extension module: its lines of build.ninja, or the reason why it is not built."""

    name: str
    reason: str = ""
    ninja: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def built(self) -> bool:
        return not self.reason


def flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def jobs() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("MAX_JOBS") or cpus)


# --- tools ----------------------------------------------------------------------------------------------------


def output_of(command: Sequence[str]) -> str:
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    ).stdout


def try_compile(command: Sequence[str], source: str, suffix: str) -> str:
    """The first error of compiling ``source``, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{suffix}"
        path.write_text(source)
        try:
            done = subprocess.run(
                [*command, str(path), "-o", str(path.with_suffix(".out"))],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
        except OSError as error:
            return str(error.strerror)
        if done.returncode == 0:
            return ""
        lines = done.stdout.replace(f"{path}:", "").strip().splitlines()
        return next(
            (line for line in lines if "error" in line), lines[0] if lines else f"exit {done.returncode}"
        ).strip()


def python_includes() -> list[str]:
    return [
        f"-I{path}"
        for path in dict.fromkeys((sysconfig.get_path("include"), sysconfig.get_path("platinclude")))
    ]


def pybind11_includes() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise Missing("the Python package pybind11 is not installed") from None
    return [f"-I{pybind11.get_include()}"]


def find_ninja() -> str:
    with contextlib.suppress(ImportError):
        import ninja

        for program in Path(ninja.BIN_DIR).glob("ninja*"):
            return str(program)
    if program := shutil.which("ninja") or shutil.which("ninja-build"):
        return program
    raise Missing("ninja is not installed")


def find_cxx() -> list[str]:
    """The C++ compiler of $CXX, or the first one there is."""
    if os.environ.get("CXX"):
        candidates = [shlex.split(os.environ["CXX"])]
    else:
        candidates = [["g++"], ["c++"], ["clang++"]]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    raise Missing(f"no C++ compiler found (looked for {', '.join(c[0] for c in candidates)})")


def check_cxx(cxx: list[str]) -> list[str]:
    """Raises Missing if the compiler cannot build a Python module here. Returns the flags for OpenMP, if it has it."""
    program = "#include <Python.h>\n#include <vector>\nstd::vector<int> v;\n"
    if error := try_compile([*cxx, "-std=c++17", "-fPIC", "-c", *python_includes()], program, ".cpp"):
        raise Missing(f"the C++ compiler cannot build a Python module: {error}")
    openmp = try_compile(
        [*cxx, "-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n", ".cpp"
    )
    return [] if openmp else ["-fopenmp"]


def find_nvcc() -> str:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    if program := shutil.which("nvcc"):
        return program
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return "/usr/local/cuda/bin/nvcc"
    raise Missing("nvcc not found (looked in CUDA_HOME, CUDA_PATH and PATH)")


def nvcc_settings(nvcc: str) -> dict[str, str]:
    """What nvcc itself says about its toolkit: TOP, INCLUDES, LIBRARIES (it may be a wrapper script elsewhere)."""
    return dict(
        re.findall(
            r"^#\$ (\w+)=[ \t]*(.*?)[ \t]*$", output_of([nvcc, "--dryrun", "-c", "x.cu"]), re.MULTILINE
        )
    )


def cuda_archs(nvcc: str) -> list[str]:
    """FASTLOSS_CUDA_ARCHS as a list ("80", "90", "120+PTX"); of the default, those that this nvcc knows."""
    asked = os.environ.get("FASTLOSS_CUDA_ARCHS")
    archs = re.split(r"[;,\s]+", (asked or CUDA_ARCHS).strip())
    bad = [arch for arch in archs if not re.fullmatch(r"\d+[af]?(\+PTX)?", arch)]
    if bad:
        raise BuildError(
            f'FASTLOSS_CUDA_ARCHS: expected numbers such as "80;90;120+PTX", got {", ".join(bad)}'
        )
    known = set(re.findall(r"sm_(\w+)", output_of([nvcc, "--list-gpu-code"])))
    unknown = [arch for arch in archs if arch.removesuffix("+PTX") not in known]
    if unknown and asked:
        raise BuildError(f"FASTLOSS_CUDA_ARCHS: this nvcc has no sm_{', sm_'.join(unknown)}")
    archs = [arch for arch in archs if arch not in unknown]
    if not archs:
        raise Missing(f"nvcc knows none of the architectures {CUDA_ARCHS}")
    if not asked and unknown:
        archs[-1] = archs[-1].removesuffix("+PTX") + "+PTX"  # newer GPUs compile it when it is loaded
    return archs


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


# --- build.ninja ----------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def rule(name: str, words: Sequence[str], tail: str, *, depfile: bool = True, pool: str = "") -> list[str]:
    lines = [f"rule {name}", f"  command = {command(words)} {tail}", f"  description = {name} $out"]
    if depfile:
        lines += ["  depfile = $out.d", "  deps = gcc"]
    return lines + ([f"  pool = {pool}"] if pool else [])


def link_flags() -> list[str]:
    return (
        ["-shared", "-undefined", "dynamic_lookup"]
        if sys.platform == "darwin"
        else ["-shared", "-Wl,--version-script=csrc/common/exports.map"]
    )


def last_libraries(root: Path, folder: str, cxx: list[str]) -> list[str]:
    """What ends a link command: nothing, or with FASTLOSS_GLIBC=2.28 the libraries of an older Linux (old_glibc.py)."""
    asked = os.environ.get("FASTLOSS_GLIBC", "")
    if not asked:
        return []
    newest = ".".join(map(str, old_glibc.NEWEST["GLIBC"]))
    if asked != newest or sys.platform != "linux":
        raise BuildError(f"FASTLOSS_GLIBC: expected {newest}, on Linux, got {asked} on {sys.platform}")
    try:
        return old_glibc.make(cxx, root / folder / f"glibc-{newest}")
    except (OSError, RuntimeError) as error:
        raise BuildError(f"FASTLOSS_GLIBC={asked}: {error}") from None


def isas_of(machine: str) -> dict[str, list[str]]:
    """The instruction sets that csrc/cpu is compiled for on a processor, best first, and the flags of each."""
    if machine.lower() in ("x86_64", "amd64"):
        return X86_ISAS
    return ARM_ISAS if machine.lower() in ("aarch64", "arm64") else {"generic": []}


def cpu_half(root: Path, folder: str) -> Half:
    """PER_ISA sources once per instruction set (FASTLOSS_ISA names its namespace), every other source once."""
    half = Half("_cpu")
    try:
        if os.name != "posix":
            raise Missing("the native modules are built on Linux and macOS")
        sources = sorted(path.name for path in (root / "csrc" / "cpu").glob("*.cpp"))
        if not sources:
            raise Missing("there is no source in csrc/cpu")
        find_ninja()
        cxx, bind = find_cxx(), [*python_includes(), *pybind11_includes()]
        openmp = check_cxx(cxx)
    except Missing as missing:
        half.reason = str(missing)
        return half
    isas = isas_of(platform.machine())
    compile = [*cxx, *CXX_FLAGS, *openmp, "-Icsrc"]
    tail = "-MD -MF $out.d -c $in -o $out"
    lines = rule("cpu_cxx", [*compile, *bind], tail)
    objects = []
    for isa, flags in isas.items():
        lines += rule(f"cpu_{isa}", [*compile, *flags, f"-DFASTLOSS_ISA={isa}"], tail)
    for source in sources:
        stem = source.removesuffix(".cpp")
        for isa in isas if source in PER_ISA else [None]:
            output = f"{SHARED if isa else folder}/cpu/{stem}{f'.{isa}' if isa else ''}.o"
            lines.append(f"build {escape(output)}: cpu_{isa or 'cxx'} {escape(f'csrc/cpu/{source}')}")
            objects.append(output)
    last = command(last_libraries(root, folder, cxx))
    lines += rule("cpu_link", [*cxx, *link_flags(), *openmp], f"$in -o $out {last}".rstrip(), depfile=False)
    lines.append(f"build {escape(f'{folder}/_cpu{EXT_SUFFIX}')}: cpu_link {' '.join(map(escape, objects))}")
    half.ninja = lines
    half.info = {
        "compiler": output_of([*cxx, "--version"]).splitlines()[0],
        "isas": list(isas),
        "openmp": bool(openmp),
    }
    return half


def cuda_half(root: Path, folder: str) -> Half:
    """*.cu with nvcc for every architecture, *.cpp with the C++ compiler, the CUDA runtime linked in."""
    half = Half("_cuda")
    try:
        if os.environ.get("FASTLOSS_BUILD_CUDA") == "0":
            raise Missing("left out by FASTLOSS_BUILD_CUDA=0")
        if sys.platform != "linux":
            raise Missing("CUDA is built on Linux")
        kernels = sorted(path.name for path in (root / "csrc" / "cuda").glob("*.cu"))
        if not kernels:
            raise Missing("there is no source in csrc/cuda")
        nvcc = find_nvcc()
        find_ninja()
        cxx, bind = find_cxx(), [*python_includes(), *pybind11_includes()]
        check_cxx(cxx)
        settings = nvcc_settings(nvcc)
        archs = cuda_archs(nvcc)
        probe = [nvcc, "-ccbin", cxx[-1], "-c", gencode(archs)[0]]
        if error := try_compile(probe, "__global__ void probe() {}\n", ".cu"):
            raise Missing(f"nvcc cannot compile an empty kernel: {error}")
    except Missing as missing:
        half.reason = str(missing)
        return half
    includes = [word.replace('"', "") for word in shlex.split(settings.get("INCLUDES", ""))]
    libraries = [word for word in shlex.split(settings.get("LIBRARIES", "")) if not word.endswith("/stubs")]
    codes = gencode(archs)
    threads = max(1, min(len(codes), jobs(), 4))
    lines = [
        "pool nvcc",
        f"  depth = {max(1, jobs() // threads)}",
    ]  # each nvcc runs `threads` compilers itself
    lines += rule(
        "cuda_nvcc", [nvcc, "-ccbin", cxx[-1], *NVCC_FLAGS, *codes, f"--threads={threads}", "-Icsrc"],
        "-MD -MF $out.d -c $in -o $out", pool="nvcc",
    )  # fmt: skip
    lines += rule("cuda_cxx", [*cxx, *CXX_FLAGS, "-Icsrc", *includes, *bind], "-MD -MF $out.d -c $in -o $out")
    objects = []
    for source in [*kernels, *sorted(path.name for path in (root / "csrc" / "cuda").glob("*.cpp"))]:
        stem, suffix = os.path.splitext(source)
        output = f"{SHARED}/cuda/{stem}.cu.o" if suffix == ".cu" else f"{folder}/cuda/{stem}.o"
        lines.append(
            f"build {escape(output)}: cuda_{'nvcc' if suffix == '.cu' else 'cxx'} {escape(f'csrc/cuda/{source}')}"
        )
        objects.append(output)
    runtime = [*libraries, "-lcudart_static", "-lrt", "-ldl", "-lpthread", *last_libraries(root, folder, cxx)]
    lines += rule("cuda_link", [*cxx, *link_flags()], f"$in -o $out {command(runtime)}", depfile=False)
    lines.append(f"build {escape(f'{folder}/_cuda{EXT_SUFFIX}')}: cuda_link {' '.join(map(escape, objects))}")
    half.ninja = lines
    release = re.search(r"release ([\d.]+)", output_of([nvcc, "--version"]))
    half.info = {
        "nvcc": release.group(1) if release else "unknown",
        "archs": ", ".join(arch.removesuffix("+PTX") for arch in archs),
        "ptx": ", ".join(arch.removesuffix("+PTX") for arch in archs if arch.endswith("+PTX")),
    }
    return half


@dataclass
class Plan:
    """The two halves, and the build.ninja (paths relative to ``root``) that builds those with their tools there."""

    root: Path
    folder: str
    halves: list[Half]

    @property
    def ninja_file(self) -> Path:
        return self.root / self.folder / "build.ninja"

    def module(self, half: Half) -> str:
        return f"{self.folder}/{half.name}{EXT_SUFFIX}"

    def text(self) -> str:
        head = [
            "# Generated by tools/build_native.py.",
            "ninja_required_version = 1.8",
            f"builddir = {escape(SHARED)}",
        ]
        return "\n".join([*head, *(line for half in self.halves if half.built for line in half.ninja)]) + "\n"

    def write(self) -> None:
        self.ninja_file.parent.mkdir(parents=True, exist_ok=True)
        if not self.ninja_file.exists() or self.ninja_file.read_text() != self.text():
            self.ninja_file.write_text(self.text())

    def run_ninja(self, halves: Sequence[Half]) -> bool:
        words = [
            find_ninja(),
            "-f",
            str(self.ninja_file),
            "-j",
            str(jobs()),
            *(self.module(half) for half in halves),
        ]
        sys.stdout.flush()
        return subprocess.run(words, cwd=self.root, stdin=subprocess.DEVNULL, check=False).returncode == 0


def plan(root: Path = ROOT) -> Plan:
    """Objects are kept under build/, so that a second build only compiles what changed; the bindings' per Python version."""
    folder = f"build/native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    return Plan(root, folder, [cpu_half(root, folder), cuda_half(root, folder)])


# --- the build ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Two builds in one tree take turns: ninja itself does not lock."""
    if os.name != "posix":
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def put(source: Path, target: Path) -> None:
    """Replaces ``target`` as one step: a process that has the old module loaded keeps it."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy(source, fresh)
    fresh.replace(target)


def build(package: Path, root: Path = ROOT) -> list[Path]:
    """Builds what can be built, puts it and _build_info.py into ``package``; returns those files."""
    with locked(root / "build" / "native.lock"):
        todo = plan(root)
        wanted = [half for half in todo.halves if half.built]
        if wanted:
            todo.write()
            if not todo.run_ninja(wanted):
                failed = (
                    wanted if len(wanted) == 1 else [half for half in wanted if not todo.run_ninja([half])]
                )
                names = " and ".join(f"fastloss.{half.name}" for half in failed)
                if not flag("FASTLOSS_ALLOW_NO_NATIVE"):
                    raise BuildError(
                        f"{names}: the compiler's errors are above. FASTLOSS_ALLOW_NO_NATIVE=1 installs without it."
                    )
                for half in failed:
                    half.reason = "its source did not compile, and FASTLOSS_ALLOW_NO_NATIVE=1"
        by_choice = os.environ.get("FASTLOSS_BUILD_CUDA") == "0"
        for half in todo.halves:
            if half.reason:
                print(f"fastloss.{half.name} is not built: {half.reason}", flush=True)
                if flag("FASTLOSS_REQUIRE_NATIVE") and not (half.name == "_cuda" and by_choice):
                    raise BuildError(
                        f"FASTLOSS_REQUIRE_NATIVE=1, but fastloss.{half.name} is missing: {half.reason}"
                    )
        package.mkdir(parents=True, exist_ok=True)
        files = []
        for half in todo.halves:
            target = package / f"{half.name}{EXT_SUFFIX}"
            if half.built:
                put(root / todo.module(half), target)
                files.append(target)
            else:
                target.unlink(missing_ok=True)  # left by an earlier build
        info = package / "_build_info.py"
        info.write_text(info_text(todo.halves))
        return [*files, info]


def info_text(halves: Sequence[Half]) -> str:
    lines = ['"""What tools/build_native.py built, and why something is missing. Generated."""']
    for half in halves:
        value = {"built": half.built, "reason": half.reason, **half.info}
        lines += ["", f"{half.name[1:].upper()} = {pprint.pformat(value, width=100, sort_dicts=False)}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        for built in build(ROOT / "fastloss"):
            print(built.relative_to(ROOT))
    except BuildError as error:
        sys.exit(f"error: {error}")
