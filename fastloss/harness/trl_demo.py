"""SFT, DPO and GRPO by TRL's own trainers, as they are and with fastloss under them: one report."""

from __future__ import annotations

import contextlib
import copy
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import builtin, measure, parallel, plots, report
from .report import Terminal
from .run import only_one
from .tokenizer import END, PAD, train_bpe

NAMES = ("TRL", "TRL with fastloss")
STEPS = {"sft": 60, "dpo": 40, "grpo": 20}
SHAPE = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 512}
VOCAB = 8192  # at least: the corpus may have fewer words, and the rest is padding, as in real models
ROUNDS = 8  # of measuring one batch with and without fastloss in turn
IN_LOG = {"sft": "mean_token_accuracy", "dpo": "rewards/margins", "grpo": "reward"}


def run_trl_demo(
    out: str, *, steps: int = 0, seed: int = 0, threads: int = 0, console: Console | None = None
) -> dict[str, dict[str, Any]]:
    """kind -> what was found; ``steps``: of each run, at most.

    Raises:
        ImportError: TRL is not installed (``pip install 'trl>=1.16'``).
    """
    parallel.expect_one("demo")
    with only_one(Path(out)):
        return _run(Path(out), steps, seed, threads, console or Terminal())


def _run(folder: Path, steps: int, seed: int, threads: int, console: Console) -> dict[str, dict[str, Any]]:
    import datasets
    import transformers

    if threads:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    tokenizer = _tokenizer()
    start, found = _model(tokenizer, seed), {}
    for kind, most in STEPS.items():
        console.rule(f"{kind} by TRL")
        found[kind], trained = _both(kind, start, tokenizer, folder, min(steps or most, most), seed)
        start = trained if kind == "sft" else start  # preferences and rewards begin where imitation ended
    _write(folder, found, seed, console)
    return found


def _tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    texts = [text for row in (*_rows("sft"), *_rows("dpo")) for text in row.values() if isinstance(text, str)]
    inner = train_bpe(texts, VOCAB)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=PAD)


def _model(tokenizer: Any, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    size = max(VOCAB, len(tokenizer))
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=size, tie_word_embeddings=True, **SHAPE, **ends))


def _rows(kind: str) -> list[dict[str, Any]]:
    """TRL's plain-text rows."""
    rows = builtin.preferences(0.05, 100)[0][:800] if kind == "dpo" else builtin.arithmetic(30)
    text = lambda value: value if isinstance(value, str) else value[0]["content"]
    names = {
        "sft": ("prompt", "completion"),
        "dpo": ("prompt", "chosen", "rejected"),
        "grpo": ("prompt", "answer"),
    }
    return [
        {name: text(row[name]) + ("\n" if name == "prompt" and kind == "dpo" else "") for name in names[kind]}
        for row in rows
    ]


def _trainer(kind: str, model: Any, tokenizer: Any, folder: Path, steps: int, seed: int) -> Any:
    import trl
    from datasets import Dataset

    common: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(), "bf16": torch.cuda.is_available(), "seed": seed, "gradient_checkpointing": False,
    }  # fmt: skip
    data = Dataset.from_list(_rows(kind))
    model = copy.deepcopy(model)
    given = {"processing_class": tokenizer, "train_dataset": data}
    if kind == "sft":
        args = trl.SFTConfig(
            **common, per_device_train_batch_size=32, learning_rate=2e-3, completion_only_loss=False
        )
        return trl.SFTTrainer(model, args=args, **given)
    if kind == "dpo":
        args = trl.DPOConfig(**common, per_device_train_batch_size=8, learning_rate=3e-4)
        return trl.DPOTrainer(model, ref_model=copy.deepcopy(model), args=args, **given)
    args = trl.GRPOConfig(
        **common,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=6,
        learning_rate=2e-4,
    )
    return trl.GRPOTrainer(model, reward_funcs=characters_right, args=args, **given)


