"""The linear head over blocks of the vocabulary, all rows at once, in one native call (csrc/cpu/head.h).

Pass 1 makes the logits a block at a time and keeps the sums that the loss needs. Pass 2 turns each block into its d logits,
finishes that block of d weight over all rows – no accumulator, no rounding between chunks – and adds to d hidden. Until d
weight's own memory is written, it holds the logits of the first D rows; those of the others are made again. So the extra
memory is a few blocks, and d hidden in float32 where it has another dtype; the GEMMs are 3 up to D rows, 3.5 at 2 D.

With a frozen weight one pass is enough, in 2 GEMMs and whatever the rows: exp(logits) times the weight is summed relative to
the largest logit so far, as in flash attention (Dao et al. 2022, arXiv:2205.14135). Where a row's coefficients are known only
after the forward (a loss per row, log-probs and entropy with gradients) the backward makes the logits again: 4 GEMMs.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from fastloss.head import Given, Grads, Head, Needs, upcasts
from fastloss.ops import cpu_rows
from fastloss.ops.cross_entropy import CrossEntropyCall, Factor
from fastloss.ops.gemm_bf16 import supports_gemm_bf16
from fastloss.ops.native_rows import DTYPE_CODES, empty_stats
from fastloss.ops.new_gradient import new_gradient

ENABLED = os.environ.get("FASTLOSS_VOCABULARY_BLOCKS", "1") != "0"
# Columns of a block at most: the threads share a block of all rows' d logits.
WIDTH = 512
# Weights of a block at most.
CACHED = 1 << 18
# Below this many rows a GEMM waits for the weight's memory, and packing it costs more than the chunks' GEMMs (AMD Zen 3, one
# thread: at 16 rows 1.1 to 1.4 times them, at 64 0.76 to 0.94). With d weight blocks are as fast from the first row.
FORWARD_FROM = 64
# Rows over D from which making their logits again costs more than memory for them is worth.
RECOMPUTE_UP_TO = 2
# Multiples of D of further rows whose logits are kept, in memory of their own: 2 in bfloat16 (1 in float32) are as large as a
# float32 gradient of the weight, and a call of up to 3 D (2 D) rows takes 3 GEMMs.
KEEP_MORE = 0


def why_not(
    backend: str, dtype: torch.dtype, weight: Tensor, rows: int, needs: Needs, chunk_size: int | None
) -> str:
    """Why any call goes through chunks of rows instead; empty if it may go through here."""
    if backend != "cpu" or not hasattr(cpu_rows.native, "HeadCall"):
        return "the backend has no kernels for blocks of the vocabulary"
    if chunk_size is not None or not ENABLED:
        return "chunk_size, or FASTLOSS_VOCABULARY_BLOCKS=0"
    if dtype not in (torch.float32, torch.bfloat16) or weight.dtype not in (torch.float32, torch.bfloat16):
        return "the dtype"
    if not multiplies_floats(weight, dtype):
        if not (supports_gemm_bf16() or cpu_rows.native.supports_tiles()):
            return "oneDNN multiplies bfloat16 faster than float32"
        if weight.dtype != dtype or weight.shape[1] % 2:
            return "bfloat16 is multiplied in pairs along D, and d weight has the logits' dtype"
    if rows < FORWARD_FROM and not needs.weight:
        return f"fewer than {FORWARD_FROM} rows"
    return "" if weight.stride(1) == 1 else "the weight's layout"


def why_not_cross_entropy(rows: int, dim: int, needs: Needs, per_row: bool, smooth: bool) -> str:
    """The same of cross-entropy. ``smooth``: every token of the vocabulary is a target, by smoothing or as a probability."""
    if not needs or (per_row and (needs.weight or needs.bias)):
        return ""  # a forward alone, perhaps a backward alone later
    if not needs.weight:
        if needs.bias:
            return "the bias's gradient is made with the weight's"
        return "label smoothing or class probabilities with a frozen weight" if smooth else ""
    return "" if rows <= RECOMPUTE_UP_TO * dim else f"more than {RECOMPUTE_UP_TO} D rows"


def multiplies_floats(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether operands become float32: that is what they are, or what this CPU multiplies faster."""
    return dtype == torch.float32 or upcasts(weight.device, dtype)


def gemms(needs: Needs, rows: int, dim: int) -> float:
    """GEMMs of forward and backward in one; a fraction where the logits of some rows are made again."""
    again = max(0, rows - (1 + KEEP_MORE) * dim) / max(rows, 1) if needs.weight else 0
    return round(1 + needs.hidden + needs.weight + again, 2)


