"""A vocabulary that is cut over the processes of a group: who has which classes, and the statistics of a row from all of them.

Every process has the rows of the vocabulary matrix that follow those of the process before it, the same hidden states and the
same targets. A loss needs a few numbers of each token (engine/contract.py, ``row_stats``); those of a shard and those of the
whole row are connected by the shard's share π of the row's probability::

    log π_r = (largest_r - largest) + (log Σ_r - log Σ)
    log p   = log p_r + log π_r                      where r has the target
    H       = Σ_r π_r (H_r - log π_r)                terms of one sign: nothing cancels

So the statistics travel, and nothing else: one all-gather of 2 to 6 numbers of each token, from which every process computes
the same bits; the gradients of a shard's columns then need no other shard, and d hidden is one sum over the group (as in
Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, which does this for cross-entropy).

A loss that reads more of a row than that has two further messages: numbers that add up over the classes (a divergence from a
teacher; :func:`add_in_order`), and the logits of a few classes that an id names, each of which one process has (:meth:`Shards.from_owner`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss.engine import failures
from fastloss.engine.checks import ShapeError
from fastloss.engine.contract import Factor
from fastloss.tables import ARGMAX, DTYPE_CODES, LSE_PARTS, CrossEntropyOptions, RowOptions

# Its name since torch 2.13, and the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

# The ignored target of a shard: no class, whatever number the caller ignores (that may be a class of another shard).
NO_TARGET = -(2**63)


@dataclass(frozen=True)
class Shards:
    """The classes of each process of a group: ``sizes[r]`` of them, after those of the processes before r."""

    sizes: tuple[int, ...]
    rank: int = 0
    group: Any = None  # a torch.distributed ProcessGroup
    reduce_hidden: bool = True  # False: the caller sums d hidden over the group

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return (0, *itertools.accumulate(self.sizes))

    @property
    def first(self) -> int:
        """The first class of this process."""
        return self.starts[self.rank]

    @property
    def own(self) -> int:
        return self.sizes[self.rank]

    @property
    def vocab(self) -> int:
        """Classes of all processes."""
        return self.starts[-1]

    @property
    def world(self) -> int:
        return len(self.sizes)

    def owner(self, target: Tensor) -> Tensor:
        """The process that has each class, int64; for an ignored target, or a bad one, any."""
        size = self.sizes[0]
        if size >= self.sizes[-1] and size and all(n == size for n in self.sizes[:-1]):
            return (target // size).clamp_(0, self.world - 1)
        # No table of the borders: a list of the host's reaches a GPU by a copy that waits, and that no CUDA graph captures.
        out = torch.zeros_like(target)
        for border in self.starts[1:-1]:
            out += target >= border
        return out

    def local(self, target: Tensor | None, ignore_index: int) -> tuple[Tensor | None, Tensor | None]:
        """(each target as a class of this shard, 0 where another one has it; whether this one has it)."""
        if target is None:
            return None, None
        ignored = target == ignore_index
        mine = self.has(target) & ~ignored
        none = (target < 0) | (target >= self.vocab)  # a bad target is one to every shard's kernel
        local = torch.where(mine, target - self.first, 0).masked_fill(none, self.own)
        return local.masked_fill(ignored, NO_TARGET), mine

    def has(self, classes: Tensor) -> Tensor:
        """Whether this process has each class."""
        return (classes >= self.first) & (classes < self.first + self.own)

    def local_ids(self, ids: Tensor) -> Tensor:
        """Each id as a class of this shard; -1 where another one has it, or none."""
        return torch.where(self.has(ids), ids - self.first, -1)

    def columns(self, w: Tensor | None) -> Tensor | None:
        """This shard's part of one number per class."""
        return None if w is None else w[self.first : self.first + self.own].contiguous()

    def gather(self, message: Tensor) -> Tensor:
        """``[numbers, rows]`` of every process: ``[processes, numbers, rows]``."""
        return all_gather(message, self.group)

    def add_up(self, partial: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if partial.numel():
            with failures.named(self.group):
                dist.all_reduce(partial, group=self.group)
        return partial

    def from_owner(self, own: Tensor, mine: Tensor) -> Tensor:
        """Numbers each of which one process has (``mine``), on every process; 0 what none has. One sum of a number and of zeros:
        the same bits everywhere."""
        return self.add_up(torch.where(mine, own, 0.0))

    def details(
        self, rows: int, want: Sequence[str], dtype: torch.dtype, hidden: Tensor | None = None
    ) -> dict[str, Any]:
        """What ``explain`` tells: bytes that this process sends. Its numbers of each token, to each other process; and d hidden,
        twice less a share, as a ring sums it. ``dtype`` is that of the statistics."""
        return self.told(rows * (1 + len(needed(want))) * dtype.itemsize, 0, hidden)

    def told(self, gathered: int, summed: int, hidden: Tensor | None) -> dict[str, Any]:
        """The same of ``gathered`` bytes of this process in all-gathers, and of ``summed`` bytes in sums beside d hidden's."""
        others = self.world - 1
        if hidden is not None and self.reduce_hidden:
            summed += hidden.numel() * hidden.element_size()
        return {
            "vocabulary_shards": list(self.sizes),
            "gathered_bytes": others * gathered,
            "reduced_bytes": 2 * others * summed // self.world,
        }


class Call(NamedTuple):
    """What the processes of a group must have in common to compute one call together."""

    rows: int
    dim: int  # of the hidden states; 0 where logits are given
    dtype: torch.dtype
    target: Tensor | None
    ignore_index: int


def of_group(group: Any, own: int, device: torch.device, call: Call | None = None) -> Shards:
    """The shards of a group, of which this process has ``own`` classes. A DeviceMesh of one dimension is its group; Shards are
    what they are. One all-gather of a few integers, by which all processes find out, and say, that one of them has other tokens
    or a bad target: none is left waiting for it.

    Raises:
        TypeError: it is neither a process group nor such a mesh. ValueError: this process is not in it.
        ShapeError: the processes have other numbers of tokens, hidden sizes or dtypes.
        IndexError: on a CPU, a process has a target that is no class.
        ProcessFailed: a process is gone, or does not take part within the group's timeout.
    """
    if isinstance(group, Shards):
        if group.own != own:
            raise ShapeError(f"group: expected the {group.own} classes of this process's shard, got {own}")
        return group
    group = process_group(group)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected a group that this process belongs to")
    failures.register(group)
    low, high = _range(call)
    rows, dim, code = (-1, -1, -1) if call is None else (call.rows, call.dim, DTYPE_CODES.get(call.dtype, -1))
    mine = torch.tensor([own, rows, dim, code, low, high], dtype=torch.int64, device=device)
    everyone = all_gather(mine, group).view(-1, 6).tolist()
    shards = Shards(tuple(each[0] for each in everyone), rank, group)
    _agree(everyone, shards.vocab)
    return shards


def _range(call: Call | None) -> tuple[int, int]:
    """The least and the largest target; (0, 0) where there is none, or where a GPU would be waited for."""
    if call is None or call.target is None or call.target.device.type != "cpu":
        return 0, 0
    learned = call.target[call.target != call.ignore_index]
    return (int(learned.min()), int(learned.max())) if learned.numel() else (0, 0)


def _agree(everyone: list[list[int]], vocab: int) -> None:
    names = {1: "tokens", 2: "numbers in a hidden state", 3: "dtype (a position in fastloss.tables.DTYPES)"}
    for place, name in names.items():
        values = [each[place] for each in everyone]
        if len(set(values)) > 1:
            told = ", ".join(f"process {rank}: {value}" for rank, value in enumerate(values))
            raise ShapeError(f"group: expected the same {name} on every process, got {told}")
    for rank, (*_, low, high) in enumerate(everyone):
        if low < 0 or high > max(0, vocab - 1):
            bad = low if low < 0 else high
            raise IndexError(
                f"target: Target {bad} of process {rank} is out of bounds: expected a class in [0, {vocab})"
            )


def both(student: Shards, teacher: Shards) -> Shards:
    """The classes that two models have in common, where the wider one has padding at the end of its vocabulary, or of its shards:
    each process must have the same ones of both.

    Raises:
        ShapeError: it has not.
    """
    sizes = tuple(min(pair) for pair in zip(student.sizes, teacher.sizes, strict=True))
    out = replace(student, sizes=sizes)
    same = all(
        not n or student.starts[rank] == teacher.starts[rank] == out.starts[rank]
        for rank, n in enumerate(sizes)
    )
    if not same or out.vocab != min(student.vocab, teacher.vocab):
        raise ShapeError(
            f"group: expected the teacher's vocabulary cut at the student's classes {list(student.sizes)}, got {list(teacher.sizes)}"
        )
    return out


def of_teacher(group: Any, shards: Shards, own: int, device: torch.device) -> Shards:
    """:func:`both` of a student's ``shards`` and of a teacher of whose vocabulary this process has ``own`` classes."""
    if isinstance(group, Shards):  # nothing is exchanged: the teacher's are cut as these
        if group.own != own:
            raise ShapeError(
                f"group: expected the {group.own} classes of this process's shard of the teacher's vocabulary too, got {own}"
            )
        return shards
    return both(shards, of_group(group, own, device))


def process_group(group: Any) -> Any:
    """A ProcessGroup, or that of a DeviceMesh of one dimension."""
    get = getattr(group, "get_group", None)
    if get is not None and hasattr(group, "mesh"):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected a DeviceMesh of one dimension, got {group.ndim}; take one by name"
            )
        return get()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh or Shards, got {type(group).__name__}")
    return group


