"""The linear head over blocks of the vocabulary with the library's GEMMs and the row kernels: ``memory="low"`` on a GPU.

Pass 1 makes a block's logits of all rows, and the row kernel's statistics of that block; those of the whole rows follow from all
blocks', as from the shards of a cut vocabulary (engine/shards.py). Pass 2 turns a block's logits into their gradient and multiplies
it into d hidden and into that block of d weight, which is final: no accumulator over the vocabulary. Until then the block of d
weight holds the block's logits of as many rows as fit, D in bfloat16; those of the other rows are made again: 3 GEMMs up to D rows,
3.5 at 2 D. What is held besides is one block of logits, and half of d hidden's sums in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastloss.engine import devices, invariance
from fastloss.engine import shards as cut
from fastloss.engine.argmax import row_statistics
from fastloss.engine.autograd import new_gradient
from fastloss.engine.coefficients import Coefficients, of_cross_entropy
from fastloss.engine.contract import Factor
from fastloss.engine.head_rows import buffer_dtype, weight_dtype
from fastloss.engine.head_types import Grads, Head, Limits, Needs, options_of_part
from fastloss.tables import ACC_DTYPES, ARGMAX, LSE_PARTS, CrossEntropyOptions, Row, RowOptions

# Blocks that a vocabulary is cut into, and the columns that make a block worth a GEMM. Not tuned on a GPU.
BLOCKS, COLUMNS = 32, 256


def width_of(vocab: int) -> int:
    """Columns of a block: about a 32nd of the vocabulary, a multiple of 256."""
    return -(-vocab // (BLOCKS * COLUMNS)) * COLUMNS


def why_not(head: Head, rows: int, needs: Needs, limits: Limits) -> str:
    """Why a pass takes chunks of rows instead."""
    if limits.memory != "low" or limits.chunk_size is not None:
        return 'only memory="low" without a chunk_size asks for it'
    if not devices.is_gpu(head.weight.device) or head.backend.differentiable:
        return "a CPU has blocks of its own, and the definition none"
    if not needs.weight:
        return "without d weight there is no memory to keep logits in"
    if head.shards is not None or head.rank:
        return "the vocabulary is cut, or a LoRA is added"
    if invariance.wanted():
        return "statistics of blocks have other bits than those of whole rows"
    return "" if rows and head.weight.shape[0] > width_of(head.weight.shape[0]) else "one block is the whole"


def kept_rows(head: Head, rows: int, float_logits: bool) -> int:
    """Rows whose logits d weight's memory holds: none of float32 that have no room in low precision."""
    if buffer_dtype(head, float_logits) != head.dtype:
        return 0
    return min(rows, head.weight.shape[1] * weight_dtype(head, 1).itemsize // head.dtype.itemsize)


def gemms(head: Head, rows: int, needs: Needs, float_logits: bool) -> float:
    """Of forward and backward in one pass; a fraction where the logits of some rows are made again."""
    again = 1 - kept_rows(head, rows, float_logits) / max(rows, 1)
    return round(1 + needs.hidden + needs.weight + again, 2)


def buffer_bytes(head: Head, rows: int, needs: Needs, float_logits: bool) -> int:
    """Of a block of logits, and of the sums of d hidden that have no room in its own memory."""
    made = buffer_dtype(head, float_logits)
    block = made.itemsize + (head.dtype.itemsize if made != head.dtype else 0)
    total = rows * min(width_of(head.weight.shape[0]), head.weight.shape[0]) * block
    if needs.hidden and head.dtype.itemsize < 4:
        total += (rows - rows // 2) * head.weight.shape[1] * 4
    return total


class _HiddenSums:
    """d hidden, summed over the blocks in the accumulation dtype: in its own memory as far as that goes, half of the rows in low
    precision."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device):
        self.memory = torch.empty((rows, dim), dtype=dtype, device=device)
        acc = ACC_DTYPES[dtype]
        if acc == dtype:
            self.sums = [self.memory]
        else:
            first = rows // 2
            own = self.memory.view(-1)[: 2 * first * dim].view(acc).view(first, dim)
            self.sums = [own, torch.empty((rows - first, dim), dtype=acc, device=device)]
        self.begun = False

    def add(self, z: Tensor, weight: Tensor) -> None:
        start = 0
        for sums in self.sums:
            part = z[start : start + sums.shape[0]]
            start += sums.shape[0]
            if not sums.shape[0]:
                continue
            if not self.begun:
                sums.zero_()
            if sums.dtype == z.dtype:
                torch.addmm(sums, part, weight, out=sums)
            else:
                devices.add_wide(sums, part, weight)
        self.begun = True

    def finish(self) -> Tensor:
        if not self.begun:
            return self.memory.zero_()
        if len(self.sums) == 2:
            own, rest = self.sums
            rounded = own.to(self.memory.dtype)  # before its place is written to
            self.memory[: own.shape[0]] = rounded
            self.memory[own.shape[0] :] = rest
        return self.memory


class ColumnBlocks:
    """One pass over all rows (the interface of engine/head.py): one part."""

    def __init__(self, head: Head, needs: Needs, keep: Tensor | None, float_logits: bool):
        self.head, self.needs, self.keep, self.float_logits = head, needs, keep, float_logits
        self.all_rows = head.hidden.shape[0]
        self.rows = self.all_rows if keep is None else keep.numel()
        self.multiplied = 0.0  # rows times GEMMs, so far
        hidden = head.hidden.to(head.dtype)
        self.hidden = hidden if keep is None else hidden.index_select(0, keep)
        vocab, self.dim = head.weight.shape
        self.width = width_of(vocab)
        shape, device = (self.rows, min(self.width, vocab)), hidden.device
        self.logits_memory = torch.empty(shape, dtype=buffer_dtype(head, float_logits), device=device)
        rounds = self.logits_memory.dtype != head.dtype and bool(needs)
        self.rounded = torch.empty(shape, dtype=head.dtype, device=device) if rounds else None
        self.d_weight: Tensor | None = None
        self.d_hidden: Tensor | None = None
        self.d_bias: Tensor | None = None
        if needs.weight:
            self.d_weight = new_gradient((vocab, self.dim), weight_dtype(head, 1), device)
        self.kept = kept_rows(head, self.rows, float_logits) if needs.weight else 0
        self.holds = False  # d weight's memory holds logits

    def parts(self) -> Iterator[ColumnPart]:
        yield ColumnPart(self)

    def blocks(self) -> Iterator[tuple[int, int]]:
        vocab = self.head.weight.shape[0]
        for start in range(0, vocab, self.width):
            yield start, min(start + self.width, vocab)

    def multiply(self, first: int, last: int, start: int, stop: int, out: Tensor) -> None:
        """Logits of rows [start, stop) and columns [first, last)."""
        weight = self.head.weight[first:last].to(self.head.dtype).t()
        if out.dtype == weight.dtype:
            torch.mm(self.hidden[start:stop], weight, out=out)
        else:
            devices.multiply_wide(out, self.hidden[start:stop], weight)

    def kept_logits(self, first: int, last: int) -> Tensor:
        """The place in d weight's memory of the kept rows' logits of a block."""
        assert self.d_weight is not None
        memory = self.d_weight[first:last].view(-1).view(self.head.dtype)
        return memory[: self.kept * (last - first)].view(self.kept, last - first)

    def grads(self) -> Grads:
        needs, device = self.needs, self.hidden.device
        if needs.hidden and self.d_hidden is None:
            self.d_hidden = torch.zeros((self.rows, self.dim), dtype=self.head.dtype, device=device)
        if needs.bias and self.d_bias is None:
            acc = ACC_DTYPES[self.head.dtype]
            self.d_bias = torch.zeros(self.head.weight.shape[0], dtype=acc, device=device)
        if self.d_weight is not None and self.holds:  # no gradient was made of what it holds
            self.d_weight.zero_()
        d_hidden = self.d_hidden
        if d_hidden is not None and self.keep is not None:
            d_hidden = d_hidden.new_zeros((self.all_rows, self.dim)).index_copy_(0, self.keep, d_hidden)
        return Grads(d_hidden, self.d_weight, self.d_bias)


class ColumnPart:
    """All rows of a pass."""

    def __init__(self, run: ColumnBlocks):
        self.run, self.start, self.stop = run, 0, run.rows
        run.holds = run.d_weight is not None  # memory that nobody has written to

    def of(self, per_row: Tensor | None) -> Tensor | None:
        """This part's entries of a tensor that has one for each computed row."""
        return per_row

    def own(self, options: Row) -> Row:
        return options_of_part(options, self.run.keep, self.start, self.stop)

    def stats(self, target: Tensor | None, options: RowOptions, want: Sequence[str]) -> dict[str, Tensor]:
        """Pass 1: statistics of each block of columns, and of all. What d weight's memory holds is kept."""
        run, head = self.run, self.run.head
        vocab, names = head.weight.shape[0], cut.needed(want)
        own = cut.local_options(self.own(options))
        found: list[dict[str, Tensor]] = []
        for first, last in run.blocks():
            local, bias = _local(target, options, vocab, first, last), _columns(head.bias, first, last)
            pieces = []
            if run.kept:
                z = run.kept_logits(first, last)
                run.multiply(first, last, 0, run.kept, z)
                pieces.append((0, z))
            if run.kept < run.rows or not run.rows:
                z = run.logits_memory[run.kept :, : last - first]
                run.multiply(first, last, run.kept, run.rows, z)
                pieces.append((run.kept, z))
            parts = []
            for start, z in pieces:
                stop = start + z.shape[0]
                of = _rows(own, start, stop)
                of_target = None if local is None else local[start:stop]
                parts.append(row_statistics(head.backend, z, of_target, of, names, bias))
            out = parts[0] if len(parts) == 1 else {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
            if bias is not None:
                out[LSE_PARTS] = cut.without_share(out[LSE_PARTS], functools.partial(_is_forbidden, bias))
            if ARGMAX in out:
                out[ARGMAX] = out[ARGMAX] + first
            found.append(out)
        run.multiplied += run.rows
        run.holds = run.d_weight is not None
        acc = found[0][LSE_PARTS].dtype
        stacked = {
            n: torch.stack([x[n].to(torch.int64 if n == ARGMAX else acc) for x in found]) for n in found[0]
        }
        owner, ignored = None, None
        if target is not None:
            ignored = target == options.ignore_index
            owner = target.clamp(0, vocab - 1) // run.width
        # Filled there: a list would be copied from the host, which no CUDA graph captures.
        sizes = torch.full((len(found), 1), run.width, dtype=acc, device=run.hidden.device)
        sizes[-1].fill_(vocab - (len(found) - 1) * run.width)
        whole = cut.combine(stacked, sizes, owner, ignored)
        return {name: whole[name] for name in want}

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
        """Of classes, without label smoothing: from the log-probs."""
        assert target is not None and not options.label_smoothing
        vocab = self.run.head.weight.shape[0]
        out = self.stats(target, options, tuple(dict.fromkeys((*want, "logprobs", LSE_PARTS))))
        loss = cut.cross_entropy(out, target, w, vocab, options)
        if self.run.needs and self.run.rows:
            upstream = cut.upstream_of(loss, factor, row_factors)
            k = of_cross_entropy(upstream, out[LSE_PARTS], target, w, vocab, options)
            self.gradients(target, options, out[LSE_PARTS], k)
        loss = loss if row_factors is None else loss * row_factors
        return {name: out[name] for name in dict.fromkeys((*want, LSE_PARTS))} | {"loss": loss}

    def gradients(
        self,
        target: Tensor | None,
        options: RowOptions,
        lse_parts: Tensor,
        coefficients: Coefficients,
        w: Tensor | None = None,
    ) -> None:
        """Pass 2."""
        run, head, needs = self.run, self.run.head, self.run.needs
        if not needs or not run.rows:
            return
        own = cut.local_options(self.own(options))
        kept = run.kept if run.multiplied else 0  # a backward of its own has kept nothing
        vocab, device = head.weight.shape[0], run.hidden.device
        sums = _HiddenSums(run.rows, run.dim, head.dtype, device) if needs.hidden else None
        d_bias = torch.empty(vocab, dtype=ACC_DTYPES[head.dtype], device=device) if needs.bias else None
        for first, last in run.blocks():
            local = _local(target, options, vocab, first, last)
            k = coefficients
            if target is not None and k.a is not None:
                mine = (target >= first) & (target < last)
                k = k._replace(a=torch.where(mine, k.a, 0.0))
            z = run.logits_memory[:, : last - first]
            if kept < run.rows:
                run.multiply(first, last, kept, run.rows, z[kept:])
            pieces = [(0, kept, run.kept_logits(first, last))] if kept else []
            pieces += [(kept, run.rows, z[kept:])] if kept < run.rows else []
            for start, stop, logits in pieces:
                head.backend.row_grad(
                    logits,
                    None if local is None else local[start:stop],
                    _rows(own, start, stop),
                    lse_parts=lse_parts[start:stop],
                    coefficients=k.rows(start, stop),
                    out=z[start:stop],
                    bias=_columns(head.bias, first, last),
                    w=_columns(w, first, last),
                )
            if run.rounded is not None:
                z = run.rounded[:, : last - first].copy_(z)
            if sums is not None:
                sums.add(z, head.weight[first:last].to(head.dtype))
            if run.d_weight is not None:  # what it held has been read
                devices.add_transposed(run.d_weight[first:last], z, run.hidden, accumulate=False)
            if d_bias is not None:
                d_bias[first:last] = z.sum(0, dtype=d_bias.dtype)
        again = 1 - kept / run.rows
        run.multiplied += run.rows * (again + needs.hidden + needs.weight)
        run.holds = False
        run.logits_memory = run.logits_memory[:0].clone()  # the sums' rounding takes its place
        run.d_hidden = None if sums is None else sums.finish()
        run.d_bias = d_bias


def _rows(options: Row, start: int, stop: int) -> Row:
    return options.of_rows(lambda x: x[start:stop])


def _is_forbidden(bias: Tensor) -> Tensor:
    """Whether a bias makes all logits of a block -inf."""
    return (bias == -torch.inf).all()


def _columns(per_class: Tensor | None, first: int, last: int) -> Tensor | None:
    """A block's part of one number per class, of all rows or of each."""
    return None if per_class is None else per_class[..., first:last].contiguous()


def _local(target: Tensor | None, options: RowOptions, vocab: int, first: int, last: int) -> Tensor | None:
    """Each target as a class of the block: 0 where another block has it, one past the end where none has, and is bad to the kernel."""
    if target is None:
        return None
    mine = (target >= first) & (target < last)
    bad = (target < 0) | (target >= vocab)
    local = torch.where(mine, target - first, 0).masked_fill(bad, last - first)
    return local.masked_fill(target == options.ignore_index, cut.NO_TARGET)
