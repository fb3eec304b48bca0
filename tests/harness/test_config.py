"""Options from a file and the command line: which one wins, what a wrong one is told, what a run saves."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastloss.cli.train import app
from fastloss.harness import config as configs
from fastloss.harness import grpo, sft
from fastloss.harness.config import (
    DpoConfig,
    GrpoConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)

STAGES: dict[str, type[TrainConfig]] = {
    "pretrain": PretrainConfig, "sft": SftConfig, "reward": RewardConfig, "dpo": DpoConfig, "grpo": GrpoConfig,
    "ppo": PpoConfig,
}  # fmt: skip


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300", "TERM": "dumb"})


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command line hands to sft and grpo, without their runs."""
    seen: dict[str, Any] = {}
    for stage in (sft, grpo):
        monkeypatch.setattr(stage, "run", lambda config, **flags: seen.update(config=config, **flags))
    return seen


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path, caught: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "# by hand\nlr: 1e-4\nbatch_size: 3\ndata: [a.jsonl, b.jsonl]\npacking: false\nout: here\n"
    )
    got = invoke("sft", "--config", str(path), "--lr", "1e-3", "--packing", "--out", "there")
    assert got.exit_code == 0, got.output
    expected = SftConfig(lr=1e-3, batch_size=3, data=("a.jsonl", "b.jsonl"), packing=True, out="there")
    assert caught == {"config": expected, "resume": False, "overwrite": False}
    # a default that is typed wins over the file too
    default = SftConfig().batch_size
    invoke("sft", "--config", str(path), "--batch-size", str(default), "--data", "c.jsonl")
    assert caught["config"].batch_size == default and caught["config"].data == ("c.jsonl",)


@pytest.mark.parametrize("name", STAGES)
def test_what_is_saved_comes_back(name: str, tmp_path: Path) -> None:
    """Every field off its default: numbers that YAML 1.1 reads as text, text that it reads as something else."""
    kind = STAGES[name]
    other: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        default, choices = field.default, field.metadata["choices"]
        if isinstance(default, bool):
            other[field.name] = not default
        elif isinstance(default, int):
            other[field.name] = default + 1
        elif isinstance(default, float):
            other[field.name] = default + 1e-7 if field.name != "temperature" else 1e16
        elif isinstance(default, tuple):
            other[field.name] = ("yes", "1e-3", "ä: b #c", "")
        else:
            other[field.name] = choices[-1] if choices else "no"
    other["date"], other["parallel"] = "2026-11-05", "fsdp"
    config = kind(**other)
    configs.save(config, tmp_path / "config.yaml")
    assert configs.load(kind, tmp_path / "config.yaml") == config
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2))  # an old run's
    assert configs.load(kind, tmp_path / "config.json") == config
    assert config != kind() and set(other) == {field.name for field in dataclasses.fields(kind)}


