"""The linear head in chunks of rows: a GEMM into a small logits buffer, a row kernel in place, two GEMMs out.

The logits of all rows are never held (32 rows or fewer are one chunk). The number of GEMMs is the cost; every function here says its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastloss.engine.coefficients import Coefficients
from fastloss.engine.gemm_bf16 import gemm_bf16, supports_gemm_bf16
from fastloss.engine.native_rows import acc_dtype
from fastloss.engine.new_gradient import new_gradient

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
    by_vocabulary: bool = (
        False  # the call goes over blocks of the vocabulary (engine/vocab_blocks.py) instead
    )

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

    def __init__(self, head: Head, needs: Needs, keep: Tensor | None):
        vocab, dim = head.weight.shape
        rows = head.hidden.shape[0]
        device = head.hidden.device
        self.keep = keep
        self.hidden = head.hidden.to(head.dtype)
        self.weight = head.weight.to(head.dtype)
        self.acc = acc_dtype(head.dtype)
        self.buffer = torch.empty((min(head.chunk, rows), vocab), dtype=head.buffer_dtype, device=device)
        new = torch.empty if keep is None else torch.zeros
        self.d_hidden = new((rows, dim), dtype=head.dtype, device=device) if needs.hidden else None
        # Its first chunk writes it: no zeros to make and read.
        self.d_weight = new_gradient((vocab, dim), self.acc, device) if needs.weight else None
        self.weight_begun = False
        self.d_bias = torch.zeros(vocab, dtype=self.acc, device=device) if needs.bias else None

    def rows(self, start: int, stop: int) -> Tensor:
        """The chunk's hidden states, in the GEMMs' dtype."""
        if self.keep is None:
            return self.hidden[start:stop]
        return self.hidden.index_select(0, self.keep[start:stop])

    def logits(self, start: int, stop: int) -> Tensor:
        z = self.buffer[: stop - start]
        torch.mm(self.rows(start, stop), self.weight.t(), out=z)
        return z

    def gradients(self, z: Tensor, start: int, stop: int) -> None:
        """From the chunk's d logits."""
        if self.d_hidden is not None:
            if self.keep is None:
                torch.mm(z, self.weight, out=self.d_hidden[start:stop])
            else:
                self.d_hidden.index_copy_(0, self.keep[start:stop], torch.mm(z, self.weight))
        if self.d_weight is not None:
            self._add_weight(z, self.rows(start, stop))
        self._add_bias(z)

    def _add_weight(self, z: Tensor, hidden: Tensor) -> None:
        assert self.d_weight is not None
        beta, self.weight_begun = int(self.weight_begun), True
        if z.dtype == self.acc:
            torch.addmm(self.d_weight, z.t(), hidden, beta=beta, out=self.d_weight)
        elif z.is_cuda:
            torch.addmm(self.d_weight, z.t(), hidden, beta=beta, out_dtype=self.acc, out=self.d_weight)
        elif z.dtype == torch.bfloat16 and supports_gemm_bf16() and hidden.stride(1) == 1:
            gemm_bf16(self.d_weight, z, hidden, accumulate=bool(beta))
        else:
            torch.addmm(self.d_weight, z.t().to(self.acc), hidden.to(self.acc), beta=beta, out=self.d_weight)

    def finish(self) -> Grads:
        if self.d_weight is not None and not self.weight_begun:  # no rows
            self.d_weight.zero_()
        return Grads(self.d_hidden, self.d_weight, self.d_bias)

    def _add_bias(self, z: Tensor) -> None:
        if self.d_bias is not None:
            self.d_bias += z.sum(0, dtype=self.acc)


class _UpcastGemms(_Gemms):
    """The same with float32 GEMMs over blocks of the vocabulary, for CPUs without low-precision GEMMs."""

    def __init__(self, head: Head, needs: Needs, keep: Tensor | None):
        nothing = Needs(False, False, False)
        super().__init__(head._replace(dtype=torch.float32, weight=head.weight[:0], bias=None), nothing, keep)
        vocab, dim = head.weight.shape
        rows = head.hidden.shape[0]
        self.weight = head.weight
        self.buffer = torch.empty((min(head.chunk, rows), vocab))
        new = torch.empty if keep is None else torch.zeros
        self.d_hidden = new((rows, dim), dtype=head.hidden.dtype) if needs.hidden else None
        self.d_weight = new_gradient((vocab, dim), self.acc, self.hidden.device) if needs.weight else None
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
        hidden = self.rows(start, stop)
        for vocab_block, weight in self._blocks():
            torch.mm(hidden, weight.t(), out=z[:, vocab_block])
        return z

    def gradients(self, z: Tensor, start: int, stop: int) -> None:
        hidden = self.rows(start, stop)
        d_hidden = torch.zeros_like(hidden) if self.d_hidden is not None else None
        if d_hidden is not None:
            for vocab_block, weight in self._blocks():
                torch.addmm(d_hidden, z[:, vocab_block], weight, out=d_hidden)
            assert self.d_hidden is not None
            if self.keep is None:
                self.d_hidden[start:stop] = d_hidden
            else:
                self.d_hidden.index_copy_(0, self.keep[start:stop], d_hidden.to(self.d_hidden.dtype))
        if self.d_weight is not None:
            self._add_weight(z, hidden)
        self._add_bias(z)


