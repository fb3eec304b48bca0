"""Pretraining, top to bottom: corpus, tokenizer, model, loop, validation, report."""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from . import checkpoint, corpus, logging, measure, plots, report, tokenizer
from . import config as configs
from .config import PretrainConfig
from .data import IGNORE, Rows
from .loop import Metrics, StepFn, cosine, make_optimizer, run_steps
from .losses import Loss, describe, loss_named, torch_loss
from .model import Head, build_model, check_head, head_of, hidden_states, model_config, parameter_count

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Data:
    """Made once; runs that differ in their loss alone share it."""

    tokenizer: Tokenizer
    train: Rows
    val: Rows | None
    val_bytes: int
    source: str


@dataclass(frozen=True)
class Cost:
    """What one optimizer step costs, measured after the run."""

    model_flops: int  # what the model needs, whoever computes the loss
    counted_flops: int  # what the counter saw in a step with this run's loss
    loss_by: str  # fastloss: which backend, and why
    loss_peak: measure.Peak
    step_peak: measure.Peak


@dataclass(frozen=True)
class Result:
    rows: list[dict[str, float]]  # the log of all steps, those before a resume too
    done: int
    val_loss: float | None
    cost: Cost
    summary: dict[str, float]
    model: Any


def prepare(config: PretrainConfig, folder: Path, console: Console) -> Data:
    """Text, tokenizer and rows. The tokenizer is the model folder's, this run's own, or trained now."""
    texts = corpus.documents(config.data)
    train_texts, val_texts = corpus.split(texts, config.val_fraction)
    vocab_size = int(model_config(config).get_text_config().vocab_size)
    ready = [Path(config.model) / "tokenizer.json"] if config.model else []
    saved = next((path for path in [*ready, folder / "tokenizer.json"] if path.is_file()), None)
    bpe = tokenizer.load(saved) if saved else tokenizer.train_bpe(train_texts, vocab_size)
    if bpe.get_vocab_size() > vocab_size:
        raise ValueError(
            f"model: expected a vocabulary of at least {bpe.get_vocab_size()} for its tokenizer, "
            f"got {vocab_size}"
        )
    bpe.save(str(folder / "tokenizer.json"))
    train = Rows(tokenizer.encode(bpe, train_texts), config.seq_len, config.seed)
    val = Rows(tokenizer.encode(bpe, val_texts), config.seq_len) if val_texts else None
    source = f"{len(config.data)} files" if config.data else "Python's own documentation and docstrings"
    console.print(
        f"{source}: {len(texts)} documents, {len(train.tokens):,} training tokens, "
        f"{len(val.tokens) if val else 0:,} held back, vocabulary {bpe.get_vocab_size():,}"
    )
    return Data(bpe, train, val, sum(len(text.encode()) for text in val_texts), source)


def make_step(model: Any, head: Head, loss_fn: Loss, rows: Rows, config: PretrainConfig) -> StepFn:
    """Forward and backward of one optimizer step.

    The graph is cut at the hidden states: the loss runs forward and backward on its own, and its gradient is
    then handed to the body. The arithmetic is that of one backward, and every step gives the loss's time.
    """
    device = head.weight.device
    per_step = config.batch_size * config.accumulate

    def step_fn(step: int) -> Metrics:
        start = step * per_step
        batches = [
            rows.batch(start + i * config.batch_size, config.batch_size) for i in range(config.accumulate)
        ]
        tokens = sum(
            int((targets != IGNORE).sum()) for _, targets in batches
        )  # of all passes: the mean is global
        total, loss_s = torch.zeros((), device=device), 0.0
        for inputs, targets in batches:
            with autocast(config, device):
                hidden = hidden_states(model, inputs.to(device))  # [B, T, D]
            measure.synchronize(device)
            started = time.perf_counter()
            loss, grad = loss_and_grad(loss_fn, hidden, head, targets.to(device), tokens, config)
            measure.synchronize(device)
            loss_s += time.perf_counter() - started
            hidden.backward(grad)
            total += loss
        return {"loss": total, "tokens": tokens, "loss_s": loss_s}

    return step_fn


