"""A run, whatever its stage: folder, resume, loop, held-back metrics before and after, costs, report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

from fastloss.engine import failures

from . import checkpoint, layers, logging, measure, parallel, plots, report
from . import config as configs
from .badsteps import Watch
from .config import TrainConfig
from .cost import Cost, measure_costs
from .loop import cosine, make_optimizer, run_steps
from .model import parameters
from .report import Terminal
from .stage import Stage

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Result:
    stage: Stage
    rows: list[dict[str, float]]  # the log of all steps, those before a resume too
    done: int
    before: dict[str, float]  # held-back metrics
    after: dict[str, float]
    costs: dict[str, Cost]  # by name of the loss; the run's own comes first
    summary: dict[str, float]

    @property
    def model(self) -> Any:
        return self.stage.model

    @property
    def cost(self) -> Cost:
        return next(iter(self.costs.values()))


def begun(run: Callable[..., Result]) -> Callable[..., Result]:
    """Around a stage's ``run``: its processes know each other, only the first one speaks, no other run writes into its
    folder meanwhile, and a resumed run has the date of its beginning."""

    @functools.wraps(run)
    def alone(
        config: TrainConfig, *, resume: bool = False, overwrite: bool = False,
        console: Console | None = None, **more: Any,
    ) -> Result:  # fmt: skip
        parallel.start(config.device, config.parallel)
        console = console or Terminal() if parallel.is_first() else Console(quiet=True)
        folder = Path(config.out)
        with failures.named(), only_one(folder):
            date = config.date or parallel.from_first(lambda: _date(folder, resume))
            config = dataclasses.replace(config, date=date)
            return run(config, resume=resume, overwrite=overwrite, console=console, **more)

    return alone


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Nobody else writes into the folder: two runs there would destroy each other's checkpoints."""
    held: list[FileLock] = []
    parallel.from_first(lambda: held.append(_lock(folder)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"out: another run is writing into {folder}; give this one another folder") from None
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        raise ValueError(f"out: cannot write into {folder}: {error.strerror}") from None
    return lock


def _date(folder: Path, resume: bool) -> str:
    """Today, or of a run that goes on the day on which it began: a chat template may write it into the data."""
    saved = folder / "config.yaml"
    options: Any = OmegaConf.load(saved) if resume and saved.is_file() else {}
    return str(options.get("date") or datetime.date.today().isoformat())


def open_folder(config: TrainConfig, resume: bool, overwrite: bool, console: Console) -> Path:
    folder = Path(config.out)
    if config.wandb:
        import_module("wandb")  # if it is not there: now, not when the data is ready
    parallel.from_first(lambda: _open(folder, resume, overwrite, console))
    if config.threads:
        torch.set_num_threads(config.threads)
    return folder


def _open(folder: Path, resume: bool, overwrite: bool, console: Console) -> None:
    saved = checkpoint.latest(folder / CHECKPOINT)
    if saved and not resume:
        if not overwrite:
            raise ValueError(
                f"out: {folder} holds a checkpoint; --resume goes on from it, --overwrite starts again"
            )
        for name in ("log.jsonl", "tokenizer.json"):
            (folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINT, "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif resume and not saved:
        console.print(f"no checkpoint in {folder}: starting from the beginning")
    checkpoint.clean(folder / CHECKPOINT)


def train(stage: Stage, config: TrainConfig, folder: Path, *, resume: bool, console: Console) -> Result:
    """Leaves in ``folder``: config.yaml, log.jsonl, tensorboard/, checkpoint/, model/, loss.png, report.md.

    Each process of the run does all of this with its share of the data; the first one writes.
    """
    parallel.from_first(lambda: configs.save(config, folder / "config.yaml"))
    for group, values in configs.by_group(config).items():
        shown = "  ".join(f"{key}={value}" for key, value in values.items())
        console.print(f"{group}: {shown}", markup=False, highlight=False)
    device = next(stage.model.parameters()).device
    optimizer = make_optimizer(stage.model, config.lr, (config.beta1, config.beta2), config.weight_decay)
    path, carry = parallel.from_first(lambda: checkpoint.latest(folder / CHECKPOINT)), dict[str, Tensor]()
    progress: dict[str, Any] = {"step": 0, "tokens": 0, "train_s": 0.0, "data": stage.fingerprint}
    if parallel.data_rank():  # dropout of its own, and of all parts of one model the same
        torch.manual_seed((config.seed + 1_000_003 * parallel.data_rank()) % 2**63)
    if resume and path:
        parallel.from_first(partial(checkpoint.check, path))
        if checkpoint.read_progress(path)["data"] != progress["data"]:
            raise ValueError(
                f"{path}: made from other data, another seq_len, seed or number of rows in a step: it cannot go on from its position here"
            )
        progress = checkpoint.load(path, stage.model, optimizer, carry)
        progress.setdefault("before", {})
        console.print(f"resumed at step {progress['step']}")
    else:
        with torch.random.fork_rng():
            progress["before"] = stage.held_back()
        console.print("held back, before: " + _line(stage, progress["before"]))

    rate = matmul_rate(device, config)
    with layers.activations_kept(stage.model):
        flops = stage.model_flops() if stage.same_shape else 0
    stage.model.zero_grad(set_to_none=True)

    def save(done: int) -> None:
        progress.update(step=done)
        checkpoint.save(folder / CHECKPOINT, done, stage.model, optimizer, progress, carry, keep=config.keep)

    wandb = None
    if config.wandb and parallel.is_first():
        options = dataclasses.asdict(config)
        wandb = logging.open_wandb(config.wandb, folder, stage.title, options, progress)
    with (
        logging.RunLog(
            folder,
            steps=config.steps,
            first=progress["step"],
            title=stage.title,
            console=console,
            wandb=wandb,
        )
        if parallel.is_first()
        else contextlib.nullcontext()
    ) as log:

        def on_row(row: dict[str, Any]) -> None:
            progress["train_s"] += row["step_s"]
            if "bad" in row:
                row["examples"] = stage.examples(row["step"])
            else:
                progress["tokens"] += int(row["tokens"])
            row["tokens_per_s"] = row["tokens"] / row["step_s"]
            if stage.same_shape:
                row["mfu"] = flops / row["step_s"] / rate
            if log:
                log.row(row)

        done = run_steps(
            stage.step(config.loss, carry), optimizer, first=progress["step"],
            last=min(config.steps, config.stop_after or config.steps),
            lr_at=partial(
                cosine, steps=config.steps, peak=config.lr, warmup=config.warmup, least=config.min_lr
            ),
            clip=config.clip, log=on_row, save=save, save_every=config.save_every,
            watch=Watch(
                config.spike, skip=config.on_bad_step == "skip", state=progress.setdefault("watch", {})
            ),
        )  # fmt: skip
        if done < config.steps:
            console.print(f"stopped after step {done} of {config.steps}, with a checkpoint: --resume goes on")

    stage.export(folder / "model")
    after = stage.held_back()
    optimizer.zero_grad(set_to_none=True)
    names = [config.loss, *(["torch"] if config.compare and config.loss != "torch" else [])]
    costs = measure_costs(stage, names)
    with layers.activations_kept(stage.model):
        flops = flops or stage.model_flops()  # where steps differ: of the step that was measured
    stage.model.zero_grad(set_to_none=True)
    rate = max(rate, matmul_rate(device, config))
    rows = parallel.from_first(lambda: logging.read(folder / "log.jsonl"))
    summary = _summary(stage, rows, progress, costs[config.loss], flops, rate)
    result = Result(stage, rows, done, progress["before"], after, costs, summary)
    if parallel.is_first():
        plots.curves(folder / "loss.png", stage.curves, rows, stage.title)
        _report(folder, config, result, device, console)
    return result


def matmul_rate(device: torch.device, config: TrainConfig) -> float:
    """Of all processes, measured at the same time."""
    return parallel.of_all(measure.matmul_rate(device, torch.bfloat16 if config.bf16 else torch.float32))[0]


def _summary(
    stage: Stage, rows: list[dict[str, float]], progress: dict[str, Any], cost: Cost, flops: int, rate: float
) -> dict[str, float]:
    """The report's numbers. Times are medians over steps: the first ones warm up."""
    step_s = statistics.median(row["step_s"] for row in rows)
    loss_s = statistics.median(row["loss_s"] for row in rows)
    curve = next(iter(stage.curves))
    last = [row[curve] for row in rows[-10:]]
    return {
        "steps": progress["step"], "skipped": progress["watch"]["skipped"], "tokens": progress["tokens"], "first": rows[0][curve],
        "last": sum(last) / len(last), "step_s": step_s, "loss_s": loss_s, "loss_share": loss_s / step_s,
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows), "model_flops": flops,
        "matmul_rate": rate, "mfu": flops / (step_s if stage.same_shape else cost.step_s) / rate,
        "train_s": progress["train_s"], "device_hours": progress["train_s"] * parallel.world() / 3600,
    }  # fmt: skip


def _line(stage: Stage, values: dict[str, float]) -> str:
    return ", ".join(f"{label} {values[key]:.4g}" for key, label in stage.metrics.items() if key in values)


def _report(
    folder: Path, config: TrainConfig, result: Result, device: torch.device, console: Console
) -> None:
    stage, s = result.stage, result.summary
    curve = next(iter(stage.curves))
    held_back = [
        [label, f"{result.before[key]:.4f}", f"{result.after[key]:.4f}"]
        for key, label in stage.metrics.items()
        if key in result.after
    ]
    lines = [
        ["model", f"{type(stage.model).__name__}, {parameters(stage.model)}"],
        ["data", stage.source],
        ["machine", measure.machine(device)],
        *([["processes", f"{parallel.world()}, {config.parallel}"]] if parallel.world() > 1 else []),
        ["steps, tokens learned from", f"{s['steps']:,}, {s['tokens']:,}"],
        *([["bad steps, skipped", f"{s['skipped']:,}"]] if s["skipped"] else []),
        [f"{curve}, first step → mean of the last 10", f"{s['first']:.4f} → {s['last']:.4f}"],
        *(
            [label, report.sparkline([row[key] for row in result.rows])]
            for key, label in stage.curves.items()
        ),
        ["tokens/s (median step)", f"{s['tokens_per_s']:,.0f}"],
        [
            "step; of it the loss",
            f"{s['step_s'] * 1e3:.1f} ms; {s['loss_s'] * 1e3:.1f} ms ({report.percent(s['loss_share'])})",
        ],
        ["model FLOPs of a step", report.count(s["model_flops"], "FLOP")],
        ["measured matmul rate", report.count(s["matmul_rate"], "FLOP/s")],
        ["MFU", report.percent(s["mfu"])],
        ["device-hours", f"{s['device_hours']:.4f}"],
    ]
    groups = configs.by_group(config).values()
    options = [[f"`{key}`", f"`{value}`"] for values in groups for key, value in values.items()]
    sections = [
        *([report.table(["held back", "before", "after"], held_back)] if held_back else []),
        report.table(["", f"loss = {config.loss}"], lines),
        "## One step, after the run",
        cost_table(result),
        "![curves](loss.png)",
        f"Memory: {result.cost.step_peak.how}. Rows and columns: docs/harness.md.",
    ]
    appendix = ["## Options", report.table(["option", "value"], options)]
    report.write(folder / "report.md", stage.title, sections, console, appendix)


def cost_table(result: Result) -> str:
    """One column per loss that was measured."""
    costs, flops = result.costs.values(), result.summary["model_flops"]

    def row(label: str, cell: Callable[[Cost], str]) -> list[str]:
        return [label, *map(cell, costs)]

    rows = [
        row("loss computed by", lambda c: c.loss_by),
        row("in turns: a step without its update", lambda c: f"{c.step_s * 1e3:.1f} ms"),
        row("in turns: of it the loss", lambda c: f"{c.loss_s * 1e3:.1f} ms"),
        row("in turns: the loss's share", lambda c: report.percent(c.loss_s / c.step_s)),
        row(
            "FLOPs the counter saw",
            lambda c: f"{report.count(c.counted_flops, 'FLOP')} ({c.counted_flops / flops:.2f}×)",
        ),
        row("peak extra memory, loss", lambda c: report.mebibytes(c.loss_peak.bytes) if c.loss_peak else "–"),
        row("peak extra memory, step without its update", lambda c: report.mebibytes(c.step_peak.bytes)),
    ]
    return report.table(["", *result.costs], rows)