def all_gather(own: Tensor, group: Any) -> Tensor:
    """The dense tensors of one shape of all processes, ``[processes, ...]``."""
    out = own.new_empty((dist.get_world_size(group), *own.shape))
    if own.numel():
        with failures.named(group):
            _all_gather(out.view(-1, *own.shape[1:]), own, group=group)
    return out


def needed(want: Sequence[str]) -> tuple[str, ...]:
    """The statistics of each shard that ``want`` is made of; lse_parts is two numbers, any other one."""
    names = [name for name in want if name not in (LSE_PARTS, "logsumexp")]
    return (LSE_PARTS, *dict.fromkeys(names))


def combine(
    parts: dict[str, Tensor],
    sizes: Sequence[int] | Tensor,
    owner: Tensor | None,
    ignored: Tensor | None,
    weights: Sequence[float | Tensor] = (),
) -> dict[str, Tensor]:
    """The statistics of whole rows from those of their shards, each ``[processes, rows]`` (``lse_parts`` with 2 at the end).
    A shard without classes, or whose logits are all -inf, has no share. ``sizes`` are the classes of each shard, or of each shard
    and row ``[processes, rows]``. ``distance`` is Σ_v w_v (logsumexp - z_v), with Σ w_v of each shard in ``weights``, or of each
    shard and row in ``mass``, which adds up."""
    largest, log_sum = parts[LSE_PARTS].unbind(-1)
    nothing = largest == -torch.inf
    log_sum = torch.where(nothing, -torch.inf, log_sum)
    top = largest.amax(0)
    apart = torch.where(nothing, -torch.inf, largest - top)
    total = torch.logsumexp(apart + log_sum, 0)
    log_share = apart + log_sum - total
    share = log_share.exp()
    out = {LSE_PARTS: torch.stack([top, total], -1), "logsumexp": top + total}
    if owner is not None:
        own = owner.unsqueeze(0)
        if "logprobs" in parts:
            of_shard = torch.where(nothing, -torch.inf, parts["logprobs"])
            out["logprobs"] = (of_shard + log_share).gather(0, own)[0]
        if "is_top1" in parts:
            out["is_top1"] = (parts["is_top1"].gather(0, own)[0] > 0) & (largest.gather(0, own)[0] >= top)
            out["is_top1"] = out["is_top1"].to(torch.uint8)
    if "entropy" in parts:
        out["entropy"] = torch.where(nothing, 0.0, share * (parts["entropy"] - log_share)).sum(0)
    if "log_sum_sq_probs" in parts:
        squares = torch.where(nothing, -torch.inf, parts["log_sum_sq_probs"] + 2 * log_share)
        out["log_sum_sq_probs"] = torch.logsumexp(squares, 0)
    if "mean_logits" in parts:
        if isinstance(sizes, Tensor):
            of = sizes.to(largest.dtype) / sizes.sum(0)
        else:
            of = _column(sizes, largest) / sum(sizes)
        mean = torch.where(nothing, -torch.inf, parts["mean_logits"])
        out["mean_logits"] = torch.where(of == 0, 0.0, mean * of).sum(0)
    if ARGMAX in parts:  # of equal ones the first shard's; a float32 holds any class exactly
        out[ARGMAX] = parts[ARGMAX].gather(0, largest.argmax(0, keepdim=True))[0].long()
    if "distance" in parts:
        if "mass" in parts:
            of = parts["mass"]
            out["mass"] = of.sum(0)
        else:
            of = _column(weights, largest)
        own = torch.where(nothing, torch.inf, parts["distance"])
        further = torch.where(of == 0, 0.0, own - of * log_share)
        out["distance"] = further.sum(0)
    if ignored is not None:
        out = {
            name: x.masked_fill(ignored.unsqueeze(-1) if x.dim() > 1 else ignored, 0)
            for name, x in out.items()
        }
    return out


