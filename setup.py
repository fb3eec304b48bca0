"""The native modules and the packages; everything else is in pyproject.toml."""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import build_native


class BuildNative(build_ext):
    """Hands both modules to tools/build_native.py, which leaves out the one whose tools are missing."""

    def run(self):
        inplace = self.inplace or self.editable_mode
        package = build_native.ROOT / "fastloss" if inplace else Path(self.build_lib) / "fastloss"
        try:
            files = build_native.build(package)
        except build_native.BuildError as error:
            sys.exit(f"error: {error}")
        self.files = [] if inplace else [str(path) for path in files]

    def get_outputs(self):
        return getattr(self, "files", [])

    def get_output_mapping(self):
        return {}


class BuildPackages(build_py):
    """Starts from an empty folder: build/lib of an earlier build would leave deleted modules in the wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


# FASTLOSS_LOCAL_VERSION=cpu: 0.1.0+cpu, so that two wheels for one machine have two names.
version = runpy.run_path(str(build_native.ROOT / "fastloss" / "_version.py"))["__version__"]
if local := os.environ.get("FASTLOSS_LOCAL_VERSION"):
    version += f"+{local}"
packages = find_packages(include=["fastloss", "fastloss.*"], exclude=["fastloss.kernels*"])
kernels = ["fastloss.kernels", *(f"fastloss.kernels.{name}" for name in find_packages("kernels"))]
setup(
    version=version,
    packages=[*packages, *kernels],
    package_dir={"fastloss.kernels": "kernels"},
    ext_modules=[Extension("fastloss._cpu", []), Extension("fastloss._cuda", [])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackages},
)
