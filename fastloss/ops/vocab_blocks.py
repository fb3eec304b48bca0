"""Cross-entropy of the linear head over blocks of the vocabulary, all rows at once, in one native call (csrc/cpu/head.h).

Pass 1 makes the logits a block at a time and keeps the sums that the loss needs. Pass 2 turns each block into its d logits,
finishes that block of d weight over all rows – no accumulator, no rounding between chunks – and adds to d hidden. Until d
weight's own memory is written, it holds the logits of the first D rows; those of the others are made again. So the extra
memory is a few blocks, and d hidden in float32 where it has another dtype; the GEMMs are 3 up to D rows, 3.5 at 2 D.

With a frozen weight one pass is enough, in 2 GEMMs and whatever the rows: exp(logits) times the weight is summed relative to
the largest logit so far, as in flash attention (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from fastloss.head import Grads, Head, Needs, upcasts
from fastloss.ops import cpu_rows
from fastloss.ops.cross_entropy import CrossEntropyCall, Factor
from fastloss.ops.gemm_bf16 import supports_gemm_bf16
from fastloss.ops.native_rows import DTYPE_CODES, acc_dtype, empty_stats
from fastloss.ops.new_gradient import new_gradient

ENABLED = os.environ.get("FASTLOSS_VOCABULARY_BLOCKS", "1") != "0"
# Columns of a block at most: each thread holds a block of all rows' d logits.
WIDTH = 256
# Rows over D from which making their logits again costs more than memory for them is worth.
RECOMPUTE_UP_TO = 2


def why_not(
    backend: str,
    dtype: torch.dtype,
    weight: Tensor,
    rows: int,
    needs: Needs,
    chunk_size: int | None,
    per_row: bool,
    smooth: bool,
) -> str:
    """Why a call goes through chunks of rows instead; empty if it goes through here. ``smooth``: every token of the
    vocabulary is a target, by smoothing or as a probability."""
    if backend != "cpu" or not hasattr(cpu_rows.native, "HeadCall"):
        return "the backend has no kernels for blocks of the vocabulary"
    if chunk_size is not None or not ENABLED:
        return "chunk_size, or FASTLOSS_VOCABULARY_BLOCKS=0"
    if dtype not in (torch.float32, torch.bfloat16) or weight.dtype not in (torch.float32, torch.bfloat16):
        return "the dtype"
    if not multiplies_floats(weight, dtype):
        if not supports_gemm_bf16():
            return "oneDNN multiplies bfloat16 faster than float32"
        if weight.dtype != dtype or weight.shape[1] % 2:
            return "bfloat16 is multiplied in pairs along D, and d weight has the logits' dtype"
    if weight.stride(1) != 1:
        return "the weight's layout"
    if not needs:
        return ""
    if needs == Needs(True, False, False):
        return "label smoothing or class probabilities with a frozen weight" if smooth else ""
    if not needs.weight or per_row:
        return "the gradient of the weight is not made in the forward"
    if rows > RECOMPUTE_UP_TO * weight.shape[1]:
        return f"more than {RECOMPUTE_UP_TO} D rows"
    return ""


def multiplies_floats(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether operands become float32: that is what they are, or what this CPU multiplies faster."""
    return dtype == torch.float32 or upcasts(weight.device, dtype)


def gemms(needs: Needs, rows: int, dim: int) -> float:
    """GEMMs of a step; a fraction where the logits of some rows are made again."""
    again = max(0, rows - dim) / max(rows, 1) if needs.weight else 0
    return round(1 + needs.hidden + needs.weight + again, 2)


