"""Says what is wrong with a wheel or a source distribution, and how large it is. Ends with an error if anything is.

    python tools/check_wheel.py dist/*.whl dist/cpu/*.whl dist/*.tar.gz

Looked at: name and tag, size, files that are missing or do not belong, licences, metadata, and of each native module the
symbols it shows, the libraries it asks for, and whether a Linux of the wheel's tag can load it. Needs readelf.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import old_glibc

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(
    r"fastloss-(?P<version>[\w.+]+)-(?P<python>cp3\d+|py3)-(?P<abi>cp3\d+|none)-(?P<platform>[\w.]+)\.whl"
)
PLATFORM = re.compile(r"manylinux_2_28_(x86_64|aarch64)")
# MiB. A module that doubles is a mistake until somebody says that it is not.
LARGEST = {"cpu": 3, "cuda": 9, "sdist": 4}
SOURCES = (".cpp", ".cu", ".cuh", ".h", ".o", ".pyc", ".so.0")
# libgomp comes with torch; libcuda is opened when a GPU is asked for.
LIBRARIES = re.compile(
    r"lib(c|m|dl|rt|pthread)\.so\.\d|libstdc\+\+\.so\.6|libgcc_s\.so\.1|libgomp\.so\.1|ld-linux-[\w-]+\.so\.\d"
)
SYMBOL = re.compile(r"^\s*\d+: \S+\s+\S+\s+\S+\s+(GLOBAL|WEAK|UNIQUE)\s+(\S+)\s+(\S+)\s+(\S+)", re.M)
LICENCES = ("LICENSE", "NOTICE")


def kernels() -> set[str]:
    return {f"fastloss/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


def check_native(path: Path) -> list[str]:
    """What a module shows, what it asks for, and what a Linux of the tag lacks of it."""
    wrong = []
    module = path.name.split(".")[0]
    listing = _readelf("--dyn-syms", path)
    for bind, _, index, name in SYMBOL.findall(listing):
        symbol, _, version = name.replace("@@", "@").partition("@")
        if index != "UND":
            if symbol != f"PyInit_{module}" and index != "ABS":
                wrong.append(f"{path.name} shows {symbol}")
            continue
        parsed = old_glibc.version(version)
        if parsed and parsed[1] > old_glibc.NEWEST[parsed[0]]:
            wrong.append(f"{path.name} needs {symbol} of {version}")
        if not version and bind != "WEAK" and not symbol.startswith(("Py", "_Py")):
            wrong.append(f"{path.name} needs {symbol}, and no library is named that has it")
    dynamic = _readelf("--dynamic", path)
    for library in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if not LIBRARIES.fullmatch(library):
            wrong.append(f"{path.name} asks for {library}")
    for folder in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic):
        wrong.append(f"{path.name} looks for libraries in {folder}")
    return wrong


def check_metadata(metadata: Message, version: str) -> list[str]:
    """Name, version, licence; torch and nothing else needed; the extras of pyproject.toml."""
    wrong = []
    wanted = {
        "Name": "fastloss",
        "Version": version,
        "Requires-Python": ">=3.10",
        "License-Expression": "Apache-2.0",
        "Description-Content-Type": "text/markdown",
    }
    for key, value in wanted.items():
        if metadata[key] != value:
            wrong.append(f"{key}: expected {value}, got {metadata[key]}")
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    if [line.replace(" ", "") for line in needed] != ["torch>=2.8"]:
        wrong.append(f"Requires-Dist: expected torch>=2.8 alone, got {', '.join(needed) or 'nothing'}")
    section = (
        (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")
    )
    extras = set(re.findall(r"^(\w+) = \[", section[0], re.M))
    if set(metadata.get_all("Provides-Extra", [])) != extras:
        wrong.append(f"Provides-Extra: expected {', '.join(sorted(extras))}")
    if set(metadata.get_all("License-File", [])) != set(LICENCES):
        wrong.append(f"License-File: expected {', '.join(LICENCES)}")
    return wrong


def check_size(path: Path, kind: str) -> list[str]:
    size = path.stat().st_size / 2**20
    return [] if size <= LARGEST[kind] else [f"{size:.1f} MiB, more than {LARGEST[kind]}"]


def check_wheel(path: Path) -> list[str]:
    match = NAME.fullmatch(path.name)
    if match is None:
        return [f"no name of a wheel of fastloss: {path.name}"]
    version = match["version"]
    cuda = not version.endswith("+cpu")
    wrong = check_size(path, "cuda" if cuda else "cpu")
    if not PLATFORM.fullmatch(match["platform"]):
        wrong.append(f"platform: expected {PLATFORM.pattern}, got {match['platform']}")
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        info = f"fastloss-{version}.dist-info"
        native = [name for name in names if name.endswith(".so")]
        modules = {PurePosixPath(name).name.split(".")[0] for name in native}
        if modules != ({"_cpu", "_cuda"} if cuda else {"_cpu"}):
            wrong.append(f"native modules: {', '.join(sorted(modules)) or 'none'}")
        tag = f".cpython-{match['python'].removeprefix('cp')}-"
        wrong += [f"{name} is not for {match['python']}" for name in native if tag not in name]
        for name in names:
            if not name.startswith(("fastloss/", f"{info}/")) or name.endswith(SOURCES) or "/tests/" in name:
                wrong.append(f"{name} does not belong")
        wanted = {"fastloss/__init__.py", "fastloss/py.typed", "fastloss/_build_info.py"} | kernels()
        wrong += [f"{name} is missing" for name in sorted(wanted - set(names))]
        for licence in LICENCES:
            name = f"{info}/licenses/{licence}"
            if name not in names or archive.read(name) != (ROOT / licence).read_bytes():
                wrong.append(f"{name} is missing, or is another")
        if f"{info}/METADATA" in names:
            metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
            wrong += check_metadata(metadata, version)
        else:
            wrong.append("METADATA is missing")
        for name in native:
            wrong += check_native(Path(archive.extract(name, folder)))
    return wrong


def check_sdist(path: Path) -> list[str]:
    """All that a build needs is there, and nothing that a build made."""
    wrong = check_size(path, "sdist")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        member = archive.extractfile(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO")
        metadata = Parser().parsestr(member.read().decode() if member else "")
    wrong += check_metadata(metadata, path.name.removesuffix(".tar.gz").removeprefix("fastloss-"))
    wanted = {
        str(file.relative_to(ROOT))
        for folder in ("csrc", "kernels", "tools", "docs", "fastloss")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and _in_a_checkout(file)
    }
    wanted |= {*LICENCES, "setup.py", "pyproject.toml", "README.md", "Makefile", "tests/test_build.py"}
    wrong += [f"{name} is missing" for name in sorted(wanted - names)]
    made = re.compile(
        r".*\.(so|o|pyc)|fastloss/_build_info\.py|(build|dist|\.venv|\.git|benchmarks/results)/.*"
    )
    wrong += [f"{name} does not belong" for name in sorted(names) if made.fullmatch(name)]
    return wrong


def _in_a_checkout(file: Path) -> bool:
    parts = file.relative_to(ROOT).parts
    made = {"__pycache__", "_build_info.py"} & set(parts) or file.suffix in (".so", ".o", ".pyc")
    return not made and parts[:2] != ("fastloss", "kernels")


def _readelf(option: str, path: Path) -> str:
    return subprocess.run(
        ["readelf", "--wide", option, str(path)], capture_output=True, text=True, check=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    failed = False
    for path in parser.parse_args().files:
        wrong = check_sdist(path) if path.name.endswith(".tar.gz") else check_wheel(path)
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.name}  {'WRONG' if wrong else 'good'}")
        for line in wrong:
            print(f"             {line}")
        failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
