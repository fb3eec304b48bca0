"""tools/build_native.py: what it compiles, what it compiles again, and what it says when a tool is missing.

The fast tests run the real ninja with a stand-in for the compiler that only preprocesses (for the dependencies).
FASTLOSS_TEST_BUILD=1 also builds a wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh"))

pytest.importorskip("pybind11")
if not (ROOT / "tools" / "build_native.py").exists():
    pytest.skip("the installed package has no sources", allow_module_level=True)
import build_native  # noqa: E402

try:
    build_native.find_ninja()
    build_native.check_cxx(build_native.find_cxx())
except build_native.Missing as missing:
    pytest.skip(str(missing), allow_module_level=True)

COMPILER = f"""#!{sys.executable}
# Preprocesses like the real compiler, for the dependencies, and writes an empty object.
import pathlib, subprocess, sys
words = sys.argv[1:]
if "-c" in words and "-MF" in words:
    output, depfile = words[words.index("-o") + 1], words[words.index("-MF") + 1]
    keep = [word for word in words if not word.startswith("-m") and word not in ("-c", "-MD")]
    keep = [word for i, word in enumerate(keep) if word not in ("-o", "-MF") and keep[i - 1] not in ("-o", "-MF")]
    done = subprocess.run(["g++", *keep, "-MM", "-MT", output, "-MF", depfile])
    pathlib.Path(output).write_text("object")
    sys.exit(done.returncode)
if "-shared" in words:
    pathlib.Path(words[words.index("-o") + 1]).write_text("module")
    sys.exit(0)
