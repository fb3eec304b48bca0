"""Two pretraining runs from one seed: fastloss's loss and PyTorch's. The curves should be one curve."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from . import measure, plots, report
from .config import PretrainConfig
from .pretrain import Result, prepare, run

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
    console = console or Console()
    folder = Path(config.out)
    shutil.rmtree(folder / "data", ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    data = prepare(config, folder / "data", console)
    results = {}
    for loss, name in NAMES.items():
        one = replace(config, loss=loss, out=str(folder / loss))
        results[loss] = run(one, overwrite=True, data=data, console=console, title=name)
    compare(folder, config, results, console)
    return results


def compare(folder: Path, config: PretrainConfig, results: dict[str, Result], console: Console) -> None:
    curves = {NAMES[loss]: [row["loss"] for row in result.rows] for loss, result in results.items()}
    difference = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    worst = max(range(len(difference)), key=difference.__getitem__)
    plots.loss_curves(folder / "loss.png", curves, "one seed, two losses", difference)

    both = list(results.values())
    ours, theirs = both
    rows = [
        ["loss, first step", *(f"{r.summary['first_loss']:.4f}" for r in both)],
        ["loss, mean of the last 10", *(f"{r.summary['last_loss']:.4f}" for r in both)],
        ["held-back perplexity", *(f"{r.summary['perplexity']:.2f}" for r in both)],
        ["tokens/s (median)", *(f"{r.summary['tokens_per_s']:,.0f}" for r in both)],
        ["step", *(f"{r.summary['step_s'] * 1e3:.0f} ms" for r in both)],
        ["of it the loss, forward + backward", *(f"{r.summary['loss_s'] * 1e3:.0f} ms" for r in both)],
        ["the loss's share of step time", *(report.percent(r.summary["loss_share"]) for r in both)],
        ["peak extra memory of the loss", *(report.mebibytes(r.cost.loss_peak.bytes) for r in both)],
        ["peak of forward + backward", *(report.mebibytes(r.cost.step_peak.bytes) for r in both)],
        ["the loss's memory / that peak", *(report.percent(memory_share(r)) for r in both)],
        ["MFU", *(report.percent(r.summary["mfu"]) for r in both)],
        ["device-hours", *(f"{r.summary['device_hours']:.4f}" for r in both)],
    ]
    weight = ours.model.get_output_embeddings().weight.nbytes
    loss_time, step_time = (theirs.summary[key] / ours.summary[key] for key in ("loss_s", "step_s"))
    loss_memory = theirs.cost.loss_peak.bytes / max(1, ours.cost.loss_peak.bytes)
    step_memory = theirs.cost.step_peak.bytes / max(1, ours.cost.step_peak.bytes)
    sections = [
        f"**The largest difference between the loss curves is {difference[worst]:.2e}** (step {worst + 1}, "
        f"loss {curves['PyTorch'][worst]:.4f}) over {len(difference)} steps from seed {config.seed}.",
        report.table(["", *curves], rows),
        f"PyTorch ÷ fastloss: time of the loss {loss_time:.2f}, of the step {step_time:.2f}; "
        f"memory of the loss {loss_memory:.2f}, of forward + backward {step_memory:.2f}. "
        f"Of either loss's memory {report.mebibytes(weight)} is the gradient of the vocabulary matrix.",
        f"Loss computed by: {ours.cost.loss_by}. Beside it: {theirs.cost.loss_by}.",
        "![loss curves](loss.png)",
        f"Machine: {measure.machine(next(ours.model.parameters()).device)}. Time: medians over all "
        "steps of both runs, the loss timed inside every step (the graph is cut at the hidden states). "
        f"Memory: {ours.cost.loss_peak.how}; the loss alone on one batch, then a whole forward and backward, "
        "each beyond what the process held before; a warm-up run comes first. Each run's own report: "
        + ", ".join(f"`{loss}/report.md`" for loss in results)
        + ".",
    ]
    if "backend reference" in ours.cost.loss_by:
        sections.insert(0, f"**Not a measurement of fastloss's kernels**: this is {ours.cost.loss_by}.")
    report.write(folder / "report.md", "fastloss demo", sections, console)


def memory_share(result: Result) -> float:
    return result.cost.loss_peak.bytes / max(1, result.cost.step_peak.bytes)
