"""The one layout of token sequences: padded ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``, and what is summed over them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.checks import ShapeError


@dataclass(frozen=True)
class Sequences:
    """Sequence ``s`` of a flat tensor is ``[offsets[s], offsets[s + 1])``, or ``[s·length, (s + 1)·length)`` without offsets."""

    offsets: Tensor | None  # int64 [count + 1], contiguous
    length: int
    count: int
    n: int  # tokens, padding included
    device: torch.device

    @property
    def ids(self) -> Tensor:
        """The sequence of each token, int64 ``[N]``; ``count`` past the last sequence."""
        # torch.compile does not trace the lock that a cached property has in Python 3.10 and 3.11.
        return self._found() if torch.compiler.is_compiling() else self._kept

    @functools.cached_property
    def _kept(self) -> Tensor:
        return self._found()

    def _found(self) -> Tensor:
        assert self.offsets is not None
        position = torch.arange(self.n, device=self.device, dtype=torch.int64)
        return torch.searchsorted(self.offsets[1:].contiguous(), position, right=True)

    def sum(self, x: Tensor) -> Tensor:
        """``[N]`` -> ``[count]``, by PyTorch."""
        if self.offsets is None:
            return x.reshape(self.count, self.length).sum(-1)
        return torch.zeros(self.count, dtype=x.dtype, device=x.device).index_add(0, self.ids, x)

    def expand(self, per_sequence: Tensor) -> Tensor:
        """``[count]`` -> ``[N]``."""
        if self.offsets is None:
            return per_sequence.unsqueeze(-1).expand(self.count, self.length).reshape(-1)
        return per_sequence[self.ids]

    def first(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x [N]`` at each sequence's first unmasked position; 0 where there is none.  # [count]"""
        position = torch.arange(self.n, device=x.device, dtype=torch.int64)
        position = torch.where(mask, position, self.n)
        if self.offsets is None:
            first = position.reshape(self.count, self.length)
            first = first.amin(-1) if self.length else torch.full_like(first.sum(-1), self.n)
        else:
            first = torch.full((self.count,), self.n, device=x.device, dtype=torch.int64)
            first = first.scatter_reduce(0, self.ids, position, "amin")
        return torch.cat([x, x.new_zeros(1)])[first]


def layout_of(name: str, like: Tensor, cu_seqlens: Tensor | None) -> Sequences:
    """Of the argument ``name``: ``[B, T]``, or ``[N]`` with ``cu_seqlens``."""
    if cu_seqlens is None:
        if like.dim() != 2:
            raise ShapeError(f"{name}: expected shape [B, T], or [N] with cu_seqlens, got {list(like.shape)}")
        return Sequences(None, like.shape[1], like.shape[0], like.numel(), like.device)
    if like.dim() != 1:
        raise ShapeError(f"{name}: expected shape [N] with cu_seqlens, got {list(like.shape)}")
    return packed_layout("cu_seqlens", cu_seqlens, like.shape[0], like.device)


