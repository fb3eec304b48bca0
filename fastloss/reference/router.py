"""Definition of the load-balancing loss of routers."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing(
    logits: Tensor,
    selected: Tensor,
    kept: Tensor,
    scopes: tuple[int, int],
    scores: str,
    load: Tensor | None,
    per_choice: bool,
) -> tuple[Tensor, Tensor]:
    """(the loss, the load f ``[layers or 1, sequences or 1, experts]``).

    Args:
        logits: ``[layers, sequences, tokens, experts]``. selected: ``[layers, sequences, tokens, K]``. kept: bool ``[sequences, tokens]``.
        scopes: what layers and sequences are averaged over before f and P meet: 1, or all of them.
    """
    layers, sequences, _, experts = logits.shape
    # A masked token may hold anything: it is replaced before anything is computed from it.
    logits = torch.where(kept[..., None], logits, 0.0)
    p = logits.softmax(-1)
    if scores == "sigmoid":
        p = logits.sigmoid()
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    chosen = torch.nn.functional.one_hot(selected, experts).to(p.dtype).sum(-2)  # [L, S, T, E]
    weight = kept[..., None].to(p.dtype)
    shape = (scopes[0], layers // scopes[0], scopes[1], sequences // max(1, scopes[1]), experts)

    def within(x: Tensor) -> Tensor:
        return (x * weight).sum(-2).reshape(shape).sum((1, 3))

    count = within(torch.ones_like(p)).clamp(min=1)
    choices = selected.shape[-1] if per_choice else 1
    f = within(chosen) / (count * choices) if load is None else load
    return experts * (f * within(p) / count).sum() / max(1, scopes[0] * scopes[1]), f
