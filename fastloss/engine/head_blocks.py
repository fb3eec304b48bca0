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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastloss.engine.autograd import new_gradient
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import Backend, Factor
from fastloss.engine.gate import address
from fastloss.engine.head_rows import count_gemms, upcasts
from fastloss.engine.head_types import Grads, Head, Needs
from fastloss.engine.native import NativeBackend, supports_gemm_bf16
from fastloss.tables import DTYPE_CODES, LSE_PARTS, CrossEntropyOptions, RowOptions

ENABLED = os.environ.get("FASTLOSS_VOCABULARY_BLOCKS", "1") != "0"
# Columns of a block at most: the threads share a block of all rows' d logits.
WIDTH = 256
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
    backend: Backend, dtype: torch.dtype, weight: Tensor, rows: int, needs: Needs, chunk_size: int | None
) -> str:
    """Why any call goes through chunks of rows instead; empty if it may go through here."""
    if not isinstance(backend, NativeBackend) or not backend.has_head:
        return "the backend has no kernels for blocks of the vocabulary"
    if chunk_size is not None or not ENABLED:
        return "chunk_size, or FASTLOSS_VOCABULARY_BLOCKS=0"
    if dtype not in (torch.float32, torch.bfloat16) or weight.dtype not in (torch.float32, torch.bfloat16):
        return "the dtype"
    if not multiplies_floats(weight, dtype):
        if not (supports_gemm_bf16() or backend.module.supports_tiles()):
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


