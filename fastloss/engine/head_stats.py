"""Autograd of token statistics from a linear head: 1 GEMM without gradient, 2 with a frozen weight and log-probs alone, else 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastloss.engine import head as heads
from fastloss.engine.autograd import differentiable_again
from fastloss.engine.coefficients import of_upstream
from fastloss.engine.contract import Backend
from fastloss.engine.definition import REFERENCE
from fastloss.engine.head import Needs, Saved, Schedule
from fastloss.engine.shards import Shards
from fastloss.tables import DIFFERENTIABLE_STATS, LSE_PARTS, RowOptions


@dataclass(frozen=True)
class StatsRun:
    """What forward and backward of statistics from a head need beside the tensors."""

    backend: Backend
    options: RowOptions
    want: tuple[str, ...]
    dtype: torch.dtype
    schedule: Schedule
    needs: Needs
    keep: Tensor | None  # kept_rows
    shards: Shards | None = None
    differentiable: tuple[str, ...] = DIFFERENTIABLE_STATS
    all_come: bool = False  # every one of them will be differentiated

    @property
    def ahead(self) -> bool:
        """Whether d hidden of the log-probs is made with the statistics."""
        frozen = self.needs == Needs(True, False, False)
        here = "logprobs" in self.want and "logprobs" in self.differentiable
        alone = set(self.want) & set(self.differentiable) == {"logprobs"}
        return frozen and here and (alone or not self.all_come)


def _again(ctx: Any) -> Any:
    run: StatsRun = ctx.run
    heads.again_only_whole(run.shards)
    hidden, weight, bias, target, *_ = ctx.saved_tensors
    logits = heads.defined_logits(hidden, weight, bias, run.dtype, run.schedule.float_logits)
    kept = [name for name in run.want if name in run.differentiable]
    out = REFERENCE.row_stats(logits, target, run.options, want=kept)
    return [out[n] if n in run.differentiable else None for n in run.want], [hidden, weight, bias]


class LinearTokenStatistics(torch.autograd.Function):
    """(hidden, weight, bias, target) -> the wanted statistics; logprobs, entropy and logsumexp carry gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | None,
        run: StatsRun,
    ) -> Any:
        ctx.run = run
        ctx.set_materialize_grads(False)
        head = heads.make_head(run.backend, hidden, weight, bias, run.dtype, run.shards)
        # With a frozen weight d hidden of the log-probs is made now: 2 GEMMs in place of 3. Where a gradient of the entropy comes
        # after all (trainers ask for it as a metric, and seldom differentiate it) the logits are made again: 4.
        ctx.ahead = run.ahead
        out, d_hidden = heads.stats(head, target, run.options, run.want, run.schedule, run.keep, ctx.ahead)
        entropy = out.get("entropy")
        if entropy is not None:  # the caller may change what is returned in place
            entropy = entropy.clone()
        ctx.save_for_backward(hidden, weight, bias, target, out[LSE_PARTS], entropy, d_hidden)
        ctx.mark_non_differentiable(*[out[n] for n in run.want if n not in run.differentiable])
        return tuple(out[name] for name in run.want)

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        run: StatsRun = ctx.run
        hidden, weight, bias, target, lse_parts, entropy, d_hidden = ctx.saved_tensors
        none = (None,) * 2
        if all(g is None for g in upstream):
            return (None, None, None, *none)
        g = upstream[run.want.index("logprobs")] if ctx.ahead else None
        if g is not None and sum(x is not None for x in upstream) == 1:
            return ((d_hidden * g[:, None]).to(hidden.dtype), None, None, *none)
        k = of_upstream(run.want, upstream, entropy, lse_parts.dtype)
        head = heads.make_head(run.backend, hidden, weight, bias, run.dtype, run.shards)
        saved = Saved(target, lse_parts, k, run.options, run.keep)
        grads = heads.recompute(head, run.needs, run.schedule, saved)
        return (*heads.finish(grads, heads.leaf_dtypes(hidden, weight, bias), run.backend), *none)