def block_width(vocab: int, threads: int) -> int:
    """Columns of a block: the threads' blocks together are at most 3% of the logits, where that is not too narrow."""
    panel: int = cpu_rows.native.head_panel()
    width = max(64, min(WIDTH, vocab // (32 * threads)))
    return -(-min(width, vocab) // panel) * panel


def buffer_bytes(rows: int, weight: Tensor, needs: Needs) -> int:
    """Of the threads' blocks of logits."""
    threads = torch.get_num_threads()
    if not needs.weight:
        rows = min(rows, cpu_rows.native.HEAD_STRIPE)
    return rows * block_width(weight.shape[0], threads) * weight.dtype.itemsize * threads


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
    pairs = not multiplies_floats(h.weight, h.dtype)
    hidden = h.hidden.to(h.dtype if pairs or h.hidden.dtype not in DTYPE_CODES else h.hidden.dtype)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    out = _empty(rows, call.want)
    d_weight = new_gradient((vocab, dim), h.weight.dtype, h.hidden.device) if needs.weight else None
    d_bias = torch.empty(vocab) if needs.bias else None
    in_place = hidden.dtype == torch.float32
    d_hidden = torch.empty((all_rows, dim), dtype=hidden.dtype) if needs.hidden else None
    if d_hidden is not None and keep is not None and in_place:
        d_hidden.zero_()
    if not rows:
        for grad in (d_hidden, d_weight, d_bias):
            if grad is not None:
                grad.zero_()
        return out, Grads(d_hidden, d_weight, d_bias)
    # d hidden is summed in float32: in its own memory as far as that goes, which is for half of the rows.
    split = 0 if in_place or d_hidden is None else min(rows, all_rows // 2)
    rest = None if in_place or d_hidden is None else torch.empty((rows - split, dim))

    native = cpu_rows.native
    c = native.HeadCall()
    c.rows, c.vocab, c.dim = rows, vocab, dim
    threads = torch.get_num_threads()
    c.width = block_width(vocab, threads)
    alone = needs.hidden and not needs.weight  # threads share the rows, not the vocabulary
    threads = min(threads, rows if alone else -(-vocab // c.width))
    shape = (1 if alone else threads, rows, native.ROW_STATE_DOUBLES)
    state = torch.empty(shape, dtype=torch.float64)
    finished = torch.zeros(-(-rows // native.HEAD_STRIPE), dtype=torch.int64)
    tensors = {
        "target": target, "bias": h.bias, "w": w, "keep": keep, "state": state, "finished": finished,
        "hidden": hidden, "weight": h.weight, "d_weight": d_weight, "d_hidden": d_hidden, "d_hidden_rest": rest, "d_bias": d_bias, **out,
    }  # fmt: skip
    for name, tensor in tensors.items():
        setattr(c, name, 0 if tensor is None else tensor.data_ptr())
    c.ignore_index, c.scale, c.softcap = call.ignore_index, call.scale, call.softcap
    c.w_row_stride = 0 if w is None or w.dim() == 1 else w.stride(0)
    c.label_smoothing, c.z_loss = call.label_smoothing, call.z_loss
    c.grad_scale = factor.value * (1.0 if factor.tensor is None else float(factor.tensor))
    c.hidden_dtype, c.hidden_stride = DTYPE_CODES[hidden.dtype], hidden.stride(0)
    c.weight_dtype, c.weight_stride = DTYPE_CODES[h.weight.dtype], h.weight.stride(0)
    c.stored = min(rows, dim) if needs.weight else 0
    c.spread, c.split, c.pairs = in_place, split, pairs
    scratch = torch.empty(threads * c.scratch_bytes() + 64, dtype=torch.uint8)
    if _get_current_dispatch_mode() is not None:  # FlopCounterMode and its like see operators only
        _counted(hidden, h.weight, rows, gemms(needs, rows, dim))
    c.run(-(-scratch.data_ptr() // 64) * 64, threads)
    del scratch

    if d_hidden is not None and rest is not None:
        address, code = d_hidden.data_ptr(), DTYPE_CODES[d_hidden.dtype]
        native.convert(address, DTYPE_CODES[torch.float32], address, code, split * dim, 1)  # front to back
        d_hidden[split:rows] = rest
        if keep is not None:
            dense = d_hidden[:rows].clone()
            d_hidden.zero_().index_copy_(0, keep, dense)
    return out, Grads(d_hidden, d_weight, d_bias)


def _empty(rows: int, want: tuple[str, ...]) -> dict[str, Tensor]:
    """The statistics that are wanted, and always the loss and logsumexp."""
    out = empty_stats(torch.empty((rows, 0)), want)
    for name in ("logsumexp", "loss"):
        out.setdefault(name, torch.empty(rows, dtype=acc_dtype(torch.float32)))
    return out


@torch.library.custom_op("fastloss::head_gemms", mutates_args=())
def _counted(hidden: Tensor, weight: Tensor, rows: int, gemms: float) -> None:
    """Does nothing: tells FlopCounterMode what the native call multiplies."""


@register_flop_formula(torch.ops.fastloss.head_gemms)
def _(
    hidden_shape: list[int], weight_shape: list[int], rows: int, gemms: float, *args: object, **kwargs: object
) -> int:
    return round(2 * rows * weight_shape[0] * weight_shape[1] * gemms)
