"""From log-probs per token to one number per sequence: padded ``[B, T]`` with a mask, or packed ``[N]`` with cu_seqlens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine import preference as ops
from fastloss.engine.checks import ShapeError


class Segments(NamedTuple):
    """Where the sequences of a flat tensor of tokens lie, and which tokens count."""

    mask: Tensor | None  # acc [N], 0 or 1
    offsets: Tensor | None  # int64 [sequences + 1]; None: rows of ``length``
    length: int
    sequences: int
    lengths: Tensor  # acc [sequences], tokens that count

    def sum(self, rows: object, values: Tensor, tails: Tensor | None = None) -> Tensor:
        """Σ over each sequence ``[count]``; ``tails`` (acc ``[N]``) in place of the mask where given."""
        weights = self.mask if tails is None else tails
        return ops.segment_sum(rows, values.reshape(-1), weights, self.offsets, self.length, self.sequences)

    def tails(self, shared: Tensor, ld_alpha: float) -> Tensor:
        """LD-DPO (arXiv:2409.06411): weight 1 on a sequence's first ``shared`` ``[count]`` tokens, ``ld_alpha`` after them."""
        kept = shared.new_ones(self._numel()) if self.mask is None else self.mask
        if self.offsets is None:
            position = kept.reshape(self.sequences, self.length).cumsum(1)
            return self._weight(position <= shared[:, None], ld_alpha) * kept
        so_far = torch.cat([kept.new_zeros(1), kept]).cumsum(0, dtype=torch.float64)  # [N + 1]
        sequence = torch.repeat_interleave(self.offsets.diff(), output_size=self._numel())
        position = so_far[1:] - so_far[self.offsets[:-1]][sequence]
        return self._weight(position <= shared[sequence], ld_alpha) * kept

    def _weight(self, early: Tensor, ld_alpha: float) -> Tensor:
        one = torch.ones((), dtype=self.lengths.dtype, device=early.device)
        return torch.where(early, one, ld_alpha).reshape(-1)

    def _numel(self) -> int:
        if self.mask is not None:
            return self.mask.numel()
        return self.sequences * self.length if self.offsets is None else int(self.offsets[-1])


def of_tokens(
    name: str,
    tokens: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    acc: torch.dtype,
) -> Segments:
    """The segments of ``tokens``; ``name`` (as "chosen_") begins the names of the arguments in errors."""
    if mask is not None:
        checks.is_tensor(f"{name}mask", mask)
        checks.has_shape(f"{name}mask", mask, tuple(tokens.shape))
        checks.same_device(f"{name}mask", mask, tokens.device)
        mask = mask.detach().to(acc).reshape(-1).contiguous()
    if cu_seqlens is None:
        if tokens.dim() != 2:
            raise ShapeError(f"{name}logps: expected shape [B, T] with {name}mask, got {list(tokens.shape)}")
        if mask is None:
            raise ValueError(
                f"{name}mask: expected a mask [B, T] for token log-probs {list(tokens.shape)}, got None"
            )
        count, length = tokens.shape
        return Segments(mask, None, length, count, mask.reshape(count, length).sum(1))
    offsets = _offsets(f"{name}cu_seqlens", cu_seqlens, tokens)
    count = offsets.numel() - 1
    if mask is None:
        return Segments(None, offsets, 0, count, offsets.diff().to(acc))
    so_far = torch.cat([mask.new_zeros(1), mask]).cumsum(0, dtype=torch.float64)
    return Segments(mask, offsets, 0, count, so_far[offsets].diff().to(acc))


def _offsets(name: str, cu_seqlens: Tensor, tokens: Tensor) -> Tensor:
    checks.is_tensor(name, cu_seqlens)
    checks.same_device(name, cu_seqlens, tokens.device)
    if tokens.dim() != 1:
        raise ShapeError(f"{name}: expected packed log-probs of shape [N], got {list(tokens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ShapeError(
            f"{name}: expected int32 or int64 of shape [B + 1], got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    check_offsets(name, cu_seqlens, tokens.shape[0])
    return cu_seqlens.to(torch.int64).contiguous()


def check_offsets(name: str, cu_seqlens: Tensor, n: int) -> None:
    """On the CPU, where reading them costs nothing: from 0 to n, never back."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (
        int(cu_seqlens[0]) != 0
        or int(cu_seqlens[-1]) != n
        or (len(cu_seqlens) > 1 and int(cu_seqlens.diff().min()) < 0)
    ):
        raise ValueError(f"{name}: expected offsets that rise from 0 to {n}, got {cu_seqlens.tolist()}")
