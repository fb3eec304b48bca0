"""The peers of the benchmark, for a machine without a network: fetched and cut into pieces here, put together and installed there.

    python tools/gpu/wheels.py fetch FOLDER [--python 3.12] [package ...]
    python tools/gpu/wheels.py install FOLDER                      on the GPU's machine

FOLDER gets files of at most 48 MiB (one wheel is larger) and wheels.json with the size and SHA-256 of each wheel. Wheels are installed
without their dependencies: torch and Triton are there already, in the versions that are to be measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = (
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "trl",
    "accelerate",
    "omegaconf",
    "expecttest",
    "hypothesis",
    "sortedcontainers",
    "pytest-xdist",
    "execnet",
    "pytest-timeout",
)
PIECE = 48 << 20
INDEX = "wheels.json"


def split(wheels: Path, folder: Path, piece: int = PIECE) -> dict[str, dict[str, object]]:
    """Every wheel of ``wheels`` in pieces into ``folder``, and what they must add up to."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, dict[str, object]] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        content = wheel.read_bytes()
        pieces = []
        for k, start in enumerate(range(0, max(1, len(content)), piece)):
            name = f"{wheel.name}.{k:03d}"
            (folder / name).write_bytes(content[start : start + piece])
            pieces.append(name)
        index[wheel.name] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "pieces": pieces,
        }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return index


def join(folder: Path, into: Path) -> list[Path]:
    """The wheels again.

    Raises:
        ValueError: a piece is missing or is not what it was.
    """
    into.mkdir(parents=True, exist_ok=True)
    found = []
    for name, expected in json.loads((folder / INDEX).read_text()).items():
        missing = [piece for piece in expected["pieces"] if not (folder / piece).is_file()]
        if missing:
            raise ValueError(f"{name}: expected {', '.join(missing)} in {folder}")
        content = b"".join((folder / piece).read_bytes() for piece in expected["pieces"])
        got = hashlib.sha256(content).hexdigest()
        if got != expected["sha256"]:
            raise ValueError(f"{name}: expected SHA-256 {expected['sha256']}, got {got}")
        (into / name).write_bytes(content)
        found.append(into / name)
    return found


def fetch(folder: Path, python: str, packages: Sequence[str]) -> int:
    """One package at a time: one that cannot be had is said so and left out."""
    missing = 0
    with tempfile.TemporaryDirectory() as place:
        for package in packages:
            options = ["--no-deps", "--only-binary", ":all:", "--python-version", python, "-d", place, "-q"]
            platforms = ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", *options, *platforms, package],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                missing += 1
                print(
                    f"{package}: {(done.stderr.strip().splitlines() or ['not found'])[-1]}", file=sys.stderr
                )
        for name, expected in split(Path(place), folder).items():
            print(f"{name}: {expected['size']} bytes in {len(expected['pieces'])} pieces")  # type: ignore[arg-type]
    return 1 if missing else 0


def install(folder: Path) -> int:
    """Each by itself: one that does not fit this Python must not keep the others out."""
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        for wheel in join(folder, Path(place)):
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
            bad += subprocess.run(command).returncode != 0
    return 1 if bad else 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("fetch", "install"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", nargs="*", default=PACKAGES)
    parser.add_argument("--python", default="3.12")
    given = parser.parse_args(arguments)
    if given.what == "install":
        return install(given.folder)
    return fetch(given.folder, given.python, given.packages or PACKAGES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
