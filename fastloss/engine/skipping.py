"""How much of the gradients' work ``skip`` left out, for who asks."""

from __future__ import annotations

from torch import Tensor

# (row, class) pairs that were left out, and all, of calls with ``skip`` since somebody asked last.
_left_out, _all = 0, 0


def count(rows_of_blocks: Tensor, width: int, vocab: int, rows: int) -> None:
    """``rows_of_blocks``: how many rows left out each block of ``width`` classes; the last may be narrower."""
    global _left_out, _all
    missing = -vocab % width
    _left_out += int(rows_of_blocks.sum()) * width - int(rows_of_blocks[-1]) * missing
    _all += rows * vocab


def skipped_share() -> float | None:
    """The share of the (token, class) pairs whose gradients ``skip`` left out (docs/skip.md), of all calls of this process since the last
    time that this was asked; None if none of them could leave any out.

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(3, 8), torch.zeros(5, 8, requires_grad=True)
    >>> loss = fastloss.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]), skip=1e-3)
    >>> print(fastloss.skipped_share())  # 5 classes are one block
    None
    """
    global _left_out, _all
    left_out, pairs, _left_out, _all = _left_out, _all, 0, 0
    return left_out / pairs if pairs else None