def characters_right(
    prompts: list[Any], completions: list[str], answer: list[str], **columns: Any
) -> list[float]:
    """The share of the answer's characters that the completion has in their places. Exact answers would not tell apart what a
    model writes that has only begun to learn."""
    return [
        sum(a == b for a, b in zip(text.strip(), right, strict=False)) / len(right)
        for text, right in zip(completions, map(str, answer), strict=True)
    ]


def _both(
    kind: str, start: Any, tokenizer: Any, folder: Path, steps: int, seed: int
) -> tuple[dict[str, Any], Any]:
    """The two runs from one model and one seed, then one batch of the first in turns; and the first's model."""
    from transformers import PrinterCallback, set_seed

    from fastloss.integrations import trl

    hows: dict[str, Any] = dict(zip(NAMES, (contextlib.nullcontext, trl.apply), strict=True))
    curves: dict[str, list[dict[str, float]]] = {}
    trainers = []
    for name, how in hows.items():
        set_seed(seed)
        trainer = _trainer(kind, start, tokenizer, folder / kind, steps, seed)
        trainer.remove_callback(PrinterCallback)
        with how():
            trainer.train()
        curves[name] = [row for row in trainer.state.log_history if "loss" in row]
        trainers.append(trainer)
    trainer = trainers[0]
    model = trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        model.zero_grad(set_to_none=True)
        trainer.compute_loss(model, dict(batch)).backward()

    times: dict[str, list[float]] = {name: [] for name in hows}
    peaks = {}
    for name, how in hows.items():
        with how():
            peaks[name] = measure.peak_bytes(step, model.device)
    for _ in range(ROUNDS):
        for name, how in hows.items():
            with how():
                measure.synchronize(model.device)
                began = time.perf_counter()
                step()
                measure.synchronize(model.device)
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {"curves": curves, "seconds": medians, "peaks": peaks}, trainers[0].model


def _write(folder: Path, found: dict[str, dict[str, Any]], seed: int, console: Console) -> None:
    rows, pictures = [], []
    for kind, one in found.items():
        losses = {name: [row["loss"] for row in log] for name, log in one["curves"].items()}
        stock, ours = losses.values()
        difference = [abs(a - b) for a, b in zip(stock, ours, strict=True)]
        plots.loss_curves(folder / f"{kind}.png", losses, f"{kind} by TRL, one seed", difference)
        pictures.append(f"![{kind}]({kind}.png)")
        metric = IN_LOG[kind]
        last = [statistics.mean(row[metric] for row in log[-5:]) for log in one["curves"].values()]
        (slow, fast), (large, small) = one["seconds"].values(), one["peaks"].values()
        rows.append(
            [
                kind,
                str(len(stock)),
                f"{max(difference):.1e}",
                f"{metric} {last[0]:.3f}, {last[1]:.3f}",
                f"{slow * 1e3:.0f}, {fast * 1e3:.0f} ms",
                f"{fast / slow:.2f}",
                f"{report.mebibytes(large.bytes)}, {report.mebibytes(small.bytes)}",
                f"{small.bytes / max(1, large.bytes):.2f}",
            ]
        )
        how, device = large.how, "cuda" if torch.cuda.is_available() else "cpu"
    head = ["trainer", "steps", "largest difference of the loss", "mean of the last 5", "loss and backward", "ratio", "peak memory", "ratio"]  # fmt: skip
    sections = [
        f"TRL's trainers as they are, and under `fastloss.integrations.trl.apply()`, from one model and seed {seed}. Pairs of "
        "numbers: TRL, TRL with fastloss.",
        report.table(head, rows),
        *pictures,
        f"Machine: {measure.machine(torch.device(device))}. Time: medians of {ROUNDS} rounds, in which both take the same batch of "
        f"the same model, one after the other. Memory: {how}; the same batch. GRPO samples: a difference in the last digit of "
        "a log-probability may change a token, and with it the rest of the run.",
    ]
    report.write(folder / "report.md", "fastloss demo --trainer trl", sections, console)