def exchange(
    shards: Shards,
    own: dict[str, Tensor],
    target: Tensor | None,
    ignore_index: int,
    weights: Sequence[float | Tensor] = (),
    sizes: Tensor | None = None,
) -> dict[str, Tensor]:
    """The statistics of whole rows, the same bits on every process, from this shard's ``own``. ``weights`` and ``sizes``: as of
    :func:`combine`."""
    parts = own[LSE_PARTS]
    # In one order on every process, whatever its schedule: a shard without classes makes them in another.
    names = sorted(name for name in own if name != LSE_PARTS)
    message = torch.stack([*parts.unbind(-1), *(own[name].to(parts.dtype) for name in names)])
    everyone = shards.gather(message)
    got = {LSE_PARTS: everyone[:, :2].transpose(1, 2)}
    got.update({name: everyone[:, 2 + i] for i, name in enumerate(names)})
    ignored = None if target is None else target == ignore_index
    owner = None
    if target is not None and ignored is not None:
        owner = shards.owner(target.masked_fill(ignored, 0))
    return combine(got, shards.sizes if sizes is None else sizes, owner, ignored, weights)


def cross_entropy(
    stats: dict[str, Tensor], target: Tensor, w: Tensor | None, vocab: int, options: CrossEntropyOptions
) -> Tensor:
    """The loss of each row from its statistics, acc ``[rows]``: those of processes, or of blocks of columns (engine/head_columns.py).
    With label smoothing ``stats`` has "distance", Σ w_v (logsumexp - z_v)."""
    loss = -(1 - options.label_smoothing) * stats["logprobs"]
    if w is not None:
        loss = loss * w[target.clamp(0, vocab - 1)]
    if options.label_smoothing:
        loss = loss + (options.label_smoothing / vocab) * stats["distance"]
    if options.z_loss:
        loss = loss + options.z_loss * stats[LSE_PARTS].sum(-1).square()
    return torch.where(target == options.ignore_index, 0.0, loss)


