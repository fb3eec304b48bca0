"""The K-dimensional loss of PyTorch's linear_cross_entropy: one head per place ``d1, …``, one count for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.losses.token_stats import TokenStats


def k_dimensional(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    probabilities: bool,
    options: Any,
    chunk_size: int | None,
    backend: str,
) -> Any:
    """``linear_weight [C, d1, …, D]`` against ``target [N, d1, …]`` (probabilities ``[N, C, d1, …]``)."""
    from fastloss.losses.linear_cross_entropy import linear_cross_entropy

    vocab, *places, dim = linear_weight.shape
    heads = linear_weight.reshape(vocab, -1, dim)
    biases = None if linear_bias is None else linear_bias.reshape(vocab, -1)
    targets = target.reshape(*target.shape[: 2 if probabilities else 1], -1)
    parts = [
        linear_cross_entropy(
            input,
            heads[:, k],
            targets[..., k],
            linear_bias=None if biases is None else biases[:, k],
            weight=weight,
            reduction="none" if options.reduction == "none" else "sum",
            ignore_index=None if probabilities else options.ignore_index,
            label_smoothing=options.label_smoothing,
            z_loss=options.z_loss,
            logit_scale=options.scale,
            softcap=options.softcap or None,
            chunk_size=chunk_size,
            return_stats=options.return_stats,
            backend=backend,
        )
        for k in range(heads.shape[1])
    ]
    losses = [part[0] for part in parts] if options.return_stats else parts
    shape = (input.shape[0], *places)
    loss = (
        torch.stack(losses, dim=-1).reshape(shape)
        if options.reduction == "none"
        else torch.stack(losses).sum()
    )
    if options.normalizer is not None:
        loss = loss / options.normalizer
    elif options.reduction == "mean":
        loss = loss / _count(target, weight, probabilities, vocab, options.ignore_index, heads.shape[1])
    if not options.return_stats:
        return loss
    stats = [part[1] for part in parts]
    return loss, TokenStats(
        *(
            None if field[0] is None else torch.stack(field, dim=-1).reshape(shape)
            for field in zip(*stats, strict=True)
        )
    )


def _count(
    target: Tensor, weight: Tensor | None, probabilities: bool, vocab: int, ignore_index: int, places: int
) -> Any:
    if probabilities:
        return target.shape[0] * places
    kept = target != ignore_index
    if weight is None:
        return kept.sum()
    return (weight.detach()[target.clamp(0, vocab - 1)] * kept).sum()
