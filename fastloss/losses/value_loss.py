"""value_loss: PPO's loss of a value head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.backend import announce_pointwise
from fastloss.engine.jagged import takes_jagged
from fastloss.losses.policy_inputs import check_like, lay_flat, shares
from fastloss.losses.policy_options import PolicySpec, options_of
from fastloss.tables import ACC_DTYPES, AGGREGATIONS


class ValueOutput(NamedTuple):
    """The loss of a value head and detached 0-d metrics (see :func:`value_loss`)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@takes_jagged()
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
    announce_pointwise("value_loss", backend)
    acc, keep = ACC_DTYPES[values.dtype], inputs.mask.bool()
    share, scale = shares(
        keep, inputs.layout, options.aggregation, options.max_length, inputs.normalizer, acc
    )
    old = None if old_values is None else old_values.reshape(-1).to(acc)
    flat, target = values.reshape(-1).to(acc), returns.reshape(-1).to(acc)
    loss, metrics = _aggregated(flat, old, target, keep, clip_range, share, scale)
    return ValueOutput(loss, metrics)


def _aggregated(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    clip_range: float | None,
    share: Tensor,
    scale: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``scale · Σ share · ½ max((V - R)², (clip(V, V_old ± ε) - R)²)`` and its metrics, over unmasked tokens."""
    values, returns = torch.where(mask, values, 0), torch.where(mask, returns, 0).detach()
    error = (values - returns).square()
    clipped = torch.zeros_like(mask)
    if clip_range is not None and old_values is not None:
        old_values = torch.where(mask, old_values, 0).detach()
        near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
        clipped_error = (near - returns).square()
        clipped = (clipped_error > error) & mask
        error = torch.maximum(error, clipped_error)
    loss = scale * (share * 0.5 * error).sum()
    with torch.no_grad():
        tokens = mask.sum().to(values.dtype).clamp(min=1)

        def variance(x: Tensor) -> Tensor:
            centered = torch.where(mask, x - (x * mask).sum() / tokens, 0)
            return centered.square().sum() / tokens

        spread = variance(returns)
        explained = torch.where(spread > 0, 1 - variance(returns - values) / spread.clamp(min=1e-30), 0)
        metrics = {
            "value/clip_ratio": clipped.sum().to(values.dtype) / tokens,
            "value/explained_variance": explained,
            "value/mean": (values * mask).sum() / tokens,
        }
    return loss, metrics
