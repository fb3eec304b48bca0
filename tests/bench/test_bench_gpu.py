"""The cases of a GPU, built and run on small shapes on the CPU; its clock, with events that are told the time."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from fastloss.bench import clock, contention, gpu
from fastloss.bench.cases import data, exact
from fastloss.bench.exact import errors
from fastloss.bench.goals import GOALS
from fastloss.bench.kinds import KINDS
from fastloss.bench.peers import registry as peers
from fastloss.bench.run import run_case
from fastloss.cli.bench import bench

APP = typer.Typer()
APP.command()(bench)
ON_CPU = {case.name for kind in KINDS.values() for case in kind.cases(True)}
SMALL = {case.name: case for case in gpu.cases(quick=True)}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(contention.Spins, "free", lambda self: True)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ON_CPU])
def test_every_case_runs(name: str) -> None:
    case = SMALL[name]
    result = run_case(case, repeats=1, patterns=("[ft]*",), skip=("torch chunked*",))
    measured = {p["name"]: p for p in result["providers"] if "errors" in p}
    assert "torch eager" in measured
    tolerance = 0.05 if case.dtype == torch.bfloat16 else 1e-5
    for provider, p in measured.items():
        assert p["errors"]["loss"] < tolerance, provider
        for leaf in p["errors"].keys() - {"loss"}:
            # Of peaked logits in bfloat16 eager's own gradient is further off than that.
            bound = max(tolerance * result["gradient_scale"][leaf], measured["torch eager"]["errors"][leaf])
            assert p["errors"][leaf] <= bound, (provider, leaf)
    assert not [p for p in result["providers"] if "rror:" in p.get("reason", "")]


def test_shapes_are_those_that_fill_a_gpu() -> None:
    full = {case.name: case for case in gpu.cases(quick=False)}
    assert len(full) == len(gpu.cases(quick=False))  # no name twice
    for vocab in (32000, 128256, 262144):
        for dtype in ("bf16", "f32"):
            assert f"row-{dtype}-8192x{vocab}-inplace-warm" in full
    for rows in (1024, 2048, 4096, 8192, 16384):
        whole, usual = (full[f"linear-bf16-{rows}x4096x128256{end}"] for end in ("-whole", ""))
        assert whole.ignored == 0 and usual.ignored == 0.125 and whole.gemms == 3
    assert full["linear-bf16-8192x2304x256000-peaked"].peaked
    assert full["linear-bf16-8192x4096x151936-frozen"].gemms == 2
    assert {"preference-linear", "policy-linear", "distillation-linear", "kto-linear"} <= {
        c.kind for c in full.values()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_made_on_the_device(kind: str) -> None:
    """No GPU is needed: the meta device stands for it, and a generator on the CPU for its own."""
    case = next(iter(KINDS[kind].cases(True)))
    with torch.device("meta"):
        tensors = KINDS[kind].tensors(case, torch.Generator())
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


def test_inputs_do_not_depend_on_the_default_dtype() -> None:
    case = next(iter(KINDS["linear"].cases(True)))
    usual = data(case, "cpu").tensors
    torch.set_default_dtype(torch.float64)
    try:
        tensors = data(case, "cpu").tensors
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in usual.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_a_gpus_time_is_its_own_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert isinstance(end, Event)
            return 2.5

    class Step:
        def prepare(self) -> None:
            log.append("prepare")

        def __call__(self) -> None:
            log.append("call")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert clock.once(Step(), "cuda", lambda: log.append("before")) == 0.0025
    assert log == ["prepare", "before", "wait", "record", "call", "record", "wait"]


def test_of_a_large_gradient_the_first_rows_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastloss.bench import exact as module

    case = SMALL["row-f32-32x500-new-warm"]
    inputs = data(case, "cpu")
    whole = exact(case, inputs)
    monkeypatch.setattr(module, "_last", {})
    monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(module, "HELD", 2 * 8 * 500 * 8)
    part = exact(case, inputs)
    assert part.gradients["logits"].shape == (16, 500) and part.loss == whole.loss
    assert torch.equal(part.gradients["logits"], whole.gradients["logits"][:16])
    wrong = whole.gradients["logits"].clone()
    wrong[3, 3] += 1
    assert errors(part, part.loss, {"logits": wrong})["logits"] == pytest.approx(1.0)


def test_cut_cross_entropy_has_its_exact_form_beside_it() -> None:
    names = [provider.name for provider in peers()]
    assert names.index("cut-cross-entropy exact") == names.index("cut-cross-entropy") + 1


def test_goals_of_a_gpu_are_of_cases_that_exist() -> None:
    import fnmatch

    names = [case.name for case in gpu.cases(quick=False)]
    for goal in GOALS:
        if goal.what.startswith("GPU"):
            assert any(fnmatch.fnmatch(name, goal.cases) for name in names), goal


def test_the_command_lists_a_gpus_cases_without_one() -> None:
    run = CliRunner().invoke(APP, ["--device", "cuda", "--list", "--cases", "linear-*-whole"])
    assert run.exit_code == 0 and "linear-bf16-1024x4096x128256-whole" in run.output.split()


def test_time_is_up_before_the_next_case_and_a_provider_can_be_left_out(tmp_path, monkeypatch) -> None:
    from fastloss.bench import store
    from fastloss.cli import bench as command

    now = [0.0]

    def monotonic() -> float:
        now[0] += 10.0
        return now[0]

    monkeypatch.setattr(command.time, "monotonic", monotonic)
    cases = ["--cases", "tiny", "--cases", "reward-64", "--quick", "--repeats", "1"]
    arguments = [*cases, "--stop-after", "15", "--skip", "torch.*", "--out", str(tmp_path)]
    run = CliRunner().invoke(APP, arguments)
    assert run.exit_code == 0 and "1 of 2 cases were not measured" in run.output
    (case,) = store.load(tmp_path)["cases"]
    assert {p["name"]: p.get("reason") for p in case["providers"]}["torch.compile"] == "left out (--skip)"