def loss_and_grad(
    loss_fn: Loss, hidden: Tensor, head: Head, targets: Tensor, tokens: int, config: PretrainConfig
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for the hidden states; the head's gradient is added to its parameter."""
    leaf = hidden.detach().requires_grad_()
    with autocast(config, hidden.device):
        loss = loss_fn(leaf.flatten(0, 1), head, targets.flatten(), tokens)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def autocast(config: PretrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if config.bf16 else contextlib.nullcontext()


@torch.no_grad()
def evaluate(model: Any, head: Head, loss_fn: Loss, rows: Rows, config: PretrainConfig) -> float:
    """Mean loss over every held-back token."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for inputs, targets in rows.in_order(config.batch_size):
        with autocast(config, head.weight.device):
            hidden = hidden_states(model, inputs.to(head.weight.device))
            total += (
                loss_fn(hidden.flatten(0, 1), head, targets.to(hidden.device).flatten(), 1).double().cpu()
            )
    model.train()
    return float(total) / (len(rows.tokens) - 1)


def model_flops(model: Any, head: Head, rows: Rows, config: PretrainConfig) -> int:
    """Counted on one row with PyTorch's plain loss, so that a fused or hidden operator cannot change it.

    Forward and backward are linear in the number of rows.
    """
    one = replace(config, batch_size=1, accumulate=1)
    flops = measure.count_flops(partial(make_step(model, head, torch_loss, rows, one), 0))
    model.zero_grad(set_to_none=True)
    return flops * config.batch_size * config.accumulate


def measure_memory(
    model: Any, head: Head, loss_fn: Loss, rows: Rows, config: PretrainConfig
) -> tuple[Any, Any]:
    """Peak extra bytes of the loss (forward, backward, gradients) and of the whole forward and backward."""
    device = head.weight.device
    inputs, targets = rows.batch(0, config.batch_size)
    targets, tokens = targets.to(device), config.batch_size * config.seq_len
    with torch.no_grad(), autocast(config, device):
        hidden = hidden_states(model, inputs.to(device))

    def loss_alone() -> None:
        model.zero_grad(set_to_none=True)
        loss_and_grad(loss_fn, hidden, head, targets, tokens, config)
        model.zero_grad(set_to_none=True)

    step = make_step(model, head, loss_fn, rows, replace(config, accumulate=1))

    def whole_step() -> None:
        model.zero_grad(set_to_none=True)
        step(0)
        model.zero_grad(set_to_none=True)

    with torch.random.fork_rng():
        return measure.peak_bytes(loss_alone, device), measure.peak_bytes(whole_step, device)


def run(
    config: PretrainConfig, *, resume: bool = False, overwrite: bool = False,
    data: Data | None = None, console: Console | None = None, title: str = "pretrain",
) -> Result:  # fmt: skip
    """Train, and leave in ``config.out``: config.json, tokenizer.json, log.jsonl, tensorboard/,
    checkpoint.safetensors, model/ (a transformers folder), loss.png, report.md.
    """
    console = console or Console()
    folder = _open_folder(Path(config.out), resume, overwrite, console)
    loss_fn = loss_named(config.loss)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device(_device(config.device))
    data = data or prepare(config, folder, console)
    data.tokenizer.save(str(folder / "tokenizer.json"))
    configs.save(config, folder / "config.json")
    console.print(
        "  ".join(f"{key}={value}" for key, value in configs.as_dict(config).items() if value not in ("", []))
    )

    model = build_model(model_config(config), config.seed, str(device))
    head = head_of(model)
    check_head(model, data.train.row(0)[0][None, :16].to(device))
    optimizer = make_optimizer(model, config.lr, (config.beta1, config.beta2), config.weight_decay)
    path = folder / CHECKPOINT
    progress: dict[str, Any] = {
        "step": 0,
        "rows": 0,
        "tokens": 0,
        "train_s": 0.0,
        "data": data.train.fingerprint(),
    }
    if resume and path.exists():
        if checkpoint.read_progress(path)["data"] != progress["data"]:
            raise ValueError(
                f"{path}: made from other data, seq_len or seed: it cannot go on from its position here"
            )
        progress = checkpoint.load(path, model, optimizer)
        console.print(f"resumed at step {progress['step']}")

    dtype = torch.bfloat16 if config.bf16 else torch.float32
    rate = measure.matmul_rate(device, dtype)
    flops = model_flops(model, head, data.train, config)
    last = min(config.steps, config.stop_after or config.steps)
    step_fn = make_step(model, head, loss_fn, data.train, config)

    def save(done: int) -> None:
        progress.update(step=done, rows=done * config.batch_size * config.accumulate)
        checkpoint.save(path, model, optimizer, progress)

    with logging.RunLog(
        folder, steps=config.steps, first=progress["step"], title=title, console=console
    ) as log:

        def on_row(row: dict[str, float]) -> None:
            progress["tokens"] += int(row["tokens"])
            progress["train_s"] += row["step_s"]
            row["tokens_per_s"] = row["tokens"] / row["step_s"]
            row["mfu"] = flops / row["step_s"] / rate
            log.row(row)

        schedule = partial(
            cosine, steps=config.steps, peak=config.lr, warmup=config.warmup, least=config.min_lr
        )
        done = run_steps(
            step_fn, optimizer, first=progress["step"], last=last, lr_at=schedule,
            clip=config.clip, log=on_row, save=save, save_every=config.save_every,
        )  # fmt: skip

    _export(model, data.tokenizer, folder / "model")
    val_loss = evaluate(model, head, loss_fn, data.val, config) if data.val else None
    optimizer.zero_grad(set_to_none=True)
    counted = measure.count_flops(partial(step_fn, 0))
    loss_peak, step_peak = measure_memory(model, head, loss_fn, data.train, config)
    loss_by = describe(config.loss, head, config.batch_size * config.seq_len, dtype)
    rate = max(rate, measure.matmul_rate(device, dtype))  # again: another job may have slowed the first
    cost = Cost(flops, counted, loss_by, loss_peak, step_peak)
    rows = logging.read(folder / "log.jsonl")
    summary = _summary(rows, progress, val_loss, data, cost, rate)
    plots.loss_curves(folder / "loss.png", {config.loss: [row["loss"] for row in rows]}, title)
    _report(folder, config, model, data, cost, summary, device, console, title)
    return Result(rows, done, val_loss, cost, summary, model)


def _summary(
    rows: list[dict[str, float]],
    progress: dict[str, Any],
    val_loss: float | None,
    data: Data,
    cost: Cost,
    rate: float,
) -> dict[str, float]:
    """The report's numbers. Times are medians over steps: the first ones warm up."""
    step_s = statistics.median(row["step_s"] for row in rows)
    loss_s = statistics.median(row["loss_s"] for row in rows)
    tail = [row["loss"] for row in rows[-10:]]
    summary = {
        "steps": progress["step"], "tokens": progress["tokens"], "first_loss": rows[0]["loss"],
        "last_loss": sum(tail) / len(tail), "step_s": step_s, "loss_s": loss_s, "loss_share": loss_s / step_s,
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows),
        "matmul_rate": rate, "mfu": cost.model_flops / step_s / rate,
        "train_s": progress["train_s"], "device_hours": progress["train_s"] / 3600,
    }  # fmt: skip
    if val_loss is not None and data.val is not None:
        nats = val_loss * (len(data.val.tokens) - 1)
        summary |= {
            "val_loss": val_loss,
            "perplexity": math.exp(min(val_loss, 700)),
            "bits_per_byte": nats / math.log(2) / data.val_bytes,
        }
    return summary


def _report(
    folder: Path, config: PretrainConfig, model: Any, data: Data, cost: Cost, s: dict[str, float],
    device: torch.device, console: Console, title: str,
) -> None:  # fmt: skip
    seen = cost.counted_flops / cost.model_flops
    epochs = s["tokens"] / len(data.train.tokens)
    lines = [
        ["model", f"{type(model).__name__}, {report.count(parameter_count(model))} parameters"],
        [
            "data",
            f"{data.source}, {len(data.train.tokens):,} tokens, {epochs:.2f} epochs",
        ],
        ["machine", measure.machine(device)],
        ["loss computed by", cost.loss_by],
        ["steps, tokens", f"{s['steps']:,}, {s['tokens']:,}"],
        ["loss, first step → mean of the last 10", f"{s['first_loss']:.4f} → {s['last_loss']:.4f}"],
    ]
    if "perplexity" in s:
        lines += [
            ["held-back loss", f"{s['val_loss']:.4f}"],
            ["held-back perplexity", f"{s['perplexity']:.2f}"],
            ["held-back bits per byte", f"{s['bits_per_byte']:.3f}"],
        ]
    lines += [
        ["tokens/s (median step)", f"{s['tokens_per_s']:,.0f}"],
        [
            "step; of it the loss",
            f"{s['step_s'] * 1e3:.1f} ms; {s['loss_s'] * 1e3:.1f} ms ({report.percent(s['loss_share'])})",
        ],
        ["model FLOPs per step", report.count(cost.model_flops, "FLOP")],
        [
            "FLOPs the counter saw in a step with this loss",
            f"{report.count(cost.counted_flops, 'FLOP')} ({seen:.2f}×)",
        ],
        ["measured matmul rate", report.count(s["matmul_rate"], "FLOP/s")],
        ["MFU", report.percent(s["mfu"])],
        ["device-hours", f"{s['device_hours']:.4f}"],
        ["peak extra memory, loss", report.mebibytes(cost.loss_peak.bytes)],
        ["peak extra memory, forward and backward", report.mebibytes(cost.step_peak.bytes)],
    ]
    options = [
        [f"`{key}`", f"`{value}`"] for key, value in configs.as_dict(config).items() if value not in ("", [])
    ]
    sections = [
        report.table(["", f"loss = {config.loss}"], lines),
        "![loss](loss.png)",
        f"Memory: {cost.loss_peak.how}. Columns: docs/harness.md.",
        "## Options",
        report.table(["option", "value"], options),
    ]
    report.write(folder / "report.md", title, sections, console)


def _open_folder(folder: Path, resume: bool, overwrite: bool, console: Console) -> Path:
    if (folder / CHECKPOINT).exists() and not resume:
        if not overwrite:
            raise ValueError(
                f"out: {folder} holds a checkpoint; --resume goes on from it, --overwrite starts again"
            )
        for name in (CHECKPOINT, "log.jsonl", "tokenizer.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    elif resume and not (folder / CHECKPOINT).exists():
        console.print(f"no checkpoint in {folder}: starting from the beginning")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _export(model: Any, bpe: Tokenizer, folder: Path) -> None:
    """The weights as a folder that AutoModelForCausalLM.from_pretrained and the later stages read."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    disable_progress_bar()
    model.save_pretrained(temporary)
    bpe.save(str(temporary / "tokenizer.json"))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