WRONG = {
    "lr: 1e-3\nbatch_sise: 4\n": r"run.yaml:2: batch_sise: .*Did you mean: 'batch_size'\?",
    "batch-size: 4\n": r"run.yaml:1: batch-size: .*Did you mean: 'batch_size'\?",
    "\n\nlr: fast\n": r"run.yaml:3: lr: Value 'fast' of type 'str' could not be converted to Float",
    "steps: 2.5\n": r"run.yaml:1: steps: Value '2.5' of type 'float' could not be converted to Integer",
    "seed: 1\ntie: maybe\n": r"run.yaml:2: tie: Value 'maybe' is not a valid bool",
    "data: a.jsonl\n": r"run.yaml:1: data: ",
    "lr:\n": r"run.yaml:1: lr: ",
    "seed: 1\nlr: -1\n": r"run.yaml:2: lr: expected at least 0, got -1",
    "seed: 1\nscale: std\n": r"run.yaml:2: scale: expected one of 'group', 'batch', 'none', got 'std'",
    "val_fraction: 1.5\n": r"run.yaml:1: val_fraction: expected less than 1, got 1.5",
    "lr: 1\nlr: 2\n": r"run.yaml:2: found duplicate key lr",
    "lr: [1\n": r"run.yaml:2: ",
    "- lr\n": r"run.yaml:1: expected lines of `option: value`, got a list",
    '{"lr": 1,\n "stepps": 3}': r"run.yaml:2: stepps: .*Did you mean: 'steps'\?",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_in_a_file_is_named_with_its_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=WRONG[text]) as error:
        configs.load(GrpoConfig, path)
    assert "\n" not in str(error.value)
    got = invoke("grpo", "--config", str(path), "--out", str(tmp_path / "run"))
    assert got.exit_code == 2 and str(error.value) in got.output and "Traceback" not in got.output
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_on_the_command_line_is_named() -> None:
    for arguments, message in (
        (["--batch-sise", "4"], "--batch-size"),
        (["--lr", "fast"], "Invalid value for '--lr'"),
        (["--lr", "-1"], "lr: expected at least 0, got -1.0"),
        (["--task", "sums"], "task: expected one of 'both', 'describe', 'arithmetic', got 'sums'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ):
        got = invoke("sft", *arguments)
        assert got.exit_code == 2 and message in got.output and "Traceback" not in got.output, got.output


@pytest.mark.parametrize("name", STAGES)
def test_help_has_every_option_with_its_default_and_meaning(name: str) -> None:
    kind = STAGES[name]
    shown = invoke(name, "--help").output
    panels = ["Data", "Model", "Optimisation", "Loss", "Run"]
    places = [shown.index(f" {panel} ──") for panel in panels]
    assert places == sorted(places)
    lines = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│ --")}
    for field in dataclasses.fields(kind):
        line = lines["--" + field.name.replace("_", "-")]
        assert field.metadata["help"] in line
        if field.default not in ("", ()):
            default = str(field.default)
            if isinstance(field.default, bool):
                default = ("" if field.default else "no-") + field.name.replace("_", "-")
            assert f"[default: {default}]" in line
    grouped = [field for fields in configs.groups(kind).values() for field in fields]
    assert len(grouped) == len(dataclasses.fields(kind))


@pytest.mark.usefixtures("light")
def test_the_saved_file_gives_the_same_run(tiny: PretrainConfig, tmp_path: Path) -> None:
    configs.save(replace(tiny, steps=3, lr=3e-3), tmp_path / "first.yaml")
    logs = []
    for number, source in enumerate(("first.yaml", "0/config.yaml")):
        out = tmp_path / str(number)
        got = invoke("pretrain", "--config", str(tmp_path / source), "--out", str(out))
        assert got.exit_code == 0, got.output
        assert "Optimisation: steps=3  batch_size=2" in got.output and "lr=0.003" in got.output
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        logs.append([(row["loss"], row["grad_norm"], row["lr"]) for row in rows])
    assert logs[0] == logs[1] and len(logs[0]) == 3
    saved = configs.load(PretrainConfig, tmp_path / "1" / "config.yaml")
    assert date.fromisoformat(saved.date)  # of the first run
    assert saved == replace(tiny, steps=3, lr=3e-3, out=str(tmp_path / "1"), date=saved.date)


def test_resume_reads_what_the_run_saved(tmp_path: Path, caught: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text('{"lr": 0.5, "steps": 7}')
    assert invoke("sft", "--resume", "--out", str(tmp_path), "--steps", "9").exit_code == 0
    assert caught == {
        "config": SftConfig(lr=0.5, steps=9, out=str(tmp_path)), "resume": True, "overwrite": False
    }  # fmt: skip
    configs.save(SftConfig(lr=0.25), tmp_path / "config.yaml")  # newer than the other
    invoke("sft", "--resume", "--out", str(tmp_path))
    assert caught["config"] == SftConfig(lr=0.25, out=str(tmp_path))
    invoke("sft", "--out", str(tmp_path))  # without --resume nothing is read
    assert caught["config"] == SftConfig(out=str(tmp_path))
