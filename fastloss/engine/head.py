"""The linear head ``hidden @ weight.T + bias`` for every loss: its operands, the schedule of a call, and the two phases.

A loss runs through the parts of a pass over the rows: it asks a part for statistics, makes its own coefficients of them, and
hands these back for the gradients::

    with begin(head, needs, keep, schedule) as run:
        for part in run.parts():
            stats = part.stats(part.of(target), options, want)      # 1 GEMM
            part.gradients(part.of(target), options, stats["lse_parts"], coefficients(stats))   # 1 GEMM each for d hidden, d weight
    grads = run.grads()

Two schedules have this interface, and a loss does not know which one runs: chunks of rows (engine/head_rows.py), whose
logits are in a buffer between the two phases, and blocks of the vocabulary (engine/head_blocks.py), where one part holds all
rows and their logits are never there at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.utils._python_dispatch import _disable_current_modes

from fastloss.engine import checks, devices, head_blocks, head_columns, head_exponentials, invariance
from fastloss.engine.autograd import scale_in_place
from fastloss.engine.checks import ShapeError
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import Backend, Factor
from fastloss.engine.head_blocks import VocabularyBlocks
from fastloss.engine.head_columns import ColumnBlocks
from fastloss.engine.head_exponentials import ExponentialChunks
from fastloss.engine.head_rows import (
    RowChunks,
    accumulator_bytes,
    accumulator_rows,
    buffer_dtype,
    count_gemms,
    default_chunk,
    equal_chunks,
    rounds_gradients,
    row_stride,
    weight_dtype,
)
from fastloss.engine.head_shards import EmptyShard, ShardedRun
from fastloss.engine.head_types import NOTHING, Grads, Head, Limits, Needs, join_bias, split_bias
from fastloss.engine.native import NativeBackend
from fastloss.engine.shards import Call as SharedCall
from fastloss.engine.shards import Shards, of_group
from fastloss.tables import ACC_DTYPES, LSE_PARTS, CrossEntropyOptions, RowOptions


class Part(Protocol):
    """Some rows of a pass. Tensors handed to it have one entry for each of its rows (:meth:`of`)."""

    def of(self, per_row: Tensor | None) -> Tensor | None:
        """This part's entries of a tensor that has one for each computed row."""
        ...

    def stats(self, target: Tensor | None, options: RowOptions, want: Sequence[str]) -> dict[str, Tensor]:
        """The statistics in ``want`` of these rows."""
        ...

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
        """Losses, each times its entry of ``row_factors`` (acc), and statistics; the gradients of the losses' sum times ``factor``
        are made on the way, if any is needed."""
        ...

    def gradients(
        self,
        target: Tensor | None,
        options: RowOptions,
        lse_parts: Tensor,
        coefficients: Coefficients,
        w: Tensor | None = None,
    ) -> None:
        """Adds these rows' gradients to the head's."""
        ...