sys.exit(subprocess.run(["g++", *words]).returncode)
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of csrc/ that is built with the stand-in compiler, without CUDA."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to preprocess with")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FASTLOSS_BUILD_CUDA", "0")
    for name in ("FASTLOSS_REQUIRE_NATIVE", "FASTLOSS_ALLOW_NO_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def build_info(package: Path) -> dict[str, dict[str, object]]:
    info: dict[str, dict[str, object]] = {}
    exec((package / "_build_info.py").read_text(), info)
    return info


def would_compile(tree: Path) -> set[str]:
    """The objects that ninja would build now."""
    plan = build_native.plan(tree)
    done = subprocess.run(
        [build_native.find_ninja(), "-n", "-v", "-d", "explain", "-f", str(plan.ninja_file)],
        cwd=tree, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {Path(name).name for name in re.findall(r" -o (\S+\.o)\b", done.stdout)}


def touch(path: Path) -> None:
    later = time.time() + 2
    os.utime(path, (later, later))


def test_no_torch_headers() -> None:
    assert SOURCES
    for path in SOURCES:
        found = re.findall(r"#\s*include\s*[<\"](?:torch|ATen|c10)[/.]\S*", path.read_text())
        assert not found, f"{path.relative_to(ROOT)} includes {found}"


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_no_torch_symbols(name: str) -> None:
    spec = importlib.util.find_spec(f"fastloss.{name}")
    if spec is None or spec.origin is None:
        pytest.skip(f"fastloss.{name} is not built")
    for tool in (["nm", "-D", "--undefined-only"], ["readelf", "-d"]):
        if shutil.which(tool[0]) is None or sys.platform != "linux":
            pytest.skip(f"no {tool[0]}")
        text = subprocess.run([*tool, spec.origin], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"N2at|N3c10|torch|libc10|libcudart", text)


def test_build_ninja_is_reproducible(tree: Path) -> None:
    first = build_native.plan(tree)
    first.write()
    stamp = first.ninja_file.stat().st_mtime_ns
    second = build_native.plan(tree)
    second.write()
    assert second.text() == first.text()
    assert first.ninja_file.stat().st_mtime_ns == stamp
    assert str(tree / "csrc") not in first.text() and str(ROOT / "csrc") not in first.text()


def test_every_source_is_compiled(tree: Path) -> None:
    build_native.plan(tree).write()
    objects = would_compile(tree)
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        assert any(name.split(".")[0] == path.stem for name in objects)
    assert {name for name in objects if name.startswith("rows.")} >= {"rows.generic.o"}


def test_one_changed_file_is_one_object(tree: Path) -> None:
    build_native.build(tree / "package", tree)
    assert would_compile(tree) == set()
    touch(tree / "csrc" / "cpu" / "dispatch.cpp")
    assert would_compile(tree) == {"dispatch.o"}


def test_a_changed_header_is_what_includes_it(tree: Path) -> None:
    build_native.build(tree / "package", tree)
    touch(tree / "csrc" / "cpu" / "vec.h")
    objects = would_compile(tree)
    per_isa = {Path(source).stem for source in build_native.PER_ISA}
    # vec.h is theirs alone
    assert {Path(name).name.split(".")[0] for name in objects} == per_isa


def test_a_missing_compiler_is_a_reason(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_native.build(tree / "package", tree)
    monkeypatch.setenv("CXX", "no-such-compiler")
    files = build_native.build(tree / "package", tree)
    assert [path.name for path in files] == ["_build_info.py"]
    assert not list((tree / "package").glob("_cpu*"))
    cpu = build_info(tree / "package")["CPU"]
    assert cpu["built"] is False and "no-such-compiler" in str(cpu["reason"])


def test_a_compiler_that_cannot_compile_is_a_reason(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    build_native.build(tree / "package", tree)
    assert "cannot build a Python module" in str(build_info(tree / "package")["CPU"]["reason"])


def test_require_native_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FASTLOSS_REQUIRE_NATIVE", "1")
    with pytest.raises(build_native.BuildError, match="no-such-compiler"):
        build_native.build(tree / "package", tree)


def test_missing_nvcc_leaves_the_cpu_half(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLOSS_BUILD_CUDA")

    def missing() -> str:
        raise build_native.Missing("nvcc not found")

    monkeypatch.setattr(build_native, "find_nvcc", missing)
    build_native.build(tree / "package", tree)
    info = build_info(tree / "package")
    assert info["CPU"]["built"] is True
    assert info["CUDA"] == {"built": False, "reason": "nvcc not found"}


def test_our_own_error_stops_the_build(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "csrc" / "cpu" / "dispatch.cpp").write_text('#include "not_there.h"\n')
    with pytest.raises(build_native.BuildError, match=r"fastloss\._cpu"):
        build_native.build(tree / "package", tree)
    monkeypatch.setenv("FASTLOSS_ALLOW_NO_NATIVE", "1")
    build_native.build(tree / "package", tree)
    assert "did not compile" in str(build_info(tree / "package")["CPU"]["reason"])


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_native, "output_of", lambda _: "sm_80\nsm_90\nsm_90a\n")
    monkeypatch.delenv("FASTLOSS_CUDA_ARCHS", raising=False)
    assert build_native.cuda_archs("nvcc") == ["80", "90+PTX"]  # what an older nvcc knows of the default
    monkeypatch.setenv("FASTLOSS_CUDA_ARCHS", "80, 90a+PTX")
    assert build_native.cuda_archs("nvcc") == ["80", "90a+PTX"]
    assert build_native.gencode(["80", "90a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    for wrong in ("120", "sm_80", "80;;x"):
        monkeypatch.setenv("FASTLOSS_CUDA_ARCHS", wrong)
        with pytest.raises(build_native.BuildError, match="FASTLOSS_CUDA_ARCHS"):
            build_native.cuda_archs("nvcc")


@pytest.mark.skipif(
    os.environ.get("FASTLOSS_TEST_BUILD") != "1", reason="FASTLOSS_TEST_BUILD=1 builds a wheel (slow)"
)
def test_wheel(tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info", "_build_info.py"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)],
        check=True, env={**os.environ, "FASTLOSS_REQUIRE_NATIVE": "1", "FASTLOSS_BUILD_CUDA": "0"},
    )  # fmt: skip
    (wheel,) = tmp_path.glob("fastloss-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"fastloss/_cpu{build_native.EXT_SUFFIX}", "fastloss/_build_info.py", "fastloss/__init__.py"}
    assert wanted <= names
    kernels = {f"fastloss/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels <= names
    assert not [name for name in names if not name.startswith(("fastloss/", "fastloss-"))]
    assert not [name for name in names if name.endswith((".h", ".cpp", ".cu"))]
    loaded = subprocess.run(
        [sys.executable, "-c", "import fastloss._cpu as m; print(m.isa())"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(_unpacked(wheel, tmp_path))},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded.stdout.strip() in build_native.ISAS


def _unpacked(wheel: Path, folder: Path) -> Path:
    target = folder / "unpacked"
    zipfile.ZipFile(wheel).extractall(target)
    return target
