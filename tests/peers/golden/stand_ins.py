"""Loads one module of a peer whose package imports a whole training stack: those imports get empty stand-ins."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


class _Anything(types.ModuleType):
    """A module any name can be imported from: the name becomes an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if any(fullname == x or fullname.startswith(x + ".") for x in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def load(package: str, modules: tuple[str, ...], stand_ins: tuple[str, ...]) -> types.ModuleType:
    """The last of ``modules`` (dotted, executed in this order); ``package/__init__.py`` and those between are not run."""
    if package in sys.modules:  # of an earlier call
        root = Path(sys.modules[package].__path__[0])
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"{package}: pip install --no-deps --target FOLDER {package}, and PYTHONPATH=FOLDER"
            )
        root = Path(next(iter(spec.submodule_search_locations)))
    sys.meta_path.insert(0, _StandIns(stand_ins))
    for module in modules:
        parts = module.split(".")
        for depth in range(1, len(parts)):  # parent packages, without their __init__
            parent = ".".join(parts[:depth])
            if parent not in sys.modules:
                empty = _Anything(parent)
                empty.__path__ = [str(root.joinpath(*parts[1:depth]))]
                sys.modules[parent] = empty
                if depth > 1:
                    setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], empty)
        path = root.joinpath(*parts[1:]).with_suffix(".py")
        file_spec = importlib.util.spec_from_file_location(module, path)
        assert file_spec is not None and file_spec.loader is not None
        loaded = importlib.util.module_from_spec(file_spec)
        sys.modules[module] = loaded
        file_spec.loader.exec_module(loaded)
        parent, name = module.rsplit(".", 1)
        setattr(sys.modules[parent], name, loaded)
    return loaded
