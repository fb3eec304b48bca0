"""A body with one score: transformers' own class of the model's family, or one made here of the same parts."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)


def classifier(config: PretrainedConfig) -> Any:
    """What reads and builds a family's classifier: AutoModelForSequenceClassification, which knows the class afterwards."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"model: expected a causal language model, got {type(config).__name__}")
        AutoModelForSequenceClassification.register(
            type(config), _made(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        )
    return AutoModelForSequenceClassification


def score_of(model: Any) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(f"model: expected a linear `score` head, got {type(model).__name__} without one")
    return head


def _made(causal: Any) -> type:
    """The family's body under the name that its causal model gives it, and transformers' generic score on top."""
    try:
        from transformers.modeling_layers import GenericForSequenceClassification
    except ImportError:
        raise ValueError(
            f"model: this version of transformers has no sequence-classification class for {causal.__name__}"
        ) from None
    parent = next(c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel"))
    name = (
        causal.__name__.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + "ForSequenceClassification"
    )
    return type(
        name, (GenericForSequenceClassification, parent), {"base_model_prefix": causal.base_model_prefix}
    )
