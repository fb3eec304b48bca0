"""Pretraining, top to bottom: corpus, tokenizer, step, validation, and what the shared run needs to know."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from fastloss.engine.skipping import skipped_share

from . import chat, corpus, layers, lora, measure, parallel, sources, tokenizer
from .config import PretrainConfig, TrainConfig
from .context import cut_rows, own_piece
from .data import IGNORE, Batch, Rows
from .export import export
from .loop import Metrics, StepFn
from .losses import Loss, describe, loss_named, torch_loss
from .model import (
    Head,
    build_model,
    check_head,
    check_positions,
    folder_of,
    head_of,
    hidden_states,
    load_model,
    model_config,
)
from .routers import routers_of, with_routers
from .run import Result, begun, open_folder, train
from .stage import Stage
from .step import autocast, begins, cut_backward, loss_and_grad


@dataclass(frozen=True)
class Data:
    """Made once; runs that differ in their loss alone share it."""

    tokenizer: Tokenizer
    train: Rows
    val: Rows | None
    val_bytes: int
    source: str


def prepare(config: TrainConfig, folder: Path, console: Console) -> Data:
    """Text, tokenizer and rows. The tokenizer is the model folder's, this run's own, or trained now."""
    if config.data:
        texts, skipped = corpus.read_files(config.data, columns=config.column, skip=config.skip_bad_rows)
        source = sources.named(config.data)
    else:
        texts, skipped, source = corpus.python_corpus(), [], "Python's own documentation and docstrings"
    train_texts, val_texts = corpus.split(texts, config.val_fraction)
    vocab_size = int(model_config(config).get_text_config().vocab_size)
    ready = [folder_of(config.model) / "tokenizer.json"] if config.model else []
    saved = next((path for path in [*ready, folder / "tokenizer.json"] if path.is_file()), None)
    end = None
    if (
        saved and saved.with_name("tokenizer_config.json").is_file()
    ):  # it knows its own end and beginning of texts
        known = chat.load(saved.parent, config.date)
        bpe, end = known.backend_tokenizer, known.eos_token_id
    else:
        bpe = tokenizer.load(saved) if saved else tokenizer.train_bpe(train_texts, vocab_size)
    if bpe.get_vocab_size() > vocab_size:
        raise ValueError(
            f"model: expected a vocabulary of at least {bpe.get_vocab_size()} for its tokenizer, "
            f"got {vocab_size}"
        )
    train_rows = Rows(tokenizer.encode(bpe, train_texts, end), config.seq_len, config.seed)
    val = Rows(tokenizer.encode(bpe, val_texts, end), config.seq_len) if val_texts else None
    source += f", {len(texts)} documents, {len(train_rows.tokens):,} training tokens"
    source += f", {len(skipped)} rows skipped" if skipped else ""
    held_back = f"{len(val.tokens) if val else 0:,} held back, vocabulary {bpe.get_vocab_size():,}"
    console.print(f"{source}, {held_back}")
    return Data(bpe, train_rows, val, sum(len(text.encode()) for text in val_texts), source)


def make_step(model: Any, head: Head, loss_fn: Loss, rows: Rows, config: PretrainConfig) -> StepFn:
    """Forward and backward of one optimizer step."""
    device, routers = head.weight.device, routers_of(model, config)
    skipped_share()  # that of this run from here on

    def step_fn(step: int) -> Metrics:
        batches = [
            own_piece(rows.batch(start, config.batch_size)).to(device) for start in config.starts(step)
        ]
        # of all passes of all processes: the mean is global
        tokens = int(parallel.summed(sum(int((batch.targets != IGNORE).sum()) for batch in batches))[0])
        total, loss_s = torch.zeros((), dtype=torch.float32, device=device), 0.0
        for batch in batches:
            hidden, beside = with_routers(model, batch, config, routers, len(batches))  # [B, T, D]
            loss, seconds = cut_backward(
                hidden, loss_of(loss_fn, head, batch.targets, tokens, config), beside
            )
            loss_s += seconds
            total += loss
        made: Metrics = {"loss": parallel.summed(total)[0], "tokens": tokens, "loss_s": loss_s}
        share = skipped_share()
        if share is not None:
            made["skipped_share"] = share
        return made

    return step_fn


def loss_of(loss_fn: Loss, head: Head, targets: Tensor, tokens: int, config: PretrainConfig) -> Any:
    def of(hidden: Tensor) -> Tensor:
        with autocast(config, hidden.device):
            return loss_fn(hidden.flatten(0, 1), head.gathered(), targets.flatten(), tokens)

    return of


@torch.no_grad()
def evaluate(model: Any, head: Head, loss_fn: Loss, data: Data, config: PretrainConfig) -> dict[str, float]:
    """Mean loss over every held-back token."""
    if data.val is None:
        return {}
    model.eval()

    def total(batch: Batch) -> float:
        with autocast(config, head.weight.device):
            hidden = hidden_states(model, batch.inputs.to(head.weight.device))
            targets = batch.targets.to(hidden.device)
            return float(loss_fn(hidden.flatten(0, 1), head.gathered(), targets.flatten(), 1))

    tokens = len(data.val.tokens) - 1
    loss = sum(parallel.spread(total, list(data.val.in_order(config.batch_size)))) / tokens
    model.train()
    bits = loss * tokens / math.log(2)
    return {"perplexity": math.exp(min(loss, 700)), "loss": loss, "bits_per_byte": bits / data.val_bytes}


def model_flops(model: Any, head: Head, rows: Rows, config: PretrainConfig) -> int:
    """Counted on one row with PyTorch's plain loss, so that a fused or hidden operator cannot change it.

    Forward and backward are linear in the number of rows; the counter saw one of each replica.
    """
    one = replace(config, batch_size=1, accumulate=1)
    flops = measure.count_flops(partial(make_step(model, head, torch_loss, rows, one), 0))
    model.zero_grad(set_to_none=True)
    return flops * config.rows_per_step // parallel.replicas()


def tokenizer_to_export(config: PretrainConfig, data: Data) -> Any:
    """The model folder's with its own names of special tokens, or what was trained here."""
    folder = folder_of(config.model) if config.model else None
    if folder and (folder / "tokenizer.json").is_file():
        return chat.load(folder, config.date)
    return chat.wrap(data.tokenizer, config.date)


