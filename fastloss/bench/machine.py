"""Where and with what it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastloss

PACKAGES = (
    "torch",
    "triton",
    "trl",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "numpy",
)
FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
)
ROOT = Path(__file__).resolve().parents[2]


def machine(device: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in _cpuinfo("flags").split() if flag in FLAGS],
        "caches": caches(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu.name if gpu else None,
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "device": device,
        "os": platform.platform(),
        "python": platform.python_version(),
        "fastloss": fastloss.__version__,
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": list(os.getloadavg()),
    }


def slug(info: dict[str, Any]) -> str:
    """A folder's name: the GPU, or the CPU with its threads and widest vectors."""
    isa = next((f for f in ("amx_bf16", "avx512f", "avx2") if f in info["flags"]), "")
    name = info["gpu"] or f"{info['cpu']} {info['threads']}t {isa}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    out = {}
    for package in PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def caches() -> dict[str, str]:
    """Of the first core: {"L1d": "32K", …, "L3": "32768K"}; empty where the system doesn't say."""
    out = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        out[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return out


def commit() -> str:
    """Short hash, with a plus where the code has changes that are not committed; "" outside a checkout."""

    def git(*args: str) -> str:
        try:
            run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "fastloss", "kernels", "csrc")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def _cpuinfo(field: str) -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*:\s*(.*)$", info.read_text(), re.M) if info.exists() else None
    return found.group(1) if found else ""
