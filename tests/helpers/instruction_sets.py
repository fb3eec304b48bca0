"""The instruction sets that this processor has and the CPU library was built for; a test under each, or with some threads."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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


@contextmanager
def threads_of(number: int) -> Iterator[None]:
    """So many threads for PyTorch and for the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
