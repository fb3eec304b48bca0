"""The class of each row's largest logit, which is PyTorch's to find beside the row kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastloss.engine.contract import Backend
from fastloss.tables import ARGMAX, RowOptions


def largest_class(
    logits: Tensor, target: Tensor | None, options: RowOptions, bias: Tensor | None = None
) -> Tensor:
    """int64 ``[rows]``: of ``logits + bias`` under the sign of the scale (the soft-cap keeps their order), the first of several; 0
    where the target is ignored."""
    z = logits.detach() if bias is None else logits.detach() + bias.detach()
    found = z.argmin(-1) if options.scale < 0 else z.argmax(-1)
    return found if target is None else found.masked_fill(target == options.ignore_index, 0)


def row_statistics(
    backend: Backend,
    logits: Tensor,
    target: Tensor | None,
    options: RowOptions,
    want: Sequence[str],
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """``backend.row_stats`` with "argmax" among the statistics."""
    if ARGMAX not in want:
        return backend.row_stats(logits, target, options, want=want, bias=bias)
    out = backend.row_stats(logits, target, options, want=[n for n in want if n != ARGMAX], bias=bias)
    return {**out, ARGMAX: largest_class(logits, target, options, bias)}
