"""The model: any causal LM of `transformers`, split into its body and its vocabulary head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from .config import PretrainConfig


@dataclass(frozen=True)
class Head:
    """From hidden states to the logits a loss sees: scale · softcap · tanh((h Wᵀ + b) / softcap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        z = nn.functional.linear(hidden, self.weight, self.bias).float()
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z if self.scale == 1.0 else z * self.scale


def model_config(config: PretrainConfig) -> PretrainedConfig:
    if config.model:
        folder = Path(config.model)
        if not (folder / "config.json").is_file():
            raise ValueError(f"model: expected a folder with config.json, got {config.model!r}")
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.hidden % config.heads or config.hidden // config.heads % 2:
        raise ValueError(f"hidden: expected an even multiple of heads={config.heads}, got {config.hidden}")
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.seq_len,
        tie_word_embeddings=config.tie,
        bos_token_id=0,
        eos_token_id=0,
    )


def build_model(config: PretrainedConfig, seed: int, device: str) -> nn.Module:
    """Random float32 weights that depend on the seed alone."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    return model.to(device).train()


def head_of(model: Any) -> Head:
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if layer is None or not isinstance(layer, nn.Linear):
        raise ValueError(f"model: expected a linear vocabulary head, got {type(layer).__name__}")
    scale = 1.0
    if isinstance(getattr(config, "logit_scale", None), int | float):  # Cohere
        scale = float(config.logit_scale)
    if isinstance(getattr(config, "logits_scaling", None), int | float):  # Granite
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(layer.weight, layer.bias, scale, float(softcap) if softcap else None)


def hidden_states(model: Any, inputs: Tensor) -> Tensor:
    """The body alone: what the head would read.  # [B, T, D]"""
    return model.base_model(input_ids=inputs, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model: Any, inputs: Tensor) -> None:
    """Body and :class:`Head` give the model's own logits; another kind of head is an error, not a guess."""
    training = model.training
    model.eval()
    own = model(input_ids=inputs, use_cache=False).logits.float()
    ours = head_of(model).logits(hidden_states(model, inputs))
    model.train(training)
    tolerance = 1e-4 * float(own.abs().max()) + 1e-6
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-3, atol=tolerance):
        raise ValueError(
            f"model: the logits of {type(model).__name__} are not scale · softcap(hidden · weight): "
            "fastloss does not know this head"
        )


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
