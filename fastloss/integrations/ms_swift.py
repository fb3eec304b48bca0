"""ms-swift: ``--loss_type fastloss --external_plugins file.py``, where the file calls ``register()``."""

from __future__ import annotations

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastloss.integrations import transformers
from fastloss.integrations.handle import Handle

__all__ = ["register"]


def register(name: str = "fastloss") -> Handle:
    """Add ``name`` to ms-swift's ``loss_map``: next-token cross-entropy, with its ``loss_scale`` per token."""
    losses = importlib.import_module("swift.loss")
    if name in losses.loss_map:
        return Handle([])
    base: Any = losses.BaseLoss

    class FastlossLoss(base):
        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(args, trainer)
            self.applied = Handle([])

        def __call__(
            self,
            outputs: Any,
            labels: Tensor,
            *,
            num_items_in_batch: Any = None,
            loss_scale: Tensor | None = None,
            **kwargs: Any,
        ) -> Tensor:
            model = getattr(self.trainer, "model", None)
            if model is not None:  # from the next step on its logits are lazy; again is harmless
                transformers.apply(model)
            logits = outputs.logits
            target = labels.roll(-1, -1).reshape(-1).to(logits.device)
            logits = logits.float().reshape(-1, logits.shape[-1])
            if num_items_in_batch is None:
                num_items_in_batch = (labels[:, 1:] != -100).sum()
            if loss_scale is None:
                return F.cross_entropy(logits, target, reduction="sum") / num_items_in_batch
            loss = F.cross_entropy(logits, target, reduction="none") * loss_scale.reshape(-1)
            return loss.sum() / num_items_in_batch

    losses.loss_map[name] = FastlossLoss
    return Handle([lambda: losses.loss_map.pop(name, None)])
