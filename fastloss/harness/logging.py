"""Where the numbers of a run go: a JSONL file, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class RunLog:
    """A context manager; ``row()`` logs one step everywhere."""

    def __init__(self, folder: Path, *, steps: int, first: int, title: str, console: Console) -> None:
        self.console, self.title, self.steps = console, title, steps
        truncate(folder / "log.jsonl", first)
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        except ImportError:
            console.print("tensorboard is not installed: no TensorBoard log")
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

    def row(self, row: dict[str, float]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        step = int(row["step"])
        if self._board is not None:
            for key, value in row.items():
                if key != "step":
                    self._board.add_scalar(key, value, step)
        loss, rate = f"{row['loss']:.4f}", f"{row['tokens_per_s']:,.0f}"
        self._bar.update(self._task, completed=step + 1, loss=loss, rate=rate)
        every = max(1, self.steps // 10)
        if not self.console.is_terminal and (step % every == 0 or step + 1 == self.steps):
            eta = (self.steps - step - 1) * row["step_s"]
            place = f"{self.title}  step {step + 1}/{self.steps}"
            self.console.print(f"{place}  loss {loss}  {rate} tok/s  ETA {eta:.0f} s")

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict[str, float]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def truncate(path: Path, first: int) -> None:
    """Drop the rows from step ``first`` on: they are younger than the checkpoint and will be made again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < first:
                kept.append(line + "\n")
        except ValueError:  # a line that a killed run left half-written
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
