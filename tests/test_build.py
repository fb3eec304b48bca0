"""tools/build_native.py: what it compiles, what it compiles again, and what it says when a tool is missing.

The fast tests run the real ninja with a stand-in for the compiler that only preprocesses (for the dependencies).
FASTLOSS_TEST_BUILD=1 also builds a wheel.
"""

from __future__ import annotations

import ctypes
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
import check_wheel  # noqa: E402
import old_glibc  # noqa: E402

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


LIBC = """
    12: 0000000000098050   713 FUNC    GLOBAL DEFAULT   15 pthread_create@@GLIBC_2.34
    13: 0000000000098050   713 FUNC    GLOBAL DEFAULT   15 pthread_create@GLIBC_2.2.5
    14: 0000000000011000    99 FUNC    GLOBAL DEFAULT   15 exp@@GLIBC_2.29
    15: 0000000000012000    99 FUNC    WEAK   DEFAULT   15 exp@GLIBC_2.2.5
    16: 0000000000013000    99 IFUNC   GLOBAL DEFAULT   15 memcpy@@GLIBC_2.14
    17: 0000000000013000    99 IFUNC   GLOBAL DEFAULT   15 memcpy@GLIBC_2.2.5
    18: 0000000000014000    99 FUNC    GLOBAL DEFAULT   15 arc4random@@GLIBC_2.36
    19: 0000000000015000     4 OBJECT  GLOBAL DEFAULT   15 __libc_private@@GLIBC_PRIVATE
    20: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND malloc@GLIBC_2.2.5
"""


def test_an_older_glibc_offers_older_versions() -> None:
    assert old_glibc.offered(LIBC) == {
        "libpthread.so.0": {"pthread_create": ("FUNC", "GLIBC_2.2.5")},
        "": {"exp": ("FUNC", "GLIBC_2.2.5"), "memcpy": ("IFUNC", "GLIBC_2.14")},
    }


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="Linux with binutils")
def test_a_module_for_an_older_glibc(tmp_path: Path) -> None:
    """A small module that throws, has threads and calls exp: checked as those of a wheel are, linked both ways."""
    source = tmp_path / "small.cpp"
    source.write_text(
        "#include <cmath>\n#include <pthread.h>\n#include <stdexcept>\n#include <vector>\n"
        "std::vector<double> kept;\n"
        'extern "C" __attribute__((visibility("default"))) void* PyInit_small() {\n'
        '  if (kept.size() > 9) throw std::runtime_error("full");\n'
        "  kept.push_back(std::exp(double(kept.size())));\n"
        "  pthread_t thread; return pthread_create(&thread, nullptr, [](void* p) { return p; }, nullptr) ? nullptr : &kept; }\n"
    )
    cxx = [*build_native.find_cxx(), "-O1", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([*cxx, "-c", str(source), "-o", str(tmp_path / "small.o")], check=True)
    exports = f"-Wl,--version-script={ROOT / 'csrc/common/exports.map'}"
    link = [*cxx, "-shared", exports, str(tmp_path / "small.o"), "-o", str(tmp_path / "small.so")]
    subprocess.run([*link, *old_glibc.make(cxx, tmp_path / "glibc")], check=True)
    assert check_wheel.check_native(tmp_path / "small.so") == []
    loaded = ctypes.CDLL(str(tmp_path / "small.so"))
    loaded.PyInit_small.restype = ctypes.c_void_p
    assert loaded.PyInit_small()
    # What is undefined in every library, and what is shown beside the entry point, is found.
    (tmp_path / "more.cpp").write_text(
        'extern "C" int nowhere(); extern "C" __attribute__((visibility("default"))) int shown() { return nowhere(); }'
    )
    bad = [str(tmp_path / "more.cpp"), "-o", str(tmp_path / "small.so"), "-Wl,-rpath,/opt/x"]
    subprocess.run([*cxx, "-shared", *bad], check=True)
    found = " | ".join(check_wheel.check_native(tmp_path / "small.so"))
    assert "shows shown" in found and "needs nowhere" in found and "/opt/x" in found


def test_another_glibc_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOSS_GLIBC", "2.17")
    with pytest.raises(build_native.BuildError, match=r"FASTLOSS_GLIBC: expected 2\.28"):
        build_native.plan(tree)


METADATA = """Metadata-Version: 2.4
Name: fastloss
Version: 0.1.0+cpu
License-Expression: Apache-2.0
License-File: LICENSE
License-File: NOTICE
Requires-Python: >=3.10
Description-Content-Type: text/markdown
Requires-Dist: torch>=2.8
"""


def small_wheel(folder: Path, change: dict[str, bytes | None], name: str = "0.1.0+cpu-cp311-cp311") -> Path:
    """A wheel without native modules, with some files put in (bytes) or left out (None)."""
    extras = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1].split("\n[")[0], re.M
    )  # fmt: skip
    metadata = METADATA + "".join(f"Provides-Extra: {extra}\n" for extra in extras)
    files: dict[str, bytes | None] = {
        "fastloss/__init__.py": b"",
        "fastloss/py.typed": b"",
        "fastloss/_build_info.py": b"",
        **dict.fromkeys(check_wheel.kernels(), b""),
        "fastloss-0.1.0+cpu.dist-info/METADATA": metadata.encode(),
        **{
            f"fastloss-0.1.0+cpu.dist-info/licenses/{name}": (ROOT / name).read_bytes()
            for name in check_wheel.LICENCES
        },
        **change,
    }
    path = folder / f"fastloss-{name}-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            if content is not None:
                archive.writestr(file, content)
    return path


