"""nanochat: its GPT trains without logits (padded vocabulary, soft-cap 15, ignore_index -1 are its own code's)."""

from __future__ import annotations

from typing import Any

from fastloss.integrations import transformers
from fastloss.integrations.handle import Handle

__all__ = ["apply"]


def apply(model: Any, head: str = "lm_head") -> Handle:
    """``apply(model)`` after the model is built and before ``torch.compile``; the loss of ``model(idx, targets)`` is then
    computed from the hidden states. Works for any GPT of this kind whose head is a named ``nn.Linear``."""
    return transformers.apply(model, heads=head)
