"""Distillation: a teacher folder, its K likeliest tokens, rows that carry them; answers of the data and of the student."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from rich.console import Console
from typer.testing import CliRunner

from fastloss.cli.train import app
from fastloss.harness import builtin, chat, distill, sft, teacher
from fastloss.harness.config import DistillConfig
from fastloss.harness.run import Result
from fastloss.harness.start import language_model

COMMON: dict[str, Any] = {
    "steps": 4, "warmup": 1, "save_every": 0, "batch_size": 4, "seq_len": 64, "task": "arithmetic", "numbers": 6,
    "exact": 4, "max_new_tokens": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The base model, trained a little: a teacher with the same tokenizer."""
    from fastloss.harness.config import SftConfig

    out = tmp_path_factory.mktemp("teacher")
    config = SftConfig(**COMMON | {"steps": 30, "exact": 0}, model=str(base), out=str(out), lr=5e-3)
    sft.run(config, resume=False, overwrite=True, console=Console(quiet=True))
    return out / "model"


@pytest.fixture
def config(base: Path, other: Path, tmp_path: Path) -> DistillConfig:
    return DistillConfig(**COMMON, model=str(base), teacher=str(other), out=str(tmp_path / "run"), lr=3e-3)


def columns(result: Result, *names: str) -> list[list[float]]:
    return [[row[name] for name in names] for row in result.rows]


def run(config: DistillConfig, quiet: Console, **how: Any) -> Result:
    return distill.run(config, console=quiet, **{"resume": False, "overwrite": True, **how})


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("top_k, on_policy", [(0, 0.0), (16, 0.0), (0, 1.0)])
def test_the_student_comes_nearer(
    top_k: int, on_policy: float, config: DistillConfig, quiet: Console
) -> None:
    result = run(replace(config, steps=30, top_k=top_k, on_policy=on_policy, hard=0.1), quiet)
    assert result.after["kl"] < 0.7 * result.before["kl"]
    assert result.after["agreement"] > result.before["agreement"]
    assert {row["own_answers"] for row in result.rows} == {on_policy}
    assert "exact_arithmetic" in result.after


@pytest.mark.usefixtures("light")
def test_a_model_has_nothing_to_learn_from_itself(config: DistillConfig, quiet: Console) -> None:
    result = run(replace(config, teacher=config.model, steps=1), quiet)
    assert result.rows[0]["loss"] == pytest.approx(0, abs=1e-6) and result.before["agreement"] == 1.0


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("divergence", distill.TORCH_KNOWS)
def test_one_curve_under_both_losses(divergence: str, config: DistillConfig, quiet: Console) -> None:
    config = replace(
        config, divergence=divergence, interpolation=0.3, temperature=1.5, hard=0.2, accumulate=2
    )
    curves = [
        torch.tensor(
            columns(
                run(replace(config, loss=loss, out=f"{config.out}-{loss}"), quiet), "loss", "kl", "grad_norm"
            )
        )
        for loss in ("fastloss", "torch")
    ]
    torch.testing.assert_close(*curves, rtol=2e-4, atol=1e-5)


@pytest.mark.usefixtures("light")
def test_resume_bit_for_bit_with_own_answers(config: DistillConfig, quiet: Console) -> None:
    config = replace(config, on_policy=0.5, steps=6, packing=False)
    whole = run(replace(config, out=f"{config.out}-whole"), quiet)
    assert {row["own_answers"] for row in whole.rows} == {0.0, 1.0}
    assert run(replace(config, stop_after=3), quiet).done == 3
    rest = run(config, quiet, resume=True, overwrite=False)
    names = ("step", "loss", "kl", "grad_norm")
    assert columns(whole, *names) == columns(rest, *names) and whole.after == rest.after
    for p, q in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = builtin.arithmetic(6)[:40]
    path.write_text("".join(json.dumps({k: row[k] for k in ("prompt", "completion")}) + "\n" for row in rows))
    return path


