"""Two pretraining runs from one seed: fastloss's loss and PyTorch's. The curves should be one curve."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from . import measure, parallel, plots, report
from .config import PretrainConfig
from .cost import in_turns
from .pretrain import prepare, run
from .report import Terminal
from .run import Result, only_one

ROUNDS = 12  # of measuring the two losses in turns
NAMES = {"fastloss": "fastloss", "torch": "PyTorch"}

# two cores: the head is half of the step's time, as in small real models, and both runs take minutes
DEMO = PretrainConfig(
    out="runs/demo",
    vocab_size=8192,
    hidden=192,
    layers=4,
    heads=3,
    intermediate=512,
    seq_len=256,
    batch_size=4,
    steps=240,
    lr=3e-3,
    save_every=0,
)


def run_demo(config: PretrainConfig = DEMO, console: Console | None = None) -> dict[str, Result]:
    parallel.expect_one("demo")
    with only_one(Path(config.out)):
        return _run_demo(config, Path(config.out), console or Terminal())


def _run_demo(config: PretrainConfig, folder: Path, console: Console) -> dict[str, Result]:
    shutil.rmtree(folder / "data", ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    data = prepare(config, folder / "data", console)
    results = {}
    for loss, name in NAMES.items():
        one = replace(config, loss=loss, out=str(folder / loss))
        results[loss] = run(one, overwrite=True, data=data, console=console, title=name)
        if results[loss].done < config.steps:
            console.print(f"stopped by a signal at step {results[loss].done} of {name}'s run: no comparison")
            return results
    times = in_turns(results["fastloss"].stage, list(results), ROUNDS)
    compare(folder, config, results, times, console)
    return results


def compare(
    folder: Path,
    config: PretrainConfig,
    results: dict[str, Result],
    times: dict[str, tuple[float, float]],
    console: Console,
) -> None:
    curves = {NAMES[loss]: [row["loss"] for row in result.rows] for loss, result in results.items()}
    difference = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    worst = max(range(len(difference)), key=difference.__getitem__)
    plots.loss_curves(folder / "loss.png", curves, "one seed, two losses", difference)

    both = list(results.values())
    ours, theirs = both
    rows = [
        ["loss, first step", *(f"{r.summary['first']:.4f}" for r in both)],
        ["loss, mean of the last 10", *(f"{r.summary['last']:.4f}" for r in both)],
        ["held-back perplexity", *(f"{r.after['perplexity']:.2f}" for r in both)],
        ["in turns: forward + backward", *(f"{step * 1e3:.0f} ms" for step, _ in times.values())],
        ["in turns: of it the loss", *(f"{loss * 1e3:.0f} ms" for _, loss in times.values())],
        [
            "in turns: the loss's share of step time",
            *(report.percent(loss / step) for step, loss in times.values()),
        ],
        ["peak extra memory of the loss", *(report.mebibytes(loss_peak(r)) for r in both)],
        ["peak of forward + backward", *(report.mebibytes(r.cost.step_peak.bytes) for r in both)],
        ["the loss's memory / that peak", *(report.percent(memory_share(r)) for r in both)],
        ["whole run: step (median)", *(f"{r.summary['step_s'] * 1e3:.0f} ms" for r in both)],
        ["whole run: the loss's share of it", *(report.percent(r.summary["loss_share"]) for r in both)],
        ["whole run: tokens/s (median)", *(f"{r.summary['tokens_per_s']:,.0f}" for r in both)],
        ["whole run: MFU", *(report.percent(r.summary["mfu"]) for r in both)],
        ["whole run: device-hours", *(f"{r.summary['device_hours']:.4f}" for r in both)],
    ]
    weight = ours.model.get_output_embeddings().weight.nbytes
    step_time, loss_time = (t / f for t, f in zip(times["torch"], times["fastloss"], strict=True))
    loss_memory = loss_peak(theirs) / max(1, loss_peak(ours))
    step_memory = theirs.cost.step_peak.bytes / max(1, ours.cost.step_peak.bytes)
    sections = [
        f"**The largest difference between the loss curves is {difference[worst]:.2e}** (step {worst + 1}, "
        f"loss {curves['PyTorch'][worst]:.4f}) over {len(difference)} steps from seed {config.seed}; "
        f"over the first 30, before rounding has grown, {max(difference[:30]):.2e}.",
        report.table(["", *curves], rows),
        f"PyTorch ÷ fastloss: time of the loss {loss_time:.2f}, of forward + backward {step_time:.2f}; "
        f"memory of the loss {loss_memory:.2f}, of forward + backward {step_memory:.2f}. "
        f"Of either loss's memory {report.mebibytes(weight)} is the gradient of the vocabulary matrix.",
        f"Loss computed by: {ours.cost.loss_by}. Beside it: {theirs.cost.loss_by}.",
        "![loss curves](loss.png)",
        f"Machine: {measure.machine(next(ours.model.parameters()).device)}. Time, in turns: medians over rounds "
        "in which both losses take the same batch of the same trained model one after the other, so that another job "
        "on the machine meets both; whole run: medians over its steps, minutes apart from the other's. "
        f"Memory: {ours.cost.step_peak.how}; the loss alone on one batch, then a whole forward and backward, "
        "each beyond what the process held before; a warm-up run comes first. Each run's own report: "
        + ", ".join(f"`{loss}/report.md`" for loss in results)
        + ".",
    ]
    if "backend reference" in ours.cost.loss_by:
        sections.insert(0, f"**Not a measurement of fastloss's kernels**: this is {ours.cost.loss_by}.")
    report.write(folder / "report.md", "fastloss demo", sections, console)


def loss_peak(result: Result) -> int:
    return result.cost.loss_peak.bytes if result.cost.loss_peak else 0


def memory_share(result: Result) -> float:
    return loss_peak(result) / max(1, result.cost.step_peak.bytes)
