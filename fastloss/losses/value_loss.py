"""value_loss: PPO's loss of a value head."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.autograd import differentiable_again
from fastloss.engine.backend import resolve_call, resolves_views
from fastloss.engine.contract import Backend, ValueInputs
from fastloss.engine.definition import REFERENCE
from fastloss.engine.jagged import takes_jagged
from fastloss.losses.policy_inputs import check_like, lay_flat, shares
from fastloss.losses.policy_options import PolicySpec, options_of
from fastloss.tables import ACC_DTYPES, AGGREGATIONS, VALUE_PLACE

METRICS = ("clip_ratio", "explained_variance", "mean")


class ValueOutput(NamedTuple):
    """The loss of a value head and detached 0-d metrics (see :func:`value_loss`)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@takes_jagged()
@resolves_views
def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    *,
    clip_range: float | None = None,
    aggregation: str = "token-mean",
    max_length: float | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> ValueOutput:
    """PPO's loss of a value head: ``½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)``, aggregated.

    The ½ is TRL's and verl's. Without ``clip_range``: ``½ (V - R)²``.

    Args:
        values: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``; carries the gradient.
        old_values, returns: like ``values``, constants. ``old_values`` may be None without ``clip_range``.
        mask: bool or 0/1 like ``values``; None: all.
        clip_range: ε > 0. aggregation, max_length, normalizer: as in :func:`policy_loss`.

    Returns:
        the loss and the metrics value/clip_ratio, value/explained_variance (1 - Var(R - V)/Var(R); 0 where R is constant),
        value/mean.

    >>> import torch, fastloss
    >>> values = torch.tensor([[1.0, 3.0]])
    >>> fastloss.value_loss(values, None, torch.zeros(1, 2), None).loss
    tensor(2.5000)
    """
    checks.is_floating("values", values)
    inputs = lay_flat(
        "values", values, mask=mask, cu_seqlens=cu_seqlens, dtype=values.dtype, normalizer=normalizer
    )
    check_like("returns", returns, values)
    checks.is_one_of("aggregation", aggregation, AGGREGATIONS)
    if clip_range is not None:
        checks.number("clip_range", clip_range, low=0.0, open_low=True)
        if old_values is None:
            raise ValueError(f"old_values: expected a tensor for clip_range={clip_range}, got None")
    if old_values is not None:
        check_like("old_values", old_values, values)
    options = options_of(
        PolicySpec(aggregation=aggregation, max_length=max_length),
        with_sampler=False,
        with_ref=False,
        default_length=None if cu_seqlens is not None else inputs.layout.length,
    )
    acc, keep = ACC_DTYPES[values.dtype], inputs.mask.bool()
    call = resolve_call(
        "value_loss", backend, values, old_values, returns, mask, normalizer, cu_seqlens, has_operators=False
    )
    call.announce()
    share, scale = None, None
    if inputs.normalizer is not None or AGGREGATIONS[options.aggregation] != "token-mean":
        share, scale = shares(
            keep, inputs.layout, options.aggregation, options.max_length, inputs.normalizer, acc
        )
        if AGGREGATIONS[options.aggregation] != "seq-mean-token-mean":
            share = None  # the mask
    flat = values.reshape(-1).to(acc)
    loss, out = _launch(
        call.backend,
        flat,
        ValueInputs(
            returns=returns.detach().reshape(-1).to(acc).contiguous(),
            mask=inputs.mask,
            old=None
            if clip_range is None or old_values is None
            else old_values.detach().reshape(-1).to(acc).contiguous(),
            clip_range=math.inf if clip_range is None else clip_range,
            share=share,
            scale=scale,
        ),
    )
    metrics = {f"value/{name}": out[VALUE_PLACE[name]] for name in METRICS}
    return ValueOutput(loss, metrics)


def _again(ctx: Any) -> Any:
    values = ctx.saved_tensors[0]
    return [REFERENCE.value_loss(values, ctx.given).loss, None], [values]


class _ValueLoss(torch.autograd.Function):
    """values -> (loss, out); the gradient is made in the forward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, backend: Backend, inputs: ValueInputs) -> Any:
        result = backend.value_loss(values, inputs)
        ctx.given = inputs
        ctx.save_for_backward(values, result.d_values, result.out)
        ctx.mark_non_differentiable(result.out)
        return result.loss.clone(), result.out

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        _, d_values, out = ctx.saved_tensors
        return d_values * (upstream * out[VALUE_PLACE["scale"]]), None, None


def _launch(backend: Backend, values: Tensor, inputs: ValueInputs) -> tuple[Tensor, Tensor]:
    """Loss and ``out`` (fastloss.tables.VALUE_OUT)."""
    if backend.differentiable or not values.numel():
        result = REFERENCE.value_loss(values, inputs)
        return result.loss, result.out
    loss, out = _ValueLoss.apply(values.contiguous(), backend, inputs)
    return loss, out