def packed_layout(name: str, cu_seqlens: Tensor, n: int, device: torch.device) -> Sequences:
    """Of ``n`` packed tokens; the one place where ``cu_seqlens`` is checked (its values on the CPU alone: on a GPU the host would wait)."""
    checks.is_tensor(name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ShapeError(
            f"{name}: expected int32 or int64 of shape [B + 1], got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    checks.same_device(name, cu_seqlens, device)
    offsets = cu_seqlens.to(torch.int64).contiguous()
    if checks.host_reads(offsets):
        ends = numbers_of(offsets)
        if ends[0] != 0 or ends[-1] != n or sorted(ends) != ends:
            raise ValueError(f"{name}: expected offsets that rise from 0 to {n}, got {ends}")
    return Sequences(offsets, 0, offsets.numel() - 1, n, device)


def flat_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """uint8 ``[N]``, 0 or 1; None is all ones."""
    if mask is None:
        return torch.ones(like.numel(), dtype=torch.uint8, device=like.device)
    checks.is_tensor("mask", mask)
    checks.has_shape("mask", mask, tuple(like.shape))
    checks.same_device("mask", mask, like.device)
    mask = mask if mask.dtype == torch.bool else mask != 0
    mask = mask.reshape(-1).contiguous()
    # torch.jit.trace cannot record a view of another dtype.
    return mask.to(torch.uint8) if torch.jit.is_tracing() else mask.view(torch.uint8)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch of responses, and which of them count."""

    layout: Sequences
    mask: Tensor | None  # acc [N], 0 or 1; None: all
    lengths: Tensor  # acc [count], tokens that count

    def tail_weights(self, shared: Tensor, ld_alpha: float) -> Tensor:
        """LD-DPO (arXiv:2409.06411): weight 1 on a response's first ``shared [count]`` tokens, ``ld_alpha`` after.  # acc [N]"""
        layout = self.layout
        kept = shared.new_ones(layout.n) if self.mask is None else self.mask
        if layout.offsets is None:
            position = kept.reshape(layout.count, layout.length).cumsum(1)
            return self._weight(position <= shared[:, None], ld_alpha) * kept
        so_far = torch.cat([kept.new_zeros(1), kept]).cumsum(0, dtype=torch.float64)  # [N + 1]
        sequence = torch.repeat_interleave(layout.offsets.diff(), output_size=layout.n)
        position = so_far[1:] - so_far[layout.offsets[:-1]][sequence]
        return self._weight(position <= shared[sequence], ld_alpha) * kept

    def weighted(self, token_weight: Tensor) -> Tensor:
        """A factor of each token ``[N]``, 0 where one does not count, whatever its own is.  # acc [N]"""
        own = token_weight.to(self.lengths.dtype)
        return own if self.mask is None else torch.where(self.mask == 0, 0.0, own)

    def _weight(self, early: Tensor, ld_alpha: float) -> Tensor:
        one = torch.ones((), dtype=self.lengths.dtype, device=early.device)
        return torch.where(early, one, one * ld_alpha).reshape(-1)


def tokens_of(
    prefix: str, logps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, acc: torch.dtype
) -> Tokens:
    """Of token log-probs; ``prefix`` (as "chosen_") begins the arguments' names in errors."""
    if mask is not None:
        checks.is_tensor(f"{prefix}mask", mask)
        checks.has_shape(f"{prefix}mask", mask, tuple(logps.shape))
        checks.same_device(f"{prefix}mask", mask, logps.device)
        mask = mask.detach().to(acc).reshape(-1).contiguous()
    if cu_seqlens is None:
        if logps.dim() != 2:
            raise ShapeError(
                f"{prefix}logps: expected shape [B, T] with {prefix}mask, got {list(logps.shape)}"
            )
        if mask is None:
            raise ValueError(
                f"{prefix}mask: expected a mask [B, T] for token log-probs {list(logps.shape)}, got None"
            )
        count, length = logps.shape
        layout = Sequences(None, length, count, logps.numel(), logps.device)
        return Tokens(layout, mask, mask.reshape(count, length).sum(1))
    if logps.dim() != 1:
        raise ShapeError(
            f"{prefix}cu_seqlens: expected packed log-probs of shape [N], got {list(logps.shape)}"
        )
    layout = packed_layout(f"{prefix}cu_seqlens", cu_seqlens, logps.shape[0], logps.device)
    assert layout.offsets is not None
    if mask is None:
        return Tokens(layout, None, layout.offsets.diff().to(acc))
    so_far = torch.cat([mask.new_zeros(1), mask]).cumsum(0, dtype=torch.float64)
    return Tokens(layout, mask, so_far[layout.offsets].diff().to(acc))


def numbers_of(x: Tensor) -> list[int]:
    """On the host. ``tolist`` of torch 2.8 asks a tensor of torch.func for its address."""
    try:
        return x.tolist()  # type: ignore[no-any-return]
    except RuntimeError:
        return [int(value) for value in x]


class TimeSteps:
    """Tokens by their time step: the n-th unmasked token of each sequence in column n, whatever lies between them.

    The layout is ``[count, width]``; for a packed batch the host waits for the longest length; under torch.compile it is the batch's."""

    def __init__(self, layout: Sequences, keep: Tensor) -> None:
        count, offsets, n = layout.count, layout.offsets, layout.n
        before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))  # unmasked tokens before each position
        if offsets is None:
            self.width = layout.length
            starts = torch.arange(count, device=keep.device, dtype=torch.int64) * layout.length
            row = torch.arange(n, device=keep.device, dtype=torch.int64) // max(1, layout.length)
        else:
            self.width = 0
            if count:  # a meta tensor has no lengths, nor has a trace: the most there can be
                unknown = offsets.is_meta or torch.compiler.is_compiling()
                self.width = n if unknown else int(offsets.diff().max())
            starts, row = offsets[:-1], layout.ids
        step = before[:-1] - layout.expand(before[starts])
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
