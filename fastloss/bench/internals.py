"""What the tools (bench, plan, command line) ask of the core below its public names: all of it, in one place."""

from __future__ import annotations

import torch

from fastloss.engine import cpu_rows, head


def upcasts(device: torch.device, dtype: torch.dtype) -> bool:
    """True where GEMMs in ``dtype`` are emulated, so that the heads take float32 ones."""
    return head.upcasts(device, dtype)


def gpu_chunk(rows: int, vocab: int, dtype: torch.dtype) -> int:
    """Rows of logits that a linear head on a GPU holds at a time."""
    return head.default_chunk(rows, vocab, dtype, torch.device("cuda"))


def cpu_instruction_sets() -> tuple[str, list[str]] | None:
    """The one that the CPU kernels use, and all that run here; None where the native module is not there."""
    native = cpu_rows.native
    return None if native is None else (native.isa(), list(native.supported_isas()))