def upstream_of(loss: Tensor, factor: Factor, row_factors: Tensor | None) -> Tensor:
    """What each row's loss is multiplied by in their sum."""
    upstream = torch.full_like(loss, factor.value) if row_factors is None else row_factors * factor.value
    return upstream if factor.tensor is None else upstream * factor.tensor


def _column(numbers: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """``[numbers, 1]`` in ``like``'s dtype, each filled in on its device: no copy from the host, which would wait."""
    column = like.new_empty(len(numbers), 1)
    for place, number in enumerate(numbers):
        column[place].fill_(number)
    return column


def without_share(parts: Tensor, masked: Callable[[], Tensor]) -> Tensor:
    """lse_parts ``[rows, 2]`` of a shard, of which a row kernel makes NaN where every logit is -inf (``masked``, of each row or of all):
    in the whole row such a shard has no share."""
    nan = parts[:, 1].isnan()
    if parts.device.type == "cpu" and not bool(nan.any()):
        return parts
    nothing = nan & masked()
    return torch.stack([parts[:, 0].masked_fill(nothing, -torch.inf), parts[:, 1].masked_fill(nothing, 0)], 1)


def add_in_order(shards: Shards, own: Tensor) -> Tensor:
    """The sum over the processes of ``own``, in their order and in float64: one all-gather, the same bits on each."""
    return shards.gather(own.contiguous()).double().sum(0).to(own.dtype)


def join_parts(parts: Tensor) -> Tensor:
    """The lse_parts ``[..., 2]`` of the union of disjoint classes, from those of each ``[processes, ..., 2]``. A second number of
    -inf says that there is no class."""
    largest, log_sum = parts.double().unbind(-1)
    nothing = (log_sum == -torch.inf) | (largest == -torch.inf)
    top = torch.where(nothing, -torch.inf, largest).amax(0)
    each = torch.where(nothing, -torch.inf, (largest - top) + log_sum)
    return torch.stack([top, torch.logsumexp(each, 0)], -1).to(parts.dtype)


def local_options(options: RowOptions) -> RowOptions:
    return replace(options, ignore_index=NO_TARGET)


def neutral(rows: int, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The statistics of a shard without classes."""
    out = {name: torch.zeros(rows, dtype=dtype, device=device) for name in names if name != LSE_PARTS}
    lse = torch.zeros(rows, 2, dtype=dtype, device=device)
    lse[:, 0].fill_(-torch.inf)
    return {LSE_PARTS: lse, **out}


class _Whole(torch.autograd.Function):
    """This process's rows -> the rows of all; every process computes the same from them, so that each keeps its own gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        longest = max(shards.sizes)
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: own.shape[0]] = own.detach()
        pieces = all_gather(padded, shards.group)
        return torch.cat([piece[:size] for piece, size in zip(pieces, shards.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        shards: Shards = ctx.shards
        return upstream[shards.first : shards.first + shards.own], None


def whole(own: Tensor | None, shards: Shards | None) -> Tensor | None:
    """The vocabulary matrix or bias of all processes, for the definition, which holds them whole."""
    return own if own is None or shards is None else _Whole.apply(own, shards)
