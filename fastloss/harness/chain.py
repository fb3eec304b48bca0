"""The whole chain on one small model: pretrain, sft, reward, dpo, grpo, ppo, distill, and one report of them all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from . import distill, dpo, grpo, measure, parallel, plots, ppo, pretrain, report, reward, sft
from .config import (
    DistillConfig,
    DpoConfig,
    GrpoConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)
from .report import Terminal
from .run import Result, only_one

# name, its run, whose model it starts from, options
Link = tuple[str, Callable[..., Result], str, TrainConfig]
# One small model, two cores, minutes. Every held-back metric rose with these settings (docs/harness.md);
# 30% of the shown sums are wrong: what imitation cannot unlearn and a checked reward can.
SHAPE: dict[str, Any] = {
    "hidden": 128, "layers": 4, "heads": 4, "intermediate": 344, "vocab_size": 4096,
    "val_fraction": 0.2, "save_every": 0, "compare": True,
}  # fmt: skip
REINFORCE: dict[str, Any] = {"max_new_tokens": 5, "warmup": 5, "updates": 2}
STAGES: tuple[Link, ...] = (
    ("pretrain", pretrain.run, "",
     PretrainConfig(**SHAPE | {"val_fraction": 0.05}, steps=200, batch_size=4, lr=3e-3)),
    ("sft", sft.run, "pretrain",
     SftConfig(**SHAPE, steps=800, batch_size=4, lr=2e-3, repeat=150, wrong=0.3, max_new_tokens=24)),
    ("reward", reward.run, "sft", RewardConfig(**SHAPE, steps=500, batch_size=24, lr=1e-3, warmup=40)),
    ("dpo", dpo.run, "sft", DpoConfig(**SHAPE, steps=250, batch_size=24, lr=5e-4)),
    ("grpo", grpo.run, "sft",
     GrpoConfig(**SHAPE, **REINFORCE, steps=160, batch_size=64, group_size=4, lr=2e-4)),
    ("ppo", ppo.run, "sft", PpoConfig(**SHAPE, **REINFORCE, steps=120, batch_size=256, lr=3e-4)),
    # what reinforcement found, taught to the model that it began from; the teacher is a stage's name here
    ("distill", distill.run, "sft",
     DistillConfig(**SHAPE, teacher="ppo", task="arithmetic", steps=200, batch_size=8, lr=5e-4, repeat=50, wrong=0.3,
                   max_new_tokens=5, on_policy=0.5)),
)  # fmt: skip


def run_chain(
    out: str, *, seed: int = 0, threads: int = 0, steps: int = 0, console: Console | None = None,
    stages: tuple[Link, ...] = STAGES,
) -> dict[str, Result]:  # fmt: skip
    parallel.expect_one("demo")
    with only_one(Path(out)):
        return _run_chain(Path(out), seed, threads, steps, console or Terminal(), stages)


def _run_chain(
    folder: Path, seed: int, threads: int, steps: int, console: Console, stages: tuple[Link, ...]
) -> dict[str, Result]:
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    for name, run, start, config in stages:
        model = str(folder / start / "model") if start else ""
        config = replace(
            config, out=str(folder / name), model=model, seed=seed, threads=threads,
            steps=min(steps or config.steps, config.steps),
        )  # fmt: skip
        if isinstance(config, DistillConfig):
            config = replace(config, teacher=str(folder / config.teacher / "model"))
        console.rule(name)
        began = time.perf_counter()
        results[name] = run(config, overwrite=True, console=console)
        seconds[name] = time.perf_counter() - began
        if results[name].done < config.steps:
            console.print(
                f"stopped by a signal at step {results[name].done} of {name}: no report of the chain"
            )
            return results
    write(folder, results, seconds, console)
    return results


def write(folder: Path, results: dict[str, Result], seconds: dict[str, float], console: Console) -> None:
    plots.chain(
        folder / "chain.png", [(_headline(name, r), r.stage.curves, r.rows) for name, r in results.items()]
    )
    held_back = [
        [name, label, report.number(r.before[key]), report.number(r.after[key])]
        for name, r in results.items()
        for key, label in r.stage.metrics.items()
        if key in r.after
    ]
    runs = [
        [
            name, f"{seconds[name]:.0f} s", f"{r.done:,}", f"{r.summary['tokens_per_s']:,.0f}",
            report.count(r.summary["model_flops"], "FLOP"), report.percent(r.summary["mfu"]),
            f"{r.summary['device_hours']:.4f}",
        ]
        for name, r in results.items()
    ]  # fmt: skip
    learned = []
    for name, r in results.items():
        for key, label in r.stage.curves.items():
            values = [row[key] for row in r.rows]
            last = sum(values[-10:]) / len(values[-10:])
            learned.append(
                [name, label, report.number(values[0]), report.number(last), report.sparkline(values)]
            )
    losses = []
    for name, r in results.items():
        for loss, cost in r.costs.items():
            peak, whole = cost.loss_peak, cost.step_peak.bytes
            losses.append(
                [name, loss, f"{cost.loss_s * 1e3:.1f} ms", report.percent(cost.loss_s / cost.step_s),
                 report.mebibytes(peak.bytes) if peak else "–", report.mebibytes(whole),
                 report.percent(peak.bytes / whole) if peak and whole else "–"]
            )  # fmt: skip
    by = "\n".join(f"- {name}: {r.cost.loss_by}" for name, r in results.items())
    first = next(iter(results.values()))
    sections = [
        report.table(["stage", "held back", "before", "after"], held_back),
        report.table(["stage", "in training", "first step", "mean of the last 10", "curve"], learned),
        "![curves](chain.png)",
        report.table(
            ["stage", "whole stage", "steps", "tokens/s", "model FLOPs of a step", "MFU", "device-hours"],
            runs,
        ),
        "## What the loss took, with fastloss and with plain PyTorch",
        report.table(
            ["stage", "loss", "time", "of the step", "peak memory", "the step's", "of it the loss"], losses
        ),
        "Times are medians over rounds in which both losses take the first step of the trained model one after the "
        "other; in grpo and ppo a step holds the sampling too. Memory is beyond what was held before.",
        f"The losses were computed by\n\n{by}",
        f"Whole chain: {sum(seconds.values()):.0f} s. "
        f"Machine: {measure.machine(next(first.model.parameters()).device)}. Memory: {first.cost.step_peak.how}. "
        "Each stage's own report: " + ", ".join(f"`{name}/report.md`" for name in results) + ".",
    ]
    report.write(folder / "report.md", "fastloss demo: the chain", sections, console)


def _headline(name: str, result: Result) -> str:
    """The stage and its first held-back metric, before and after."""
    key, label = next(iter(result.stage.metrics.items()))
    if key not in result.after:
        return name
    return f"{name}\n{label}: {report.number(result.before[key])} → {report.number(result.after[key])}"
