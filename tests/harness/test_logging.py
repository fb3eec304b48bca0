"""Where a run's numbers go: the terminal, log.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from fastloss.cli.train import app
from fastloss.harness import config as configs
from fastloss.harness import logging, pretrain
from fastloss.harness.config import PretrainConfig
from fastloss.harness.logging import RunLog


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4.0 - step / 8, "tokens": 640, "step_s": 0.5, "tokens_per_s": 1280.0} | more


def test_the_bar_shows_loss_rate_and_time_left(tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with RunLog(tmp_path, steps=10, first=4, title="sft", console=screen) as log:
        for step in range(4, 8):
            time.sleep(0.02)
            log.row(row(step))
    last = screen.file.getvalue().split("\r")[-1]  # type: ignore[attr-defined]
    assert "sft" in last and "8/10" in last and "loss 3.1250" in last and "1,280 tok/s" in last
    assert re.search(r"ETA \d:\d\d:\d\d", last)


def test_a_pipe_gets_ten_lines_of_the_same(tmp_path: Path) -> None:
    pipe = Console(file=io.StringIO(), width=120)
    with RunLog(tmp_path, steps=40, first=0, title="sft", console=pipe) as log:
        for step in range(40):
            log.row(row(step))
    lines = pipe.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 11  # every tenth, and the last
    assert lines[1] == "sft  step 5/40  loss 3.5000  1,280 tok/s  ETA 18 s"


def test_a_bad_step_is_null_in_the_file_and_nowhere_else(tmp_path: Path) -> None:
    pipe = Console(file=io.StringIO(), width=120)
    examples = {3: "a [b] \u2028", **dict.fromkeys(range(10, 20), "c")}
    bad = row(1, loss=math.nan, grad_norm=math.inf, bad="loss nan", skipped=True, examples=examples)
    with RunLog(tmp_path, steps=3, first=0, title="sft", console=pipe) as log:
        log.row(row(0))
        log.row(bad)
        log.row(row(2))
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").split("\n")
    saved = [json.loads(line, parse_constant=pytest.fail) for line in lines[:-1]]
    assert saved[1] == bad | {
        "loss": None,
        "grad_norm": None,
        "examples": {str(k): v for k, v in examples.items()},
    }
    assert logging.read(tmp_path / "log.jsonl") == [row(0), row(2)]
    said = pipe.file.getvalue()  # type: ignore[attr-defined]
    assert "bad step 1: loss nan: skipped, no update" in said
    assert "example 3: 'a [b] \\u2028'" in said and "and 7 more: log.jsonl" in said
    logging.truncate(tmp_path / "log.jsonl", 2)
    kept = (tmp_path / "log.jsonl").read_text(encoding="utf-8").split("\n")
    assert kept == [*lines[:2], ""]


@pytest.mark.usefixtures("light")
def test_tensorboard_has_every_number_of_the_log(tiny: PretrainConfig, quiet: Console) -> None:
    result = pretrain.run(replace(tiny, stop_after=3), console=quiet)
    result = pretrain.run(tiny, resume=True, console=quiet)
    board = EventAccumulator(str(Path(tiny.out) / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(result.rows[0]) - {"step"}
    for key in board.Tags()["scalars"]:
        got = {event.step: event.value for event in board.Scalars(key)}
        assert got == pytest.approx({r["step"]: r[key] for r in result.rows}, rel=1e-6)


@pytest.mark.parametrize(
    "missing, extra", [("tensorboard", "train"), pytest.param("wandb", "wandb", marks=pytest.mark.slow)]
)
def test_a_missing_package_is_one_line_before_any_work(missing: str, extra: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from fastloss.cli import main; main()"
    arguments = ["train", "sft", "--out", str(tmp_path / "run"), "--wandb", "project"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {missing} is not installed: pip install 'fastloss[{extra}]'\n"
    assert not (tmp_path / "run" / "log.jsonl").exists()


class FakeRun:
    def __init__(self, **options: Any) -> None:
        self.id, self.options = options["id"] or "made", options
        self.rows: list[dict[str, float]] = []
        self.metrics: list[tuple[Any, Any]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.mark.usefixtures("light")
def test_wandb_gets_options_and_rows_and_goes_on(
    tiny: PretrainConfig, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(**options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    configs.save(tiny, tmp_path / "tiny.yaml")
    arguments = ["pretrain", "--config", str(tmp_path / "tiny.yaml"), "--wandb", "losses"]
    first = CliRunner().invoke(app, [*arguments, "--stop-after", "4"])
    assert first.exit_code == 0, first.output
    rest = CliRunner().invoke(app, ["pretrain", "--resume", "--out", tiny.out, "--stop-after", "0"])
    assert rest.exit_code == 0, rest.output
    one, two = runs
    today = one.options["config"]["date"]
    config = dataclasses.asdict(replace(tiny, wandb="losses", stop_after=4, date=today))
    assert one.options == {
        "project": "losses", "dir": tiny.out, "name": "pretrain", "config": config, "id": None, "resume": "allow"
    }  # fmt: skip
    assert two.options["id"] == one.id == "made" and two.options["resume"] == "allow"
    assert one.metrics == [("*", "step")] and (one.exit_code, two.exit_code) == (0, 0)
    assert one.rows + two.rows == logging.read(Path(tiny.out) / "log.jsonl")
    assert [r["step"] for r in two.rows] == [4, 5]

    wild = replace(tiny, wandb="losses", lr=1e30, clip=0.0, warmup=0)
    with pytest.raises(FloatingPointError):
        pretrain.run(wild, overwrite=True, console=quiet)
    assert runs[2].exit_code == 1 and runs[2].rows[-1]["skipped"] is False
    assert all(math.isfinite(value) for r in runs[2].rows for value in r.values())


@pytest.mark.usefixtures("light")
def test_wandb_itself_without_a_network(
    tiny: PretrainConfig, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    result = pretrain.run(replace(tiny, wandb="losses"), console=quiet)
    (file,) = (Path(tiny.out) / "wandb").glob("offline-run-*/run-*.wandb")
    written = file.read_bytes()
    for r in result.rows:
        assert json.dumps(r["loss"]).encode() in written and json.dumps(r["grad_norm"]).encode() in written
    assert b"vocab_size" in written and b"losses" in written
