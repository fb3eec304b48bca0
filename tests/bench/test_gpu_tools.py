"""tools/gpu: the stages' machinery with stages that pass, fail and never end; each script on small shapes on the CPU."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastloss

needs_cpu = pytest.mark.skipif(fastloss.backends()["cpu"] != "available", reason="no native CPU module")
HERE = Path(__file__).resolve().parents[2] / "tools" / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run = load("run")
wheels = load("wheels")


def _python(code: str, seconds: int = 60, tool: str = ""):  # type: ignore[no-untyped-def]
    return run.Stage("a stage", seconds, lambda out, left: [sys.executable, "-c", code], tool)


ENDLESS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def test_the_next_stage_runs_whatever_became_of_the_one_before(tmp_path: Path) -> None:
    stages = {
        "good": _python("print('fine')"),
        "bad": _python("raise SystemExit(3)"),
        "endless": _python(ENDLESS, seconds=6),
        "tool": _python("", tool="no-such-tool"),
        "last": _python("import os; print(os.environ['FASTLOSS_TEST_DEVICE'])"),
    }
    began = time.monotonic()
    ended = run.run(list(stages), tmp_path, 1000.0, stages)
    assert time.monotonic() - began < 120
    assert {name: how["how"] for name, how in ended.items()} == {
        "good": "passed",
        "bad": "failed",
        "endless": "time was up",
        "tool": "left out",
        "last": "passed",
    }
    assert ended["bad"]["status"] == 3 and "no-such-tool" in ended["tool"]["why"]
    assert json.loads((tmp_path / "stages.json").read_text()) == ended
    assert (tmp_path / "good.txt").read_text() == "fine\n" and (tmp_path / "last.txt").read_text() == "cuda\n"
    child = int((tmp_path / "endless.txt").read_text().split()[1])
    assert not _alive(child), "what the stage started must end with it"
    assert not list(tmp_path.glob("*.part"))


def test_of_a_long_output_the_end_is_kept(tmp_path: Path) -> None:
    stages = {"long": _python("print('x' * 100_000); print('the end')")}
    run.run(["long"], tmp_path, 1000.0, stages)
    text = (tmp_path / "long.txt").read_text()
    assert len(text) < run.KEPT + 100 and text.endswith("the end\n") and "left out" in text


def test_no_stage_begins_without_time(tmp_path: Path) -> None:
    ended = run.run(["good"], tmp_path, 20.0, {"good": _python("", seconds=300)})
    assert ended["good"] == {"how": "left out", "seconds": 0.0, "why": "no time is left"}


def test_stages_fit_their_machine_and_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert run.main(["--list"]) == 0
    listed = capsys.readouterr().out.split()
    for name, stage in run.STAGES.items():
        assert name in listed and 60 <= stage.seconds < 600
        command = stage.command(Path("/out"), stage.seconds)
        assert command[0] == sys.executable
        assert all(Path(word).is_file() for word in command if word.endswith(".py"))
    with pytest.raises(SystemExit):
        run.main(["smok"])
    assert "expected one of build, smoke" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("a stage ran"))
    with pytest.raises(SystemExit, match="sees no CUDA device: nothing was built"):
        run.main(["smoke"])


def test_tests_of_a_gpu_are_those_that_use_one() -> None:
    names = {path.name for path in run.gpu_tests()}
    assert {"test_parity.py", "test_triton_kernels.py", "test_preference.py", "test_golden.py"} <= names
    assert {"test_on_gpu.py", "test_gpu_head.py", "test_gpu_flops.py"} <= names
    assert not names & {
        "test_cpu_kernels.py",
        "test_cuda_emulated.py",
        "test_triton_compiles.py",
        "test_build.py",
        "test_pretrain.py",
        "test_plan.py",
        "test_shards.py",
        "test_calibration.py",
        "test_docstrings.py",
        Path(__file__).name,
    }


def test_the_benchmark_takes_the_stages_options() -> None:
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fastloss.cli.bench import bench

    app = typer.Typer()
    app.command()(bench)
    shown: set[str] = set()
    for name in ("peers", "final"):
        command = run.STAGES[name].command(Path("/out"), 300)
        found = CliRunner().invoke(app, [*command[command.index("bench") + 1 :], "--list"])
        assert found.exit_code == 0, found.output
        assert not shown & set(found.output.split())  # no case twice
        shown |= set(found.output.split())
    everything = CliRunner().invoke(app, ["--device", "cuda", "--list"]).output.split()
    assert shown == set(everything)


@needs_cpu
def test_smoke_says_a_line_each(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = load("smoke")
    options = ["--device", "cpu", "--small", "--only"]
    for only, lines in (
        ("rows 503", 6),
        ("head 1000", 2),
        ("scaled exponentials 503", 1),
        ("losses", 3),
        ("flop", 1),
        ("autocast", 1),
    ):
        assert smoke.main([*options, only]) == 0
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines and all(line.startswith("ok ") for line in said)
    right = smoke.fastloss.cross_entropy
    monkeypatch.setattr(smoke.fastloss, "cross_entropy", lambda *a, **o: right(*a, **o) * 1.01)
    assert smoke.main([*options, "rows 503 float32 aligned"]) == 1
    assert capsys.readouterr().out.startswith("FAIL rows 503 float32 aligned: AssertionError: loss")
    assert smoke.main([*options, "losses", "--seconds", "-1"]) == 1
    assert capsys.readouterr().out.count("time is up") == 3


def test_smoke_knows_what_a_gpu_is_used_for() -> None:
    names = [name for name, _ in load("smoke").checks("cuda", False)]
    for vocab in (128256, 50257, 256000):
        for dtype in ("float32", "bfloat16"):
            assert {f"rows {vocab} {dtype} {x}" for x in ("aligned", "odd strides")} <= set(names)
            assert f"head {vocab} {dtype}" in names
        assert f"scaled exponentials {vocab}" in names
    assert {"graph", "side stream", "flop counter", "autocast", "compile"} <= set(names)


@needs_cpu
def test_ceilings_and_sweeps_write_what_they_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ceilings, sweeps = load("ceilings"), load("sweeps")
    assert ceilings.main(["--device", "cpu", "--small", "--out", str(tmp_path / "c.json")]) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    whats = {"copy", "logits", "logits, batch-invariant", "d hidden", "d weight", "d weight, float32"}
    assert {one["what"] for one in found} == whats
    assert all(one["rate"] > 0 for one in found if "reason" not in one)
    assert len(capsys.readouterr().out.splitlines()) == len(found)
    options = ["--device", "cpu", "--small", "--out", str(tmp_path / "s.json")]
    assert sweeps.main([*options, "--only", "chunks"]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert {one["candidate"] for one in found} == {
        "cpu, its own choice",
        "cpu, chunks of 8",
        "cpu, chunks of 16",
    }
    assert all(one["median"] > 0 for one in found)
    first = [one["candidate"] for one in itertools.islice(sweeps.exponentials("cpu", True), 2)]
    assert first == ["cpu, two passes", "cpu, scaled exponentials"]


def test_a_candidate_that_fails_says_why() -> None:
    sweeps = load("sweeps")

    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of resources")

    case = next(case for case in sweeps.gpu.cases(True) if case.name == "row-f32-32x500-inplace-warm")
    losses = {"good": torch.nn.functional.cross_entropy, "broken": broken}
    good, bad = sweeps.timed(case, losses, "cpu", budget=0.05)
    assert good["median"] > 0 and bad["reason"] == "RuntimeError: out of resources"


def test_launch_shapes_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = load("sweeps")
    pytest.importorskip("triton")
    from fastloss.kernels import shapes

    rows, others = dict(shapes.ROWS), {name: dict(shape) for name, shape in shapes.SHAPES.items()}
    seen: list[tuple[dict[str, object], dict[str, object]]] = []

    def timed(case, losses, device, budget=3.0):  # type: ignore[no-untyped-def]
        for name, loss in losses.items():
            loss()
            seen.append((dict(shapes.ROWS), dict(shapes.SHAPES)))
            yield {"case": case.name, "candidate": name}

    monkeypatch.setattr(sweeps, "available", lambda device: ["triton"])
    monkeypatch.setattr(sweeps, "timed", timed)
    for kind in {"row", *sweeps.KERNELS.values()}:
        usual = sweeps.KINDS[kind].ours

        def silent_ours(case, call, usual=usual):  # type: ignore[no-untyped-def]
            usual(case, call)  # takes these options
            assert call == {"backend": "triton"}
            return lambda *tensors: None

        silent = replace(sweeps.KINDS[kind], ours=silent_ours)
        monkeypatch.setitem(sweeps.KINDS, kind, silent)
    found = [one["candidate"] for one in sweeps.launch_shapes("cpu", True)]
    assert {f"threads {n}, bytes {b}" for n, b in sweeps.SHAPES} <= set(found)
    assert rows == shapes.ROWS and others == shapes.SHAPES
    assert {shape for each, _ in seen for shape in each.values()} >= set(sweeps.SHAPES)
    for name in sweeps.KERNELS:
        tried = {(each[name]["BLOCK"], each[name]["num_warps"]) for _, each in seen}  # type: ignore[index]
        assert len(tried) == 9 and (others[name]["BLOCK"], others[name]["num_warps"]) in tried


@needs_cpu
def test_calls_reach_every_loss_and_run_under_a_tool(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    calls = load("calls")
    assert calls.main(["--backend", "cpu"]) == 0
    said = capfd.readouterr().out
    assert "FAIL" not in said and said.count("ok ") >= 20
    monkeypatch.setitem(calls.TOOLS, "ncu", [["env"]])
    assert calls.under("ncu", ["cpu"], 0.0) == 124  # ended: no time was left
    assert "time is up" in capfd.readouterr().out
    monkeypatch.setitem(calls.TOOLS, "compute-sanitizer", [["false"], ["true"]])
    assert calls.under("compute-sanitizer", ["cpu"], 60.0) == 1  # the second way runs all the same
    assert capfd.readouterr().out.count("$ ") == 2


def test_wheels_come_back_whole(tmp_path: Path) -> None:
    source, folder, back = tmp_path / "source", tmp_path / "pieces", tmp_path / "back"
    source.mkdir()
    content = {"small-1.whl": b"x", "large-1.whl": bytes(range(256)) * 10}
    for name, data in content.items():
        (source / name).write_bytes(data)
    index = wheels.split(source, folder, piece=1000)
    assert [len(index[name]["pieces"]) for name in ("small-1.whl", "large-1.whl")] == [1, 3]
    assert max(path.stat().st_size for path in folder.glob("*.whl.*")) <= 1000
    assert {path.name: path.read_bytes() for path in wheels.join(folder, back)} == content
    (folder / "large-1.whl.001").write_bytes(b"y" * 1000)
    with pytest.raises(ValueError, match=r"large-1\.whl: expected SHA-256"):
        wheels.join(folder, back)
    (folder / "large-1.whl.001").unlink()
    with pytest.raises(ValueError, match=r"expected large-1\.whl\.001 in"):
        wheels.join(folder, back)
