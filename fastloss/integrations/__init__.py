"""fastloss inside the trainers that people already have: one module each, ``apply()`` in, ``undo()`` out."""

import importlib
from typing import Any

from fastloss.integrations.handle import Handle, UnknownVersion

__all__ = ["Handle", "UnknownVersion"]


def __getattr__(name: str) -> Any:
    # fastloss.integrations.transformers.apply(model) after ``import fastloss`` alone; a module needs its trainer installed.
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"{__name__}.{name}":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        raise