def _gemms(head: Head, needs: Needs, keep: Tensor | None) -> _Gemms:
    kind = _UpcastGemms if upcasts(head.hidden.device, head.dtype) else _Gemms
    return kind(head, needs, keep)


class Given(NamedTuple):
    """What a backward of its own knows of each row: row_grad's arguments (docs/engine.md)."""

    target: Tensor | None
    lse: Tensor
    k: Coefficients
    w: Tensor | None
    ignore_index: int
    scale: float
    softcap: float

    def pick(self, keep: Tensor | None) -> Given:
        """The same of the kept rows."""
        k = Coefficients(*(pick(x, keep) for x in self.k))
        return self._replace(target=pick(self.target, keep), lse=cast(Tensor, pick(self.lse, keep)), k=k)


RowFunction = Callable[[Tensor, int, int, bool], dict[str, Tensor]]


def kept_rows(target: Tensor | None, ignore_index: int) -> Tensor | None:
    """The rows that carry a target, int64 and ascending; None where all do, or where counting them would make a GPU
    wait for the CPU."""
    if target is None or target.device.type != "cpu":
        return None
    keep = (target != ignore_index).nonzero().view(-1)
    return None if keep.numel() == target.numel() else keep


def count_kept(rows: int, target: Tensor | None, ignore_index: int) -> int:
    """How many of ``rows`` are computed: all of them where :func:`kept_rows` is None."""
    if target is None or target.device.type != "cpu":
        return rows
    return int((target != ignore_index).sum())


def pick(per_row: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """``per_row`` of the kept rows."""
    return per_row if per_row is None or keep is None else per_row.index_select(0, keep)


def run(
    head: Head,
    needs: Needs,
    row_function: RowFunction,
    *,
    keep: Tensor | None = None,
    bounds: Iterable[tuple[int, int]] | None = None,
) -> tuple[dict[str, Tensor], Grads]:
    """1 GEMM, plus one for each of d hidden and d weight that is needed.

    ``row_function(z, start, stop, overwrite)`` gets a chunk's logits, returns statistics per row and, where
    ``overwrite``, leaves d logits in their place.

    With ``keep`` (from :func:`kept_rows`) only those rows are computed, and start and stop count them: what the row
    function reads per row has gone through :func:`pick`. The other rows' statistics and d hidden are 0, and nothing of
    their hidden states, NaN included, reaches anything. ``bounds`` are the chunks, of at most ``head.chunk`` rows; None is equal ones.
    """
    rows = head.hidden.shape[0] if keep is None else keep.numel()
    with torch.autocast(head.hidden.device.type, enabled=False), torch.no_grad():
        gemms = _gemms(head, needs, keep)
        parts: list[dict[str, Tensor]] = []
        for start, stop in chunks(rows, head.chunk) if bounds is None else bounds:
            z = gemms.logits(start, stop)
            parts.append(row_function(z, start, stop, bool(needs)))
            if needs:
                gemms.gradients(z, start, stop)
        if not parts:  # no rows at all
            parts.append(row_function(gemms.buffer[:0], 0, 0, False))
        out = {
            name: torch.cat([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]
            for name in parts[0]
        }
        return spread_all(out, keep, head.hidden.shape[0]), gemms.finish()


def spread_all(out: dict[str, Tensor], keep: Tensor | None, rows: int) -> dict[str, Tensor]:
    """Statistics of the kept rows as those of all rows, 0 for the others."""
    if keep is None:
        return out
    return {name: x.new_zeros((rows, *x.shape[1:])).index_copy_(0, keep, x) for name, x in out.items()}


def backward(head: Head, needs: Needs, rows: Any, given: Given, keep: Tensor | None) -> Grads:
    """Of what :meth:`Given.pick` kept. Recomputes the logits: 1 GEMM, plus one for each of d hidden and d weight."""

    def row_function(z: Tensor, start: int, stop: int, overwrite: bool) -> dict[str, Tensor]:
        k, w = given.k.rows(start, stop), given.w
        rows.row_grad(
            z,
            None if given.target is None else given.target[start:stop],
            ignore_index=given.ignore_index,
            bias=head.bias,
            scale=given.scale,
            softcap=given.softcap,
            lse=given.lse[start:stop],
            a=k.a,
            b=k.b,
            c=k.c,
            d=k.d,
            w=w if w is None or w.dim() == 1 else w[start:stop],
            out=z,
        )
        return {}

    return run(head, needs, row_function, keep=keep)[1]


def gemm_count(needs: Needs, recompute: bool) -> int:
    """GEMMs of a step, forward and backward together."""
    return 1 + recompute + needs.hidden + needs.weight
