"""Tokens by their time step: the n-th unmasked token of each sequence in column n, whatever lies between them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference import Sequences


class Steps:
    """The layout ``[count, width]`` of a flat batch; a packed one waits for the device to say its longest length."""

    def __init__(self, sequences: Sequences, keep: Tensor) -> None:
        count, offsets, n = sequences.count, sequences.offsets, sequences.n
        before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))  # unmasked tokens before each position
        if offsets is None:
            self.width = sequences.length
            starts = torch.arange(count, device=keep.device) * sequences.length
            row = torch.arange(n, device=keep.device) // max(1, sequences.length)
        else:
            self.width = int(offsets.diff().max()) if count else 0
            starts, row = offsets[:-1], sequences.ids
        step = before[:-1] - sequences.expand(before[starts])
        # Masked tokens share one place past the end.
        self._place = torch.where(keep, row * self.width + step, count * self.width)
        self._shape, self._keep = (count, self.width), keep

    def by_step(self, x: Tensor) -> Tensor:
        """``[N]`` -> ``[count, width]``, 0 where a sequence has no such step."""
        flat = x.new_zeros(self._shape[0] * self._shape[1] + 1)
        flat[self._place] = x
        return flat[:-1].view(self._shape)

    def by_token(self, x: Tensor) -> Tensor:
        """``[count, width]`` -> ``[N]``, 0 where masked."""
        padded = torch.nn.functional.pad(x.reshape(-1), (0, 1))
        return torch.where(self._keep, padded[self._place], 0)
