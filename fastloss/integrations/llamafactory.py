"""LLaMA-Factory v1: ``kernel_config: {name: fastloss}``; ``register()`` once before the model is built."""

from __future__ import annotations

import importlib
from typing import Any

from fastloss.integrations import transformers
from fastloss.integrations.handle import Handle

__all__ = ["register"]


def apply_fastloss(model: Any, include_kernels: Any = "auto", **options: Any) -> Any:
    """The kernel: the same model, training without logits; logits that its weighted loss asks for are lazy."""
    if include_kernels:
        transformers.apply(model)
    return model


def register(name: str = "fastloss") -> Handle:
    """Register the kernel plugin ``name``."""
    interface = importlib.import_module("llamafactory.v1.plugins.model_plugins.kernels.interface")
    plugin = interface.KernelPlugin
    if plugin._registry[name].get("__call__") is apply_fastloss:
        return Handle([])
    plugin(name).register()(apply_fastloss)
    return Handle([lambda: plugin._registry[name].pop("__call__", None)])
