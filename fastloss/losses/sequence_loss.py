"""linear_sequence_loss: a loss of the caller's own of whole sequences, from hidden states, at the GEMMs of the built-in ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine import head as heads
from fastloss.engine import head_groups as groups
from fastloss.engine.autograd import segment_sum
from fastloss.engine.backend import resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.engine.contract import Backend
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.jagged import takes_jagged
from fastloss.losses.token_stats import TokenStats, row_options, stats_from
from fastloss.tables import Number

# What float16's coefficients are multiplied by until the gradients are made, so that the terms of a mean do not vanish.
_LARGEST_FACTOR = 256


class SequencePart(NamedTuple):
    """Some whole sequences of a batch, as :func:`linear_sequence_loss` hands them to the caller's loss.

    Attributes:
        logps: Σ log p of each sequence, ``[S]``, differentiable.
        logprobs: log p of their tokens, one sequence after the other, ``[n]``, differentiable.
        mask: bool ``[n]``, which of the tokens have a target. The others are left out, but for calls that torch.compile traces and for
            a GPU that may not be asked which they are: there their log-prob is 0, and a function of tokens must leave them out.
        cu_seqlens: int64 ``[S + 1]``, where each sequence begins in ``logprobs`` and in ``stats``.
        lengths: tokens with a target of each sequence, ``[S]``, in the dtype of ``logps``.
        indices: int64 ``[S]``, which sequences of the batch these are: ``advantages[part.indices]``.
        stats: TokenStats ``[n]`` of the wanted outputs, detached.
    """

    logps: Tensor
    logprobs: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    indices: Tensor
    stats: TokenStats


@takes_jagged(TokenStats)
@takes_dtensors("linear_weight")
@resolves_views
def linear_sequence_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss_fn: Callable[[SequencePart], Tensor],
    *,
    linear_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    outputs: tuple[str, ...] = ("logprobs",),
    coupled: bool = False,
    temperature: Number = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    memory: str = "auto",
    group: Any = None,
    logits_dtype: torch.dtype | None = None,
    lora: Any = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    """A loss of your own of sequences' log-probs under ``input @ linear_weight.T + linear_bias``, whose logits are never held.

    ``loss_fn`` gets whole sequences with the log-probs of their tokens and returns the sum of their losses; it is called once for
    each part of the batch, and what it returns adds up. Its gradient is taken by autograd as soon as a part's log-probs are
    there, and made into those of ``input`` and ``linear_weight`` while its logits are: 3 GEMMs, 2 with a frozen weight, where
    ``linear_token_stats`` and a loss after it cost 4. It may be called again in a second backward, so it must return the same
    for the same part.

    Args:
        input: hidden states ``[B, T, D]``, or packed ``[N, D]`` with ``cu_seqlens`` ``[B + 1]``.
        linear_weight: ``[V, D]``. linear_bias: ``[V]``.
        target: int64 ``[B, T]`` or ``[N]``; ``ignore_index`` on prompts and padding.
        loss_fn: :class:`SequencePart` -> a 0-d tensor. A mean over the batch divides by the batch's size in here. Other tensors that
            it reads are constants: one that requires a gradient is an error.
        outputs: statistics that ``loss_fn`` and the caller read, detached, as in :func:`token_stats`; "logprobs" is always there.
        coupled: a sequence's term depends on other sequences: ``loss_fn`` is called once, with all. 4 GEMMs where they do not fit into
            one part.
        temperature, logit_scale, softcap: as in :func:`linear_token_stats`.
        chunk_size, memory, group, logits_dtype, lora: as in :func:`linear_preference_loss`.
        return_stats: also a :class:`TokenStats` of ``target``'s shape with ``outputs``, detached and 0 where ignored.

    Returns:
        The loss, 0-d, in float32 (float64 for float64 input); or with ``return_stats`` the pair (loss, TokenStats).

    Raises:
        ValueError: shapes, dtypes or options that do not fit; a ``loss_fn`` that returns no 0-d tensor, or one that does not depend on
            the log-probs, or that depends on another tensor with a gradient. IndexError: on the CPU, a bad target.

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(2, 3, 8, requires_grad=True), torch.zeros(4, 8)
    >>> target = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    >>> reward = torch.tensor([1.0, -1.0])
    >>> loss = fastloss.linear_sequence_loss(hidden, weight, target, lambda part: -(reward[part.indices] * part.logps).sum())
    >>> round(loss.item(), 4)
    1.3863
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function, got {type(loss_fn).__name__}")
    want = ("logprobs", *(name for name in outputs if name != "logprobs"))
    for name in want:
        checks.is_one_of("outputs", name, groups.TOKEN_STATS)
    options = row_options(temperature, logit_scale, softcap, ignore_index, input.shape[:-1], input)
    x = groups.check_grouped_head(
        input,
        linear_weight,
        target,
        linear_bias,
        cu_seqlens,
        options,
        heads.limits_of(chunk_size, memory, group, input, linear_weight, target, ignore_index, logits_dtype),
        width=1,
        lora=lora,
    )
    plan = groups.plan_groups(
        "linear_sequence_loss", x, backend, (cu_seqlens,), coupled=coupled, per_group=False, ref=False
    )
    own = _SequencesOfHead(x, loss_fn, want)
    factor = min(max(x.rows.groups, 1), _LARGEST_FACTOR)
    value, out = groups.evaluate(x, plan, own, want, (), factor, want)
    if not return_stats:
        return value
    return value, stats_from(groups.in_place_of_targets(out, x, target), want)


