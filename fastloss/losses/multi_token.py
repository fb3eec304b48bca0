"""multi_token_targets: the tokens that several heads predict from one position, with the borders of packed documents right."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.checks import ShapeError
from fastloss.engine.sequences import packed_layout

AVERAGES = ("head", "none")


class MultiTokenTargets(NamedTuple):
    """What K heads predict, the heads first."""

    target: Tensor  # int64 [K, ...]: ignore_index where a head has nothing to predict
    token_weight: Tensor  # float32 [K, ...]: 0 there


def multi_token_targets(
    labels: Tensor,
    heads: int,
    *,
    first: int = 1,
    weights: Sequence[float] | Tensor | None = None,
    average: str = "head",
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    ignore_index: int = -100,
) -> MultiTokenTargets:
    """Targets and weights of ``heads`` heads over the same positions: head k of position t predicts the label at t + ``first`` + k.

    A label beyond the sequence, or in another packed document, is no target. With the hidden states of all heads stacked,
    ``[K, ..., D]``, one call has all heads' loss, for the 3 GEMMs of its rows::

        t = multi_token_targets(labels, heads=K, weights=w)
        loss = linear_cross_entropy(hidden, head, t.target, token_weight=t.token_weight, reduction="sum")

    which is Σ_k w_k · (mean over head k's targets). DeepSeek-V3's, Llama's, Medusa's and EAGLE-3's forms: docs/multi_token.md.

    Args:
        labels: int64 ``[T]``, ``[B, T]`` or more: each token at its own place, ``ignore_index`` where it is not learned.
        heads: K.
        first: how far ahead head 0 looks; 0: labels are shifted already.
        weights: K numbers, or a tensor ``[K]``; None: ones.
        average: "head": ``token_weight`` is w_k over the number of head k's targets, for ``reduction="sum"``. "none": w_k alone, for a
            ``normalizer`` of the caller's, as with gradient accumulation.
        cu_seqlens: int32 or int64 ``[documents + 1]``: of packed ``labels [N]`` (or ``[1, N]``).
        position_ids: int64, as ``labels``: a document begins where a position is not the one before plus 1.
        segment_ids: as ``labels``, a number for each document. At most one of the three.

    Returns:
        :class:`MultiTokenTargets`. A head without a target has weight 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; the message names the argument.

    >>> import torch, fastloss
    >>> t = fastloss.multi_token_targets(torch.arange(5), heads=2, cu_seqlens=torch.tensor([0, 3, 5]))
    >>> t.target.tolist()
    [[1, 2, -100, 4, -100], [2, -100, -100, -100, -100]]
    """
    checks.is_tensor("labels", labels)
    if labels.dim() < 1 or labels.dtype != torch.int64:
        got = str(labels.dtype).removeprefix("torch.")
        raise ShapeError(f"labels: expected int64 of shape [..., T], got {got} of shape {list(labels.shape)}")
    _whole("heads", heads, 1)
    _whole("first", first, 0)
    checks.is_one_of("average", average, AVERAGES)
    factors = _weights(weights, heads, labels.device)
    document = _documents(labels, cu_seqlens, position_ids, segment_ids)
    length = labels.shape[-1]
    made = []
    for ahead in range(first, first + heads):
        ahead = min(ahead, length)
        later = labels[..., ahead:]
        if document is not None:
            same = document[..., ahead:] == document[..., : length - ahead]
            later = later.masked_fill(~same, ignore_index)
        made.append(torch.nn.functional.pad(later, (0, ahead), value=ignore_index))
    target = torch.stack(made)
    valid = target != ignore_index
    if average == "head":
        factors = factors / valid.flatten(1).sum(1).clamp(min=1)
    shape = (heads, *(1 for _ in labels.shape))
    return MultiTokenTargets(target, torch.where(valid, factors.view(shape), 0.0))


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")


def _weights(weights: Sequence[float] | Tensor | None, heads: int, device: torch.device) -> Tensor:
    """float32 ``[K]``."""
    if weights is None:
        return torch.ones(heads, dtype=torch.float32, device=device)
    if not isinstance(weights, Tensor):
        if len(weights) != heads:
            raise ShapeError(f"weights: expected {heads} numbers, got {len(weights)}")
        one = torch.ones(1, dtype=torch.float32, device=device)
        return torch.cat([one * checks.number("weights", w) for w in weights])
    checks.is_floating("weights", weights)
    checks.has_shape("weights", weights, (heads,))
    checks.same_device("weights", weights, device)
    return weights.detach().to(torch.float32)


def _documents(
    labels: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None, segment_ids: Tensor | None
) -> Tensor | None:
    """The number of each position's document, which rises along the sequence; None: a sequence is one."""
    if sum(x is not None for x in (cu_seqlens, position_ids, segment_ids)) > 1:
        raise ValueError("cu_seqlens: expected at most one of cu_seqlens, position_ids and segment_ids")
    if cu_seqlens is not None:
        if labels.numel() != labels.shape[-1]:
            raise ShapeError(f"labels: expected shape [N] with cu_seqlens, got {list(labels.shape)}")
        return packed_layout("cu_seqlens", cu_seqlens, labels.numel(), labels.device).ids.view(labels.shape)
    given, name = (position_ids, "position_ids") if segment_ids is None else (segment_ids, "segment_ids")
    if given is None:
        return None
    checks.is_tensor(name, given)
    checks.has_shape(name, given, tuple(labels.shape))
    checks.same_device(name, given, labels.device)
    step = 1 if segment_ids is None else 0
    begins = given[..., 1:] != given[..., :-1] + step
    return torch.nn.functional.pad(begins.cumsum(-1), (1, 0))