def block_width(vocab: int, dim: int) -> int:
    """Columns of a block, which the threads share: at most 2% of the logits, and weights of it, packed twice, that stay in a
    core's cache, where that is not too narrow."""
    panel: int = cpu_rows.native.head_panel()
    width = max(64, min(WIDTH, vocab // 64, max(128, CACHED // dim)))
    return -(-min(width, vocab) // panel) * panel


def buffer_bytes(rows: int, weight: Tensor, needs: Needs) -> int:
    """Of a block of logits."""
    width = block_width(*weight.shape)
    if needs.weight or needs.bias:
        return rows * width * weight.dtype.itemsize
    stripe: int = min(rows, cpu_rows.native.HEAD_STRIPE)
    return stripe * width * weight.dtype.itemsize * torch.get_num_threads()


class _Call:
    """A native call: the tensors whose addresses it holds, and its gradients."""

    def __init__(
        self,
        h: Head,
        keep: Tensor | None,
        target: Tensor | None,
        w: Tensor | None,
        form: tuple[int, float, float],
        needs: Needs,
    ):
        self.keep, self.all_rows, self.dim = keep, *h.hidden.shape
        self.vocab = h.weight.shape[0]
        self.rows = self.all_rows if keep is None else keep.numel()
        self.needs = needs
        self.tensors: list[Tensor] = []
        pairs = not multiplies_floats(h.weight, h.dtype)
        hidden = h.hidden
        if pairs or hidden.dtype not in (torch.float32, torch.bfloat16):
            hidden = hidden.to(h.dtype if pairs else torch.float32)
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        self.operands = hidden, h.weight
        self._gradients(hidden, h.weight)
        c = self.native = cpu_rows.native.HeadCall()
        c.rows, c.vocab, c.dim = self.rows, self.vocab, self.dim
        c.width = block_width(self.vocab, self.dim)
        c.ignore_index, c.scale, c.softcap = form
        c.hidden_dtype, c.hidden_stride = DTYPE_CODES[hidden.dtype], hidden.stride(0)
        c.weight_dtype, c.weight_stride = DTYPE_CODES[h.weight.dtype], h.weight.stride(0)
        c.w_row_stride = 0 if w is None or w.dim() == 1 else w.stride(0)
        c.grad_scale, c.spread, c.split, c.pairs = 1.0, self.rest is None, self.split, pairs
        c.tiles = pairs and cpu_rows.native.supports_tiles()
        self.point_to(
            target=target, bias=h.bias, w=w, keep=keep, hidden=hidden, weight=h.weight, d_weight=self.d_weight,
            d_hidden=self.d_hidden, d_hidden_rest=self.rest, d_bias=self.d_bias,
        )  # fmt: skip

    def point_to(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self.tensors.append(tensor)
                setattr(self.native, name, tensor.data_ptr())

    def _gradients(self, hidden: Tensor, weight: Tensor) -> None:
        shape = self.all_rows, self.dim
        self.d_weight = new_gradient(weight.shape, weight.dtype, weight.device) if self.needs.weight else None
        self.d_bias = torch.empty(self.vocab) if self.needs.bias else None
        self.d_hidden = torch.empty(shape, dtype=hidden.dtype) if self.needs.hidden else None
        # In low precision it is summed in float32: in its own memory as far as that goes, which is for half of the rows.
        self.split, self.rest = self.rows, None
        if self.d_hidden is None or hidden.dtype == torch.float32:
            if self.d_hidden is not None and self.keep is not None:
                self.d_hidden.zero_()
            return
        self.split = min(self.rows, self.all_rows // 2)
        self.rest = torch.empty((self.rows - self.split, self.dim))

    def execute(self, gemms: float) -> None:
        if not self.rows:
            for grad in (self.d_hidden, self.d_weight, self.d_bias):
                if grad is not None:
                    grad.zero_()
            return
        c, native = self.native, cpu_rows.native
        threads = torch.get_num_threads()
        self.point_to(state=torch.empty((self.rows, native.ROW_STATE_DOUBLES), dtype=torch.float64))
        scratch = torch.empty(c.workspace_bytes(threads) + 64, dtype=torch.uint8)
        if _get_current_dispatch_mode() is not None:  # FlopCounterMode and its like see operators only
            _counted(*self.operands, self.rows, gemms)
        c.run(-(-scratch.data_ptr() // 64) * 64, threads)

    def gradients(self) -> Grads:
        """Those of an executed call."""
        if self.d_hidden is not None and self.rest is not None and self.rows:
            x, split = self.d_hidden, self.split
            code, address = DTYPE_CODES[x.dtype], x.data_ptr()
            # Front to back, so that no sum is overwritten before it is read.
            cpu_rows.native.convert(address, DTYPE_CODES[torch.float32], address, code, split * self.dim, 1)
            x[split : self.rows] = self.rest
            if self.keep is not None:
                dense = x[: self.rows].clone()
                x.zero_().index_copy_(0, self.keep, dense)
        return Grads(self.d_hidden, self.d_weight, self.d_bias)


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
    this = _Call(h, keep, target, w, (call.ignore_index, call.scale, call.softcap), needs)
    out = empty_stats(torch.empty((this.rows, 0)), call.want)
    for name in ("logsumexp", "loss"):
        out.setdefault(name, torch.empty(this.rows))
    this.point_to(**out)
    c = this.native
    c.label_smoothing, c.z_loss = call.label_smoothing, call.z_loss
    c.grad_scale = factor.value * (1.0 if factor.tensor is None else float(factor.tensor))
    if needs.weight:
        c.stored = min(this.rows, this.dim)
        c.more = min(this.rows - c.stored, KEEP_MORE * this.dim)
        this.point_to(more_logits=new_gradient((this.vocab, c.more), h.weight.dtype, h.weight.device))
    this.execute(gemms(needs, this.rows, this.dim))
    return out, this.gradients()


def backward(h: Head, needs: Needs, given: Given, keep: Tensor | None) -> Grads:
    """Of what :meth:`Given.pick` kept: makes the logits again."""
    form = given.ignore_index, given.scale, given.softcap
    this = _Call(h, keep, given.target, given.w, form, needs)
    k = {name: None if x is None else x.contiguous() for name, x in given.k._asdict().items()}
    this.point_to(lse=given.lse, **k)
    this.execute(1 + needs.hidden + needs.weight)
    return this.gradients()


@torch.library.custom_op("fastloss::head_gemms", mutates_args=())
def _counted(hidden: Tensor, weight: Tensor, rows: int, gemms: float) -> None:
    """Does nothing: tells FlopCounterMode what the native call multiplies."""


@register_flop_formula(torch.ops.fastloss.head_gemms)
def _(
    hidden_shape: list[int], weight_shape: list[int], rows: int, gemms: float, *args: object, **kwargs: object
) -> int:
    return round(2 * rows * weight_shape[0] * weight_shape[1] * gemms)
