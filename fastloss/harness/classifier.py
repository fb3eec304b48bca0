"""A body with one score: transformers' own class of the model's family, or one made here of the same parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
)

from .model import body


def with_score(config: PretrainedConfig, build: Callable[[Any], Any]) -> tuple[Any, nn.Linear]:
    """The model that ``build`` makes of a class, and its score: of transformers' own class, if it has one that is linear."""
    kind: Any = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        model = build(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind])
        if _is_score(getattr(model, "score", None)):
            return model, model.score
    model = build(_made(config))
    return model, model.score


def _is_score(head: Any) -> bool:
    return isinstance(head, nn.Linear) and head.out_features == 1


def _made(config: PretrainedConfig) -> type:
    """The family's body under the name that its causal model gives it, and transformers' generic score on top."""
    kind: Any = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model: expected a causal language model, got {kind.__name__}")
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    try:
        from transformers.modeling_layers import GenericForSequenceClassification
    except ImportError:
        raise ValueError(f"model: this transformers has no score for a body as {causal.__name__}'s") from None
    with torch.device("meta"):
        outer = causal(config)
    inner = body(outer)
    prefix = next(name for name, module in outer.named_children() if module is inner)
    if kind not in MODEL_MAPPING or MODEL_MAPPING[kind] is not type(inner):  # the decoder of a pair, say
        raise ValueError(
            f"model: expected a body that reads alone, got {causal.__name__}'s {type(inner).__name__}"
        )
    parent = next(c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel"))
    name = causal.__name__.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    own = {"base_model_prefix": prefix}
    return type(f"{name}ForSequenceClassification", (GenericForSequenceClassification, parent), own)
