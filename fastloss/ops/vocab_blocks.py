"""Cross-entropy of the linear head over blocks of the vocabulary, all rows at once: for the CPU, where a GEMM with few rows
is slow and the weight's gradient is as large as the logits of D rows.

Pass 1 makes the logits a block at a time and keeps the sums that the loss needs. Pass 2 turns each block into its d logits,
adds to d hidden, and finishes that block of d weight in one GEMM over all rows: no accumulator, no rounding between
chunks. Until d weight's own memory is written, it holds the logits of the first D rows; those of the others are made again.
So the extra memory is a block of logits and d hidden in float32, and the GEMMs are 3 up to D rows, 3.5 at 2 D.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastloss.head import Grads, Head, Needs, upcasts
from fastloss.ops import cpu_rows
from fastloss.ops.cross_entropy import CrossEntropyCall, Factor
from fastloss.ops.gemm_bf16 import gemm_bf16, supports_gemm_bf16
from fastloss.ops.native_rows import DTYPE_CODES, acc_dtype, empty_stats
from fastloss.ops.new_gradient import new_gradient

# Hundreds of short parallel regions a step: where other processes want the same cores, OpenMP's waiting threads burn their
# time slices (4.4 times slower at a load of 4 on 2 cores; with OMP_WAIT_POLICY=passive not at all).
ENABLED = os.environ.get("FASTLOSS_VOCABULARY_BLOCKS", "1") != "0"
# Columns of a block (Zen 4, 2 threads, torch 2.13, bfloat16): at [448, 1024] x [1024, 128256] 1.11 of three GEMMs, 1024 columns
# 1.23; at [896, 512] x [512, 32000] narrower than 320 is slower and wider more memory.
WIDTH = 320
# Rows over D from which making their logits again costs more than an accumulator of d weight is worth.
RECOMPUTE_UP_TO = 2
# Rows without any gradient, up to where a block of their logits is small.
FORWARD_UP_TO = 4096


def why_not(
    backend: str,
    dtype: torch.dtype,
    weight: Tensor,
    rows: int,
    needs: Needs,
    chunk_size: int | None,
    per_row: bool,
) -> str:
    """Why a call goes through chunks of rows instead; empty if it goes through here."""
    if backend != "cpu" or not hasattr(cpu_rows.native, "vocab_call"):
        return "the backend has no kernels for blocks of the vocabulary"
    if chunk_size is not None or not ENABLED:
        return "chunk_size, or FASTLOSS_VOCABULARY_BLOCKS=0"
    if dtype not in (torch.float32, torch.bfloat16) or upcasts(weight.device, dtype):
        return "the dtype of the GEMMs"
    if not needs:
        if dtype == torch.bfloat16:
            return "oneDNN is as fast with few rows"
        return "" if rows <= FORWARD_UP_TO else f"more than {FORWARD_UP_TO} rows"
    if not needs.weight or per_row:
        return "the gradient of the weight is not made in the forward"
    if dtype == torch.bfloat16 and not supports_gemm_bf16():
        return "the processor has no bfloat16 dot product"
    if weight.dtype != dtype or weight.stride(1) != 1:
        return "d weight has another dtype or layout than the logits"
    limit = (
        RECOMPUTE_UP_TO if dtype == torch.bfloat16 else 1
    )  # float32 chunks accumulate in the gradient itself
    if rows > limit * weight.shape[1]:
        return f"more than {limit} D rows"
    return ""


def gemms(needs: Needs, rows: int, dim: int) -> float:
    """GEMMs of a step; a fraction where the logits of some rows are made again."""
    again = max(0, rows - dim) / max(rows, 1) if needs else 0
    return round(1 + needs.hidden + needs.weight + again, 2)


def buffer_bytes(rows: int, dtype: torch.dtype) -> int:
    return rows * WIDTH * dtype.itemsize


def run(
    h: Head,
    needs: Needs,
    keep: Tensor | None,
    target: Tensor | None,
    w: Tensor | None,
    call: CrossEntropyCall,
    factor: Factor,
) -> tuple[dict[str, Tensor], Grads]:
    """Losses and statistics of the kept rows (``target`` is theirs), and the gradients of their sum times ``factor``."""
    all_rows, dim = h.hidden.shape
    vocab = h.weight.shape[0]
    rows = all_rows if keep is None else keep.numel()
    weight = h.weight.to(h.dtype)
    d_hidden = torch.empty((all_rows, dim), dtype=h.dtype) if needs.hidden else None
    if keep is None:
        hidden = h.hidden.to(h.dtype)
    else:  # d hidden's memory is free until the end
        room = None if d_hidden is None or h.hidden.dtype != h.dtype else d_hidden[:rows]
        hidden = torch.index_select(h.hidden, 0, keep, out=room).to(h.dtype)
    d_weight = new_gradient((vocab, dim), h.dtype, h.hidden.device) if needs.weight else None
    d_bias = torch.empty(vocab) if needs.bias else None
    sum_hidden = torch.zeros((rows, dim)) if needs.hidden else None  # d hidden of the kept rows, float32
    block = torch.empty(rows * WIDTH, dtype=h.dtype)
    losses = _Losses(h, rows, target, w, call, factor)
    stored = min(rows, dim) if needs else 0

    # Views are made once: between small GEMMs a Python call costs as much as the rows' own kernels.
    first, others = hidden[:stored], hidden[stored:]
    weights = weight.split(WIDTH)
    transposed = [part.t() for part in weights]
    d_weights = () if d_weight is None else d_weight.split(WIDTH)
    kept = [_stored_logits(part, stored) for part in d_weights]
    whole, last = (
        [z[:stored], z[stored:], z]
        for z in (_rows_of(block, rows, weights[0]), _rows_of(block, rows, weights[-1]))
    )

    for k, part in enumerate(transposed):
        if stored:
            torch.mm(first, part, out=kept[k])
            losses.forward(kept[k], 0, k * WIDTH)
        if stored < rows:
            z = (whole if k + 1 < len(weights) else last)[1]
            torch.mm(others, part, out=z)
            losses.forward(z, stored, k * WIDTH)
    losses.finish()
    if not needs:
        return losses.out, Grads(None, None, None)
    for k, part in enumerate(transposed):
        z_first, z_others, z = whole if k + 1 < len(weights) else last
        losses.backward(kept[k], z_first, 0, k * WIDTH)
        if stored < rows:
            torch.mm(others, part, out=z_others)
            losses.backward(z_others, z_others, stored, k * WIDTH)
        if sum_hidden is not None:
            _add_product(sum_hidden, z, weights[k])
        torch.mm(z.t(), hidden, out=d_weights[k])
        if d_bias is not None:
            torch.sum(z, 0, dtype=torch.float32, out=d_bias[k * WIDTH : k * WIDTH + z.shape[1]])
    if d_hidden is not None and sum_hidden is not None:
        del whole, last, z_first, z_others, z, block  # before the copy in low precision
        if keep is None:
            d_hidden.copy_(sum_hidden)
        else:
            d_hidden.zero_().index_copy_(0, keep, sum_hidden.to(h.dtype))
    return losses.out, Grads(d_hidden, d_weight, d_bias)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (float32) += a · b"""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        gemm_bf16(out, a, b, accumulate=True)


