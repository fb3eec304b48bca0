"""DeepSpeed: the function that its ``TiledFusedLogitsLoss`` takes, or the whole loss without tiles."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastloss.integrations.heads import lazy_heads

__all__ = ["head_loss"]


def head_loss(head: nn.Module, hidden: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum over the tokens of ``hidden [B, T, D]`` against ``target [B, T]`` (already shifted, -100 ignored).

    As ``fn`` of ``TiledFusedLogitsLoss.apply(fn, head, hidden, target, mask, shards, params, "sum")`` its tiles need no
    logits; alone it needs no tiles: the memory does not grow with the tokens. Divide by the global count of tokens.

    Args:
        mask: bool or 0/1 ``[B, T]``, the tokens that count.

    >>> import torch
    >>> from fastloss.integrations.deepspeed import head_loss
    >>> loss = head_loss(torch.nn.Linear(4, 8, bias=False), torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
    >>> round(loss.item(), 4)
    2.0794
    """
    if mask is not None:
        target = target.masked_fill(~mask.bool(), -100)
    with lazy_heads(head):
        logits = head(hidden)
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), reduction="sum")
