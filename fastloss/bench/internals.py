"""What the tools (bench, plan, command line) ask of the core below its public names: all of it, in one place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from fastloss.engine import calibration, head_exponentials, head_rows
from fastloss.engine.native import cpu_backend


def upcasts(device: torch.device, dtype: torch.dtype) -> bool:
    """True where GEMMs in ``dtype`` are emulated, so that the heads take float32 ones."""
    return head_rows.upcasts(device, dtype)


def gpu_chunk(rows: int, vocab: int, dim: int, dtype: torch.dtype) -> int:
    """Rows of logits that a linear head on a GPU holds at a time where its weight is trained."""
    return head_rows.default_chunk(rows, vocab, dim, dtype, torch.device("cuda"))


scaled_exponentials = head_exponentials.enabled
SCHEDULES = (calibration.BLOCKS, calibration.CHUNKS)
CALIBRATED = calibration.DTYPES
only = calibration.only
calibration_path = calibration.default_path


@contextlib.contextmanager
def cluster_rows(on: bool) -> Iterator[None]:
    """FASTLOSS_CLUSTER_ROWS, which CUDA's row cross-entropy reads at every call."""
    before = os.environ.get("FASTLOSS_CLUSTER_ROWS")
    os.environ["FASTLOSS_CLUSTER_ROWS"] = str(int(on))
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTLOSS_CLUSTER_ROWS"]
        else:
            os.environ["FASTLOSS_CLUSTER_ROWS"] = before


def cpu_kind() -> str:
    """What this processor multiplies with, as a calibration names it."""
    return calibration.KIND


def calibration_file() -> calibration.Table:
    """The table of schedules that this process reads."""
    return calibration.table()


def cpu_instruction_sets() -> tuple[str, list[str]] | None:
    """The one that the CPU kernels use, and all that run here; None where the native module is not there."""
    cpu = cpu_backend()
    return None if cpu.why_not() else (cpu.module.isa(), list(cpu.module.supported_isas()))
