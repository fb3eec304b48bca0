"""The linear head over blocks of the vocabulary, all rows at once, in one native call (csrc/cpu/head.h).

Pass 1 makes the logits a block at a time and keeps the sums that the loss needs. Pass 2 turns each block into its d logits,
finishes that block of d weight over all rows – no accumulator, no rounding between chunks – and adds to d hidden. Until d
weight's own memory is written, it holds the logits of the first D rows; those of the others are made again. Logits are float32;
only those that are kept have the weight's dtype, relative to the largest of 256. So the extra
memory is a few blocks, and d hidden in float32 where it has another dtype; the GEMMs are 3 up to D rows, 3.5 at 2 D.

With a frozen weight one pass is enough, in 2 GEMMs and whatever the rows: exp(logits) times the weight is summed relative to
the largest logit so far, as in flash attention (Dao et al. 2022, arXiv:2205.14135). Where a row's coefficients are known only
after the forward (a loss per row, log-probs and entropy with gradients) the backward makes the logits again: 4 GEMMs.

With ``skip`` cross-entropy's pass 2 leaves out most of the blocks that have the least of a row's probability (docs/skip.md). The classes then go by in the order of their mean logits, so that most rows leave out the same blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine import calibration, skipping
from fastloss.engine.autograd import new_gradient
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import Backend, Factor
from fastloss.engine.gate import address, of_made
from fastloss.engine.head_rows import upcasts
from fastloss.engine.head_types import Grads, Head, Needs, options_of_part
from fastloss.engine.native import NativeBackend, supports_gemm_bf16
from fastloss.engine.selection import Ranked, Taken
from fastloss.tables import ARGMAX, DTYPE_CODES, LSE_PARTS, CrossEntropyOptions, Row, RowOptions

ENABLED = os.environ.get("FASTLOSS_VOCABULARY_BLOCKS", "1") != "0"
# Columns of a block at most: the threads share a block of all rows' d logits.
WIDTH = 256
# Weights of a block at most.
CACHED = 1 << 18
# Rows over D from which making their logits again costs more than memory for them is worth.
RECOMPUTE_UP_TO = 2
# Rows of a part whose logits are kept with a frozen weight, where statistics other than log-probs are differentiated.
KEPT_FROZEN = 256
# One of how many rows has its logits kept, beside D of them, where parts of the rows are added up.
KEPT_SHARE = 25
# Rows whose logits could be made again in the time that one more part takes (by a Zen 4's bfloat16; a float32 part costs less).
ROWS_OF_A_SUM = 256


def why_not(backend: Backend, dtype: torch.dtype, weight: Tensor) -> str:
    """Why any call goes through chunks of rows instead; empty if it may go through here. The number of rows is no reason: a
    token's log-probability has the same bits alone and in any batch."""
    if not isinstance(backend, NativeBackend) or not backend.has_head:
        return "the backend has no kernels for blocks of the vocabulary"
    if not ENABLED:
        return "FASTLOSS_VOCABULARY_BLOCKS=0"
    if dtype not in (torch.float32, torch.bfloat16) or weight.dtype not in (torch.float32, torch.bfloat16):
        return "the dtype"
    if weight.shape[1] == 0:
        return "hidden states of width 0"
    if not multiplies_floats(weight, dtype):
        if not (supports_gemm_bf16() or backend.module.supports_tiles()):
            return "oneDNN multiplies bfloat16 faster than float32"
        if weight.dtype != dtype or weight.shape[1] % 2:
            return "bfloat16 is multiplied in pairs along D, and d weight has the logits' dtype"
    if weight.stride(1) != 1:
        return "the weight's layout"
    schedule, says = calibration.faster(dtype)
    return "" if schedule == calibration.BLOCKS else says


def why_not_cross_entropy(needs: Needs, per_row: bool, smooth: bool) -> str:
    """The same of cross-entropy. ``smooth``: every token of the vocabulary is a target, by smoothing or as a probability."""
    if not needs or (per_row and (needs.weight or needs.bias)):
        return ""  # a forward alone, perhaps a backward alone later
    if not needs.weight:
        if needs.bias:
            return "the bias's gradient is made with the weight's"
        return "label smoothing or class probabilities with a frozen weight" if smooth else ""
    return ""


