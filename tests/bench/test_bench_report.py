"""What is written of a run, and the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from fastloss.bench import clock, contention, goals, machine, ratios, report, store
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
    monkeypatch.setattr(contention.Spins, "free", lambda self: True)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def results() -> dict:
    found = [run_case(case, repeats=2) for case in cases(quick=True) if case.name in ("tiny", CASE)]
    return {**store.begin("cpu", quick=True), "cases": found}


def test_the_file_has_what_was_measured_and_the_rest_follows(results: dict, tmp_path) -> None:
    report.save(results, tmp_path)
    read = store.load(tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert store.dumps(read) == text and len(text) < 8000
    assert "over_limit" not in text and "times" not in text
    for case, again in zip(results["cases"], read["cases"]):
        for p, q in zip(case["providers"], again["providers"]):
            assert p.keys() == q.keys()
            assert all(
                q[key] == pytest.approx(p[key], rel=2e-3) for key in p if key in ("median", "over_limit")
            )
    text = (tmp_path / "results.md").read_text()
    assert f"## {CASE}" in text and "fastloss[cpu]" in text and results["machine"]["cpu"] in text
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_compare_sees_a_slower_run(results: dict, tmp_path) -> None:
    for case in results["cases"]:  # numbers that keep all their digits when they are written with four
        for p in case["providers"]:
            p.update({key: 0.004 for key in ("median", "min") if key in p})
    slower = copy.deepcopy(results)
    for p in slower["cases"][1]["providers"]:
        if p["name"] == "torch eager":
            p["median"] *= 2
    for run in (results, slower):
        for case in run["cases"]:
            ratios.add_ratios(case)
    for name, run in (("old", results), ("new", slower)):
        report.save(run, tmp_path / name)
    last = {(case, provider): line[-1] for case, provider, *line in report.compare(results, slower)}
    assert last[CASE, "torch eager"] == "2.000" and last["tiny", "torch eager"] == "1.000"
    run = CliRunner().invoke(
        APP, ["--compare", *(str(tmp_path / name / "results.json") for name in ("old", "new"))]
    )
    assert run.exit_code == 0 and "2.000" in run.output and "1.000" in run.output


def test_a_case_measured_again_replaces_the_one_before_and_no_other(results: dict, tmp_path) -> None:
    again = {**store.begin("cpu", quick=True), "cases": copy.deepcopy(results["cases"][1:])}
    again["cases"][0]["load"] = [7.0]
    alone = copy.deepcopy(results["cases"][1])
    alone["only"] = "torch*"
    again["cases"].append(alone)
    merged = store.merge(results, again)
    assert {(c["name"], c.get("only"), c["run"]) for c in merged["cases"]} == {
        ("tiny", None, 0),
        (CASE, None, 1),
        (CASE, "torch*", 1),
    }
    assert next(c["load"] for c in merged["cases"] if c["name"] == CASE) == [7.0]
    everything = store.merge(merged, {**again, "cases": copy.deepcopy(merged["cases"])})
    assert len(everything["runs"]) == 1 and len(everything["cases"]) == 3  # a run without a case is gone


def test_the_index_lists_the_machines(results: dict, tmp_path) -> None:
    (tmp_path / "README.md").write_text("")
    report.save({**results, "quick": False}, tmp_path / "a-machine")
    report.save(results, tmp_path / "quick")
    text = (tmp_path / "README.md").read_text()
    assert "[a-machine](a-machine/results.md)" in text and "quick" not in text and "| 2 |" in text


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_results_of_the_repository_are_one_folder_per_machine_and_their_tables_are_of_the_json() -> None:
    folders = [path for path in RESULTS.iterdir() if path.is_dir()]
    assert folders and (RESULTS / "README.md").read_text() == report.index(RESULTS)
    for folder in folders:
        found = store.load(folder)
        assert folder.name == machine.slug(found["machine"])
        assert (folder / "results.md").read_text() == report.markdown(found)
        assert (folder / "results.json").read_text().count("\n") < 1500


def test_what_is_no_result_is_named(tmp_path) -> None:
    (tmp_path / "results.json").write_text('{"cases": [{}]}')
    with pytest.raises(ValueError, match=r"results\.json: expected results"):
        store.load(tmp_path)
    run = CliRunner().invoke(APP, ["--quick", "--cases", "tiny", "--out", str(tmp_path)])
    assert run.exit_code == 2 and "expected results" in run.output


def test_results_of_another_machine_are_not_mixed_in(results: dict, tmp_path, monkeypatch) -> None:
    report.save({**results, "quick": False}, tmp_path / "full")
    report.save({**results, "machine": {**results["machine"], "cpu": "Another"}}, tmp_path / "other")
    for folder, said in (
        ("full", "expected a folder of quick results"),
        ("other", "got quick results of another"),
    ):
        run = CliRunner().invoke(APP, ["--quick", "--cases", "tiny", "--out", str(tmp_path / folder)])
        assert run.exit_code == 2 and said in " ".join(run.output.split())


def test_the_command_measures_and_writes(tmp_path) -> None:
    arguments = ["--quick", "--cases", "row-*-new-*", "--providers", "torch eager", "--repeats", "1"]
    run = CliRunner().invoke(APP, [*arguments, "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert {c["name"].split("-")[1] for c in found["cases"]} == {"f32", "bf16"}
    assert {c["only"] for c in found["cases"]} == {"torch eager"}
    assert all(p["name"] != "torch.compile" for c in found["cases"] for p in c["providers"])


def test_patterns_add_up_and_a_folder_keeps_its_other_cases(tmp_path) -> None:
    first = ["--quick", "--repeats", "1", "--out", str(tmp_path), "--cases", "gae-*"]
    assert CliRunner().invoke(APP, first).exit_code == 0
    both = [*first[:-2], "--cases", "tiny", "--cases", "preference-sigmoid-64", "--list"]
    assert CliRunner().invoke(APP, both).output.split() == ["tiny", "preference-sigmoid-64"]
    run = CliRunner().invoke(APP, both[:-1])
    assert run.exit_code == 0, run.output
    names = {c["name"] for c in json.loads((tmp_path / "results.json").read_text())["cases"]}
    assert names == {"gae-4x64", "tiny", "preference-sigmoid-64"}


def test_patterns_of_providers_add_up(tmp_path) -> None:
    arguments = ["--quick", "--cases", "gae-*", "--repeats", "1", "--out", str(tmp_path)]
    run = CliRunner().invoke(APP, [*arguments, "--providers", "torch eager", "--providers", "fastloss?cpu?"])
    assert run.exit_code == 0, run.output
    (case,) = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert case["only"] == "torch eager or fastloss?cpu?"
    assert {"torch eager", "fastloss[cpu]"} <= {p["name"] for p in case["providers"]}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cases", "tiny", "--cases", "nothing"],
        ["--cases", "nothing"],
        ["--device", "tpu"],
        ["--compare", "a", "b"],
    ],
)
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
    assert outcome["cost per token: spread over lengths", "tokens-f32 1024 … 4096"]


def test_a_head_that_is_told_its_memory_has_goals_of_its_own() -> None:
    times = {
        "torch eager": 4.0,
        "limit: GEMMs": 1.0,
        "fastloss[cpu]": 2.0,
        "fastloss[cpu], memory=fast": 1.05,
    }
    providers = [{"name": name, "median": time, "extra_bytes": 1} for name, time in times.items()]
    case = {
        "name": "linear-bf16-1024x512x32000",
        "shape": [1024, 512, 32000],
        "logits_bytes": 100,
        "providers": providers,
    }
    ratios.add_ratios(case)
    assert providers[0]["fastloss_speedup"] == 2.0 and "fastloss_speedup" not in providers[3]
    outcome = {o.what: o for o in goals.met({"cases": [case]})}
    assert outcome["linear head: over three GEMMs"].measured == 2.0
    assert outcome["any head, fast: over its GEMMs"].measured == 1.05
    assert outcome["any head, fast: over its GEMMs"].reached
    assert "any head, low: over its GEMMs" not in outcome
    # A float32 gradient of the weight, and 4 or 6 of the 100 bytes of logits.
    for more, reached in ((4, True), (6, False)):
        providers[3]["extra_bytes"] = 512 * 32000 * 4 + more
        outcome = {o.what: o for o in goals.met({"cases": [case]})}
        found = outcome["any head, fast: extra memory, less d weight in float32"]
        assert found.measured == more / 100 and found.reached == reached


def _tiny_of(**marks: bool) -> dict:
    providers = [
        {"name": "fastloss[cpu]", "median": 1.0, "over_limit": 0.5, "extra_bytes": 1},
        {"name": "torch eager", "median": 131.0, "over_limit": 1.0, "fastloss_speedup": 131.0},
        {"name": "torch.compile", "median": 2.0, "over_limit": 1.0, "fastloss_speedup": 2.0},
    ]
    for p in providers:
        p.update({"contended": True} if marks.get(p["name"].split(" ")[0].split("[")[0]) else {})
    name = "row-f32-1024x32000-inplace-cold"
    return {
        "cases": [
            {"name": name, "shape": [1024, 0, 9], "logits_bytes": 100, "providers": providers, "load": [1.0]}
        ]
    }


def test_what_was_measured_while_somebody_else_was_running_is_never_reached() -> None:
    against = "in place, cold: against eager"
    (free,) = [o for o in goals.met(_tiny_of()) if o.what == against]
    assert free.reached and free.verdict == "reached"
    for who in ("fastloss", "torch"):
        (found,) = [o for o in goals.met(_tiny_of(**{who: True})) if o.what == against]
        assert not found.reached and found.contended and "contended" in found.verdict
    assert report.contended(_tiny_of()) == [] and len(report.contended(_tiny_of(torch=True))) == 1


def test_machine_says_where() -> None:
    info = machine.machine("cpu")
    assert info["threads"] == torch.get_num_threads() and info["versions"]["torch"]
    assert machine.slug({"gpu": "NVIDIA H200", "flags": []}) == "nvidia-h200"
    assert (
        machine.slug({"gpu": None, "cpu": "AMD EPYC", "threads": 2, "flags": ["avx2"]}) == "amd-epyc-2t-avx2"
    )
