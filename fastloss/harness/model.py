"""The model: any causal LM of `transformers`, split into its body and its vocabulary head."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.utils import logging

from . import parallel
from .config import TrainConfig
from .parallel import gathered
from .report import count


@dataclass(frozen=True)
class Head:
    """From hidden states to the logits a loss sees: scale · softcap · tanh((h Wᵀ + b) / softcap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None
    scale: float
    softcap: float | None
    vocab: int  # rows of the whole matrix
    group: Any = None  # of the processes that have the other rows of ``weight`` (tp)

    def gathered(self) -> Head:
        """With the whole matrix and bias, where they lie in shards, or this process's rows of it: what a loss reads."""
        group = parallel.axis("tp").get_group() if parallel.layout.tp > 1 else None
        return replace(self, weight=gathered(self.weight), bias=gathered(self.bias), group=group)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.group is not None:
            z = parallel.logits_of_parts(hidden, self.weight, self.bias, self.vocab).float()
        else:
            z = nn.functional.linear(hidden, self.weight, self.bias).float()
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z if self.scale == 1.0 else z * self.scale


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """What transformers raises, for sizes that do not fit each other say, in one line that says where."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = (line.strip() for line in str(error).splitlines())
        why = next((line for line in said if line), type(error).__name__)
        raise ValueError(f"model: {what}: {why}") from error


def folder_of(model: str) -> Path:
    """Of a transformers folder, of its config.json, or of a model's name on the hub that the cache holds."""
    path = Path(model)
    if path.name == "config.json" and path.is_file():
        return path.parent
    if not path.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        from huggingface_hub import snapshot_download

        with contextlib.suppress(OSError, ValueError):  # not in the cache, or not a name: the error below
            path = Path(snapshot_download(model, local_files_only=True))
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model: expected a folder with config.json, or a name that the hub's cache holds, got {model!r}"
        )
    return path


def model_config(config: TrainConfig) -> PretrainedConfig:
    if config.model:
        return AutoConfig.from_pretrained(folder_of(config.model), local_files_only=True)
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
    with one_line(f"cannot build {type(config).__name__}'s model"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    return model.to(device).train()


def load_model(name: str, device: str, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The float32 weights of a transformers folder, or of a name that the hub's cache holds."""
    folder = folder_of(name)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a new head is what some stages ask for, and no reason to warn
    try:
        with one_line(f"cannot load {folder}"):
            model = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    model.config.use_cache = False
    return model.to(device)


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
    softcap = softcap or getattr(config, "logits_soft_cap", None)  # RecurrentGemma
    return Head(layer.weight, layer.bias, scale, float(softcap) if softcap else None, layer.weight.shape[0])


def body(model: Any) -> Any:
    """What makes hidden states of tokens."""
    inner = model.base_model
    if inner is model:  # base_model_prefix names what an outer model has, as in Llama 4's text model
        inner = getattr(model, "model", None)
    if inner is None:
        raise ValueError(f"model: expected a body apart from the head, got none in {type(model).__name__}")
    return inner


def hidden_states(
    model: Any, inputs: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The body alone: what the head would read. Positions that restart at 0 part a row's documents.  # [B, T, D]"""
    options = {} if positions is None else {"position_ids": positions}
    if mask is not None:
        options["attention_mask"] = mask
    return body(model)(input_ids=inputs, use_cache=False, **options).last_hidden_state


@torch.no_grad()
def check_head(model: Any, inputs: Tensor) -> None:
    """Body and :class:`Head` give the model's own logits; another kind of head is an error, not a guess."""
    training = model.training
    model.eval()
    with one_line(f"{type(model).__name__} cannot read a row of tokens"):
        own = model(input_ids=inputs, use_cache=False).logits.float()
    ours = head_of(model).logits(hidden_states(model, inputs))
    model.train(training)
    tolerance = 1e-4 * float(own.abs().max()) + 1e-6
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-3, atol=tolerance):
        raise ValueError(
            f"model: the logits of {type(model).__name__} are not scale · softcap(hidden · weight): "
            "fastloss does not know this head"
        )


@torch.no_grad()
def check_packing(model: Any, vocab_size: int) -> None:
    """A document gives the same hidden states in a packed row and alone, or packing is an error."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    ids = torch.arange(1, 13, dtype=torch.int64, device=device)[None] % vocab_size
    positions = torch.tensor([[*range(5), *range(7)]], dtype=torch.int64, device=device)
    together = hidden_states(model, ids, positions)
    apart = torch.cat([hidden_states(model, ids[:, :5]), hidden_states(model, ids[:, 5:])], 1)
    model.train(training)
    if not torch.allclose(together, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max())):
        raise ValueError(
            f"packing: {type(model).__name__} looks from one document into another; use --no-packing"
        )


@torch.no_grad()
def check_positions(model: Any, seq_len: int) -> None:
    """The model has a position for every token of a row, or training would end in an index out of range."""
    inner, words = body(model), model.get_input_embeddings()
    known = None
    for name, module in inner.named_modules():
        if isinstance(module, nn.Embedding) and module is not words and re.search(r"wpe|pos", name):
            known = module.num_embeddings - int(getattr(module, "offset", 0))  # OPT keeps the first two apart
    if known is None and next(inner.parameters()).device.type == "cpu":
        # a table that is no module, as the sines of GPT-J; on a GPU an index out of range would end the process
        if "position_ids" in inspect.signature(inner.forward).parameters:
            try:
                last = torch.tensor([[seq_len - 1]], dtype=torch.int64, device="cpu")
                hidden_states(model, torch.zeros_like(last), last)
            except (IndexError, RuntimeError):
                known = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    if known is not None and known < seq_len:
        raise ValueError(
            f"seq_len: expected at most {known}, the positions of {type(model).__name__}, got {seq_len}"
        )


def parameters(model: nn.Module) -> str:
    """How many, and of these how many are trained where some are frozen; for the report."""
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{count(whole)} parameters" + (f", {count(trained)} of them trained" if trained < whole else "")
