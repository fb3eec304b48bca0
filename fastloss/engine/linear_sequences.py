"""The head under a contrast of sequences: 3 GEMMs, chunked by whole groups (a pair, or one sequence).

Once every token of a group has been read its coefficients are known, so that the gradient is made while its logits
are still there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import cross_entropy as ce
from fastloss.engine import head, linear
from fastloss.engine import token_stats as ts
from fastloss.engine.head import Grads, Head, Needs
from fastloss.engine.once import once_differentiable

# (log-probs [n], the other statistics, rows (start, stop), groups (first, last)) -> (loss, outputs per group)
Contrast = Callable[
    [Tensor, dict[str, Tensor], tuple[int, int], tuple[int, int]], tuple[Tensor, dict[str, Tensor]]
]


class Plan(NamedTuple):
    """Everything about a call but what it differentiates."""

    target: Tensor  # [rows]
    call: ts.StatsCall
    contrast: Contrast  # of some groups; the losses of all add up
    rows: list[tuple[int, int]]  # of each chunk
    groups: list[tuple[int, int]]  # of each chunk
    total: int  # the loss is divided by it: float16's coefficients are kept undivided until the end
    dtype: torch.dtype
    chunk: int
    needs: Needs
    outputs: tuple[str, ...]


def run(h: Head, plan: Plan) -> tuple[dict[str, Tensor], Grads]:
    groups = iter(plan.groups)
    call = plan.call

    def row_function(z: Tensor, start: int, stop: int, overwrite: bool) -> dict[str, Tensor]:
        target = plan.target[start:stop]
        part = ts.stats(call, z, target, h.bias)
        with torch.enable_grad():
            logprob = part["logprob"].detach().requires_grad_()
            loss, out = plan.contrast(logprob, part, (start, stop), next(groups))
        if overwrite:
            (a,) = torch.autograd.grad(loss, logprob)
            if ce.factor_is_late(h.dtype):
                a = a * plan.total
            call.rows.row_grad(
                z,
                target,
                ignore_index=call.ignore_index,
                bias=h.bias,
                scale=call.scale,
                softcap=call.softcap,
                lse=part["logsumexp"],
                a=a,
                b=-a,
                out=z,
            )
        kept = {name: value for name, value in part.items() if name in plan.outputs}
        return {"loss": loss.detach().reshape(1), **out, **kept}

    return head.run(h, plan.needs, row_function, bounds=plan.rows)


class LinearContrast(torch.autograd.Function):
    """(hidden, weight, bias) -> loss, and the plan's outputs, which are detached."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Any:
        ctx.plan = plan
        h = linear._head(hidden, weight, bias, plan.dtype, plan.chunk)
        out, grads = run(h, plan)
        ctx.late = ce.factor_is_late(h.dtype)
        ctx.grads = grads if ctx.late else Grads(*linear.finish(grads, linear._dtypes(hidden, weight, bias)))
        ctx.save_for_backward(hidden, weight, bias)
        rest = tuple(out[name] for name in plan.outputs)
        ctx.mark_non_differentiable(*rest)
        return (out["loss"].sum(), *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        plan: Plan = ctx.plan
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # retain_graph: the first backward gave the buffers away
            grads = run(linear._head(hidden, weight, bias, plan.dtype, plan.chunk), plan)[1]
        late = ce.Factor(1.0 / plan.total) if ctx.late else None
        scale = linear._scale(upstream, late, hidden)
        return (*linear.finish(grads, linear._dtypes(hidden, weight, bias), scale, plan.call.rows), None)
