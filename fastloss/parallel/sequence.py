"""A sequence that is cut over processes (context and sequence parallelism): targets across the cut, and what all shards share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss.engine import checks, failures
from fastloss.engine.checks import ShapeError
from fastloss.engine.shards import all_gather, process_group

LAYOUTS = ("contiguous", "zigzag")


class SequenceShard(NamedTuple):
    """What the loss of this process's positions needs."""

    target: Tensor  # int64 [B, T]: the token after each position, ignore_index where none is learned
    tokens: Tensor  # int64, 0-d: targets of all processes
    normalizer: Tensor  # float32, 0-d: the same, at least 1: the losses' sum over all processes divided by it is the mean


def sequence_shard(
    labels: Tensor,
    group: Any,
    *,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    layout: str = "contiguous",
    ignore_index: int = -100,
    shift: bool = True,
) -> SequenceShard:
    """The targets of a shard of sequences, and how many all shards have.

    Position t predicts the token at t + 1. At the end of a shard that token is on another process: a shift of each shard alone
    loses it, or learns a wrong one. One all-gather of a shard's first tokens, and one sum of a number. With them::

        shard = sequence_shard(labels, group)
        loss = fastloss.linear_cross_entropy(hidden, weight, shard.target, reduction="sum", normalizer=shard.normalizer)

    is this process's part: the sum of it and of its gradients over the group is the loss of the whole sequences. (A wrapper that
    takes the mean of gradients over processes, as DDP and FSDP do, wants it times their number.)

    Args:
        labels: int64 ``[B, T]``, this process's tokens, the label of a token at its own place.
        group: a ProcessGroup, or a DeviceMesh of one dimension, in the order of the shards.
        mask: bool or 0/1 ``[B, T]``: tokens that are not learned are 0.
        documents: int64 ``[B, T]``, a number for each packed document: its last token predicts nothing.
        layout: "contiguous": process r has the r-th piece. "zigzag": of 2 W pieces, r and 2 W - 1 - r, in this order, as ring
            attention has them so that all processes have as much to do.
        ignore_index: labels that are not learned, and what target is there.
        shift: False: ``labels`` are targets already, and are only counted.

    Raises:
        ShapeError: other shapes than ``labels``'; an odd T with "zigzag". TypeError: group is no group.

    >>> import torch, fastloss.parallel
    >>> import torch.distributed as dist
    >>> store = dist.HashStore()
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> fastloss.parallel.sequence_shard(torch.tensor([[5, 6, 7]]), dist.group.WORLD).target
    tensor([[   6,    7, -100]])
    >>> dist.destroy_process_group()
    """
    checks.is_tensor("labels", labels)
    if labels.dim() != 2:
        raise ShapeError(f"labels: expected shape [B, T], got {list(labels.shape)}")
    checks.index_target("labels", labels, tuple(labels.shape), labels.device)
    checks.is_one_of("layout", layout, LAYOUTS)
    for name, given in (("mask", mask), ("documents", documents)):
        if given is not None:
            checks.is_tensor(name, given)
            checks.has_shape(name, given, tuple(labels.shape))
            checks.same_device(name, given, labels.device)
    group = process_group(group)
    pieces = 2 if layout == "zigzag" else 1
    if labels.shape[1] % pieces:
        raise ShapeError(
            f"labels: expected an even number of positions with layout='zigzag', got {labels.shape[1]}"
        )
    learned = labels if mask is None else labels.masked_fill(mask == 0, ignore_index)
    target = _shifted(learned, documents, group, pieces, ignore_index) if shift else learned
    tokens = (target != ignore_index).sum()
    with failures.named(group):
        dist.all_reduce(tokens, group=group)
    return SequenceShard(target, tokens, tokens.clamp(min=1).to(torch.float32))


def _shifted(labels: Tensor, documents: Tensor | None, group: Any, pieces: int, ignore_index: int) -> Tensor:
    batch, length = labels.shape
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    size = length // pieces
    if not size:
        raise ShapeError(f"labels: expected at least {pieces} positions on each process, got {length}")
    # [2, B, pieces, size]: labels and documents
    own = torch.stack([labels, labels if documents is None else documents.to(torch.int64)])
    own = own.reshape(2, batch, pieces, size)
    firsts = own[..., 0].contiguous()  # [2, B, pieces]
    everyone = all_gather(firsts, group)  # [world, 2, B, pieces]
    target = torch.full_like(own[0], ignore_index)
    same = torch.ones_like(own[0], dtype=torch.bool)
    target[..., :-1] = own[0, ..., 1:]
    same[..., :-1] = own[1, ..., 1:] == own[1, ..., :-1]
    for piece in range(pieces):
        place = rank if piece == 0 else 2 * world - 1 - rank  # among all pieces
        after = place + 1
        if after == pieces * world:
            continue  # the end of the sequence
        there, which = (after, 0) if after < world else (2 * world - 1 - after, 1)
        target[:, piece, -1] = everyone[there, 0, :, which]
        same[:, piece, -1] = everyone[there, 1, :, which] == own[1, :, piece, -1]
    if documents is not None:
        target = target.masked_fill(~same, ignore_index)
    return target.reshape(batch, length)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.detach().clone(memory_format=torch.contiguous_format)
        with failures.named(group):
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, None


def sum_over_shards(part: Tensor, group: Any) -> Tensor:
    """The sum over the group of what each process has of a number, for a loss that every process then computes from it.

    The log-probability of a response whose tokens lie on several processes::

        logps = fastloss.linear_token_stats(hidden, weight, shard.target).logprobs.sum(-1)   # 0 where ignored
        logps = fastloss.parallel.sum_over_shards(logps, group)
        out = fastloss.dpo_loss(logps[:pairs], logps[pairs:], ref_chosen, ref_rejected)

    The gradient of a process's part is that of the sum: the loss counts once, though every process computes it, and the
    gradients of a weight that all have add up over the group.

    Args:
        part: of any shape, the same on each process. group: as in :func:`sequence_shard`.

    >>> import torch, fastloss.parallel
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> fastloss.parallel.sum_over_shards(torch.tensor([-1.5]), dist.group.WORLD)
    tensor([-1.5000])
    >>> dist.destroy_process_group()
    """
    checks.is_floating("part", part)
    return _Sum.apply(part, process_group(group))
