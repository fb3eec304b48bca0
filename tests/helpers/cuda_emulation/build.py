"""Builds csrc/cuda for the CPU with g++: `_cuda_emulated`, and the race check. Cached in build/ by mtime."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_emulation"
# -ffp-contract=off as nvcc's -fmad=false: the only fused multiply-adds are the ones that are written.
FLAGS = [
    "-std=c++20",
    "-O1",  # half the time of -O2: small rows run in no time, and most of a test is the compiler
    "-Wall",
    "-Wextra",
    "-Werror=switch",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-DFASTLOSS_EMULATE",
    "-pthread",
    f"-I{HERE}",
    f"-I{SOURCES}",
    f"-I{SOURCES.parent}",
]
WARPS_OF_32 = "-DFASTLOSS_EMULATED_WARP=32"  # as on a GPU


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def _compile(out: Path, arguments: list[str]) -> Path:
    inputs = [
        *SOURCES.iterdir(),
        *SOURCES.parent.glob("*.h"),
        *SOURCES.parent.glob("common/*.h"),
        *HERE.glob("*.h"),
        *HERE.glob("*.cpp"),
        Path(__file__),
    ]
    newest = max(path.stat().st_mtime for path in inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be at it
        if not out.exists() or out.stat().st_mtime < newest:
            partial = out.with_suffix(".partial")
            command = [compiler() or "g++", *FLAGS, *arguments, "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            partial.replace(out)
    return out


@functools.cache
def build_emulated() -> ModuleType:
    """The module with the interface of ``fastloss._cuda`` whose pointers are the CPU's."""
    import pybind11

    out = _compile(
        BUILD / ("_cuda_emulated" + str(sysconfig.get_config_var("EXT_SUFFIX"))),
        [
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-DFASTLOSS_MODULE=_cuda_emulated",
            f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_paths()['include']}",
            "-x",
            "c++",
            *map(str, sorted(SOURCES.glob("*.cu"))),
            *map(str, sorted(SOURCES.glob("*.cpp"))),
        ],
    )
    spec = importlib.util.spec_from_file_location("_cuda_emulated", out)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _under_thread_sanitizer(main: str, sources: Sequence[Path], *more: str) -> Path:
    flags = [*more, "-fsanitize=thread", "-g", "-x", "c++"]
    return _compile(BUILD / main, [*flags, *map(str, sources), str(HERE / f"{main}.cpp")])


def build_race_check() -> Path:
    """Every kernel: does a block's threads race?"""
    return _under_thread_sanitizer("tsan_main", sorted(SOURCES.glob("*.cu")), WARPS_OF_32)


def build_tickets_check() -> Path:
    """The kernels whose last block finishes: do blocks that run at once race?"""
    sources = [SOURCES / "policy.cu", SOURCES / "tokens.cu"]
    return _under_thread_sanitizer("tickets_main", sources, "-DFASTLOSS_CONCURRENT_BLOCKS")


def build_limits_check() -> Path:
    """Launches on several devices: what is asked of the driver?"""
    sources = [SOURCES / "rows.cu", SOURCES / "cluster_rows.cu", SOURCES / "scale.cu"]
    return _under_thread_sanitizer("limits_main", sources, WARPS_OF_32)


def build_cluster_check() -> Path:
    """The row kernel of clusters: do its blocks race, and does the emulation notice what is left out?"""
    return _under_thread_sanitizer(
        "cluster_main", [SOURCES / "cluster_rows.cu"], "-DFASTLOSS_CONCURRENT_BLOCKS"
    )