def loss_alone(model: Any, head: Head, loss_fn: Loss, rows: Rows, config: PretrainConfig) -> Any:
    inputs, targets, *_ = rows.batch(0, config.batch_size).to(head.weight.device)
    with torch.no_grad(), autocast(config, inputs.device):
        hidden = hidden_states(model, inputs)
    return partial(loss_and_grad, hidden, loss_of(loss_fn, head, targets, targets.numel(), config))


@begun
def run(
    config: PretrainConfig, *, resume: bool, overwrite: bool, console: Console,
    data: Data | None = None, title: str = "pretrain",
) -> Result:  # fmt: skip
    loss_fn = loss_named(config.loss, config.skip)
    if config.skip and config.loss != "fastloss":
        raise ValueError(
            f"skip: expected --loss fastloss, which alone leaves gradients out, got {config.loss}"
        )
    folder = open_folder(config, resume, overwrite, console)

    def read() -> Data:  # the others find the tokenizer
        found = data or prepare(config, folder, console)
        found.tokenizer.save(str(folder / "tokenizer.json"))
        return found

    data = parallel.from_reader(read, in_turn=True)

    device = layers.build_device(config)
    if config.keep_weights:
        model: Any = load_model(config.model, device).train()
    else:
        model = build_model(model_config(config), config.seed, device)
    check_positions(model, config.seq_len)
    check_head(model, data.train.row(0)[0][None, :16].to(device))
    cut_rows(model, config.seq_len, model.config.get_text_config().vocab_size)
    lora.add(model, config, model.get_output_embeddings())
    head = head_of(layers.prepare(model, config))
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    rows = data.train
    stage = Stage(
        title=title,
        model=model,
        source=data.source,
        fingerprint=rows.fingerprint(),
        step=lambda name, _: make_step(model, head, loss_named(name, config.skip), rows, config),
        loss_alone=lambda name: loss_alone(model, head, loss_named(name, config.skip), rows, config),
        loss_by=lambda name: describe(name, head, config.batch_size * config.seq_len, dtype, config.skip),
        model_flops=partial(model_flops, model, head, rows, config),
        same_shape=True,
        examples=lambda step: begins(
            chat.wrap(data.tokenizer), rows.order.step(step, config.rows_per_step),
            lambda row: rows.row(row)[0].tolist(),
        ),
        held_back=lambda: evaluate(model, head, loss_fn, data, config),
        metrics={
            "perplexity": "perplexity", "loss": "loss (nats per token)", "bits_per_byte": "bits per byte"
        },
        export=partial(export, model, tokenizer_to_export(config, data)),
    )  # fmt: skip
    return train(stage, config, folder, resume=resume, console=console)
