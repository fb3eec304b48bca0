"""The instruction sets that this processor has and the CPU library was built for, and a test under each of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

try:
    _native = importlib.import_module("fastloss._cpu")
    ISAS: list[str] = list(_native.supported_isas())
except ImportError:
    ISAS = []


@contextmanager
def forced(isa: str) -> Iterator[None]:
    """The kernels of one instruction set in place of the best."""
    before = _native.isa()
    _native.set_isa(isa)
    try:
        yield
    finally:
        _native.set_isa(before)
