"""Layers of the Hugging Face kernel hub package (``make hub``): stateless modules that replace a forward of another's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss
from fastloss.lazy_logits import LazyLogits, lazy

__all__ = ["ForCausalLMLoss", "LinearHead"]


class ForCausalLMLoss(nn.Module):
    """transformers' loss of the same name, from real logits without a float32 copy of them, or from lazy ones."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(-1).to(logits.device)
        items = num_items_in_batch
        if isinstance(items, Tensor):
            items = items.to(logits.device)
        options = {"ignore_index": ignore_index, "reduction": "mean" if items is None else "sum", **kwargs}
        logits = logits.view(-1, vocab_size)
        if isinstance(logits, LazyLogits):
            loss = F.cross_entropy(logits.float(), target, **options)
        elif logits.dtype in (torch.bfloat16, torch.float16):
            # Token losses are float32 from low-precision logits, and so is their sum.
            keep = target != ignore_index
            token = -fastloss.token_stats(logits, target, ignore_index=ignore_index).logprobs  # type: ignore[operator]
            loss = token.sum() / keep.sum() if items is None else token.sum()
        else:
            loss = fastloss.cross_entropy(logits, target, **options)
        return loss if items is None else loss / items


class LinearHead(nn.Module):
    """The forward of a vocabulary head (``nn.Linear``): in training its logits are lazy, so that a loss makes none."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Any:
        weight: Any = self.weight
        if self.training and torch.is_grad_enabled():
            return lazy(input, weight, self.bias)  # type: ignore[arg-type]
        return F.linear(input, weight, self.bias)  # type: ignore[arg-type]