class Schedule(NamedTuple):
    """How a pass goes through rows and vocabulary. ``chunk``: rows whose logits are in memory at once; 0: blocks of the
    vocabulary, in parts of ``part`` rows (0: all), each of which keeps the logits of its first D rows and of ``more`` others.
    ``float_logits``: a chunk's are float32; those of a block always are. ``columns``: blocks of so many classes with the library's
    GEMMs, all rows (``chunk``) in one part. ``exponentials``: cross-entropy's gradients from scaled exponentials
    (engine/head_exponentials.py), in chunks of rows. ``skip``: by how much of its coefficient
    a row's gradients may err (docs/skip.md); ``exact``: why it is none though that was asked for."""

    chunk: int
    part: int = 0
    more: int = 0
    float_logits: bool = False
    columns: int = 0
    exponentials: bool = False
    skip: float = 0.0
    exact: str = ""

    @property
    def by_vocabulary(self) -> bool:
        return self.chunk == 0

    def details(
        self,
        head: Head,
        rows: int,
        needs: Needs,
        recompute: bool,
        want: Sequence[str] = ("logprobs",),
    ) -> dict[str, Any]:
        """What ``explain`` tells. ``recompute``: the backward makes the logits again. ``want``: statistics that are made."""
        gemms: float = 1 + recompute + needs.hidden + needs.weight
        vocab, dim = head.weight.shape
        sent: dict[str, Any] = {"lora_rank": head.rank} if head.rank else {}
        if invariance.wanted():
            sent["batch_invariant"] = True
        if self.skip or self.exact:
            sent["skip"] = (
                f"not used, exact: {self.exact}" if self.exact else head_blocks.what_is_skipped(self.skip)
            )
        if head.shards is not None:
            sent |= head.shards.details(
                rows, want, ACC_DTYPES[head.dtype], head.hidden if needs.hidden else None
            )
        if self.columns:
            if not recompute:
                gemms = head_columns.gemms(head, rows, needs, self.float_logits)
            return {
                **sent,
                "schedule": "blocks of the vocabulary",
                "gemms": gemms,
                "rows": rows,
                "chunk_rows": rows,
                "chunk_columns": self.columns,
                "logits_dtype": str(buffer_dtype(head, self.float_logits)),
                "buffer_bytes": head_columns.buffer_bytes(head, rows, needs, self.float_logits),
                "accumulator_bytes": accumulator_bytes(head, 1),
            }
        if not self.by_vocabulary:
            chunk = min(self.chunk, rows)
            if self.exponentials:
                sent |= {
                    "row_pass": "scaled exponentials",
                    "scratch_bytes": head_exponentials.scratch_bytes(head, chunk, needs),
                }
            return {
                **sent,
                "schedule": "chunks of rows",
                "gemms": gemms,
                "rows": rows,
                "chunk_rows": chunk,
                "logits_dtype": str(buffer_dtype(head, self.float_logits)),
                "buffer_bytes": buffer_bytes(head, chunk, self.float_logits),
                "accumulator_bytes": accumulator_bytes(head, -(-rows // max(1, chunk))) * needs.weight,
            }
        assert isinstance(head.backend, NativeBackend)
        width = head_blocks.block_width(head.backend, vocab, dim, self.skip)
        part = min(self.part or rows, rows)
        if not recompute:
            gemms = head_blocks.gemms(needs, part, dim, self.more)
        extra = 0
        if needs.weight and not recompute:
            more = max(0, min(self.more, part - dim))
            extra = more * vocab * head.weight.dtype.itemsize
            extra += head_blocks.origins_bytes(head.backend, head.weight, min(part, dim) + more)
            extra += vocab * dim * torch.float32.itemsize if part < rows else 0
            extra += head_blocks.mass_bytes(head.backend, vocab, part) if self.skip else 0
        return {
            **sent,
            "schedule": "blocks of the vocabulary",
            "gemms": gemms,
            "rows": rows,
            "chunk_rows": part,
            "chunk_columns": min(width, vocab),
            "logits_dtype": str(torch.float32),
            "buffer_bytes": extra
            + head_blocks.buffer_bytes(head.backend, part, head.weight, needs, self.skip),
        }


def buffer_bytes(head: Head, rows: int, float_logits: bool = False) -> int:
    """Memory of the logits of ``rows`` rows."""
    itemsize = buffer_dtype(head, float_logits).itemsize
    if rounds_gradients(head, float_logits):
        itemsize += head.dtype.itemsize
    return rows * row_stride(head.weight.shape[0], head.weight.device) * itemsize


def limits_of(
    chunk_size: int | None,
    memory: str,
    group: Any,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    ignore_index: int,
    logits_dtype: torch.dtype | None = None,
    skip: Any = 0.0,
) -> Limits:
    """The checked keywords of a public function."""
    checks.chunk_size_value(chunk_size)
    checks.memory_value(memory)
    checks.logits_dtype_value(logits_dtype)
    float_logits = logits_dtype is not None or invariance.wanted()
    skip = checks.skip_value(skip)
    if group is None:
        return Limits(chunk_size, memory, None, float_logits, skip)
    invariance.refuse("the vocabulary is cut over processes")
    dim = input.shape[-1]
    call = SharedCall(math.prod(input.shape[:-1]), dim, input.dtype, target, ignore_index)
    shards = of_group(group, linear_weight.shape[0], linear_weight.device, call)
    return Limits(chunk_size, memory, shards, float_logits, skip)


def vocab_of(linear_weight: Tensor, limits: Limits) -> int:
    """Classes of the whole vocabulary."""
    return linear_weight.shape[0] if limits.shards is None else limits.shards.vocab


def classes_of(head: Head) -> int:
    """Classes of the whole vocabulary."""
    return head.weight.shape[0] if head.shards is None else head.shards.vocab


def chunked(head: Head, rows: int, needs: Needs, limits: Limits) -> Schedule:
    """The schedule in chunks of rows. "fast": as many as take the memory of a float32 gradient of the weight; "low": a
    quarter of the usual, but all rows at once where that spares an accumulator as large as their logits."""
    if invariance.wanted():
        invariance.refuse(invariance.why_not(head))
    vocab, dim = head.weight.shape
    if head.shards is not None:  # every process of a group takes the same chunks
        vocab = max(head.shards.sizes)
    chunk = limits.chunk_size or default_chunk(rows, vocab, dim, head.dtype, head.weight.device, needs.weight)
    if limits.chunk_size is None and limits.memory == "fast":
        chunk = max(chunk, head_blocks.further_rows(head.weight))
    if limits.chunk_size is None and limits.memory == "low":
        spared = needs.weight and weight_dtype(head, 2) != weight_dtype(head, 1)
        if not (spared and rows <= accumulator_rows(dim, head.dtype)):
            chunk = max(min(chunk, 32), chunk // 4)
    return Schedule(min(chunk, max(rows, 1)), float_logits=limits.float_logits)


def goes_by_vocabulary(head: Head) -> bool:
    """Whether blocks of the vocabulary can take the calls of this head: not with a LoRA, whose product they do not know."""
    if (
        head.hidden.shape[1] != head.weight.shape[1]
    ):  # not by head.rank: torch 2.8 does not trace a NamedTuple's property
        return False
    return head_blocks.why_not(head.backend, head.dtype, head.weight) == ""


def schedule_of(head: Head, rows: int, needs: Needs, limits: Limits) -> Schedule:
    """The schedule of statistics alone, or of a backward whose coefficients are given, over ``rows`` computed rows."""
    if goes_by_vocabulary(head):
        return Schedule(0, min(limits.chunk_size or 0, rows), float_logits=limits.float_logits)
    return in_columns(head, rows, needs, limits) or chunked(head, rows, needs, limits)


def in_columns(head: Head, rows: int, needs: Needs, limits: Limits) -> Schedule | None:
    """The schedule in blocks of the vocabulary with the library's GEMMs, where that is asked for and can be."""
    if head_columns.why_not(head, rows, needs, limits):
        return None
    columns = head_columns.width_of(head.weight.shape[0])
    return Schedule(rows, float_logits=limits.float_logits, columns=columns)


def schedule_of_one_pass(
    head: Head, rows: int, needs: Needs, limits: Limits, logprobs_only: bool = False
) -> Schedule:
    """The schedule of a pass whose gradients follow on its statistics, part by part."""
    if not goes_by_vocabulary(head):
        return in_columns(head, rows, needs, limits) or chunked(head, rows, needs, limits)
    parts = head_blocks.parts_of(head, rows, needs, limits.memory, logprobs_only)
    part = min(parts.rows, limits.chunk_size) if limits.chunk_size else parts.rows
    return Schedule(0, 0 if part >= rows else part, parts.more, limits.float_logits)


def schedule_of_cross_entropy(
    head: Head, rows: int, needs: Needs, limits: Limits, per_row: bool, smooth: bool
) -> Schedule:
    """The schedule of cross-entropy. ``per_row``: the loss of each row is returned; ``smooth``: every token is a target."""
    schedule = _schedule_of_cross_entropy(head, rows, needs, limits, per_row, smooth)
    if not limits.skip:
        return schedule
    why_not = "chunks of rows" if schedule.chunk else head_blocks.why_not_skip(head, needs, per_row, smooth)
    if schedule.columns:
        why_not = "the library's GEMMs"
    return schedule._replace(skip=0.0 if why_not else limits.skip, exact=why_not)


def _schedule_of_cross_entropy(
    head: Head, rows: int, needs: Needs, limits: Limits, per_row: bool, smooth: bool
) -> Schedule:
    why_not = head_blocks.why_not_cross_entropy(needs, per_row, smooth)
    if head.shards is not None and smooth:
        why_not = "label smoothing over a vocabulary that is cut"
    if (
        (why_not or not goes_by_vocabulary(head))
        and not smooth
        and (by_columns := in_columns(head, rows, needs, limits))
    ):
        return by_columns
    if why_not or not goes_by_vocabulary(head):
        return chunked(head, rows, needs, limits)
    if not needs or per_row:
        return schedule_of(head, rows, needs, limits)
    return schedule_of_one_pass(head, rows, needs, limits, logprobs_only=True)


def with_exponentials(
    schedule: Schedule, head: Head, needs: Needs, want: Sequence[str], per_row: bool, smooth: bool
) -> Schedule:
    """A schedule of cross-entropy whose gradients come from scaled exponentials, where that is asked for and can be."""
    if schedule.by_vocabulary or schedule.columns or invariance.wanted():
        return schedule
    if per_row and (needs.weight or needs.bias):  # gradients are made in a backward that knows the rows' sums
        needs = NOTHING
    why_not = head_exponentials.why_not(head, needs, smooth, schedule.float_logits, want)
    return schedule._replace(exponentials=not why_not)


def make_head(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    shards: Shards | None = None,
) -> Head:
    """The operands, detached. ``dtype`` is that of the GEMMs."""
    acc = ACC_DTYPES[dtype]
    low_rank, bias = split_bias(None if bias is None else bias.detach(), hidden.shape[1] - weight.shape[1])
    dense = None if bias is None else bias.to(acc).contiguous()
    return Head(backend, hidden.detach(), weight.detach(), dense, dtype, shards, low_rank)


class _Pass:
    """One pass over the rows; what it computes has no gradient of its own, and autocast changes none of its dtypes."""

    def __init__(self, run: RowChunks | VocabularyBlocks | ColumnBlocks | EmptyShard, by_rows: bool):
        shards = run.head.shards
        self._inner = run
        sharded = shards is not None and not isinstance(run, ColumnBlocks)
        self._run = ShardedRun(run, shards, by_rows) if sharded else run  # type: ignore[arg-type]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Pass:
        run = self._inner
        device = run.head.hidden.device.type
        if isinstance(run, RowChunks):
            count_gemms(run.head, run.rows, 1 + run.needs.hidden + run.needs.weight)
        self._stack.enter_context(_disable_current_modes())
        # Nor does torch.compile trace what is computed here: with the modes gone it would begin with the next frame.
        self._stack.callback(set_eval_frame, set_eval_frame(None))
        self._stack.enter_context(torch.autocast(device, enabled=False))
        self._stack.enter_context(torch.no_grad())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        run = self._inner
        if isinstance(run, (VocabularyBlocks, ColumnBlocks)):
            count_gemms(run.head, run.rows, run.multiplied / max(1, run.rows))

    def parts(self) -> Iterator[Any]:
        return iter(self._run.parts())

    def collect(
        self, outs: list[dict[str, Tensor]], computed: Sequence[str] = (), without: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """The parts' statistics as those of all rows, 0 for the rows that were left out; ``computed`` are of the others alone."""
        run = self._run
        out = {name: x for name, x in outs[0].items() if name not in without}
        if len(outs) > 1:
            out = {name: torch.cat([part[name] for part in outs]) for name in out}
        if run.keep is None:
            return out
        return {
            name: x
            if name in computed
            else x.new_zeros((run.all_rows, *x.shape[1:])).index_copy_(0, run.keep, x)
            for name, x in out.items()
        }

    def grads(self) -> Grads:
        return self._run.grads()


def begin(
    head: Head,
    needs: Needs,
    keep: Tensor | None,
    schedule: Schedule,
    bounds: Iterable[tuple[int, int]] | None = None,
    logprobs_only: bool = False,
) -> _Pass:
    """A pass over the rows ``keep`` (from :func:`kept_rows`; None: all). 1 GEMM, and one for each of d hidden and d weight
    that is needed. The other rows' statistics and d hidden are 0, and nothing of their hidden states, NaN included,
    reaches anything. ``bounds`` are the chunks or parts, of at most as many rows as the schedule's; None is equal ones.
    ``logprobs_only``: the coefficients will be those of log-probs, ``a = -b``."""
    shards = head.shards
    if shards is not None:
        logprobs_only = False  # a shard's log-probs are not yet those of the row
        if not shards.own:
            rows = head.hidden.shape[0] if keep is None else keep.numel()
            chunks = (
                equal_chunks(rows, schedule.chunk or max(1, schedule.part or rows))
                if bounds is None
                else bounds
            )
            return _Pass(EmptyShard(head, needs, keep, list(chunks)), not schedule.by_vocabulary)
    if schedule.by_vocabulary:
        rows = head.hidden.shape[0] if keep is None else keep.numel()
        if bounds is None and schedule.part:
            bounds = equal_chunks(rows, schedule.part)
        blocks = VocabularyBlocks(
            head, needs, keep, list(bounds or ()), schedule.more, logprobs_only, schedule.skip
        )
        return _Pass(blocks, by_rows=False)
    with _disable_current_modes():
        if schedule.columns:
            return _Pass(ColumnBlocks(head, needs, keep, schedule.float_logits), by_rows=False)
        rows_of = ExponentialChunks if schedule.exponentials and needs else RowChunks
        return _Pass(rows_of(head, needs, keep, schedule.chunk, bounds, schedule.float_logits), by_rows=True)


def with_lse_parts(want: tuple[str, ...]) -> tuple[str, ...]:
    """``want``, and what the backward needs."""
    return (*want, LSE_PARTS)


def cross_entropy(
    head: Head,
    needs: Needs,
    classes: Tensor | None,
    w: Tensor | None,
    options: CrossEntropyOptions,
    want: tuple[str, ...],
    factor: Factor,
    schedule: Schedule,
    keep: Tensor | None,
    row_factors: Tensor | None = None,
    summed: bool = False,
) -> tuple[dict[str, Tensor], Grads]:
    """Losses, each times its entry of ``row_factors``, and statistics of all rows, and the gradients of the losses' sum times
    ``factor``. ``keep``: :func:`kept_rows`. ``summed``: the losses of the computed rows are enough, and no "lse_parts"."""
    classes, row_factors = pick(classes, keep), pick(row_factors, keep)
    with begin(head, needs, keep, schedule) as run:
        outs = [
            part.cross_entropy(
                part.of(classes), options, w=w, factor=factor, want=want, row_factors=part.of(row_factors)
            )
            for part in run.parts()
        ]
        out = run.collect(outs, ("loss",), (LSE_PARTS,)) if summed else run.collect(outs)
        return out, run.grads()


def stats(
    head: Head,
    target: Tensor | None,
    options: RowOptions,
    want: tuple[str, ...],
    schedule: Schedule,
    keep: Tensor | None,
    with_gradient: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Statistics of all rows, and d hidden of the sum of their log-probabilities where asked for. ``keep``: :func:`kept_rows`."""
    target = pick(target, keep)
    outs: list[dict[str, Tensor]] = []
    with begin(head, Needs(with_gradient, False, False), keep, schedule, logprobs_only=True) as run:
        for part in run.parts():
            own = part.of(target)
            out = part.stats(own, options, with_lse_parts(want))
            if with_gradient:
                parts = out[LSE_PARTS]
                one = torch.ones(parts.shape[0], dtype=parts.dtype, device=parts.device)
                part.gradients(own, options, parts, Coefficients(a=one, b=-one))
            outs.append(out)
        return run.collect(outs), run.grads().hidden


def again_only_whole(shards: Shards | None) -> None:
    """Refuses to differentiate a gradient again where no process has the whole of it."""
    if shards is not None:
        raise NotImplementedError("group: a gradient of a vocabulary that is cut is not differentiable again")


@contextlib.contextmanager
def float_operands(
    float_logits: bool, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The operands of a definition that multiplies them itself; in float32 and without autocast where its logits must be."""
    if not float_logits or compute_dtype(hidden, weight).itemsize >= torch.float32.itemsize:
        yield hidden, weight, bias
        return
    with _without_autocast(hidden.device.type):
        yield hidden.float(), weight.float(), None if bias is None else bias.float()


def _without_autocast(device: str) -> Any:
    # There is no autocast on "meta" to turn off.
    return torch.autocast(device, enabled=False) if checks.autocasts(device) else contextlib.nullcontext()


def defined_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, float_logits: bool = False
) -> Tensor:
    """The whole logits in the GEMMs' dtype, or in float32, for the definition, which autograd differentiates."""
    if float_logits:
        dtype = torch.promote_types(dtype, torch.float32)
    if bias is not None and bias.dim() == 1:
        bias = bias.to(dtype)
    with _without_autocast(hidden.device.type):
        return products(hidden, weight.to(dtype), bias)


def products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The whole logits of a head's operands (:class:`Head`), by PyTorch, in the weight's dtype; a LoRA's product in its own."""
    dim = weight.shape[1]
    low_rank, bias = split_bias(bias, hidden.shape[-1] - dim)
    if low_rank is None:
        return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    bias = None if bias is None else bias.to(weight.dtype)
    z = torch.nn.functional.linear(hidden[..., :dim].to(weight.dtype), weight, bias)
    u = hidden[..., dim:]
    wide = torch.promote_types(u.dtype, low_rank.dtype)
    return (z + torch.nn.functional.linear(u.to(wide), low_rank.to(wide))).to(z.dtype)


class Saved(NamedTuple):
    """Per-row state saved for a backward that makes the logits again."""

    target: Tensor | None
    lse_parts: Tensor
    coefficients: Coefficients
    options: RowOptions
    keep: Tensor | None  # kept_rows of the forward
    w: Tensor | None = None


def recompute(head: Head, needs: Needs, schedule: Schedule, saved: Saved) -> Grads:
    """The gradients of rows whose coefficients became known after their forward: 1 GEMM for the logits, and one for each
    of d hidden and d weight."""
    keep = saved.keep
    target, lse_parts = pick(saved.target, keep), pick(saved.lse_parts, keep)
    k = Coefficients(*(pick(x, keep) for x in saved.coefficients))
    with begin(head, needs, keep, schedule) as run:
        for part in run.parts():
            own = Coefficients(*(part.of(x) for x in k))
            part.gradients(part.of(target), saved.options, part.of(lse_parts), own, saved.w)
        return run.grads()


def kept_rows(target: Tensor | None, ignore_index: int, traced: bool = False) -> Tensor | None:
    """The rows that carry a target, int64 and ascending; None where all do, or where nobody may ask: a GPU is waited for
    (:func:`fastloss.engine.devices.may_wait`), once a call, but not by an operator of a compiled graph (``traced``)."""
    if target is None or not devices.may_wait(target.device) or (traced and devices.is_gpu(target.device)):
        return None
    keep = (target != ignore_index).nonzero().view(-1)
    return None if keep.numel() == target.numel() else keep


def count_kept(rows: int, keep: Tensor | None) -> int:
    """How many of ``rows`` are computed."""
    return rows if keep is None else keep.numel()


def pick(per_row: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """``per_row`` of the kept rows."""
    return per_row if per_row is None or keep is None else per_row.index_select(0, keep)


def finish(
    grads: Grads, dtypes: tuple[torch.dtype, ...], backend: Backend, scale: float | Tensor | None = None
) -> Grads:
    """Gradients (exclusively ours) times a scalar, in their leaves' dtypes."""
    out = []
    for grad, dtype in zip(grads, dtypes, strict=True):
        if grad is not None and scale is not None:
            grad = scale_in_place(backend, grad, scale)
        out.append(grad if grad is None else grad.to(dtype))
    return Grads(*out)


def leaf_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[torch.dtype, ...]:
    return hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype


def needs_of(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Needs:
    """Which gradients autograd may ask a call for."""
    if not torch.is_grad_enabled():
        return NOTHING
    bias = linear_bias is not None and linear_bias.requires_grad
    return Needs(input.requires_grad, linear_weight.requires_grad, bias)


def compute_dtype(input: Tensor, linear_weight: Tensor) -> torch.dtype:
    """The dtype of the head's GEMMs. ``input`` may be wider than the weight where a LoRA is (:func:`with_lora`)."""
    device = input.device.type
    if checks.autocasts(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return linear_weight.dtype


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Shapes, dtypes and devices that do not fit, in PyTorch's words."""
    if input.dim() < 1 or input.dim() > 2:
        raise ShapeError(f"input: expected input with dimensionality 1 or 2, got {input.dim()}")
    _is_there(linear_weight)
    if linear_weight.dim() < 2:
        raise ShapeError(
            f"linear_weight: expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise ShapeError(
            "input: expected equal input and linear_weight last dimensions (in_features), got "
            f"{input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    checks.same_device("linear_weight", linear_weight, input.device)
    if linear_bias is not None:
        checks.is_floating("linear_bias", linear_bias)
        checks.same_device("linear_bias", linear_bias, input.device)
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise ShapeError(
                f"linear_bias: expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
            )
    if input.dim() == 1 and linear_weight.dim() > 2:
        raise ShapeError(
            f"input: K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched "
            f"input, (N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    if not checks.autocasts(input.device.type) and input.dtype != linear_weight.dtype:
        raise ShapeError(
            f"linear_weight: expected {input.dtype} as input, got {linear_weight.dtype} (autocast would cast them)"
        )


def _is_there(linear_weight: Tensor) -> None:
    """ZeRO-3 leaves a parameter of shape [0] in place of one whose parts it has not gathered."""
    if linear_weight.dim() == 1 and not linear_weight.numel():
        raise ShapeError(
            "linear_weight: expected shape [V, D], got an empty one, as ZeRO-3 leaves where a parameter is not gathered; call inside "
            "deepspeed.zero.GatheredParameters, or through the module that owns it"
        )


def check_head(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """The checks of a loss over tokens ``[..., D]`` and one matrix ``[V, D]``; returns the rows ``[N, D]``."""
    checks.is_floating("input", input)
    checks.is_floating("linear_weight", linear_weight)
    _is_there(linear_weight)
    if input.dim() < 1 or linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ShapeError(
            f"linear_weight: expected shape [V, {input.shape[-1] if input.dim() else 'D'}], got {list(linear_weight.shape)}"
        )
    rows = checks.as_rows(input)
    check_linear(rows, linear_weight, linear_bias)
    return rows


def with_lora(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, lora: Any
) -> tuple[Tensor, Tensor | None]:
    """The operands of a checked head with a LoRA, as :class:`Head` has them: hidden states and u side by side ``[..., D + r]``, and in
    the bias's place B ``[V, r]``, the bias its last column. ``lora``: ``(A [r, D], B [V, r], scale)`` or ``(u [..., r], B)``.

    u is made here, by autograd: from d u come d A, and A's share of d hidden. Where it is wider than the input, as PEFT's is beside a model
    in bfloat16, so is what comes back; the input's numbers are the same there."""
    if lora is None:
        return input, linear_bias
    if not isinstance(lora, (tuple, list)) or len(lora) not in (2, 3):
        got = f"{len(lora)} entries" if isinstance(lora, (tuple, list)) else type(lora).__name__
        raise TypeError(f"lora: expected (A, B, scale) or (u, B), got {got}")
    first, low_rank = lora[:2]
    name = "lora's A" if len(lora) == 3 else "lora's u"
    for what, x in ((name, first), ("lora's B", low_rank)):
        checks.is_floating(what, x)
        checks.same_device(what, x, input.device)
    if linear_weight.dim() != 2:
        raise ShapeError(f"lora: expected one matrix [V, D], got linear_weight {list(linear_weight.shape)}")
    vocab, dim = linear_weight.shape
    if low_rank.dim() != 2 or low_rank.shape[0] != vocab or low_rank.shape[1] < 1:
        raise ShapeError(f"lora's B: expected shape [{vocab}, r], got {list(low_rank.shape)}")
    rank = low_rank.shape[1]
    if len(lora) == 3:
        checks.has_shape(name, first, (rank, dim))
        scale = checks.number("lora's scale", lora[2])
        wide = torch.promote_types(input.dtype, first.dtype)
        u = torch.nn.functional.linear(input.to(wide), first.to(wide)) * scale
    else:
        checks.has_shape(name, first, (*input.shape[:-1], rank))
        u = first
    if linear_bias is not None:
        wide = torch.promote_types(low_rank.dtype, linear_bias.dtype)
        low_rank, linear_bias = low_rank.to(wide), linear_bias.to(wide)
    with _without_autocast(input.device.type):  # whose cat takes no float16 beside bfloat16
        wide = torch.promote_types(input.dtype, u.dtype)
        return torch.cat([input.to(wide), u.to(wide)], -1), join_bias(low_rank, linear_bias)


def as_given(hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> dict[str, Any]:
    """``input``, ``linear_bias`` and ``lora`` for a public function, of the operands that :func:`with_lora` made."""
    dim = linear_weight.shape[-1]
    low_rank, bias = split_bias(linear_bias, hidden.shape[-1] - dim)
    if low_rank is None:
        return {"input": hidden, "linear_bias": bias}
    own = (
        hidden[..., :dim]
        if checks.autocasts(hidden.device.type)
        else hidden[..., :dim].to(linear_weight.dtype)
    )
    return {"input": own, "linear_bias": bias, "lora": (hidden[..., dim:], low_rank)}
