"""patch(): torch.nn.functional.cross_entropy computed by fastloss, for people who own no line of the trainer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.integrations.handle import Handle
from fastloss.lazy_rules import LOW_PRECISION, RULES

__all__ = ["patch"]

_ORIGINAL = F.cross_entropy


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy, by fastloss."""
    plain = type(input) in (Tensor, torch.nn.Parameter) and type(target) in (Tensor, torch.nn.Parameter)
    if not plain or not input.is_floating_point() or input.device.type == "meta":
        # Lazy logits, sharded tensors, fake ones: torch's function asks them first.
        return _ORIGINAL(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if torch.is_autocast_enabled(input.device.type) and input.dtype in LOW_PRECISION:
        input = input.float()  # autocast runs cross-entropy in float32
    return fastloss.cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )


# torch's own function announces itself to lazy logits by the name that it has in its module: this one, while patched.
RULES[_cross_entropy] = RULES[_ORIGINAL]


def patch() -> Handle:
    """Let ``torch.nn.functional.cross_entropy``, and ``torch.nn.CrossEntropyLoss`` with it, be fastloss's.

    For the process until ``undo()``, or for a ``with`` block. Code that took the function itself before
    (``from torch.nn.functional import cross_entropy``) keeps torch's. Applying twice is harmless: the first handle
    undoes it.

    Returns:
        Handle: with ``undo()``; a context manager.

    >>> import torch, fastloss
    >>> with fastloss.patch():
    ...     loss = torch.nn.CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> round(loss.item(), 4)
    1.3863
    """
    if F.cross_entropy is _cross_entropy:
        return Handle([])
    before: Any = F.cross_entropy

    def undo() -> None:
        if F.cross_entropy is _cross_entropy:
            F.cross_entropy = before

    F.cross_entropy = _cross_entropy
    return Handle([undo])