def _stored_logits(d_weight: Tensor, rows: int) -> Tensor:
    """A block's logits [rows, columns] in the memory of the block's gradient [columns, D]."""
    return _rows_of(d_weight.view(-1), rows, d_weight)


def _rows_of(memory: Tensor, rows: int, block: Tensor) -> Tensor:
    columns = block.shape[0]
    return memory[: rows * columns].view(rows, columns)


class _Losses:
    """The kernels' state of a call, and the tensors whose addresses it holds."""

    def __init__(
        self,
        h: Head,
        rows: int,
        target: Tensor | None,
        w: Tensor | None,
        call: CrossEntropyCall,
        factor: Factor,
    ):
        acc = acc_dtype(h.dtype)
        self.out = empty_stats(torch.empty((rows, 0), dtype=h.dtype), call.want)
        self.out.setdefault("logsumexp", torch.empty(rows, dtype=acc))
        self.out["loss"] = torch.empty(rows, dtype=acc)
        native = cpu_rows.native
        self.state = torch.empty((rows, native.ROW_STATE_DOUBLES), dtype=torch.float64)
        self.tensors = target, w, h.bias
        address = [0 if x is None else x.data_ptr() for x in self.tensors]
        scale = factor.value * (1.0 if factor.tensor is None else float(factor.tensor))
        names = ("loss", "logsumexp", "logprob", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
        self.call = native.vocab_call(
            DTYPE_CODES[h.dtype], rows, h.weight.shape[0], address[0], call.ignore_index, address[2], call.scale,
            call.softcap, address[1], 0 if w is None or w.dim() == 1 else w.stride(0), call.label_smoothing,
            call.z_loss, scale, *[self.out[n].data_ptr() if n in self.out else 0 for n in names],
            self.state.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def forward(self, z: Tensor, first_row: int, start: int) -> None:
        if z.numel():
            rows, width = z.shape
            self.call.forward(z.data_ptr(), first_row, first_row + rows, width, start, width)

    def finish(self) -> None:
        self.call.finish()

    def backward(self, z: Tensor, out: Tensor, first_row: int, start: int) -> None:
        if z.numel():
            rows, width = z.shape
            self.call.backward(z.data_ptr(), out.data_ptr(), first_row, first_row + rows, width, start, width)
