"""What is written of a run, and the command line."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from fastloss.bench import clock, goals, machine, report
from fastloss.bench.cases import cases
from fastloss.bench.run import run_case
from fastloss.cli.bench import bench

APP = typer.Typer()
APP.command()(bench)
CASE = "row-f32-16x2000-new-warm"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def results() -> dict:
    found = [run_case(case, repeats=2) for case in cases(quick=True) if case.name in ("tiny", CASE)]
    return {"machine": machine.machine("cpu"), "quick": True, "cases": found}


def test_json_round_trip(results: dict, tmp_path) -> None:
    report.save(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    text = (tmp_path / "results.md").read_text()
    assert f"## {CASE}" in text and "fastloss[cpu]" in text and results["machine"]["cpu"] in text
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_compare_sees_a_slower_run(results: dict, tmp_path) -> None:
    slower = copy.deepcopy(results)
    for p in slower["cases"][1]["providers"]:
        if p["name"] == "torch eager":
            p["median"] *= 2
            p["over_limit"] *= 2
    for name, run in (("old", results), ("new", slower)):
        report.save(run, tmp_path / name)
    ratios = {(case, provider): last for case, provider, *_, last in report.compare(results, slower)}
    assert ratios[CASE, "torch eager"] == "2.000" and ratios["tiny", "torch eager"] == "1.000"
    run = CliRunner().invoke(
        APP, ["--compare", *(str(tmp_path / name / "results.json") for name in ("old", "new"))]
    )
    assert run.exit_code == 0 and "2.000" in run.output and "1.000" in run.output


def test_the_command_measures_and_writes(tmp_path) -> None:
    arguments = ["--quick", "--cases", "row-*-new-*", "--providers", "torch eager", "--repeats", "1"]
    run = CliRunner().invoke(APP, [*arguments, "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert {c["name"].split("-")[1] for c in found["cases"]} == {"f32", "bf16"}
    assert all(p["name"] != "torch.compile" for c in found["cases"] for p in c["providers"])


@pytest.mark.parametrize("arguments", [["--cases", "nothing"], ["--device", "tpu"], ["--compare", "a", "b"]])
def test_the_command_refuses(arguments: list[str]) -> None:
    assert CliRunner().invoke(APP, arguments).exit_code != 0


def test_names_in_brackets_reach_the_terminal(tmp_path) -> None:
    arguments = ["--quick", "--cases", CASE, "--repeats", "1", "--out", str(tmp_path)]
    assert "fastloss[cpu]" in CliRunner().invoke(APP, arguments).output


def test_a_narrow_terminal_gets_whole_columns(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--quick", "--cases", CASE, "--repeats", "1", "--out", str(tmp_path)]
    shown = CliRunner().invoke(APP, [*arguments, "--providers", "torch*"]).output
    assert "…" not in shown and "median ms" in shown and "RSS MiB" not in shown
    assert "RSS MiB" in (tmp_path / "results.md").read_text()


def test_goals() -> None:
    def run(name: str, ours: float, eager: float) -> dict:
        providers = [
            {"name": "fastloss[cpu]", "median": ours, "over_limit": ours, "extra_bytes": 1},
            {"name": "torch eager", "median": eager, "over_limit": eager, "fastloss_speedup": eager / ours},
        ]
        rows = int(name.split("-")[2].split("x")[0])
        return {"name": name, "shape": [rows, 0, 9], "logits_bytes": 100, "providers": providers}

    found = goals.met(
        {
            "cases": [
                run("row-f32-1024x32000-inplace-cold", 1.0, 7.5),
                run("linear-bf16-1024x512x32000", 1.2, 1.1),
                run("tokens-f32-1024x4x4", 1.0, 9.0),
                run("tokens-f32-4096x4x4", 4.2, 9.0),
            ]
        }
    )
    outcome = {(o.what, o.case): o.reached for o in found}
    assert outcome["in place, cold: against eager", "row-f32-1024x32000-inplace-cold"]
    assert not outcome["linear head: over three GEMMs", "linear-bf16-1024x512x32000"]
    assert not outcome["linear head: faster than every peer", "linear-bf16-1024x512x32000"]
    assert outcome["linear head: extra memory, of the logits", "linear-bf16-1024x512x32000"]
    assert outcome["cost per token: spread over lengths", "tokens 1024 … 4096"]


def test_machine_says_where() -> None:
    info = machine.machine("cpu")
    assert info["threads"] == torch.get_num_threads() and info["versions"]["torch"]
    assert machine.slug({"gpu": "NVIDIA H200", "flags": []}) == "nvidia-h200"
    assert (
        machine.slug({"gpu": None, "cpu": "AMD EPYC", "threads": 2, "flags": ["avx2"]}) == "amd-epyc-2t-avx2"
    )
