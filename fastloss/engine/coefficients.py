"""Each loss as row coefficients: ``dz_v = a·[v = target] + b·p_v + c·p_v·log p_v + d·w_v`` (docs/engine.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine.changing import is_given
from fastloss.tables import DIFFERENTIABLE_STATS, CrossEntropyOptions


class Coefficients(NamedTuple):
    """Per-row coefficients, acc ``[rows]``; None is 0."""

    a: Tensor | None = None
    b: Tensor | None = None
    c: Tensor | None = None
    d: Tensor | None = None

    def rows(self, start: int, stop: int) -> Coefficients:
        return Coefficients(*(None if x is None else x[start:stop] for x in self))


def of_cross_entropy(
    upstream: Tensor,
    lse_parts: Tensor,
    target: Tensor | None,
    w: Tensor | None,
    vocab: int,
    options: CrossEntropyOptions,
    mass: Tensor | None = None,
) -> Coefficients:
    """Cross-entropy of each row times its upstream gradient; ``target=None`` is class probabilities in ``w``, whose sums over
    the whole row are ``mass`` (None: w has whole rows)."""
    g = upstream.to(lse_parts.dtype).contiguous()
    label_smoothing, z_loss = options.label_smoothing, options.z_loss
    if target is None:
        assert w is not None
        mass = w.sum(-1) if mass is None else mass
        return Coefficients(b=g * (mass + 2 * z_loss * lse_parts.sum(-1)), d=-g)
    keep = 1.0 - label_smoothing
    own = keep * g
    if w is not None:
        own = own * w[target.clamp(0, vocab - 1)]
    b = own
    if is_given(label_smoothing):
        b = b + g * (label_smoothing if w is None else w.sum() * (label_smoothing / vocab))
    if is_given(z_loss):
        b = b + g * (2 * z_loss) * lse_parts.sum(-1)
    d = g * (-label_smoothing / vocab) if is_given(label_smoothing) else None
    return Coefficients(a=-own, b=b, d=d)


def of_token_stats(
    logprob: Tensor | None, entropy: Tensor | None, logsumexp: Tensor | None, entropy_value: Tensor | None
) -> Coefficients:
    """Of the upstream gradients of log-prob, entropy and logsumexp (None: no gradient)."""
    a, b, c = logprob, None, None
    if logprob is not None:
        b = -logprob
    if logsumexp is not None:
        b = logsumexp if b is None else b + logsumexp
    if entropy is not None:
        # H = lse - Σ p z, so dH/dz_v = -p_v (log p_v + H)
        assert entropy_value is not None
        c = -entropy
        part = c * entropy_value
        b = part if b is None else b + part
    return Coefficients(*(None if x is None else x.contiguous() for x in (a, b, c)))


def vector(upstream: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An upstream gradient as a dense acc vector (it may be expanded, stride 0)."""
    return None if upstream is None else upstream.to(dtype).contiguous()


def of_upstream(
    want: tuple[str, ...], upstream: Sequence[Tensor | None], entropy: Tensor | None, dtype: torch.dtype
) -> Coefficients:
    """Of the upstream gradients of the statistics ``want``."""
    by_name = dict(zip(want, upstream, strict=True))
    g = [vector(by_name.get(name), dtype) for name in DIFFERENTIABLE_STATS]
    return of_token_stats(g[0], g[1], g[2], entropy)
