"""Axolotl: ``plugins: [fastloss.integrations.axolotl.FastlossPlugin]`` in the YAML, and nothing else."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
from pydantic import BaseModel

from fastloss.integrations import transformers
from fastloss.integrations.handle import Handle

__all__ = ["FastlossArgs", "FastlossPlugin"]


class FastlossArgs(BaseModel):
    """``fastloss: false`` switches the plugin off without taking it out of the list."""

    fastloss: bool = True


class FastlossPlugin(BasePlugin):
    """Every model that Axolotl loads trains without logits, whatever its architecture, adapters included."""

    def __init__(self) -> None:
        super().__init__()
        self.handle = Handle([])

    def get_input_args(self) -> str:
        return "fastloss.integrations.axolotl.FastlossArgs"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        if getattr(cfg, "fastloss", True) is not False:
            self.handle = transformers.apply(model)

    def post_train_unload(self, cfg: Any) -> None:
        self.handle.undo()
