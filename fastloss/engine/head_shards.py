"""The head's pass where every process of a group has some columns of the logits: the interface of engine/head.py around it.

A loss does not know of it: it gets the statistics of whole rows, and its coefficients go to this shard's columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss.engine import failures
from fastloss.engine import shards as cut
from fastloss.engine.argmax import row_statistics
from fastloss.engine.coefficients import Coefficients, of_cross_entropy
from fastloss.engine.contract import Backend, Factor
from fastloss.engine.head_blocks import BlockPart, VocabularyBlocks
from fastloss.engine.head_rows import RowChunks
from fastloss.engine.head_types import NOTHING, Grads, Head, Needs, join_bias
from fastloss.engine.selection import Selection, Taken, select, take, write_gradient
from fastloss.engine.shards import Shards
from fastloss.tables import ACC_DTYPES, ARGMAX, LSE_PARTS, CrossEntropyOptions, RowOptions

# Rows of logits that are copied at a time where they may not be changed.
COPIED = 64


class ShardedRun:
    """A pass over this shard's columns, whose parts exchange statistics and whose d hidden is summed over the group."""

    def __init__(self, run: RowChunks | VocabularyBlocks | EmptyShard, shards: Shards, by_rows: bool):
        """``by_rows``: the schedule is chunks of rows, on every process."""
        self.run, self.shards = run, shards
        self.head, self.needs, self.keep = run.head, run.needs, run.keep
        self.rows, self.all_rows = run.rows, run.all_rows
        self.sums: list[
            Any
        ] = []  # all-reduces of the chunks' d hidden, which go on beside the next chunk's GEMMs
        # What every process finds the same: a chunk's rows lie together, and its d hidden has one dtype everywhere.
        same = self.head.dtype == self.head.hidden.dtype
        together = by_rows and self.keep is None and self.rows > 0
        self.early = together and same and self.needs.hidden and shards.reduce_hidden

    def parts(self) -> Iterator[ShardedPart]:
        for part in self.run.parts():
            yield ShardedPart(self, part)

    def begin_sum(self, start: int, stop: int) -> None:
        """Starts the sum over the group of the d hidden of a finished chunk."""
        run = self.run
        if self.early and stop > start:
            d_hidden = run.gemms.d_hidden if isinstance(run, RowChunks) else run.grads().hidden
            assert d_hidden is not None
            self.sums.append(dist.all_reduce(d_hidden[start:stop], group=self.shards.group, async_op=True))

    def grads(self) -> Grads:
        grads = self.run.grads()
        with failures.named(self.shards.group):
            for sum_ in self.sums:
                sum_.wait()
        if grads.hidden is None or self.early or not self.shards.reduce_hidden:
            return grads
        return grads._replace(hidden=self.shards.add_up(grads.hidden.to(self.head.hidden.dtype)))


