"""Ctrl-C, as a terminal sends it to a process: a checkpoint, a clean end, and a resumed run like one never stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastloss.harness import checkpoint, logging, pretrain
from fastloss.harness import config as configs
from fastloss.harness.config import PretrainConfig

STEPS = 120
COMMAND = [sys.executable, "-c", "from fastloss.cli import main; main()", "train", "pretrain"]


def rows_of(log: Path) -> int:
    return log.read_text(encoding="utf-8").count("\n") if log.exists() else 0


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(folder, folder.with_suffix(".pt"))
    saved = torch.load(folder.with_suffix(".pt"))
    return {key: value for key, value in saved.items() if isinstance(value, torch.Tensor)}


@pytest.mark.usefixtures("light")
def test_ctrl_c_saves_and_the_resumed_run_is_the_unstopped_one(
    tiny: PretrainConfig, quiet: Console, tmp_path: Path
) -> None:
    config = replace(tiny, steps=STEPS, threads=1)
    configs.save(config, tmp_path / "run.yaml")
    out = Path(config.out)
    process = subprocess.Popen(
        [*COMMAND, "--config", str(tmp_path / "run.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while rows_of(out / "log.jsonl") < 5 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=1000)
    finally:
        process.kill()
    assert process.returncode == 0, said
    (saved,) = (out / "checkpoint").iterdir()
    done = int(checkpoint.read_progress(saved)["step"])
    assert 5 <= done < STEPS and rows_of(out / "log.jsonl") == done
    assert f"stopped after step {done} of {STEPS}, with a checkpoint: --resume goes on" in said
    assert "Traceback" not in said and (out / "report.md").exists()

    resumed = subprocess.run(
        [*COMMAND, "--resume", "--out", str(out)], capture_output=True, text=True, timeout=1000
    )
    assert resumed.returncode == 0 and f"resumed at step {done}" in resumed.stdout, resumed.stderr
    whole = tmp_path / "whole"
    pretrain.run(replace(config, out=str(whole)), console=quiet)
    one, two = (tensors(folder / "checkpoint" / f"step-{STEPS}") for folder in (out, whole))
    assert one.keys() == two.keys() and len([key for key in one if key.startswith("optimizer/")]) > 10
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key
    curves = [
        [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in logging.read(folder / "log.jsonl")]
        for folder in (out, whole)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == STEPS
