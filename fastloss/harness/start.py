"""Where a later stage starts: the folder that the stage before left, or random weights and a tokenizer made now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import nn

from . import chat, corpus, layers, lora, parallel, tokenizer
from .classifier import with_score
from .config import TrainConfig
from .context import cut_rows
from .model import build_model, check_head, check_positions, folder_of, head_of, load_model, model_config


def tokenizer_of(config: TrainConfig, folder: Path, console: Console) -> Any:
    """The model folder's; without one this run's own, trained on what Python carries."""
    if config.model:
        return chat.load(folder_of(config.model), config.date)
    saved = folder / "tokenizer.json"
    with parallel.first_alone():
        if not saved.is_file():
            console.print("no --model: random weights, and a tokenizer trained on Python's documentation")
            tokenizer.train_bpe(corpus.python_corpus(), config.vocab_size).save(str(saved))
    return chat.wrap(Tokenizer.from_file(str(saved)), config.date)


def language_model(config: TrainConfig, tok: Any) -> Any:
    """A causal LM whose head we know, with at least the tokenizer's vocabulary."""
    device = layers.build_device(config)
    torch.manual_seed(config.seed)
    model: Any = load_model(config.model, device) if config.model else _random(config, device)
    head = head_of(model)
    if len(tok) > head.weight.shape[0]:
        raise ValueError(
            f"model: expected a vocabulary of at least {len(tok)} for its tokenizer, got {head.weight.shape[0]}"
        )
    check_positions(model, config.seq_len)
    check_head(model, torch.arange(1, 9, dtype=torch.int64, device=head.weight.device)[None] % len(tok))
    cut_rows(model, config.seq_len, len(tok))
    return layers.prepare(lora.add(model, config, model.get_output_embeddings()), config).train()


def reference(config: TrainConfig, policy: Any) -> Any:
    """The model that a stage starts from once more, frozen; of ``policy`` with adapters, what is below them."""
    if config.lora_rank:
        return lora.Base(policy)
    device = layers.build_device(config)
    model: Any = load_model(config.model, device) if config.model else _random(config, device)
    return layers.prepare(model.requires_grad_(False), config).eval()


def scoring_model(config: TrainConfig, tok: Any) -> tuple[Any, nn.Linear]:
    """The body with one score in place of the vocabulary head, and that head. The scores begin near 0."""
    device = layers.build_device(config)
    torch.manual_seed(config.seed)

    def build(kind: Any) -> Any:
        if config.model:
            return load_model(config.model, device, kind, num_labels=1)
        shape = model_config(config)
        shape.num_labels, shape.use_cache = 1, False
        return kind(shape).float().to(device)

    model, head = with_score(model_config(config), build)
    model.config.pad_token_id = tok.eos_token_id if tok.pad_token_id is None else tok.pad_token_id
    check_positions(model, config.seq_len)
    return layers.prepare(lora.add(model, config, head), config).train(), head


def _random(config: TrainConfig, device: str) -> Any:
    return build_model(model_config(config), config.seed, device)
