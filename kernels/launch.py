"""The row functions on torch tensors: shapes to launch parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from . import rows as kernels

STATS = ("logsumexp", "logprob", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")


def launch_shape(vocab: int) -> dict[str, int]:
    """Up to 4096 logits in flight a program: 16 registers a thread for each array, which leaves no spills."""
    block = min(4096, max(32, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def _device(logits: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device_of(logits) if logits.is_cuda else contextlib.nullcontext()


def _outputs(logits: Tensor, want: Sequence[str]) -> dict[str, Tensor]:
    return {
        name: torch.empty(
            logits.shape[0], dtype=torch.uint8 if name == "is_top1" else torch.float32, device=logits.device)
        for name in dict.fromkeys((*want, "logsumexp"))
    }


def _stat_pointers(out: dict[str, Tensor]) -> list[Tensor]:
    return [out.get(name, out["logsumexp"]) for name in STATS]


def _want_flags(out: dict[str, Tensor]) -> dict[str, bool]:
    flags = ("WANT_LOGPROB", "WANT_ENTROPY", "WANT_SUM_SQ", "WANT_MEAN", "WANT_TOP1")
    return {flag: name in out for flag, name in zip(flags, STATS[1:], strict=True)}


def _w_stride(w: Tensor | None) -> int:
    return 0 if w is None or w.dim() == 1 else w.stride(0)


def row_stats(
    logits: Tensor, target: Tensor | None, *, ignore_index: int, bias: Tensor | None, scale: float, softcap: float,
    want: Sequence[str],
) -> dict[str, Tensor]:
    n, vocab = logits.shape
    out = _outputs(logits, want)
    if n:
        with _device(logits):
            kernels.row_stats[(n,)](
                logits, logits.stride(0), vocab, logits if target is None else target, ignore_index,
                logits if bias is None else bias, scale, softcap or 1.0, *_stat_pointers(out),
                HAS_TARGET=target is not None, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap > 0, **_want_flags(out),
                **launch_shape(vocab))
    return {name: out[name] for name in want}


def row_grad(
    logits: Tensor, target: Tensor | None, *, ignore_index: int, bias: Tensor | None, scale: float, softcap: float,
    lse: Tensor, a: Tensor | None = None, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None,
    w: Tensor | None = None, out: Tensor,
) -> None:
    n, vocab = logits.shape
    if not n:
        return
    with _device(logits):
        kernels.row_grad[(n,)](
            logits, logits.stride(0), vocab, logits if target is None else target, ignore_index,
            logits if bias is None else bias, scale, softcap or 1.0, lse, *[lse if x is None else x for x in (a, b, c, d)],
            lse if w is None else w, _w_stride(w), out, out.stride(0), HAS_TARGET=target is not None,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap > 0, HAS_A=a is not None, HAS_B=b is not None,
            HAS_C=c is not None, HAS_D=d is not None, HAS_W=w is not None, **launch_shape(vocab))


def row_cross_entropy(
    logits: Tensor, target: Tensor | None, *, ignore_index: int, bias: Tensor | None, scale: float, softcap: float,
    w: Tensor | None, label_smoothing: float, z_loss: float, grad_scale: float = 1.0,
    grad_scale_tensor: Tensor | None = None, grad: Tensor | None = None, want: Sequence[str] = (),
) -> dict[str, Tensor]:
    n, vocab = logits.shape
    out = _outputs(logits, want)
    loss = torch.empty_like(out["logsumexp"])
    if n:
        with _device(logits):
            kernels.row_cross_entropy[(n,)](
                logits, logits.stride(0), vocab, logits if target is None else target, ignore_index,
                logits if bias is None else bias, scale, softcap or 1.0, loss if w is None else w, _w_stride(w),
                label_smoothing, z_loss, grad_scale, loss if grad_scale_tensor is None else grad_scale_tensor,
                logits if grad is None else grad, 0 if grad is None else grad.stride(0), loss, *_stat_pointers(out),
                HAS_TARGET=target is not None, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap > 0, HAS_W=w is not None,
                SMOOTH=label_smoothing > 0, HAS_GRAD=grad is not None, HAS_SCALE_PTR=grad_scale_tensor is not None,
                **_want_flags(out), **launch_shape(vocab))
    out["loss"] = loss
    return out
