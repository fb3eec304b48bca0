"""The linear head in chunks of rows: a GEMM into a small buffer of logits, a row kernel in place, two GEMMs out.

On a CPU the logits of all rows are never held (32 rows or fewer are one chunk), and the weight's gradient is accumulated over the
chunks in float32. On a GPU a float32 accumulator is memory and traffic that logits may take in its place: as many rows as fill it
go together, and where that is all of them the weight's gradient is one product, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from fastloss.engine import devices, invariance
from fastloss.engine.argmax import row_statistics
from fastloss.engine.autograd import new_gradient
from fastloss.engine.coefficients import Coefficients, of_cross_entropy
from fastloss.engine.contract import Factor
from fastloss.engine.head_types import Grads, Head, Needs, join_bias, options_of_part
from fastloss.engine.native import multiply_bf16, supports_gemm_bf16
from fastloss.engine.selection import Selection, Taken, take, write_gradient
from fastloss.tables import ACC_DTYPES, LATE_DTYPES, LSE_PARTS, CrossEntropyOptions, Row, RowOptions

# Vocabulary rows converted to float32 at a time where the CPU has no low-precision GEMM.
UPCAST_BLOCK = 2048


def upcasts(device: torch.device, dtype: torch.dtype) -> bool:
    """True where low-precision GEMMs are slow scalar code: a CPU whose oneDNN lacks them. float32 GEMMs then
    read blocks of the weight converted on the way (AMD Zen 3, AVX2, 2 threads, torch 2.13: 170 against 0.3-21 GFLOP/s)."""
    if devices.is_gpu(device) or dtype not in (torch.bfloat16, torch.float16):
        return False
    supported = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    return not supported()


def buffer_dtype(head: Head, float_logits: bool = False) -> torch.dtype:
    """The dtype of the logits in the buffer."""
    if upcasts(head.hidden.device, head.dtype) or (float_logits and head.dtype.itemsize < 4):
        return torch.float32
    return head.dtype


def rounds_gradients(head: Head, float_logits: bool) -> bool:
    """Whether a GPU's low-precision GEMMs make float32 logits, and take their gradient rounded, from a buffer of its own."""
    return devices.is_gpu(head.weight.device) and buffer_dtype(head, float_logits) != head.dtype


# On a GPU: the memory of logits that no accumulator pays for, and rows that fill a wave of its tiles. Not tuned on one.
GPU_BYTES, GPU_ROWS = 512 << 20, 2048
GPU_MULTIPLE = 256  # of a chunk's rows, where there are several
GPU_ALIGNMENT = 64  # elements: rows of logits begin at a multiple, for the fast products and 16-byte loads at any vocabulary


