"""The operands and results of the linear head, which both of its schedules read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine.contract import Backend
from fastloss.engine.shards import Shards
from fastloss.tables import Row


class Needs(NamedTuple):
    """Which gradients autograd asks for."""

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
    processes its vocabulary is cut, and whether low-precision operands must give float32 logits."""

    chunk_size: int | None = None
    memory: str = "auto"
    shards: Shards | None = None
    float_logits: bool = False


class Head(NamedTuple):
    """The operands of a call, detached. ``dtype`` is that of the GEMMs' operands."""

    backend: Backend
    hidden: Tensor  # [rows, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # acc [V]
    dtype: torch.dtype
    shards: Shards | None = None  # this weight is one of them


def options_of_part(options: Row, keep: Tensor | None, start: int, stop: int) -> Row:
    """A call's options for the computed rows [start, stop). ``keep``: which of all rows are computed (None: all)."""
    return options.of_rows(lambda x: x[start:stop] if keep is None else x.index_select(0, keep[start:stop]))
