"""The arguments of pair_loss beside what it differentiates, for the definition and for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Number = float | Tensor


class PairCall(NamedTuple):
    """docs/sequences.md, 5. Tensors are acc ``[B]``; a ``Number`` is one for all pairs, or one for each."""

    terms: Sequence[tuple[int, float]]  # (code, weight), at most 8
    rc: Tensor | None = None
    rr: Tensor | None = None
    lc: Tensor | None = None
    lr: Tensor | None = None
    divergence: int = 0
    alpha: float = 0.5
    beta: Number = 0.1
    smoothing: Number = 0.0
    margin: Number = 0.0
    weight: Tensor | None = None
    delta: Number = 0.0
    tau: float = 0.05
    average_rewards: bool = False
