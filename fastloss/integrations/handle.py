"""What every ``apply()`` returns, and the one way in which names of other packages are replaced."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from typing import Any


class Handle:
    """Undoes what an ``apply()`` did, once; leaving a ``with`` block undoes it too.

    >>> from fastloss.integrations import Handle
    >>> with Handle([lambda: print("undone")]):
    ...     print("applied")
    applied
    undone
    """

    def __init__(self, steps: list[Callable[[], None]]) -> None:
        self._steps = steps

    def undo(self) -> None:
        """Put everything back. Doing it again does nothing."""
        while self._steps:
            self._steps.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()


class UnknownVersion(RuntimeError):
    """The other package is not as it was when the integration was written."""


def expect_signature(function: Any, expected: str, package: str) -> None:
    """Refuse a function whose parameters are not the ones that were read.

    Raises:
        UnknownVersion: with both signatures and the package's version.
    """
    names = ", ".join(inspect.signature(function).parameters)
    if names != expected:
        version = getattr(sys.modules.get(package), "__version__", "?")
        name = getattr(function, "__qualname__", repr(function))
        raise UnknownVersion(
            f"{package} {version}: {name} takes ({names}), expected ({expected}); "
            "this version was not read by fastloss, nothing was replaced"
        )


def expect_source(function: Any, digits: str, package: str, read: str) -> None:
    """Refuse a function whose code is not that of the version ``read``; ``digits`` begin the sha256 of its source.

    Raises:
        UnknownVersion: with the function's name and the package's version.
    """
    function = inspect.unwrap(function)
    if not hashlib.sha256(inspect.getsource(function).encode()).hexdigest().startswith(digits):
        version = getattr(sys.modules.get(package), "__version__", "?")
        raise UnknownVersion(
            f"{package} {version}: the code of {function.__qualname__} is not that of {package} {read}, which fastloss read; "
            "nothing was replaced. apply(losses=False) leaves losses alone"
        )


def replace_everywhere(package: str, old: Any, new: Any) -> Callable[[], None]:
    """Bind ``new`` wherever a module of ``package`` has ``old`` itself under some name. Returns what puts it back.

    Modules that are imported later take the name from the module that defines it, which is among those replaced.
    """
    places = []
    for module_name, module in list(sys.modules.items()):
        if module is None or not (module_name == package or module_name.startswith(package + ".")):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
                places.append((module, name))

    def undo() -> None:
        for module, name in places:
            if vars(module).get(name) is new:
                setattr(module, name, old)

    return undo
