"""The operands and results of the linear head, which both of its schedules read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine.contract import Backend
from fastloss.engine.shards import Shards
from fastloss.tables import Row


class Needs(NamedTuple):
    """Which gradients autograd asks for. ``bias``: of all that the bias's operand holds (:class:`Head`)."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


NOTHING = Needs(False, False, False)


class Grads(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Limits(NamedTuple):
    """What the caller says about a head: rows of logits at once (None: the engine's choice), "auto", "low" or "fast", over which
    processes its vocabulary is cut, whether low-precision operands must give float32 logits, and by how much
    of its coefficient a row's gradients may err."""

    chunk_size: int | None = None
    memory: str = "auto"
    shards: Shards | None = None
    float_logits: bool = False
    skip: float = 0.0


class Head(NamedTuple):
    """The operands of a call, detached. ``dtype`` is that of the GEMMs' operands.

    With a LoRA the hidden states are ``[rows, D + r]``: the last r columns, u, are multiplied by B. Autograd's functions and the
    operators of torch.compile have B in the bias's place, ``[V, r]``, the bias its last column: ``[V, r + 1]`` (:func:`split_bias`).
    Hidden states and B may be wider than ``dtype``: u and B then keep their digits, and so does d u.
    """

    backend: Backend
    hidden: Tensor  # [rows, D] or [rows, D + r]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # acc [V]
    dtype: torch.dtype
    shards: Shards | None = None  # this weight is one of them
    low_rank: Tensor | None = None  # B [V, r]

    @property
    def wide(self) -> bool:
        """Whether a LoRA is wider than the GEMMs."""
        if self.low_rank is None:
            return False
        return max(self.hidden.dtype.itemsize, self.low_rank.dtype.itemsize) > self.dtype.itemsize

    @property
    def rank(self) -> int:
        """Of the LoRA; 0 without one."""
        return self.hidden.shape[1] - self.weight.shape[1]


def split_bias(bias: Tensor | None, rank: int) -> tuple[Tensor | None, Tensor | None]:
    """(B ``[V, r]``, the bias ``[V]``) of what stands in the bias's place beside hidden states with ``rank`` columns of a LoRA."""
    if bias is None or bias.dim() == 1:
        return None, bias
    return bias[:, :rank], bias[:, rank] if bias.shape[1] > rank else None


def join_bias(low_rank: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The reverse of :func:`split_bias`."""
    if low_rank is None or bias is None:
        return bias if low_rank is None else low_rank
    return torch.cat([low_rank, bias.unsqueeze(1)], 1)


def options_of_part(options: Row, keep: Tensor | None, start: int, stop: int) -> Row:
    """A call's options for the computed rows [start, stop). ``keep``: which of all rows are computed (None: all)."""
    return options.of_rows(lambda x: x[start:stop] if keep is None else x.index_select(0, keep[start:stop]))