class ShardedPart:
    """Some rows of it."""

    def __init__(self, run: Any, part: Any):
        """``run``: a ShardedRun, or what has its ``needs``, ``shards`` and ``begin_sum``; ``part``: of this shard's columns."""
        self.run, self.part, self.shards = run, part, run.shards

    def of(self, per_row: Tensor | None) -> Tensor | None:
        """This part's entries of a tensor that has one for each computed row."""
        return self.part.of(per_row)

    def stats(self, target: Tensor | None, options: RowOptions, want: Sequence[str]) -> dict[str, Tensor]:
        """Those of whole rows: one all-gather."""
        local, _ = self.shards.local(target, options.ignore_index)
        out = self.part.stats(local, cut.local_options(options), cut.needed(want))
        out[LSE_PARTS] = self._share(out[LSE_PARTS])
        if ARGMAX in out:
            out[ARGMAX] = out[ARGMAX] + self.shards.first  # a class of the whole vocabulary
        whole = cut.exchange(self.shards, out, target, options.ignore_index)
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
        """Losses of whole rows, each times its entry of ``row_factors``; the gradients of their sum times ``factor`` are made on the
        way. ``w``: the weights of all classes, or None; without targets this shard's columns of the weighted probabilities."""
        if target is None:
            return self._of_probabilities(options, w, factor, want, row_factors)
        shards = self.shards
        names = tuple(dict.fromkeys((*want, "logprobs", LSE_PARTS)))
        smoothing = options.label_smoothing
        if smoothing:
            assert not isinstance(self.part, BlockPart)
            local, _ = shards.local(target, options.ignore_index)
            whole_row = replace(options, label_smoothing=1.0, z_loss=0.0, ignore_index=cut.NO_TARGET)
            out = self.part.distances(local, whole_row, shards.columns(w), cut.needed(names))
            out[LSE_PARTS] = self._share(out[LSE_PARTS])
            out["distance"] = out["distance"] * shards.own
            bounds = zip(shards.starts[:-1], shards.starts[1:], strict=True)
            sums = shards.sizes if w is None else [w[a:b].sum() for a, b in bounds]
            stats = cut.exchange(shards, out, target, options.ignore_index, sums)
        else:
            stats = self.stats(target, options, names)
        loss = cut.cross_entropy(stats, target, w, shards.vocab, options)
        if self.run.needs and loss.shape[0]:
            upstream = cut.upstream_of(loss, factor, row_factors)
            k = of_cross_entropy(upstream, stats[LSE_PARTS], target, w, shards.vocab, options)
            self.gradients(target, options, stats[LSE_PARTS], k, w)
        return {
            **{name: stats[name] for name in names},
            "loss": loss if row_factors is None else loss * row_factors,
        }

    def _of_probabilities(
        self,
        options: CrossEntropyOptions,
        w: Tensor | None,
        factor: Factor,
        want: Sequence[str],
        row_factors: Tensor | None,
    ) -> dict[str, Tensor]:
        """``w`` has all rows. "mass" is Σ w_v of each row."""
        assert w is not None and not isinstance(self.part, BlockPart)
        names = tuple(dict.fromkeys((*want, LSE_PARTS)))
        plain = replace(options, label_smoothing=0.0, z_loss=0.0)
        out = self.part.distances(None, plain, w, cut.needed(names))
        out[LSE_PARTS] = self._share(out[LSE_PARTS])
        rows = out["distance"].shape[0]
        own = w if isinstance(self.part, Columns) else w[self.part.start : self.part.stop]
        out["mass"] = own.sum(-1).to(out["distance"].dtype)
        stats = cut.exchange(self.shards, out, None, options.ignore_index)
        loss = stats["distance"]
        if options.z_loss:
            loss = loss + options.z_loss * stats[LSE_PARTS].sum(-1).square()
        if self.run.needs and rows:
            k = of_cross_entropy(
                cut.upstream_of(loss, factor, row_factors), stats[LSE_PARTS], None, w, self.shards.vocab, options, stats["mass"]
            )  # fmt: skip
            self.gradients(None, options, stats[LSE_PARTS], k, w)
        return {
            **{name: stats[name] for name in (*names, "mass")},
            "loss": loss if row_factors is None else loss * row_factors,
        }

    def gradients(
        self,
        target: Tensor | None,
        options: RowOptions,
        lse_parts: Tensor,
        coefficients: Coefficients,
        w: Tensor | None = None,
    ) -> None:
        """Adds this shard's gradients of these rows."""
        local, mine = self.shards.local(target, options.ignore_index)
        k = coefficients
        if mine is not None and k.a is not None:
            k = k._replace(a=torch.where(mine, k.a, 0.0))
        own = w if w is not None and w.dim() == 2 else self.shards.columns(w)
        self.part.gradients(local, cut.local_options(options), lse_parts, k, own)
        self._begin_sum()

    def _share(self, parts: Tensor) -> Tensor:
        """This shard's lse_parts, where a mask or a bias made all its logits -inf."""
        part = self.part
        if isinstance(part, Columns):
            return cut.without_share(parts, lambda: (part.logits == -torch.inf).all(1))
        bias = None if isinstance(part, EmptyPart) else self.run.head.bias
        return parts if bias is None else cut.without_share(parts, lambda: (bias == -torch.inf).all())

    def _begin_sum(self) -> None:
        if not isinstance(self.part, BlockPart):
            self.run.begin_sum(self.part.start, self.part.stop)

    # What a loss does with the logits themselves: engine/distillation.py.

    @property
    def logits(self) -> Tensor:
        """This shard's columns."""
        logits: Tensor = self.part.logits
        return logits

    def add_gradients(self) -> None:
        """Adds to the head's gradients from d logits, which have been written over this shard's columns."""
        self.part.add_gradients()
        self._begin_sum()

    # A few classes of each row: engine/topk.py.

    def take(self, mark: Tensor, options: RowOptions, selection: Selection) -> Taken:
        """The selected logits of whole rows, and the lse_parts of all their other classes: a sum of K numbers a token, each of which
        one process has, and an all-gather of 2."""
        local = self._own(selection)
        own = self.part.take(mark, options, local)
        z = self.shards.from_owner(local.spread(own.z), self.shards.has(selection.ids))
        return Taken(z, cut.join_parts(self.shards.gather(self._share(own.rest).contiguous())))

    def selected_gradients(
        self,
        mark: Tensor,
        options: RowOptions,
        lse_parts: Tensor,
        b: Tensor,
        selection: Selection,
        given: Tensor,
    ) -> None:
        """Adds this shard's gradients: ``given`` of the selected classes, ``b·p_v`` of the others."""
        local = self._own(selection)
        self.part.selected_gradients(mark, options, lse_parts, b, local, local.sorted(given))
        self._begin_sum()

    def _own(self, selection: Selection) -> Selection:
        """This shard's classes of it, whose entries came from the places of ``selection``'s."""
        return select(self.shards.local_ids(selection.ids), self.shards.own)


