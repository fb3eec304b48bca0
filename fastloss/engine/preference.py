"""Autograd of the per-sequence work: segmented sums of token log-probs, contrasts of pairs and of single sequences.

``rows`` is the backend's adapter, or None for the definition. A contrast's gradient is made in its forward, in one launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine.once import once_differentiable
from fastloss.engine.pair_call import PairCall


class SegmentSum(torch.autograd.Function):
    """(values [N]) -> Σ w·v per sequence [count]."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weights: Tensor | None,
        offsets: Tensor | None,
        length: int,
        count: int,
        rows: Any,
    ) -> Tensor:
        ctx.save_for_backward(weights, offsets)
        ctx.length, ctx.n, ctx.rows = length, values.numel(), rows
        if not values.numel() or not count:  # an empty tensor has no address
            return values.new_zeros(count)
        return rows.segment_sum(values.contiguous(), weights, offsets, length, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        weights, offsets = ctx.saved_tensors
        none = (None,) * 5
        if not ctx.n or not upstream.numel():
            return (upstream.new_zeros(ctx.n), *none)
        return (ctx.rows.segment_expand(upstream.contiguous(), weights, offsets, ctx.length, ctx.n), *none)


def segment_sum(
    rows: Any, values: Tensor, weights: Tensor | None, offsets: Tensor | None, length: int, count: int
) -> Tensor:
    """Σ w·v over ``count`` sequences of flat ``values``; a position of weight 0 adds nothing, NaN or not."""
    if rows is None:
        return reference.segment_sum(values, weights, offsets, length, count)
    return SegmentSum.apply(values, weights, offsets, length, count, rows)


# Everything about a launch but what it differentiates: the keywords of reference.unpaired_loss.
UnpairedCall = dict[str, Any]


class PairLoss(torch.autograd.Function):
    """(c, r, nll) -> loss of each pair, or the sum. What else the launch makes is put into ``out``, without a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        c: Tensor,
        r: Tensor,
        nll: Tensor | None,
        call: PairCall,
        per_pair: bool,
        rows: Any,
        out: dict[str, Tensor],
    ) -> Tensor:
        if c.numel():
            nll = nll if nll is None else nll.contiguous()
            out.update(rows.pair_loss(c.contiguous(), r.contiguous(), nll, call))
        else:  # an empty tensor has no address
            names = ("loss", "d_c", "d_r", "d_nll", "chosen_reward", "rejected_reward")
            out.update({name: torch.zeros_like(c) for name in names}, sums=c.new_zeros(7))
        ctx.save_for_backward(out["d_c"], out["d_r"], None if nll is None else out["d_nll"])
        return out["loss"] if per_pair else out["sums"][0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return (*[d * upstream if need else None for d, need in wanted], None, None, None, None)


def pair_loss(
    rows: Any, c: Tensor, r: Tensor, nll: Tensor | None, call: PairCall, per_pair: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch: (loss per pair, or its sum; chosen rewards; rejected rewards; sums)."""
    if rows is None:
        out = reference.pair_loss(c, r, nll, call)
        loss = out["loss"] if per_pair else out["loss"].sum()
    else:
        out = {}
        loss = PairLoss.apply(c, r, nll, call, per_pair, rows, out)
    return loss, out["chosen_reward"], out["rejected_reward"], out["sums"]


class UnpairedLoss(torch.autograd.Function):
    """(logps) -> loss of each sequence, or the sum; the rest as in :class:`PairLoss`."""

    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, call: UnpairedCall, per_sequence: bool, rows: Any, out: dict[str, Tensor]
    ) -> Tensor:
        if logps.numel():
            out.update(rows.unpaired_loss(logps.contiguous(), **call))
        else:
            names = ("loss", "d", "reward")
            out.update({name: torch.zeros_like(logps) for name in names}, sums=logps.new_zeros(7))
        ctx.save_for_backward(out["d"])
        return out["loss"] if per_sequence else out["sums"][0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return ctx.saved_tensors[0] * upstream, None, None, None, None


def unpaired_loss(
    rows: Any, logps: Tensor, call: UnpairedCall, per_sequence: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: (loss per sequence, or its sum; rewards; sums)."""
    if rows is None:
        out = reference.unpaired_loss(logps, **call)
        loss = out["loss"] if per_sequence else out["loss"].sum()
    else:
        out = {}
        loss = UnpairedLoss.apply(logps, call, per_sequence, rows, out)
    return loss, out["reward"], out["sums"]
