"""Builds the two native modules with ninja: no PyTorch header, so no torch in the build."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = [
    "-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Wno-psabi",
]
ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "generic": [],
}
CUDA_ARCHS = os.environ.get("FASTLOSS_CUDA_ARCHS", "80;90;100;120")


def cuda_home() -> Path | None:
    """CUDA's folder: named, or found through nvcc (which may be a wrapper script, so nvcc itself is asked)."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True)
    for line in dry.stderr.splitlines():
        if "TOP=" in line:
            return Path(line.split("TOP=", 1)[1].strip()).resolve()
    return Path(nvcc).resolve().parents[1]


def pybind11_include() -> str:
    import pybind11

    return pybind11.get_include()


class NinjaBuild(build_ext):
    """One build.ninja for both modules; a change to one file rebuilds that file."""

    def run(self) -> None:
        info = {"CPU": {"built": False, "reason": ""}, "CUDA": {"built": False, "reason": "", "archs": ""}}
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            info["CPU"]["reason"] = info["CUDA"]["reason"] = f"no C++ compiler ({compiler}) was found at build time"
        else:
            home = cuda_home()
            if os.environ.get("FASTLOSS_BUILD_CUDA") == "0":
                info["CUDA"]["reason"] = "switched off at build time (FASTLOSS_BUILD_CUDA=0)"
            elif home is None:
                info["CUDA"]["reason"] = "no nvcc was found at build time"
            cuda = home if not info["CUDA"]["reason"] else None
            self.compile(compiler, cuda)
            info["CPU"]["built"] = True
            if cuda is not None:
                info["CUDA"].update(built=True, archs=CUDA_ARCHS)
        if os.environ.get("FASTLOSS_REQUIRE_NATIVE") == "1" and not info["CPU"]["built"]:
            raise SystemExit(f"FASTLOSS_REQUIRE_NATIVE=1: {info['CPU']['reason']}")
        text = "\n".join(f"{name} = {value!r}" for name, value in info.items())
        target = (ROOT if self.inplace else Path(self.build_lib)) / "fastloss" / "_build_info.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text('"""Written by setup.py."""\n\n' + text + "\n")

    def compile(self, compiler: str, cuda: Path | None) -> None:
        tag = f"{sys.implementation.cache_tag}-{platform.machine()}"
        build = ROOT / "build" / tag
        build.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        outputs = {"_cpu": build / f"_cpu{suffix}"}
        if cuda is not None:
            outputs["_cuda"] = build / f"_cuda{suffix}"
        ninja_file = build / "build.ninja"
        text = self.ninja(compiler, cuda, outputs)
        if not ninja_file.exists() or ninja_file.read_text() != text:
            ninja_file.write_text(text)
        subprocess.run([*ninja(), "-C", str(build)], check=True)
        folder = (ROOT if self.inplace else Path(self.build_lib)) / "fastloss"
        folder.mkdir(parents=True, exist_ok=True)
        for path in outputs.values():
            shutil.copy2(path, folder / path.name)

    def ninja(self, compiler: str, cuda: Path | None, outputs: dict[str, Path]) -> str:
        include = f"-I{sysconfig.get_path('include')} -I{pybind11_include()}"
        lines = [
            f"cxx = {compiler}", f"flags = {' '.join(CXX_FLAGS)} {include}", "",
            "rule cxx", "  command = $cxx -MD -MF $out.d $flags $more -c $in -o $out", "  depfile = $out.d", "  deps = gcc", "",
            "rule link", "  command = $cxx -shared $in -o $out $libs", "",
        ]
        objects = []
        isas = ISAS if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            for isa in isas if source.stem == "rows" else [""]:
                obj = f"cpu_{source.stem}{'_' + isa if isa else ''}.o"
                more = " ".join(["-fopenmp", *(isas[isa] if isa else []), *([f"-DFASTLOSS_ISA={isa}"] if isa else [])])
                lines += [f"build {obj}: cxx {source}", f"  more = {more}"]
                objects.append(obj)
        lines += [f"build {outputs['_cpu'].name}: link {' '.join(objects)}", "  libs = -fopenmp", ""]
        if cuda is not None:
            archs = CUDA_ARCHS.split(";")
            codes = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
            codes += f" -gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
            lines += [
                "rule nvcc",
                f"  command = {cuda}/bin/nvcc -MD -MF $out.d -O3 -std=c++17 --threads 2 -Xcompiler=-fPIC,-fvisibility=hidden "
                f"{codes} -c $in -o $out",
                "  depfile = $out.d", "  deps = gcc", "",
            ]
            objects = []
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                lines += [f"build cuda_{source.stem}.o: nvcc {source}"]
                objects.append(f"cuda_{source.stem}.o")
            for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
                lines += [f"build cuda_{source.stem}.o: cxx {source}", f"  more = -I{cuda}/include"]
                objects.append(f"cuda_{source.stem}.o")
            lines += [f"build {outputs['_cuda'].name}: link {' '.join(objects)}",
                      f"  libs = -L{cuda}/lib64 -lcudart_static -ldl -lrt -lpthread", ""]
        lines += [f"default {' '.join(path.name for path in outputs.values())}", ""]
        return "\n".join(lines)

    def get_outputs(self) -> list[str]:
        return []


def ninja() -> list[str]:
    try:
        import ninja as package

        return [str(Path(package.BIN_DIR) / "ninja")]
    except ImportError:
        return ["ninja"]


setup(
    ext_modules=[Extension("fastloss._native", sources=[])],  # marks the wheel as binary; NinjaBuild does the work
    cmdclass={"build_ext": NinjaBuild},
)