@pytest.mark.usefixtures("light")
def test_stored_rows_are_the_teacher(
    config: DistillConfig, quiet: Console, rows_file: Path, tmp_path: Path
) -> None:
    """Rows that ``fastloss teach`` wrote give the run that the teacher itself gives."""
    stored = tmp_path / "stored.jsonl"
    arguments = ["--teacher", config.teacher, "--data", str(rows_file), "--out", str(stored), "--top-k", "8"]
    from typer import Typer

    from fastloss.cli.train import teach

    command = Typer()
    command.command()(teach)
    done = CliRunner().invoke(command, [*arguments, "--seq-len", "64"])
    assert done.exit_code == 0, done.output
    again = CliRunner().invoke(command, [*arguments, "--seq-len", "64"])
    assert again.exit_code == 2 and "--overwrite" in again.output + (again.stderr or "")
    first = json.loads(stored.read_text().splitlines()[0])
    assert len(first["teacher_ids"][0]) == len(first["teacher_logprobs"][0]) == 8
    config = replace(config, top_k=8, data=(str(rows_file),))
    live = run(replace(config, out=f"{config.out}-live"), quiet)
    read = run(replace(config, teacher="", top_k=0, data=(str(stored),)), quiet)
    a, b = (torch.tensor(columns(r, "loss", "kl", "grad_norm")) for r in (live, read))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert read.before["kl"] == pytest.approx(live.before["kl"], rel=1e-3)


def test_what_the_teacher_names(config: DistillConfig, quiet: Console) -> None:
    config = replace(config, top_k=5, temperature=2.0)
    tok = chat.load(Path(config.model))
    model = language_model(config, tok)
    lesson_of = teacher.Teacher(config, tok, distill.head_of(model).vocab)
    data = sft.prepare(config, tok, quiet)
    groups = data.taken(0, config)
    batch = data.laid_out(groups, config)
    named = lesson_of.lesson(batch, []).named
    assert named is not None
    hidden = distill.learned(lesson_of.model, batch, config)
    logp = (lesson_of.head.logits(hidden) / 2.0).log_softmax(-1)
    torch.testing.assert_close(named.logprobs, logp.topk(5).values)
    torch.testing.assert_close(logp.gather(1, named.ids), named.logprobs)


def test_prompts_of_own_answers() -> None:
    example = chat.Example([1, 2, 3, 4, 5, 6, 7], [False, False, True, True, False, True, True])
    assert distill.prompt_of(example) == [1, 2, 3, 4, 5]  # the last answer alone is answered anew
    assert distill.prompt_of(chat.Example([1, 2, 3], [True, True, True])) == [1]


def test_what_does_not_fit(
    config: DistillConfig, quiet: Console, text_file: Path, rows_file: Path, tmp_path: Path
) -> None:
    for wrong, message in (
        ({"teacher": ""}, "teacher: expected a folder"),
        ({"teacher": "", "data": (str(rows_file),), "on_policy": 0.5}, "on_policy: expected --teacher"),
        ({"teacher": "", "data": (str(rows_file),)}, r"rows.jsonl.*teacher_ids"),
        ({"compare": True, "top_k": 4}, "leave out --compare"),
        ({"top_k": 512}, "top_k: expected at most"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(config, **wrong), quiet)
    with pytest.raises(ValueError, match="parallel: distill takes no tp"):
        replace(config, parallel="tp=2")
    foreign = random_model(tmp_path / "foreign", text_file)
    tokens = json.loads((foreign / "tokenizer.json").read_text())
    tokens["model"]["vocab"] = {word[::-1] + "!": i for word, i in tokens["model"]["vocab"].items()}
    tokens["model"]["merges"] = []
    (foreign / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match="teacher: expected a model with the student's tokenizer"):
        run(replace(config, teacher=str(foreign)), quiet)
    bad = json.loads(rows_file.read_text().splitlines()[0]) | {
        "teacher_ids": [[1]],
        "teacher_logprobs": [[-0.5, 1.0]],
    }
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl.*lists of one shape"):
        run(replace(config, teacher="", data=(str(path),)), quiet)


def test_command_line_names_the_stage() -> None:
    done = CliRunner().invoke(app, ["distill", "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "--on-policy" in done.output and "--teacher" in done.output
