"""Parts of a pass that are made of whole groups of rows (a sequence, a pair), so that a group's coefficients are known while
its logits are still there: 3 GEMMs. Where that cannot be, a backward of its own makes the logits again: 4."""

from __future__ import annotations

import itertools

from fastloss.engine import head as heads
from fastloss.engine import head_blocks
from fastloss.engine.head import Head, Limits, Needs, Schedule
from fastloss.engine.head_rows import buffer_dtype
from fastloss.tables import ACC_DTYPES

# (rows, groups) of each part, as [first, stop).
Spans = tuple[list[tuple[int, int]], list[tuple[int, int]]]


def spans_of(
    head: Head,
    needs: Needs,
    limits: Limits,
    bounds: list[int],
    *,
    coupled: bool,
    late: bool = False,
    logprobs_only: bool = True,
) -> tuple[Schedule, Spans | None]:
    """The schedule of a loss of groups, and its parts; None for these where the gradients are those of a backward of its own.

    ``bounds``: the first row of each group, and the end. ``coupled``: a group's coefficients depend on the other groups, so that
    one part must hold all. ``late``: they depend on an upstream gradient that is not known yet. ``logprobs_only``: they are those
    of log-probs.
    """
    if heads.goes_by_vocabulary(head) or heads.in_columns(head, bounds[-1], needs, limits):
        return _in_blocks(head, needs, limits, bounds, coupled, late, logprobs_only)
    return _in_chunks(head, needs, limits, bounds, coupled, late, logprobs_only)


def _in_blocks(
    head: Head,
    needs: Needs,
    limits: Limits,
    bounds: list[int],
    coupled: bool,
    late: bool,
    logprobs_only: bool,
) -> tuple[Schedule, Spans | None]:
    """Blocks of the vocabulary: a part may have any number of rows, so that no group is too long for one."""
    rows = bounds[-1]
    schedule = heads.schedule_of_one_pass(head, rows, needs, limits, logprobs_only)
    late = late or bool(coupled and schedule.part)
    if late or not rows or not _waits(needs, logprobs_only):
        return heads.schedule_of(head, rows, needs, limits), None
    if not schedule.part:
        return schedule, ([(0, rows)], [(0, len(bounds) - 1)])
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    spans = _packed(bounds, max(schedule.part, longest))
    part, dim = max(stop - start for start, stop in spans[0]), head.weight.shape[1]
    more = schedule.more
    if needs.weight:
        more = 0 if limits.memory == "low" else min(max(0, part - dim), head_blocks.further_rows(head.weight))
    return schedule._replace(part=part, more=more), spans


def _in_chunks(
    head: Head,
    needs: Needs,
    limits: Limits,
    bounds: list[int],
    coupled: bool,
    late: bool,
    logprobs_only: bool,
) -> tuple[Schedule, Spans | None]:
    """Chunks of rows: a group's logits must fit into one."""
    rows = bounds[-1]
    longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    usual = heads.chunked(head, rows, needs, limits).chunk
    # A chosen size is a limit; else a group may take as much as the weight and its gradient.
    limit = limits.chunk_size or max(usual, _affordable(head))
    late = late or (coupled and rows > usual)
    if late or not _waits(needs, logprobs_only) or not 0 < longest <= limit:
        return Schedule(max(1, min(usual, rows)), float_logits=limits.float_logits), None
    spans = _packed(bounds, max(usual, longest))
    chunk = max(stop - start for start, stop in spans[0])
    return Schedule(chunk, float_logits=limits.float_logits), spans


def _waits(needs: Needs, logprobs_only: bool) -> bool:
    """Whether a gradient needs the coefficients before it can begin: d hidden of a log-prob alone is made with the statistics."""
    return bool(needs) and not (logprobs_only and needs == Needs(True, False, False))


def _affordable(head: Head) -> int:
    """Rows whose logits take no more memory than the weight and its gradient in the accumulation dtype."""
    weight = head.weight
    itemsize = buffer_dtype(head).itemsize
    return weight.shape[1] * (weight.element_size() + ACC_DTYPES[head.dtype].itemsize) // itemsize


def _packed(bounds: list[int], chunk: int) -> Spans:
    """Parts of whole groups, each as many as fit into ``chunk`` rows."""
    rows, groups, first = [], [], 0
    last = len(bounds) - 1
    while first < last:
        stop = first + 1
        while stop < last and bounds[stop + 1] - bounds[first] <= chunk:
            stop += 1
        rows.append((bounds[first], bounds[stop]))
        groups.append((first, stop))
        first = stop
    return rows, groups
