"""Where the numbers of a run go: a JSONL file, TensorBoard, a progress bar, and if wanted Weights & Biases."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

SHOWN = 4  # examples of a bad step in the terminal; log.jsonl has all


class RunLog:
    """A context manager; ``row()`` logs one step everywhere. ``wandb``: a run of Weights & Biases, or None."""

    def __init__(
        self, folder: Path, *, steps: int, first: int, title: str, console: Console, wandb: Any = None
    ) -> None:
        self.console, self.title, self.steps, self._wandb = console, title, steps, wandb
        truncate(folder / "log.jsonl", first)
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tok/s"),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=steps, completed=first, loss="-", rate="-")

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def row(self, row: dict[str, Any]) -> None:
        """A number that is not finite is null in the file, which stays JSON, and is nowhere else."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        kept = {k: None if isinstance(v, float) and k not in numbers else v for k, v in row.items()}
        self._file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        self._file.flush()
        step = int(row["step"])
        for key, value in numbers.items():
            if key != "step":
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers)
        if "bad" in row:
            self._bad(row)
        loss, rate = f"{row['loss']:.4f}", f"{row['tokens_per_s']:,.0f}"
        self._bar.update(self._task, completed=step + 1, loss=loss, rate=rate)
        every = max(1, self.steps // 10)
        if not self.console.is_terminal and (step % every == 0 or step + 1 == self.steps):
            eta = (self.steps - step - 1) * row["step_s"]
            place = f"{self.title}  step {step + 1}/{self.steps}"
            self.console.print(f"{place}  loss {loss}  {rate} tok/s  ETA {eta:.0f} s")

    def _bad(self, row: dict[str, Any]) -> None:
        """What came of it, and where to look: the step's examples by number, and how they begin."""
        done = "skipped, no update" if row["skipped"] else "no update, the run ends"
        self.console.print(escape(f"bad step {row['step']}: {row['bad']}: {done}"), style="bold red")
        examples = list(row["examples"].items())
        for number, text in examples[:SHOWN]:
            self.console.print(escape(f"  example {number}: {text!r}"), highlight=False)
        if len(examples) > SHOWN:
            self.console.print(f"  and {len(examples) - SHOWN} more: log.jsonl")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def open_wandb(
    project: str, folder: Path, name: str, config: dict[str, Any], progress: dict[str, Any]
) -> Any:
    """A run of that project; the one in ``progress`` goes on. Rows lie over their ``step``, made again or not."""
    import wandb

    run = wandb.init(
        project=project, dir=str(folder), name=name, config=config, id=progress.get("wandb"), resume="allow"
    )
    run.define_metric("*", step_metric="step")
    progress["wandb"] = run.id
    return run


def read(path: Path) -> list[dict[str, float]]:
    """The rows of the steps that made an update."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    rows = [json.loads(line) for line in lines if line]
    return [row for row in rows if "bad" not in row]


def truncate(path: Path, first: int) -> None:
    """Drop the rows from step ``first`` on: they are younger than the checkpoint and will be made again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # U+2028 may stand in a string
        try:
            if json.loads(line)["step"] < first:
                kept.append(line + "\n")
        except ValueError:  # a line that a killed run left half-written
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