@dataclass(frozen=True)
class _SequencesOfHead:
    """The caller's loss, as engine/head_groups.py asks for it."""

    x: groups.GroupedHead
    loss_fn: Callable[[SequencePart], Tensor]
    want: tuple[str, ...]

    def of_groups(
        self,
        backend: Backend,
        logprobs: Tensor,
        stats: dict[str, Tensor],
        rows: tuple[int, int],
        groups: tuple[int, int],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (start, stop), (first, last) = rows, groups
        layout = self.x.rows.part(first, last, start, stop)
        assert layout.offsets is not None
        mask = self.x.rows.tokens.mask
        kept = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask[start:stop] != 0
        part = SequencePart(
            logps=segment_sum(backend, logprobs, None, layout),
            logprobs=logprobs,
            mask=kept,
            cu_seqlens=layout.offsets,
            lengths=self.x.rows.tokens.lengths[first:last],
            indices=torch.arange(first, last, device=logprobs.device, dtype=torch.int64),
            stats=stats_from({name: stats[name].detach() for name in self.want}, self.want),
        )
        loss = self.loss_fn(part)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ShapeError(f"loss_fn: expected a 0-d tensor, the sum of the sequences' losses, got {got}")
        loss = loss.reshape(()).to(logprobs.dtype)
        _check_reads(loss, logprobs)
        if logprobs.requires_grad and not loss.requires_grad:
            if logprobs.numel():  # a part without tokens has a loss without a gradient
                raise ValueError(
                    "loss_fn: expected a loss that depends on logps or logprobs, got one without a gradient"
                )
            loss = loss + logprobs.sum()
        return loss, {}


def _check_reads(loss: Tensor, logprobs: Tensor) -> None:
    """Raises where the loss depends on a leaf with a gradient other than the log-probs: it would get none, without a word."""
    if torch.compiler.is_compiling() or loss.grad_fn is None:
        return
    seen: set[Any] = {logprobs.grad_fn}
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not logprobs:
            raise ValueError(
                "loss_fn: expected a loss of the log-probs and of constants; it depends on another tensor of shape "
                f"{list(leaf.shape)} that requires a gradient: detach it"
            )
        nodes.extend(following for following, _ in node.next_functions)
