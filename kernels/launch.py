"""The row functions of docs/engine.md over tensors: outputs allocated, one launch each.

A row is read once from memory (twice by row_cross_entropy with a gradient, the second time from L2).
Launch: one program per row, 4 or 8 elements per thread and block; see launch_shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import rows as kernels
from . import scale as scale_kernels

STATS = ("logsumexp", "logprob", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
WARP = 64 if torch.version.hip else 32
# Enough programs for any GPU, few enough to cost little where the scale is 1; 16 elements per thread. Not tuned on a GPU.
SCALE_PROGRAMS = 2048
SCALE_SHAPE = {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": True}
MAX_VOCAB = 1 << 30  # indices within a row are 32-bit, with room for one block more


def launch_shape(vocab: int, softcap: bool, warp: int = WARP) -> dict[str, int]:
    """BLOCK and Triton's launch options for a row of ``vocab``.

    512 threads at most, so that a thread may have 128 registers; 8 elements per thread, 4 with a soft-cap, whose slope
    lives beside its z. More of either spilled (tools/kernel_report_triton.py). Not tuned on a GPU.
    """
    block = min(max(triton.next_power_of_2(vocab), 128), 2048 if softcap else 4096)
    warps = max(1, block // (4 if softcap else 8) // warp)
    # Triton 3.10 turns fusion off where nobody asks for it.
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":  # the interpreter, whose numpy warns of every log(0) and inf - inf
        import numpy

        return numpy.errstate(all="ignore")
    module = getattr(torch, tensor.device.type)  # torch.cuda, torch.xpu
    same = tensor.device.index == module.current_device()
    return contextlib.nullcontext() if same else module.device(tensor.device)


def _row_of(logits: Tensor) -> int:
    """The vocabulary's size; what the kernels cannot take is refused."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits: expected float32, bfloat16 or float16, got {logits.dtype}")
    vocab = logits.shape[1]
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"logits: expected a vocabulary between 1 and 2^30, got {vocab}")
    return vocab


def _stats_like(logits: Tensor, want: Sequence[str]) -> dict[str, Tensor]:
    return {
        name: torch.empty(
            logits.shape[0], dtype=torch.uint8 if name == "is_top1" else torch.float32, device=logits.device
        )
        for name in want
    }


def _w_stride(w: Tensor | None) -> int:
    return 0 if w is None or w.dim() == 1 else w.stride(0)


def row_stats(
    logits: Tensor,
    target: Tensor | None,
    *,
    ignore_index: int,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    want: Sequence[str],
) -> dict[str, Tensor]:
    """The wanted statistics of ``logits [rows, V]``, each ``[rows]`` in float32 (is_top1: uint8)."""
    vocab = _row_of(logits)
    out = _stats_like(logits, want)
    if logits.shape[0]:
        with _on_device_of(logits):
            kernels.row_stats_kernel[(logits.shape[0],)](
                logits, logits.stride(0), vocab, target, ignore_index, bias, float(scale), float(softcap),
                *[out.get(name) for name in STATS],
                HAS_SOFTCAP=softcap > 0, **launch_shape(vocab, softcap > 0),
            )  # fmt: skip
    return out


def row_grad(
    logits: Tensor,
    target: Tensor | None,
    *,
    ignore_index: int,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    lse: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    d: Tensor | None = None,
    w: Tensor | None = None,
    out: Tensor,
) -> None:
    """Writes the rows' gradient to ``out [rows, V]``, which may be ``logits``."""
    vocab = _row_of(logits)
    if logits.shape[0]:
        with _on_device_of(logits):
            kernels.row_grad_kernel[(logits.shape[0],)](
                logits, logits.stride(0), vocab, target, ignore_index, bias, float(scale), float(softcap),
                lse, a, b, c, d, w, _w_stride(w), out, out.stride(0),
                HAS_SOFTCAP=softcap > 0, **launch_shape(vocab, softcap > 0),
            )  # fmt: skip


def row_cross_entropy(
    logits: Tensor,
    target: Tensor | None,
    *,
    ignore_index: int,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    w: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    grad_scale: float = 1.0,
    grad_scale_tensor: Tensor | None = None,
    grad: Tensor | None = None,
    want: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Loss, logsumexp and the wanted statistics; the gradient into ``grad [rows, V]`` (may be ``logits``) if given."""
    vocab = _row_of(logits)
    out = _stats_like(logits, [*want, *({"loss", "logsumexp"} - set(want))])
    if logits.shape[0]:
        with _on_device_of(logits):
            kernels.row_cross_entropy_kernel[(logits.shape[0],)](
                logits, logits.stride(0), vocab, target, ignore_index, bias, float(scale), float(softcap),
                w, _w_stride(w), 1.0 - label_smoothing, label_smoothing / vocab, float(z_loss),
                float(scale * grad_scale), grad_scale_tensor, grad, 0 if grad is None else grad.stride(0),
                out["loss"], *[out.get(name) for name in STATS],
                HAS_SOFTCAP=softcap > 0, SPREAD=target is None or label_smoothing > 0, **launch_shape(vocab, softcap > 0),
            )  # fmt: skip
    return out


def scale_in_place(x: Tensor, scale: Tensor) -> None:
    """``x [rows, width]`` (unit stride along a row) times ``scale``, one float32."""
    rows, width = x.shape
    at_once = min(rows, SCALE_PROGRAMS)
    along = min(triton.cdiv(width, SCALE_SHAPE["BLOCK"]), max(SCALE_PROGRAMS // max(at_once, 1), 1))
    if rows and width:
        with _on_device_of(x):
            scale_kernels.scale_kernel[(at_once, along)](x, x.stride(0), rows, width, scale, **SCALE_SHAPE)
