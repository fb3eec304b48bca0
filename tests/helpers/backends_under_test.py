"""Which backends the suite runs, on which device: the CUDA source runs emulated on the CPU where there is no GPU."""

from __future__ import annotations

import functools
import os
import shutil

import pytest
import torch

import fastloss
from fastloss.engine.backend import get_backend, replace_backend
from fastloss.engine.contract import Backend
from fastloss.engine.native import emulated_cuda

DEVICE = os.environ.get("FASTLOSS_TEST_DEVICE", "cpu")
KERNELS = ("cuda", "triton") if DEVICE == "cuda" else ("cpu", "triton", "cuda")
ALL = ("reference", *KERNELS)


@functools.cache
def _emulate() -> str:
    if DEVICE == "cuda" or torch.cuda.is_available():
        return ""
    if shutil.which("g++") is None:
        return "no g++ for the CUDA emulation"
    from cuda_emulation.build import build_emulated

    replace_backend("cuda", emulated_cuda(build_emulated()))
    return ""


def need(backend: str) -> str:
    """Make a backend ready, or skip with the reason why this machine cannot run it."""
    if backend == "cuda" and (reason := _emulate()):
        pytest.skip(reason)
    state = fastloss.backends()[backend]
    if state != "available":
        pytest.fail(f"{backend}: {state}")
    return backend


def contract(backend: str) -> Backend:
    """The kernels of a backend by the contract that all of them implement."""
    return get_backend(need(backend))


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    low = (torch.float32, torch.bfloat16, torch.float16)
    return (*low, torch.float64) if backend in ("reference", "cpu") else low
