"""Other trainers' loss modules, imported from what is installed, with stand-ins for what they need and a loss does not.

``make integrations`` installs the packages without their dependencies into build/integrations. A module that imports
ray, vLLM or flash-attn is imported all the same: absent packages are stood in for, the code under test is the package's.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import typing
from pathlib import Path

import pytest
import typing_extensions

FOLDER = Path(__file__).parents[2] / "build" / "integrations"


class StandIn(type):
    """A class that gives itself for every attribute, call and index: enough for a decorator, a base, a default."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, item):
        return cls

    def __or__(cls, other):
        return cls

    __ror__ = __or__


class Anything(metaclass=StandIn):
    def __new__(cls, *args, **kwargs):
        if len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]  # used as a decorator
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __bool__(self):
        return False

    def __getitem__(self, item):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return "0.0.0" if name == "__version__" else Anything


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self):
        self.roots: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.roots:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        module.__path__ = []


def load(name: str) -> types.ModuleType:
    """The module ``name`` of an installed package, or a skip."""
    if FOLDER.exists() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (make integrations)")
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.append(finder)
    typed_dict = typing.TypedDict
    typing.TypedDict = typing_extensions.TypedDict  # pydantic asks for it before Python 3.12
    try:
        for _ in range(40):
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                missing = (error.name or "").partition(".")[0]
                if not missing or missing == package or missing in finder.roots:
                    raise
                finder.roots.add(missing)
                for module in [m for m in sys.modules if m not in before and m.partition(".")[0] == package]:
                    del sys.modules[module]  # half-imported
        raise ImportError(f"{name}: more than 40 packages are absent")
    finally:
        typing.TypedDict = typed_dict
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m.partition(".")[0] in finder.roots]:
            del sys.modules[module]
