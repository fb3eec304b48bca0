"""Dot products with, and weighted sums of, rows of a matrix that an index names: by PyTorch, on every device.

A few rows are gathered at a time (:data:`GATHERED_BYTES`). Sums are made in one order: the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastloss.engine import devices
from fastloss.tables import ACC_DTYPES

# Memory of the gathered rows: of a CPU's cache; on a GPU as much as makes a launch small beside the work.
GATHERED_BYTES, GATHERED_BYTES_GPU = 4 << 20, 64 << 20


def segments_of(offsets: Tensor, entries: int) -> Tensor:
    """The segment of each entry, int64 ``[entries]``: segment s has the entries ``[offsets[s], offsets[s + 1])``. One that lies in
    none is counted to the last."""
    place = torch.arange(entries, dtype=torch.int64, device=offsets.device)
    segment = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
    return segment.clamp(max=max(0, offsets.shape[0] - 2))


def dots(x: Tensor, m: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """acc ``[entries]``: ``x[s] · m[index[j]]`` of each entry j of segment s; -inf where the index is negative."""
    acc = ACC_DTYPES[m.dtype]
    out = torch.full(index.shape, -torch.inf, dtype=acc, device=m.device)
    segment = segments_of(offsets, index.shape[0])
    for part in _parts(index, m, acc):
        rows = m.index_select(0, index[part].clamp(min=0)).to(acc)
        value = (rows * x.index_select(0, segment[part]).to(acc)).sum(1)
        out[part] = torch.where(index[part] < 0, -torch.inf, value)
    return out


def sums(m: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, out: Tensor) -> None:
    """``out[s]`` = Σ ``weights[j] · m[index[j]]`` over the entries j of segment s; a weight of 0, or a negative index, adds nothing."""
    acc = ACC_DTYPES[m.dtype]
    total = out.zero_() if out.dtype == acc else torch.zeros(out.shape, dtype=acc, device=out.device)
    segment = segments_of(offsets, index.shape[0])
    counts = (index >= 0) & (weights != 0)
    for part in _parts(index, m, acc):
        own, weight = segment[part], weights[part, None]
        rows = m.index_select(0, index[part].clamp(min=0)).to(acc)
        rows = torch.where(counts[part, None], rows * weight, 0.0)
        # The segments of these entries, numbered from 0: each is added once to a row of the total, whatever the device's order.
        n = own.shape[0]
        number = torch.zeros_like(own)
        number[1:] = (own[1:] != own[:-1]).cumsum(0)
        ends = torch.searchsorted(number, torch.arange(n + 1, dtype=torch.int64, device=m.device))
        of_segment = torch.segment_reduce(rows, "sum", offsets=ends, axis=0, unsafe=True, initial=0)
        total.index_add_(0, torch.zeros_like(own).scatter_(0, number, own), of_segment)
    if total is not out:
        out.copy_(total)


def _parts(index: Tensor, m: Tensor, acc: torch.dtype) -> Iterator[slice]:
    budget = GATHERED_BYTES_GPU if devices.is_gpu(m.device) else GATHERED_BYTES
    step = max(1, budget // max(1, m.shape[1] * acc.itemsize))
    for start in range(0, index.shape[0], step):
        yield slice(start, min(start + step, index.shape[0]))
