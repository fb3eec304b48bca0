"""Lightning: a callback that lets the transformers model inside a LightningModule train without logits."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from fastloss.integrations import transformers
from fastloss.integrations.handle import Handle

__all__ = ["FastlossCallback"]


class FastlossCallback(Callback):
    """``Trainer(callbacks=[FastlossCallback()])``: applied when a stage begins, undone when it ends.

    Args:
        model: name of the model inside the LightningModule ("model"; dots go deeper).
        heads: names of its vocabulary heads, as in :func:`fastloss.integrations.transformers.apply`.
    """

    def __init__(self, model: str = "model", heads: Any = None) -> None:
        self.model, self.heads = model, heads
        self._handle = Handle([])

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self._handle = transformers.apply(pl_module.get_submodule(self.model), heads=self.heads)

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self._handle.undo()