def why_not_skip(head: Head, needs: Needs, per_row: bool, smooth: bool) -> str:
    """Why cross-entropy's gradients over blocks of the vocabulary leave nothing out; empty if they may."""
    if head.shards is not None:
        return "a vocabulary that is cut"
    if not needs:
        return "no gradient is wanted"
    if per_row or not needs.weight:
        return "a loss per row" if per_row else "a frozen weight"
    if smooth:
        return "label smoothing or class probabilities"
    assert isinstance(head.backend, NativeBackend)
    segment = head.backend.module.HEAD_SEGMENT
    return f"at most {segment} classes" if head.weight.shape[0] <= segment else ""


def what_is_skipped(skip: float) -> str:
    return f"gradients err by up to {skip:g} of each token's coefficient"


# Rows whose mean says in which order the classes go by.
ORDERING_ROWS = 256


def order_of(head: Head, keep: Tensor | None) -> Tensor:
    """The classes by the mean of their logits, the largest first: without the soft-cap and the temperature, which keep most of the order."""
    rows = head.hidden.shape[0] if keep is None else keep.numel()
    step = -(-rows // ORDERING_ROWS)
    some = head.hidden[::step] if keep is None else head.hidden.index_select(0, keep[::step])
    mean = some.float().mean(0)
    z = torch.mv(head.weight, mean.to(head.weight.dtype))
    if head.bias is not None:
        z = z + head.bias
    return z.argsort(descending=True, stable=True)


def inverse(order: Tensor) -> Tensor:
    """Where each class is in ``order``."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return place


def multiplies_floats(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether operands become float32: that is what they are, or what this CPU multiplies faster."""
    return dtype == torch.float32 or upcasts(weight.device, dtype)


def gemms(needs: Needs, rows: int, dim: int, more: int = 0) -> float:
    """GEMMs of forward and backward in one part; a fraction where the logits of some rows are made again."""
    again = max(0, rows - dim - more) / max(rows, 1) if needs.weight else 0
    return round(1 + needs.hidden + needs.weight + again, 2)


class Parts(NamedTuple):
    """How many rows go together, and the rows past the first D of them whose logits are kept in memory of their own."""

    rows: int
    more: int = 0


def further_rows(weight: Tensor) -> int:
    """Rows whose logits are as large as a float32 gradient of the weight."""
    return weight.shape[1] * (torch.float32.itemsize // weight.dtype.itemsize)


def parts_of(head: Head, rows: int, needs: Needs, memory: str, logprobs_only: bool) -> Parts:
    """The parts of a pass whose gradients follow on its statistics. "low": all rows in one, the logits past the first D rows
    made again. "fast": 3 GEMMs, for memory of a float32 gradient of the weight and 5% of the logits at most: further logits are
    kept, some are made again, or parts of D rows and some are added up. "auto" makes up to D rows of logits again, and takes "fast" from there."""
    if not needs.weight:
        keeps = bool(needs) and not (logprobs_only and needs == Needs(True, False, False))
        return Parts(min(rows, KEPT_FROZEN), KEPT_FROZEN) if keeps and memory != "low" else Parts(rows)
    dim = head.weight.shape[1]
    further = further_rows(head.weight)
    if memory == "low" or rows <= dim or (memory == "auto" and rows <= RECOMPUTE_UP_TO * dim):
        return Parts(rows)
    share = rows // KEPT_SHARE
    most = dim + further + share
    # Few parts: each adds to all of d weight, and packs all of the weight again.
    count = -(-rows // (dim + share))
    if rows - most <= (count - 1) * ROWS_OF_A_SUM:
        return Parts(rows, min(rows, most) - dim)
    part = -(-rows // count)
    return Parts(part, max(0, part - dim))


def block_width(backend: NativeBackend, vocab: int, dim: int, skip: float = 0.0) -> int:
    """Columns of a block, which the threads share: at most 2% of the logits, and weights of it, packed twice, that stay in a
    core's cache, where that is not too narrow. With ``skip`` that of the sums which are known of each row."""
    if skip:
        return int(backend.module.HEAD_SEGMENT)
    panel: int = backend.module.head_panel()
    width = max(64, min(WIDTH, vocab // 64, max(128, CACHED // dim)))
    return -(-min(width, vocab) // panel) * panel


def buffer_bytes(backend: NativeBackend, rows: int, weight: Tensor, needs: Needs, skip: float = 0.0) -> int:
    """Of a block of logits."""
    width = block_width(backend, weight.shape[0], weight.shape[1], skip)
    if needs.weight or needs.bias:
        return rows * width * weight.dtype.itemsize
    stripe = min(rows, backend.module.HEAD_STRIPE)
    return stripe * width * weight.dtype.itemsize * torch.get_num_threads()


def origins_shape(backend: NativeBackend, vocab: int, kept: int) -> tuple[int, int]:
    """Of the numbers that the ``kept`` rows' bfloat16 logits are relative to: one for each segment of the vocabulary."""
    return -(-vocab // backend.module.HEAD_SEGMENT), kept


def mass_bytes(backend: NativeBackend, vocab: int, rows: int) -> int:
    segments, rows = origins_shape(backend, vocab, rows)
    return segments * rows * torch.float32.itemsize


def origins_bytes(backend: NativeBackend, weight: Tensor, kept: int) -> int:
    if weight.dtype != torch.bfloat16:
        return 0
    segments, rows = origins_shape(backend, weight.shape[0], kept)
    return segments * rows * torch.float32.itemsize


class VocabularyBlocks:
    """One pass (the interface of engine/head.py): all rows in one part, or, with ``bounds``, several, whose d weight is added up
    in float32, and rounded once."""

    def __init__(
        self,
        head: Head,
        needs: Needs,
        keep: Tensor | None,
        bounds: Sequence[tuple[int, int]] = (),
        more: int = 0,
        logprobs_only: bool = False,
        skip: float = 0.0,
    ):
        """``more``: rows of a part, past those that fit into d weight's memory, whose logits are kept in memory of their own.
        ``logprobs_only``: the coefficients will be those of log-probs, ``a = -b``. ``skip``: :func:`why_not_skip` is empty."""
        assert isinstance(head.backend, NativeBackend)
        self.head, self.needs, self.keep = head, needs, keep
        self.all_rows = head.hidden.shape[0]
        self.rows = self.all_rows if keep is None else keep.numel()
        self.bounds = bounds if len(bounds) > 1 else [(0, self.rows)]
        self.more, self.logprobs_only, self.skip = more, logprobs_only, skip
        self.order = order_of(head, keep) if skip and self.rows else None
        self.made = Grads(None, None, None)
        self.multiplied = 0.0  # rows times GEMMs, so far
        self.weight_memory: Tensor | None = None  # d weight of one part after the other

    def parts(self) -> Iterator[BlockPart]:
        if len(self.bounds) == 1:
            part = BlockPart(self, self.head, self.keep, 0, self.rows)
            yield part
            self.made = part.gradients_or_zeros()
            return
        self._begin_sums()
        for start, stop in self.bounds:
            hidden = self.head.hidden
            rows = hidden[start:stop] if self.keep is None else hidden.index_select(0, self.keep[start:stop])
            part = BlockPart(self, self.head._replace(hidden=rows), None, start, stop)
            yield part
            self._add(part)
        self._end_sums()

    def grads(self) -> Grads:
        return self.made

    def _begin_sums(self) -> None:
        h, needs, device = self.head, self.needs, self.head.hidden.device
        shape = (self.all_rows, h.weight.shape[1])
        new = torch.empty if self.keep is None else torch.zeros
        self.made = Grads(
            new(shape, dtype=h.hidden.dtype, device=device) if needs.hidden else None,
            new_gradient(h.weight.shape, torch.float32, device) if needs.weight else None,
            torch.zeros(h.weight.shape[0], dtype=torch.float32, device=device) if needs.bias else None,
        )

    def _end_sums(self) -> None:
        """d weight in its own dtype, in the memory that the parts had theirs in."""
        total = self.made.weight
        if total is None or self.weight_memory is None:
            return
        if total.dtype != self.weight_memory.dtype:
            self.made = self.made._replace(weight=self.weight_memory.copy_(total))
        elif self.order is not None:  # the parts' rows were added up as their blocks lie
            place = inverse(self.order)
            self.made = self.made._replace(weight=torch.index_select(total, 0, place, out=self.weight_memory))

    def _add(self, part: BlockPart) -> None:
        total, own = self.made, part.gradients_or_zeros()
        if total.hidden is not None:
            assert own.hidden is not None
            d_hidden = own.hidden.to(total.hidden.dtype)
            if self.keep is None:
                total.hidden[part.start : part.stop] = d_hidden
            else:
                total.hidden.index_copy_(0, self.keep[part.start : part.stop], d_hidden)
        if total.weight is not None and not part.is_summed:
            assert own.weight is not None
            if part.start == 0:
                total.weight.copy_(own.weight)
            else:
                total.weight.add_(own.weight)
        if total.bias is not None:
            assert own.bias is not None
            total.bias.add_(own.bias)


class BlockPart:
    """Rows [start, stop) of a pass. Their statistics come first; the gradients then find the logits that were kept."""

    def __init__(self, run: VocabularyBlocks, head: Head, keep: Tensor | None, start: int, stop: int):
        assert isinstance(head.backend, NativeBackend)
        self.head, self.needs, self.keep, self.native = head, run.needs, keep, head.backend
        self.run, self.start, self.stop = run, start, stop
        self.all_rows, self.rows = head.hidden.shape[0], stop - start
        self.more, self.logprobs_only = run.more, run.logprobs_only
        self.made = Grads(None, None, None)
        self.is_summed = False  # d weight went to the pass's sum already
        self._ahead = False  # d hidden was made with the statistics
        self._kept: _NativeCall | None = None  # of the statistics, where the gradients will go on from it

    def weight_memory(self) -> Tensor:
        """Of d weight: the parts of a pass have theirs in the same place."""
        run, weight = self.run, self.head.weight
        if run.weight_memory is None:
            run.weight_memory = new_gradient(weight.shape, weight.dtype, weight.device)
        return run.weight_memory

    def gradients_or_zeros(self) -> Grads:
        """The gradients; 0 where a loss asked for none (a part without rows)."""
        made, needs, weight = self.made, self.needs, self.head.weight
        if not needs or self.is_summed or any(x is not None for x in made):
            return made
        hidden, device = self.head.hidden, weight.device
        return Grads(
            torch.zeros_like(hidden) if needs.hidden else None,
            torch.zeros(weight.shape, dtype=weight.dtype, device=device) if needs.weight else None,
            torch.zeros(weight.shape[0], dtype=torch.float32, device=device) if needs.bias else None,
        )

    def of(self, per_row: Tensor | None) -> Tensor | None:
        """This part's entries of a tensor that has one for each computed row."""
        return None if per_row is None else per_row[self.start : self.stop]

    def own(self, options: Row) -> Row:
        return options_of_part(options, self.run.keep, self.start, self.stop)

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
        """Losses and statistics of the rows; the gradients of their sum times ``factor`` are made on the way."""
        dim = self.head.weight.shape[1]
        self.run.multiplied += self.rows * gemms(self.needs, self.rows, dim, self.more)
        if w is not None and w.dim() == 2:
            w = w[self.start : self.stop]
        order = self.run.order if self.rows else None
        call = _NativeCall(self, target, w, self.own(options), order=order)
        out = self._outputs(call, (*want, "loss"))
        call.record.set_loss(options)
        call.point_to(token_weight=row_factors)
        call.record.grad_scale = factor.value * (1.0 if factor.tensor is None else float(factor.tensor))
        call.keep_logits(self.more)
        if order is not None:
            call.skip(self.run.skip, keeps_order=len(self.run.bounds) > 1)
        call.execute()
        self.made, self.is_summed = call.gradients(), call.is_summed
        return out

    def stats(self, target: Tensor | None, options: RowOptions, want: Sequence[str]) -> dict[str, Tensor]:
        """Statistics; and with a frozen weight, where only log-probs will be differentiated, their d hidden, as in
        cross-entropy: 2 GEMMs in all."""
        self._ahead = self.needs == Needs(True, False, False) and self.logprobs_only and target is not None
        self.run.multiplied += self.rows * (1 + self._ahead)
        needs = self.needs if self._ahead else Needs(False, self.needs.weight, False)
        call = _NativeCall(self, target, None, self.own(options), needs)
        out = self._outputs(call, want)
        if self._ahead:
            call.record.grad_scale = -1.0  # cross-entropy's loss is -log p
        elif self.needs:
            call.record.stats_only = True
            call.keep_logits(self.more)
        call.execute()
        if self.needs:
            self._kept = call
        return out

    def take(self, mark: Tensor, options: RowOptions, ranked: Ranked, logprobs: bool = False) -> Taken:
        """The selected logits are left out of the rows' sums, unless ``logprobs`` are wanted: those have every function's bits."""
        self.run.multiplied += self.rows
        call = _NativeCall(self, mark, None, self.own(options), Needs(False, self.needs.weight, False))
        parts = self._outputs(call, ())[LSE_PARTS]
        z = torch.zeros(ranked.ids.shape, dtype=torch.float32, device=mark.device)
        log_p = torch.zeros_like(z) if logprobs else None
        call.record.selected_count = z.shape[1]
        call.point_to(selected=ranked.ids)
        call.point_to_made(selected_logits=z, selected_logprobs=log_p)
        if self.needs:
            call.record.stats_only = True
            call.keep_logits(self.more)
            self._kept = call
        call.execute()
        return Taken(z, parts, log_p)

    def selected_gradients(
        self,
        mark: Tensor,
        options: RowOptions,
        lse_parts: Tensor,
        b: Tensor,
        ranked: Ranked,
        given: Tensor,
    ) -> None:
        self.gradients(mark, options, lse_parts, Coefficients(b=b), selected=(ranked.ids, given))

    def _outputs(self, call: _NativeCall, want: Sequence[str]) -> dict[str, Tensor]:
        names = dict.fromkeys(name for name in (*want, LSE_PARTS) if name != ARGMAX)
        out = self.native.empty_stats(self.head.hidden, self.rows, names)
        if ARGMAX in want:
            out[ARGMAX] = torch.zeros(self.rows, dtype=torch.int64, device=self.head.hidden.device)
        call.point_to_made(**out)
        return out

    def gradients(
        self,
        target: Tensor | None,
        options: RowOptions,
        lse_parts: Tensor,
        coefficients: Coefficients,
        w: Tensor | None = None,
        selected: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """From the logits that the statistics kept; the others are made again. ``selected``: classes ``[rows, K]``, ascending, and the
        gradient of their raw logits in place of that of the coefficients."""
        if not self.needs:
            return
        kept, self._kept = self._kept, None
        if kept is not None and self._ahead:
            assert coefficients.a is not None
            self.made = kept.gradients(coefficients.a)
            return
        there = 0 if kept is None else kept.record.stored + kept.record.more
        again = 1 - there / max(self.rows, 1)
        self.run.multiplied += self.rows * (again + self.needs.hidden + self.needs.weight)
        if w is not None and w.dim() == 2:
            w = w[self.start : self.stop]
        call = _NativeCall(self, target, w, self.own(options), kept=kept)
        k = {name: None if x is None else x.contiguous() for name, x in coefficients._asdict().items()}
        call.point_to(given_lse_parts=lse_parts, **k)
        if selected is not None:
            ids, given = selected
            call.record.selected_count = ids.shape[1]
            call.point_to(selected=ids, selected_gradient=given)
        call.execute()
        self.made, self.is_summed = call.gradients(), call.is_summed


class _NativeCall:
    """A native call: the tensors whose addresses it holds, and its gradients."""

    def __init__(
        self,
        run: BlockPart,
        target: Tensor | None,
        w: Tensor | None,
        options: RowOptions,
        needs: Needs | None = None,
        kept: _NativeCall | None = None,
        order: Tensor | None = None,
    ):
        """``needs``: None is the pass's. ``kept``: the call of the statistics, whose d weight holds logits. ``order``: in which the
        classes go by; what belongs to a class is handed over in it, but for the weight."""
        h, self.keep, self.order = run.head, run.keep, order
        bias = h.bias
        if order is not None:
            place = inverse(order)
            target = None if target is None else place[target]
            bias, w = (None if x is None else x[order] for x in (bias, w))
        self.needs = run.needs if needs is None else needs
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
        self._make_gradients(run, hidden, kept)
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
            target=target, bias=bias, row_scale=options.row_scale, w=w, keep=self.keep, hidden=hidden, weight=h.weight,
            order=order,
        )  # fmt: skip
        self.point_to_made(
            d_weight=self.d_weight, d_hidden=self.d_hidden, d_hidden_rest=self.rest, d_bias=self.d_bias
        )
        total = run.run.made.weight if self.d_weight is not None else None
        self.is_summed = total is not None and h.weight.dtype == torch.bfloat16 and self.rows > 0
        if self.is_summed:
            self.point_to_made(d_weight_sum=total)
            c.adds_to_sum = run.start > 0
        if kept is not None:
            c.stored, c.more = kept.record.stored, kept.record.more
            self.point_to_made(more_logits=kept.more_logits, origins=kept.origins)

    def point_to(self, **tensors: Tensor | None) -> None:
        """Tensors that are read."""
        self._point(address, tensors)

    def point_to_made(self, **tensors: Tensor | None) -> None:
        """Tensors that were made here."""
        self._point(of_made, tensors)

    def _point(self, place: Callable[[Tensor], int], tensors: dict[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self.tensors.append(tensor)
                setattr(self.record, name, place(tensor))

    def _make_gradients(self, run: BlockPart, hidden: Tensor, kept: _NativeCall | None) -> None:
        shape, device = (self.all_rows, self.dim), hidden.device
        self.d_weight: Tensor | None = None
        self.more_logits: Tensor | None = None
        self.origins: Tensor | None = None
        if self.needs.weight:
            self.d_weight = run.weight_memory() if kept is None else kept.d_weight
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

    def keep_logits(self, more: int) -> None:
        """Those of the first D rows stay in d weight's memory, and of the next ``more`` in memory of their own."""
        c, weight = self.record, self.operands[1]
        c.stored = min(self.rows, self.dim) if self.needs.weight else 0
        c.more = min(self.rows - c.stored, more)
        if c.more:
            self.more_logits = new_gradient((self.vocab, c.more), weight.dtype, weight.device)
            self.point_to_made(more_logits=self.more_logits)
        if c.stored + c.more and weight.dtype == torch.bfloat16:
            shape = origins_shape(self.native, self.vocab, c.stored + c.more)
            self.origins = torch.empty(shape, dtype=torch.float32, device=weight.device)
            self.point_to_made(origins=self.origins)

    def skip(self, skip: float, keeps_order: bool) -> None:
        shape = origins_shape(self.native, self.vocab, self.rows)
        self.mass = torch.empty(shape, dtype=torch.float32, device=self.operands[0].device)
        self.record.width = block_width(self.native, self.vocab, self.dim, skip)
        self.record.skip, self.record.keeps_order = skip, keeps_order
        self.point_to_made(mass=self.mass)

    def execute(self) -> None:
        if not self.rows:
            for grad in (self.d_hidden, self.d_weight, self.d_bias):
                if grad is not None:
                    grad.zero_()
            return
        c, module, device = self.record, self.native.module, self.operands[0].device
        threads = torch.get_num_threads()
        shape = self.rows, module.ROW_STATE_DOUBLES
        self.point_to_made(state=torch.empty(shape, dtype=torch.float64, device=device))
        scratch = torch.empty(c.workspace_bytes(threads) + 64, dtype=torch.uint8, device=device)
        c.run(-(-of_made(scratch) // 64) * 64, threads)
        if self.order is None:
            return
        rows_of_blocks = (self.mass == module.HEAD_LEFT_OUT).sum(1)
        skipping.count(rows_of_blocks, module.HEAD_SEGMENT, self.vocab, self.rows)
        if self.d_bias is not None:
            self.d_bias = torch.empty_like(self.d_bias).index_copy_(0, self.order, self.d_bias)

    def gradients(self, row_factor: Tensor | None = None) -> Grads:
        """Those of an executed call; d hidden of each row times ``row_factor``."""
        if self.d_hidden is not None and self.rest is not None and self.rows:
            x, split = self.d_hidden, self.split
            if row_factor is not None:
                sums = x.view(-1)[: 2 * split * self.dim].view(torch.float32).view(split, self.dim)
                sums.mul_(row_factor[:split, None])
                self.rest.mul_(row_factor[split:, None])
            # Front to back, so that no sum is overwritten before it is read.
            self.native.convert_in_place(x, split * self.dim, torch.float32)
            x[split : self.rows] = self.rest
            if self.keep is not None:
                dense = x[: self.rows].clone()
                x.zero_().index_copy_(0, self.keep, dense)
        elif self.d_hidden is not None and row_factor is not None and self.rows:
            if self.keep is None:
                self.d_hidden.mul_(row_factor[:, None])
            else:  # of the kept rows, which lie where hidden's do; the others are 0
                factor = row_factor.new_zeros(self.all_rows).index_copy_(0, self.keep, row_factor)
                self.d_hidden.mul_(factor[:, None])
        return Grads(self.d_hidden, None if self.is_summed else self.d_weight, self.d_bias)
