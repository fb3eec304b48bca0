"""The linear head in chunks of rows: a GEMM into a small logits buffer, a row kernel in place, two GEMMs out.

The logits of all rows are never held (32 rows or fewer are one chunk). The number of GEMMs is the cost; every function here says its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.coefficients import Coefficients
from fastloss.ops.native_rows import acc_dtype

# Vocabulary rows converted to float32 at a time where the CPU has no low-precision GEMM.
UPCAST_BLOCK = 2048


class Needs(NamedTuple):
    """Which gradients somebody asked for."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


class Grads(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Head(NamedTuple):
    """The operands of a call. ``bias`` is acc; ``dtype`` is that of the GEMMs' operands; ``chunk`` is in rows."""

    hidden: Tensor  # [rows, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    dtype: torch.dtype
    chunk: int

    @property
    def buffer_dtype(self) -> torch.dtype:
        return torch.float32 if upcasts(self.hidden.device, self.dtype) else self.dtype

    @property
    def buffer_bytes(self) -> int:
        return self.chunk * self.weight.shape[0] * self.buffer_dtype.itemsize


def upcasts(device: torch.device, dtype: torch.dtype) -> bool:
    """True where low-precision GEMMs are slow scalar code: a CPU whose oneDNN lacks them. float32 GEMMs then
    read blocks of the weight converted on the way (AMD Zen 3, AVX2, 2 threads, torch 2.13: 170 against 0.3-21 GFLOP/s)."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    supported = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else (torch.ops.mkldnn._is_mkldnn_fp16_supported)
    )
    return not supported()


def default_chunk(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk: enough for GEMMs at full speed, small beside the weight and its gradient."""
    if device.type == "cpu":
        best = 256
    else:
        # Not yet tuned on a GPU: 1024 rows fill one wave of 128x256 tiles at V >= 32k.
        best = max(256, min(2048, (512 << 20) // max(1, vocab * dtype.itemsize)))
    # At least four chunks, so that a short batch does not hold its whole logits either.
    quarter = -(-rows // 4)
    return max(1, min(rows, best, max(quarter, 32)))


def chunks(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, chunk):
        yield start, min(start + chunk, rows)


class _Gemms:
    """The three products of a chunk, in the head's dtype, weight gradient accumulated in float32 (acc)."""

    def __init__(self, head: Head, needs: Needs):
        vocab, dim = head.weight.shape
        rows = head.hidden.shape[0]
        device = head.hidden.device
        self.hidden = head.hidden.to(head.dtype)
        self.weight = head.weight.to(head.dtype)
        self.acc = acc_dtype(head.dtype)
        self.buffer = torch.empty((min(head.chunk, rows), vocab), dtype=head.buffer_dtype, device=device)
        self.d_hidden = torch.empty((rows, dim), dtype=head.dtype, device=device) if needs.hidden else None
        self.d_weight = torch.zeros((vocab, dim), dtype=self.acc, device=device) if needs.weight else None
        self.d_bias = torch.zeros(vocab, dtype=self.acc, device=device) if needs.bias else None

    def logits(self, start: int, stop: int) -> Tensor:
        z = self.buffer[: stop - start]
        torch.mm(self.hidden[start:stop], self.weight.t(), out=z)
        return z

    def gradients(self, z: Tensor, start: int, stop: int) -> None:
        """From the chunk's d logits."""
        if self.d_hidden is not None:
            torch.mm(z, self.weight, out=self.d_hidden[start:stop])
        if self.d_weight is not None:
            self._add_weight(z, self.hidden[start:stop])
        self._add_bias(z)

    def _add_weight(self, z: Tensor, hidden: Tensor) -> None:
        assert self.d_weight is not None
        if z.dtype == self.acc:
            torch.addmm(self.d_weight, z.t(), hidden, out=self.d_weight)
        elif z.is_cuda:
            torch.addmm(self.d_weight, z.t(), hidden, out_dtype=self.acc, out=self.d_weight)
        else:
            torch.addmm(self.d_weight, z.t().to(self.acc), hidden.to(self.acc), out=self.d_weight)

    def _add_bias(self, z: Tensor) -> None:
        if self.d_bias is not None:
            self.d_bias += z.sum(0, dtype=self.acc)


class _UpcastGemms(_Gemms):
    """The same with float32 GEMMs over blocks of the vocabulary, for CPUs without low-precision GEMMs."""

    def __init__(self, head: Head, needs: Needs):
        super().__init__(
            head._replace(dtype=torch.float32, weight=head.weight[:0], bias=None), Needs(False, False, False)
        )
        vocab, dim = head.weight.shape
        rows = head.hidden.shape[0]
        self.weight = head.weight
        self.buffer = torch.empty((min(head.chunk, rows), vocab))
        self.d_hidden = torch.empty((rows, dim), dtype=head.hidden.dtype) if needs.hidden else None
        self.d_weight = torch.zeros((vocab, dim)) if needs.weight else None
        self.d_bias = torch.zeros(vocab) if needs.bias else None
        self.block = torch.empty((min(UPCAST_BLOCK, vocab), dim))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start, stop in chunks(self.weight.shape[0], UPCAST_BLOCK):
            block = self.weight[start:stop]
            if block.dtype != torch.float32:
                block = self.block[: stop - start].copy_(block)
            yield slice(start, stop), block

    def logits(self, start: int, stop: int) -> Tensor:
        z = self.buffer[: stop - start]
        for vocab_block, weight in self._blocks():
            torch.mm(self.hidden[start:stop], weight.t(), out=z[:, vocab_block])
        return z

    def gradients(self, z: Tensor, start: int, stop: int) -> None:
        hidden = self.hidden[start:stop]
        d_hidden = torch.zeros_like(hidden) if self.d_hidden is not None else None
        if d_hidden is not None:
            for vocab_block, weight in self._blocks():
                torch.addmm(d_hidden, z[:, vocab_block], weight, out=d_hidden)
            assert self.d_hidden is not None
            self.d_hidden[start:stop] = d_hidden
        if self.d_weight is not None:
            self._add_weight(z, hidden)
        self._add_bias(z)


def _gemms(head: Head, needs: Needs) -> _Gemms:
    return _UpcastGemms(head, needs) if upcasts(head.hidden.device, head.dtype) else _Gemms(head, needs)


RowFunction = Callable[[Tensor, int, int, bool], dict[str, Tensor]]


def run(head: Head, needs: Needs, row_function: RowFunction) -> tuple[dict[str, Tensor], Grads]:
    """1 GEMM, plus one for each of d hidden and d weight that is needed.

    ``row_function(z, start, stop, overwrite)`` gets a chunk's logits, returns statistics per row and, where
    ``overwrite``, leaves d logits in their place.
    """
    with torch.autocast(head.hidden.device.type, enabled=False), torch.no_grad():
        gemms = _gemms(head, needs)
        parts: list[dict[str, Tensor]] = []
        for start, stop in chunks(head.hidden.shape[0], head.chunk):
            z = gemms.logits(start, stop)
            parts.append(row_function(z, start, stop, bool(needs)))
            if needs:
                gemms.gradients(z, start, stop)
        if not parts:  # no rows at all
            parts.append(row_function(gemms.buffer, 0, 0, False))
        out = {
            name: torch.cat([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]
            for name in parts[0]
        }
        return out, Grads(gemms.d_hidden, gemms.d_weight, gemms.d_bias)


def backward(
    head: Head,
    needs: Needs,
    rows: Any,
    target: Tensor | None,
    lse: Tensor,
    k: Coefficients,
    w: Tensor | None,
    *,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> Grads:
    """Recomputes the logits: 1 GEMM, plus one for each of d hidden and d weight."""

    def row_function(z: Tensor, start: int, stop: int, overwrite: bool) -> dict[str, Tensor]:
        part = k.rows(start, stop)
        rows.row_grad(
            z,
            None if target is None else target[start:stop],
            ignore_index=ignore_index,
            bias=head.bias,
            scale=scale,
            softcap=softcap,
            lse=lse[start:stop],
            a=part.a,
            b=part.b,
            c=part.c,
            d=part.d,
            w=w if w is None or w.dim() == 1 else w[start:stop],
            out=z,
        )
        return {}

    return run(head, needs, row_function)[1]


def gemm_count(needs: Needs, recompute: bool) -> int:
    """GEMMs of a step, forward and backward together."""
    return 1 + recompute + needs.hidden + needs.weight