class EmptyShard:
    """The pass of a process without classes: its columns add nothing."""

    def __init__(self, head: Head, needs: Needs, keep: Tensor | None, bounds: Sequence[tuple[int, int]]):
        self.head, self.needs, self.keep = head, needs, keep
        self.all_rows = head.hidden.shape[0]
        self.rows = self.all_rows if keep is None else keep.numel()
        self.bounds = list(bounds) or [(0, self.rows)]
        h, acc = head, ACC_DTYPES[head.dtype]
        self.made = Grads(
            torch.zeros_like(h.hidden) if needs.hidden else None,
            torch.zeros(h.weight.shape, dtype=acc, device=h.weight.device) if needs.weight else None,
            self._no_bias(acc) if needs.bias else None,
        )

    def _no_bias(self, acc: torch.dtype) -> Tensor:
        h = self.head
        none = torch.zeros(0, dtype=acc, device=h.weight.device)
        if h.low_rank is None:
            return none
        low_rank = none.new_zeros(h.low_rank.shape)
        out = join_bias(low_rank, None if h.bias is None else none)
        assert out is not None
        return out

    def parts(self) -> Iterator[EmptyPart]:
        for start, stop in self.bounds:
            yield EmptyPart(self, start, stop)

    def grads(self) -> Grads:
        return self.made


class EmptyPart:
    def __init__(self, run: EmptyShard, start: int, stop: int):
        self.run, self.start, self.stop = run, start, stop

    def of(self, per_row: Tensor | None) -> Tensor | None:
        return None if per_row is None else per_row[self.start : self.stop]

    def stats(self, target: Tensor | None, options: RowOptions, want: Sequence[str]) -> dict[str, Tensor]:
        hidden = self.run.head.hidden
        return cut.neutral(self.stop - self.start, want, ACC_DTYPES[self.run.head.dtype], hidden.device)

    def distances(
        self, target: Tensor | None, options: CrossEntropyOptions, w: Tensor | None, want: Sequence[str]
    ) -> dict[str, Tensor]:
        return self.stats(target, options, (*want, "distance"))

    @property
    def logits(self) -> Tensor:
        h = self.run.head
        return torch.zeros((self.stop - self.start, 0), dtype=h.dtype, device=h.hidden.device)

    def take(self, mark: Tensor, options: RowOptions, selection: Selection) -> Taken:
        return _nothing_taken(selection, ACC_DTYPES[self.run.head.dtype])

    def gradients(self, *_: Any) -> None:
        return None

    def selected_gradients(self, *_: Any) -> None:
        return None

    def add_gradients(self) -> None:
        return None