def test_a_wheel_has_what_is_asked_of_it() -> None:
    assert (ROOT / "fastloss" / "py.typed").exists()
    assert all((ROOT / licence).exists() for licence in check_wheel.LICENCES)
    assert len(check_wheel.kernels()) > 5


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, "native modules: none"),
        ({"tests/test_x.py": b""}, "tests/test_x.py does not belong"),
        ({"fastloss/csrc/rows.cpp": b""}, "rows.cpp does not belong"),
        ({"fastloss/py.typed": None}, "fastloss/py.typed is missing"),
        ({"fastloss/kernels/rows.py": None}, "fastloss/kernels/rows.py is missing"),
        ({"fastloss-0.1.0+cpu.dist-info/licenses/NOTICE": b"?"}, "NOTICE is missing, or is another"),
        (
            {"fastloss-0.1.0+cpu.dist-info/METADATA": METADATA.replace("torch>=2.8", "torch").encode()},
            "Requires-Dist",
        ),
    ],
)
def test_what_is_wrong_with_a_wheel_is_said(
    tmp_path: Path, change: dict[str, bytes | None], complaint: str
) -> None:
    found = check_wheel.check_wheel(small_wheel(tmp_path, change))
    assert any(complaint in line for line in found)
    if not change:
        assert len(found) == 1


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


@pytest.mark.skipif(
    os.environ.get("FASTLOSS_TEST_BUILD") != "1", reason="FASTLOSS_TEST_BUILD=1 installs a wheel (slow)"
)
def test_without_a_compiler(tmp_path: Path) -> None:
    """An isolated build where there is no compiler: it installs, runs by the definition, and `fastloss info` says why."""
    sdist = subprocess.run(
        [sys.executable, "-c", f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()[-1]  # fmt: skip
    assert check_wheel.check_sdist(tmp_path / sdist) == []
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "site"), str(tmp_path / sdist)],
        check=True, env={**os.environ, "CXX": "no-such-compiler", "FASTLOSS_BUILD_CUDA": "0"},
    )  # fmt: skip
    said = subprocess.run(
        [sys.executable, "-m", "fastloss", "info"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "built CPU: no, no C++ compiler found (looked for no-such-compiler)" in said
    # Without torch it says what to install.
    said = subprocess.run(
        [sys.executable, "-S", "-c", "import fastloss"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip
    assert "fastloss needs PyTorch" in said


def _unpacked(wheel: Path, folder: Path) -> Path:
    target = folder / "unpacked"
    zipfile.ZipFile(wheel).extractall(target)
    return target
