"""A provider says why it cannot run a case, or hands out the loss that it would run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastloss.bench.case import Case, Loss


@dataclass(frozen=True)
class Provider:
    name: str
    available: Callable[[Case, str], str | None]  # why not, on this device; "" where the case is not its kind
    loss: Callable[[Case], Loss]  # of the case's tensors -> what is differentiated
    compiles: bool = False  # the first call is spent on compiling


def emulated(case: Case, device: str) -> str | None:
    """Low-precision GEMMs that this CPU only emulates would take minutes a call."""
    if case.emulated(device):
        return "this CPU emulates low-precision GEMMs: minutes a call (see 'torch eager, f32 GEMMs')"
    return None