def _nothing_taken(selection: Selection, acc: torch.dtype) -> Taken:
    rows, device = selection.ids.shape[0], selection.ids.device
    return Taken(
        torch.zeros(selection.ids.shape, dtype=acc, device=device),
        torch.full((rows, 2), -torch.inf, dtype=acc, device=device),
    )


class Columns:
    """This process's columns of all rows, as a part of a head's pass."""

    start = stop = 0

    def __init__(self, logits: Tensor, backend: Backend, out: Tensor | None = None):
        self.logits, self.backend, self.out = logits, backend, out

    def of(self, per_row: Tensor | None) -> Tensor | None:
        return per_row

    def _nothing(self, want: Sequence[str]) -> dict[str, Tensor]:
        return cut.neutral(self.logits.shape[0], want, ACC_DTYPES[self.logits.dtype], self.logits.device)

    def stats(self, target: Tensor | None, options: RowOptions, want: Sequence[str]) -> dict[str, Tensor]:
        if not self.logits.shape[1]:
            return self._nothing(want)
        return row_statistics(self.backend, self.logits, target, options, want)

    def distances(
        self, target: Tensor | None, options: CrossEntropyOptions, w: Tensor | None, want: Sequence[str]
    ) -> dict[str, Tensor]:
        if not self.logits.shape[1]:
            return self._nothing((*want, "distance"))
        out = self.backend.row_cross_entropy(self.logits, target, options, want=want, w=w)
        out["distance"] = out.pop("loss")
        return out

    def gradients(
        self, target: Tensor | None, options: RowOptions, lse_parts: Tensor, k: Coefficients, w: Tensor | None
    ) -> None:
        assert self.out is not None
        if self.logits.shape[1]:
            self.backend.row_grad(
                self.logits, target, options, lse_parts=lse_parts, coefficients=k, out=self.out, w=w
            )

    def take(self, mark: Tensor, options: RowOptions, selection: Selection) -> Taken:
        """From copies of a few rows at a time: the logits stay as they are."""
        if not self.logits.shape[1]:
            return _nothing_taken(selection, ACC_DTYPES[self.logits.dtype])
        taken = []
        for start in range(0, max(1, self.logits.shape[0]), COPIED):
            here = slice(start, start + COPIED)
            z = self.logits[here].clone(memory_format=torch.contiguous_format)
            own = Selection(*(x[here] for x in selection))
            taken.append(take(self.backend, z, mark[here], options, own, None))
        return Taken(torch.cat([own.z for own in taken]), torch.cat([own.rest for own in taken]))

    def selected_gradients(
        self,
        mark: Tensor,
        options: RowOptions,
        lse_parts: Tensor,
        b: Tensor,
        selection: Selection,
        given: Tensor,
    ) -> None:
        assert self.out is not None
        if self.logits.shape[1]:
            write_gradient(
                self.backend, self.logits, mark, options, lse_parts, b, selection, given, self.out, None
            )


class _NoSums(NamedTuple):
    """What a part asks of its pass, where logits are given: there are no hidden states whose gradient is a sum over the group."""

    shards: Shards
    needs: Needs = NOTHING

    def begin_sum(self, start: int, stop: int) -> None:
        return None


def of_columns(shards: Shards, logits: Tensor, backend: Backend, out: Tensor | None = None) -> ShardedPart:
    """All rows of given logits, of which this process has some columns; ``out`` is where their gradient goes."""
    return ShardedPart(_NoSums(shards), Columns(logits, backend, out))