def default_chunk(
    rows: int, vocab: int, dim: int, dtype: torch.dtype, device: torch.device, weight_gradient: bool = True
) -> int:
    """Rows per chunk: enough for GEMMs at full speed, small beside the weight and its gradient."""
    if devices.is_gpu(device):
        return _gpu_chunk(rows, vocab, dim, dtype, weight_gradient)
    # At least four chunks, so that a short batch does not hold its whole logits either.
    quarter = -(-rows // 4)
    return max(1, min(rows, 256, max(quarter, 32)))


def accumulator_rows(dim: int, dtype: torch.dtype) -> int:
    """Rows whose logits are as large as the weight's gradient in the accumulation dtype."""
    return dim * ACC_DTYPES[dtype].itemsize // dtype.itemsize


def _gpu_chunk(rows: int, vocab: int, dim: int, dtype: torch.dtype, weight_gradient: bool) -> int:
    """All rows where their logits are no larger than the accumulator that d weight would need otherwise (or take no more than
    GPU_BYTES); else equal chunks of about that many. Without d weight there is no accumulator, and a chunk takes GPU_BYTES."""
    most = max(GPU_MULTIPLE, min(GPU_ROWS, GPU_BYTES // max(1, vocab * dtype.itemsize)))
    if weight_gradient:
        most = max(most, accumulator_rows(dim, dtype))
    if rows <= most:
        return max(1, rows)
    most = most // GPU_MULTIPLE * GPU_MULTIPLE
    chunks = -(-rows // most)
    return -(-rows // (chunks * GPU_MULTIPLE)) * GPU_MULTIPLE


def weight_dtype(head: Head, chunks: int) -> torch.dtype:
    """The dtype in which d weight is made. One product over all rows is rounded by the GPU's library as it leaves: straight to
    the weight's own. Several are added up in the accumulation dtype; so is float16's, which waits for the upstream gradient."""
    direct = chunks == 1 and devices.is_gpu(head.weight.device) and head.dtype not in LATE_DTYPES
    return head.dtype if direct and head.weight.dtype == head.dtype else ACC_DTYPES[head.dtype]


def accumulator_bytes(head: Head, chunks: int) -> int:
    """Memory of d weight beside the gradient that the leaf gets."""
    made = weight_dtype(head, chunks)
    return 0 if made == head.weight.dtype else head.weight.numel() * made.itemsize


def row_stride(vocab: int, device: torch.device) -> int:
    """Elements from one row of logits in a buffer to the next."""
    return -(-vocab // GPU_ALIGNMENT) * GPU_ALIGNMENT if devices.is_gpu(device) else vocab


def new_logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer ``[rows, vocab]``; what lies between two rows is never read."""
    return torch.empty((rows, row_stride(vocab, device)), dtype=dtype, device=device)[:, :vocab]


def equal_chunks(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, chunk):
        yield start, min(start + chunk, rows)


class _Gemms:
    """The three products of a chunk, in the head's dtype; d weight in that of :func:`weight_dtype`. A LoRA adds a thin one to each."""

    def __init__(self, head: Head, needs: Needs, keep: Tensor | None, chunk: int, chunks: int):
        vocab, self.dim = head.weight.shape
        rows = head.hidden.shape[0]
        device = head.hidden.device
        self.keep = keep
        self.hidden, self.wide = head.hidden.to(head.dtype), head.wide
        if self.wide:  # u to twice the digits of the GEMMs' dtype: [rows, D + 2 r]
            rest = head.hidden[:, self.dim :]
            lost = (rest - self.hidden[:, self.dim :].to(rest.dtype)).to(head.dtype)
            self.hidden = torch.cat([self.hidden, lost], 1)
        self.weight = head.weight.to(head.dtype)
        self.acc = ACC_DTYPES[head.dtype]
        self.buffer = new_logits(min(chunk, rows), vocab, buffer_dtype(head), device)
        new = torch.empty if keep is None else torch.zeros
        shape = head.hidden.shape
        made = head.hidden.dtype if self.wide else head.dtype
        self.d_hidden = new(shape, dtype=made, device=device) if needs.hidden else None
        # Its first chunk writes it: no zeros to make and read.
        made = weight_dtype(head, chunks)
        self.d_weight = new_gradient((vocab, self.dim), made, device) if needs.weight else None
        self._gathered: tuple[tuple[int, int], Tensor] | None = None
        self.weight_begun = False
        self.invariant = invariance.wanted()
        self._make_bias(head, needs)

    def _make_bias(self, head: Head, needs: Needs) -> None:
        """What stands in the bias's place (:class:`Head`), and its gradients."""
        vocab, device = head.weight.shape[0], head.hidden.device
        self.d_bias: Tensor | None = None
        self.d_low_rank: Tensor | None = None
        self.low_rank = None if head.low_rank is None else head.low_rank.to(head.dtype)
        self.whole_rank = self.low_rank
        if head.wide:
            assert head.low_rank is not None
            self.whole_rank = head.low_rank.float()
            high, low = devices.split(self.whole_rank, head.dtype)
            self.low_rank = torch.cat(
                [high, high, low], 1
            )  # beside u's two parts, and the first of them again
        if needs.bias and (head.bias is not None or self.low_rank is None):
            self.d_bias = torch.zeros(vocab, dtype=self.acc, device=device)
        if needs.bias and self.low_rank is not None:
            columns = head.rank * (1 + head.wide)
            self.d_low_rank = torch.zeros((vocab, columns), dtype=self.acc, device=device)

    def rows(self, start: int, stop: int) -> Tensor:
        """The chunk's hidden states, in the GEMMs' dtype."""
        if self.keep is None:
            return self.hidden[start:stop]
        if self._gathered is None or self._gathered[0] != (start, stop):  # gathered once for all products
            self._gathered = (start, stop), self.hidden.index_select(0, self.keep[start:stop])
        return self._gathered[1]

    def operands(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(the rows' hidden states, what a LoRA made of them: u ``[rows, r]``)."""
        rows = self.rows(start, stop)
        return rows[:, : self.dim], rows[:, self.dim :]

    def logits(self, start: int, stop: int) -> Tensor:
        z = self.buffer[: stop - start]
        hidden, u = self.operands(start, stop)
        if self.invariant:
            invariance.multiply(z, hidden, self.weight)
        else:
            torch.mm(hidden, self.weight.t(), out=z)
        if self.low_rank is not None:
            torch.addmm(z, self.factors(u), self.low_rank.t(), out=z)
        return z

    def factors(self, u: Tensor) -> Tensor:
        """What B's columns are multiplied by."""
        return torch.cat([u, u[:, : u.shape[1] // 2]], 1) if self.wide else u

    def gradients(self, z: Tensor, start: int, stop: int) -> None:
        """Adds a chunk's part to d hidden, d weight and d bias, from its d logits."""
        if self.d_hidden is not None:
            there = self.keep is None
            out = (
                self.d_hidden[start:stop]
                if there
                else self.d_hidden.new_empty(stop - start, self.d_hidden.shape[1])
            )
            if self.wide:
                assert self.whole_rank is not None
                out[:, : self.dim] = torch.mm(z, self.weight)
                out[:, self.dim :] = devices.multiply_thin(z, self.whole_rank)
            else:
                torch.mm(z, self.weight, out=out[:, : self.dim])
                if self.low_rank is not None:
                    torch.mm(z, self.low_rank, out=out[:, self.dim :])
            if self.keep is not None:
                self.d_hidden.index_copy_(0, self.keep[start:stop], out)
        self._add_columns(z, start, stop)

    def _add_columns(self, z: Tensor, start: int, stop: int) -> None:
        self.add_weights(z, self.rows(start, stop))
        if self.d_bias is not None:
            self.d_bias += z.sum(0, dtype=self.acc)

    def add_weights(self, z: Tensor, rows: Tensor) -> None:
        """Adds zᵀ times the rows' hidden states to d weight, and zᵀ u to that of a LoRA."""
        if self.d_weight is not None:
            begun, self.weight_begun = self.weight_begun, True
            self._add_product(self.d_weight, z, rows[:, : self.dim], begun)
        if self.d_low_rank is not None:
            self._add_product(self.d_low_rank, z, rows[:, self.dim :], True)

    def forget_rows(self) -> None:
        """``keep`` has changed: no row is gathered."""
        self._gathered = None

    def _add_product(self, out: Tensor, z: Tensor, hidden: Tensor, accumulate: bool) -> None:
        on_cpu = not devices.is_gpu(z.device)  # XPU, MPS … have addresses that CPU code must not see
        if on_cpu and z.dtype == torch.bfloat16 and supports_gemm_bf16() and hidden.stride(1) == 1:
            gemm_bf16(out, z, hidden, accumulate=accumulate)
        else:
            devices.add_transposed(out, z, hidden, accumulate=accumulate)

    def finish(self) -> Grads:
        if self.d_weight is not None and not self.weight_begun:  # no rows
            self.d_weight.zero_()
        if self.wide and self.d_low_rank is not None:
            high, low = self.d_low_rank.chunk(2, 1)
            self.d_low_rank = high + low
        return Grads(self.d_hidden, self.d_weight, join_bias(self.d_low_rank, self.d_bias))


class _UpcastGemms(_Gemms):
    """The same with float32 GEMMs over blocks of the vocabulary: for CPUs without low-precision GEMMs, and for float32 logits."""

    def __init__(self, head: Head, needs: Needs, keep: Tensor | None, chunk: int, chunks: int):
        nothing = Needs(False, False, False)
        super().__init__(
            head._replace(dtype=torch.float32, weight=head.weight[:0], bias=None, low_rank=None),
            nothing,
            keep,
            chunk,
            chunks,
        )
        vocab, dim = head.weight.shape
        rows, device = head.hidden.shape[0], head.hidden.device
        self.weight = head.weight
        self.buffer = torch.empty((min(chunk, rows), vocab), dtype=torch.float32, device=device)
        new, shape = torch.empty if keep is None else torch.zeros, head.hidden.shape
        self.d_hidden = new(shape, dtype=head.hidden.dtype, device=device) if needs.hidden else None
        self.d_weight = new_gradient((vocab, dim), self.acc, device) if needs.weight else None
        self._make_bias(head._replace(dtype=torch.float32), needs)
        self.block = torch.empty((min(UPCAST_BLOCK, vocab), dim), dtype=torch.float32, device=device)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start, stop in equal_chunks(self.weight.shape[0], UPCAST_BLOCK):
            block = self.weight[start:stop]
            if block.dtype != torch.float32:
                block = self.block[: stop - start].copy_(block)
            yield slice(start, stop), block

    def logits(self, start: int, stop: int) -> Tensor:
        z = self.buffer[: stop - start]
        hidden, u = self.operands(start, stop)
        for vocab_block, weight in self._blocks():
            torch.mm(hidden, weight.t(), out=z[:, vocab_block])
        if self.low_rank is not None:
            torch.addmm(z, u, self.low_rank.t(), out=z)
        return z

    def gradients(self, z: Tensor, start: int, stop: int) -> None:
        d_hidden = torch.zeros_like(self.rows(start, stop)) if self.d_hidden is not None else None
        if d_hidden is not None:
            own = d_hidden[:, : self.dim]
            for vocab_block, weight in self._blocks():
                torch.addmm(own, z[:, vocab_block], weight, out=own)
            if self.low_rank is not None:
                torch.mm(z, self.low_rank, out=d_hidden[:, self.dim :])
            assert self.d_hidden is not None
            if self.keep is None:
                self.d_hidden[start:stop] = d_hidden
            else:
                self.d_hidden.index_copy_(0, self.keep[start:stop], d_hidden.to(self.d_hidden.dtype))
        self._add_columns(z, start, stop)


class _FloatLogitsGemms(_Gemms):
    """The same with float32 logits on a GPU: its product of low-precision operands is not rounded; their gradient is, into a
    second buffer."""

    def __init__(self, head: Head, needs: Needs, keep: Tensor | None, chunk: int, chunks: int):
        super().__init__(head, needs, keep, chunk, chunks)
        vocab, device = head.weight.shape[0], head.hidden.device
        self.rounded, rows = self.buffer, self.buffer.shape[0]
        self.buffer = new_logits(rows, vocab, torch.float32, device)

    def logits(self, start: int, stop: int) -> Tensor:
        z = self.buffer[: stop - start]
        hidden, u = self.operands(start, stop)
        if self.invariant:
            invariance.multiply(z, hidden, self.weight)
        else:
            devices.multiply_wide(z, hidden, self.weight.t())
        if self.low_rank is not None:
            devices.add_wide(z, self.factors(u), self.low_rank.t())
        return z

    def gradients(self, z: Tensor, start: int, stop: int) -> None:
        super().gradients(self.rounded[: z.shape[0]].copy_(z), start, stop)


def _gemms_of(head: Head, float_logits: bool) -> type[_Gemms]:
    if buffer_dtype(head, float_logits) == head.dtype:
        return _Gemms
    return _FloatLogitsGemms if rounds_gradients(head, float_logits) else _UpcastGemms


class RowChunks:
    """One pass over the rows, a chunk at a time (the interface of engine/head.py)."""

    def __init__(
        self,
        head: Head,
        needs: Needs,
        keep: Tensor | None,
        chunk: int,
        bounds: Iterable[tuple[int, int]] | None,
        float_logits: bool = False,
    ):
        self.head, self.needs, self.keep = head, needs, keep
        self.all_rows = head.hidden.shape[0]
        rows = self.all_rows if keep is None else keep.numel()
        self.rows = rows
        self.bounds = list(equal_chunks(rows, chunk) if bounds is None else bounds) or [(0, 0)]
        self.gemms = _gemms_of(head, float_logits)(head, needs, keep, chunk, len(self.bounds))

    def parts(self) -> Iterator[Chunk]:
        for start, stop in self.bounds:
            yield Chunk(self, start, stop)

    def grads(self) -> Grads:
        return self.gemms.finish()


class Chunk:
    """Some rows. Their logits are made at the first call and stay in the buffer until their gradient overwrites them."""

    def __init__(self, run: RowChunks, start: int, stop: int):
        self.run, self.start, self.stop = run, start, stop
        self._logits: Tensor | None = None

    def of(self, per_row: Tensor | None) -> Tensor | None:
        """This chunk's entries of a tensor that has one for each computed row."""
        return None if per_row is None else per_row[self.start : self.stop]

    def own(self, options: Row) -> Row:
        return options_of_part(options, self.run.keep, self.start, self.stop)

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            gemms = self.run.gemms
            empty = self.start == self.stop
            self._logits = gemms.buffer[:0] if empty else gemms.logits(self.start, self.stop)
        return self._logits

    def stats(self, target: Tensor | None, options: RowOptions, want: Sequence[str]) -> dict[str, Tensor]:
        head = self.run.head
        return row_statistics(head.backend, self.logits, target, self.own(options), want, head.bias)

    def distances(
        self, target: Tensor | None, options: CrossEntropyOptions, w: Tensor | None, want: Sequence[str]
    ) -> dict[str, Tensor]:
        """The losses alone, named "distance", and statistics; no gradient is made."""
        head = self.run.head
        own = self.own(options)
        if w is not None and w.dim() == 2:
            w = w[self.start : self.stop]
        out = head.backend.row_cross_entropy(self.logits, target, own, want=want, bias=head.bias, w=w)
        out["distance"] = out.pop("loss")
        return out

    def cross_entropy(
        self,
        target: Tensor | None,
        options: CrossEntropyOptions,
        *,
        w: Tensor | None,
        factor: Factor,
        want: Sequence[str],
        row_factors: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses and statistics; the gradients of their sum times ``factor`` are made on the way, if any is needed."""
        if row_factors is not None:
            return self._weighted_cross_entropy(target, options, w, factor, want, row_factors)
        head, z = self.run.head, self.logits
        grad = z if self.run.needs and z.shape[0] else None
        if w is not None and w.dim() == 2:
            w = w[self.start : self.stop]
        out = head.backend.row_cross_entropy(
            z, target, self.own(options), factor=factor, grad=grad, want=want, bias=head.bias, w=w
        )
        if grad is not None:
            self.run.gemms.gradients(z, self.start, self.stop)
        return out

    def _weighted_cross_entropy(
        self,
        target: Tensor | None,
        options: CrossEntropyOptions,
        w: Tensor | None,
        factor: Factor,
        want: Sequence[str],
        row_factors: Tensor,
    ) -> dict[str, Tensor]:
        """The losses first, then their gradients from coefficients: a row kernel has one factor for all rows."""
        head, z = self.run.head, self.logits
        own = w[self.start : self.stop] if w is not None and w.dim() == 2 else w
        out = head.backend.row_cross_entropy(z, target, self.own(options), want=want, bias=head.bias, w=own)
        out["loss"] = out["loss"] * row_factors
        if self.run.needs and z.shape[0]:
            upstream = row_factors * factor.value
            if factor.tensor is not None:
                upstream = upstream * factor.tensor
            k = of_cross_entropy(upstream, out[LSE_PARTS], target, own, z.shape[1], options)
            self.gradients(target, options, out[LSE_PARTS], k, w)
        return out

    def gradients(
        self,
        target: Tensor | None,
        options: RowOptions,
        lse_parts: Tensor,
        coefficients: Coefficients,
        w: Tensor | None = None,
    ) -> None:
        """Overwrites the logits with their gradient, and adds to the head's."""
        z = self.logits
        if not self.run.needs or not z.shape[0]:
            return
        if w is not None and w.dim() == 2:
            w = w[self.start : self.stop]
        head = self.run.head
        head.backend.row_grad(
            z, target, self.own(options), lse_parts=lse_parts, coefficients=coefficients, out=z, bias=head.bias, w=w,
        )  # fmt: skip
        self.add_gradients()

    def take(self, mark: Tensor, options: RowOptions, selection: Selection) -> Taken:
        head = self.run.head
        return take(head.backend, self.logits, mark, self.own(options), selection, head.bias)

    def selected_gradients(
        self,
        mark: Tensor,
        options: RowOptions,
        lse_parts: Tensor,
        b: Tensor,
        selection: Selection,
        given: Tensor,
    ) -> None:
        z, head = self.logits, self.run.head
        if not self.run.needs or not z.shape[0]:
            return
        own = self.own(options)
        write_gradient(head.backend, z, mark, own, lse_parts, b, selection, given, z, head.bias)
        self.add_gradients()

    def add_gradients(self) -> None:
        """Adds to the head's gradients from the chunk's d logits, which have been written over its logits."""
        if self.run.needs and self.logits.shape[0]:
            self.run.gemms.gradients(self.logits, self.start, self.stop)


def gemm_bf16(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """``out = a.t() @ b``, or ``out += a.t() @ b``, float32 from bfloat16, which PyTorch has no CPU GEMM for:
    a ``[k, m]`` and b ``[k, n]``, each dense in the last dimension."""
    multiply_bf16(out, a, b, accumulate)


def count_gemms(head: Head, rows: int, gemms: float) -> None:
    """Tells FlopCounterMode and its like what a pass over ``rows`` multiplies. The pass itself is hidden from dispatch modes: one
    that remembers operators' outputs (selective activation checkpointing) would hand back scratch that was written to."""
    if _get_current_dispatch_mode() is not None:
        _counted(head.hidden, head.weight, rows, float(gemms))


@torch.library.custom_op("fastloss::head_gemms", mutates_args=())
def _counted(hidden: Tensor, weight: Tensor, rows: int, gemms: float) -> None:
    """Does nothing."""


@_counted.register_fake
def _(hidden: Tensor, weight: Tensor, rows: int, gemms: float) -> None:
    """A mode may repeat it on meta tensors."""


@register_flop_formula(torch.ops.fastloss.head_gemms)
def _(
    hidden_shape: list[int], weight_shape: list[int], rows: int, gemms: float, *args: Any, **kwargs: Any
) -> int:
    return round(2 * rows * weight_shape[0] * hidden_shape[1] * gemms)
