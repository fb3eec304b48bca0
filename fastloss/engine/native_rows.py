"""The functions of docs/engine.md over a native module, ``fastloss._cpu`` or ``fastloss._cuda``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STATS = ("logsumexp", "logprob", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and coefficients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_stats(logits: Tensor, want: Sequence[str]) -> dict[str, Tensor]:
    acc = acc_dtype(logits.dtype)
    return {
        name: torch.empty(
            logits.shape[0], dtype=torch.uint8 if name == "is_top1" else acc, device=logits.device
        )
        for name in want
    }


def _ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _w_stride(w: Tensor | None) -> int:
    return 0 if w is None or w.dim() == 1 else w.stride(0)


class NativeRows:
    """Binds a native module to tensors. ``context`` gives its last argument: threads, or a stream."""

    def __init__(self, module: Any, context: Callable[[Tensor], int]):
        self.module = module
        self.context = context

    def row_stats(
        self,
        logits: Tensor,
        target: Tensor | None,
        *,
        ignore_index: int,
        bias: Tensor | None,
        scale: float,
        softcap: float,
        want: Sequence[str],
    ) -> dict[str, Tensor]:
        out = empty_stats(logits, want)
        rows, vocab = logits.shape
        if rows == 0:  # an empty tensor has no address
            return out
        self.module.row_stats(
            logits.data_ptr(),
            DTYPE_CODES[logits.dtype],
            rows,
            vocab,
            logits.stride(0),
            _ptr(target),
            ignore_index,
            _ptr(bias),
            scale,
            softcap,
            *[_ptr(out.get(name)) for name in STATS],
            self.context(logits),
        )
        return out

    def row_grad(
        self,
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
        rows, vocab = logits.shape
        if rows == 0:  # an empty tensor has no address
            return
        self.module.row_grad(
            logits.data_ptr(),
            DTYPE_CODES[logits.dtype],
            rows,
            vocab,
            logits.stride(0),
            _ptr(target),
            ignore_index,
            _ptr(bias),
            scale,
            softcap,
            lse.data_ptr(),
            _ptr(a),
            _ptr(b),
            _ptr(c),
            _ptr(d),
            _ptr(w),
            _w_stride(w),
            out.data_ptr(),
            out.stride(0),
            self.context(logits),
        )

    def row_cross_entropy(
        self,
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
        rows, vocab = logits.shape
        out = empty_stats(logits, want)
        if "logsumexp" not in out:
            out["logsumexp"] = torch.empty(rows, dtype=acc_dtype(logits.dtype), device=logits.device)
        out["loss"] = torch.empty_like(out["logsumexp"])
        if rows == 0:  # an empty tensor has no address
            return out
        self.module.row_cross_entropy(
            logits.data_ptr(),
            DTYPE_CODES[logits.dtype],
            rows,
            vocab,
            logits.stride(0),
            _ptr(target),
            ignore_index,
            _ptr(bias),
            scale,
            softcap,
            _ptr(w),
            _w_stride(w),
            label_smoothing,
            z_loss,
            grad_scale,
            _ptr(grad_scale_tensor),
            _ptr(grad),
            0 if grad is None else grad.stride(0),
            out["loss"].data_ptr(),
            *[_ptr(out.get(name)) for name in STATS],
            self.context(logits),
        )
        return out

    def scale_in_place(self, x: Tensor, scale: Tensor) -> None:
        """``x [rows, width]`` (unit stride along a row) times ``scale``, one float32; ``fastloss._cuda`` alone."""
        if x.numel():
            self.module.scale_in_place(
                x.data_ptr(), DTYPE_CODES[x.dtype], *x.shape, x.stride(0), scale.data_ptr(), self.context(x)
            )