def block_width(backend: NativeBackend, vocab: int, dim: int) -> int:
    """Columns of a block, which the threads share: at most 2% of the logits, and weights of it, packed twice, that stay in a
    core's cache, where that is not too narrow."""
    panel: int = backend.module.head_panel()
    width = max(64, min(WIDTH, vocab // 64, max(128, CACHED // dim)))
    return -(-min(width, vocab) // panel) * panel


def buffer_bytes(backend: NativeBackend, rows: int, weight: Tensor, needs: Needs) -> int:
    """Of a block of logits."""
    width = block_width(backend, *weight.shape)
    if needs.weight or needs.bias:
        return rows * width * weight.dtype.itemsize
    stripe = min(rows, backend.module.HEAD_STRIPE)
    return stripe * width * weight.dtype.itemsize * torch.get_num_threads()


class VocabularyBlocks:
    """One pass with all rows in one part (the interface of engine/head.py)."""

    def __init__(self, head: Head, needs: Needs, keep: Tensor | None):
        assert isinstance(head.backend, NativeBackend)
        self.head, self.needs, self.keep, self.native = head, needs, keep, head.backend
        self.all_rows = head.hidden.shape[0]
        self.rows = self.all_rows if keep is None else keep.numel()
        self.made = Grads(None, None, None)

    def parts(self) -> Iterator[VocabularyBlocks]:
        yield self

    def grads(self) -> Grads:
        return self.made

    def of(self, per_row: Tensor | None) -> Tensor | None:
        """All computed rows are this part's."""
        return per_row

    def cross_entropy(
        self,
        target: Tensor | None,
        options: CrossEntropyOptions,
        *,
        w: Tensor | None,
        factor: Factor,
        want: Sequence[str],
    ) -> dict[str, Tensor]:
        """Losses and statistics of the rows; the gradients of their sum times ``factor`` are made on the way."""
        dim = self.head.weight.shape[1]
        count_gemms(self.head, self.rows, gemms(self.needs, self.rows, dim))
        with _disable_current_modes():
            return self._cross_entropy(target, options, w, factor, want)

    def _cross_entropy(
        self,
        target: Tensor | None,
        options: CrossEntropyOptions,
        w: Tensor | None,
        factor: Factor,
        want: Sequence[str],
    ) -> dict[str, Tensor]:
        call = _NativeCall(self, target, w, options)
        out = self.native.empty_stats(self.head.hidden, self.rows, dict.fromkeys((*want, LSE_PARTS, "loss")))
        call.point_to(**out)
        c = call.record
        c.set_loss(options)
        c.grad_scale = factor.value * (1.0 if factor.tensor is None else float(factor.tensor))
        dim = self.head.weight.shape[1]
        if self.needs.weight:
            c.stored = min(self.rows, dim)
            call.keep_more(min(self.rows - c.stored, KEEP_MORE * dim))
        call.execute()
        self.made = call.gradients()
        return out

    def gradients(
        self,
        target: Tensor | None,
        options: RowOptions,
        lse_parts: Tensor,
        coefficients: Coefficients,
        w: Tensor | None = None,
    ) -> None:
        """Makes the logits again."""
        count_gemms(self.head, self.rows, 1 + self.needs.hidden + self.needs.weight)
        with _disable_current_modes():
            call = _NativeCall(self, target, w, options)
            k = {name: None if x is None else x.contiguous() for name, x in coefficients._asdict().items()}
            call.point_to(given_lse_parts=lse_parts, **k)
            call.execute()
            self.made = call.gradients()


class _NativeCall:
    """A native call: the tensors whose addresses it holds, and its gradients."""

    def __init__(self, run: VocabularyBlocks, target: Tensor | None, w: Tensor | None, options: RowOptions):
        h, self.keep, self.needs = run.head, run.keep, run.needs
        self.native, self.rows, self.all_rows = run.native, run.rows, run.all_rows
        self.vocab, self.dim = h.weight.shape
        self.tensors: list[Tensor] = []
        pairs = not multiplies_floats(h.weight, h.dtype)
        hidden = h.hidden
        if pairs or hidden.dtype not in (torch.float32, torch.bfloat16):
            hidden = hidden.to(h.dtype if pairs else torch.float32)
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        self.operands = hidden, h.weight
        self._make_gradients(hidden, h.weight)
        c = self.record = self.native.module.HeadCall()
        c.rows, c.vocab, c.dim = self.rows, self.vocab, self.dim
        c.width = block_width(self.native, self.vocab, self.dim)
        c.ignore_index, c.scale, c.softcap = options.ignore_index, options.scale, options.softcap
        c.hidden_dtype, c.hidden_stride = DTYPE_CODES[hidden.dtype], hidden.stride(0)
        c.weight_dtype, c.weight_stride = DTYPE_CODES[h.weight.dtype], h.weight.stride(0)
        c.w_row_stride = 0 if w is None or w.dim() == 1 else w.stride(0)
        c.grad_scale, c.spread, c.split, c.pairs = 1.0, self.rest is None, self.split, pairs
        c.tiles = pairs and self.native.module.supports_tiles()
        self.point_to(
            target=target, bias=h.bias, w=w, keep=self.keep, hidden=hidden, weight=h.weight, d_weight=self.d_weight,
            d_hidden=self.d_hidden, d_hidden_rest=self.rest, d_bias=self.d_bias,
        )  # fmt: skip

    def point_to(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self.tensors.append(tensor)
                setattr(self.record, name, address(tensor))

    def _make_gradients(self, hidden: Tensor, weight: Tensor) -> None:
        shape, device = (self.all_rows, self.dim), hidden.device
        self.d_weight = new_gradient(weight.shape, weight.dtype, weight.device) if self.needs.weight else None
        self.d_bias = torch.empty(self.vocab, dtype=torch.float32, device=device) if self.needs.bias else None
        self.d_hidden = torch.empty(shape, dtype=hidden.dtype, device=device) if self.needs.hidden else None
        # In low precision it is summed in float32: in its own memory as far as that goes, which is for half of the rows.
        self.split, self.rest = self.rows, None
        if self.d_hidden is None or hidden.dtype == torch.float32:
            if self.d_hidden is not None and self.keep is not None:
                self.d_hidden.zero_()
            return
        self.split = min(self.rows, self.all_rows // 2)
        self.rest = torch.empty((self.rows - self.split, self.dim), dtype=torch.float32, device=device)

    def keep_more(self, rows: int) -> None:
        """Of the rows after the first D, the logits of ``rows`` are kept, in memory of their own."""
        weight = self.operands[1]
        self.record.more = rows
        self.point_to(
            more_logits=new_gradient((self.vocab, rows), weight.dtype, weight.device) if rows else None
        )

    def execute(self) -> None:
        if not self.rows:
            for grad in (self.d_hidden, self.d_weight, self.d_bias):
                if grad is not None:
                    grad.zero_()
            return
        c, module, device = self.record, self.native.module, self.operands[0].device
        threads = torch.get_num_threads()
        shape = self.rows, module.ROW_STATE_DOUBLES
        self.point_to(state=torch.empty(shape, dtype=torch.float64, device=device))
        scratch = torch.empty(c.workspace_bytes(threads) + 64, dtype=torch.uint8, device=device)
        c.run(-(-address(scratch) // 64) * 64, threads)

    def gradients(self) -> Grads:
        """Those of an executed call."""
        if self.d_hidden is not None and self.rest is not None and self.rows:
            x, split = self.d_hidden, self.split
            # Front to back, so that no sum is overwritten before it is read.
            self.native.convert_in_place(x, split * self.dim, torch.float32)
            x[split : self.rows] = self.rest
            if self.keep is not None:
                dense = x[: self.rows].clone()
                x.zero_().index_copy_(0, self.keep, dense)
        return Grads(self.d_hidden, self.d_weight, self.d_bias)
