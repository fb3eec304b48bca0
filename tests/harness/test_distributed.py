"""Two processes under torchrun (gloo) are one with the batch of both: rows, normaliser, weights, figures, checkpoints.

By default every question is asked of sharded parameters and half of the stages; FASTLOSS_TEST_SLOW=1 asks all of both modes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import STAGES, Outcome, apart, case, environment, killed_while_saving, run_case, written
from transformers import AutoModelForCausalLM

from fastloss.harness import checkpoint, logging
from fastloss.harness.chain import run_chain
from fastloss.harness.demo import run_demo
from fastloss.harness.loop import make_optimizer
from fastloss.harness.model import load_model

WORKER = Path(__file__).with_name("stage_runs.py")
MODES = ("fsdp", "replicate")
CUT = (("sft-tied", "tp=2"), ("packed", "cp=2"))  # one replica in two processes; test_layouts.py has four
NAMES = ("pretrain", "pretrain-tied", "sft", "sft-tied", "distill", "reward", "dpo", "grpo", "ppo")
# What runs without FASTLOSS_TEST_SLOW=1.
QUICK = {"fsdp": ("pretrain", "pretrain-tied", "sft", "dpo", "grpo"), "replicate": ("sft", "distill", "ppo")}
modes = pytest.mark.parametrize("mode", ["fsdp", pytest.param("replicate", marks=pytest.mark.slow)])


def torchrun(*arguments: str, processes: int = 2, timeout: float = 1000) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments, processes=processes), env=environment(), capture_output=True, text=True, timeout=timeout)  # fmt: skip


def command(*arguments: str, processes: int = 2) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return [*launcher, *arguments]


def outcomes(
    folder: Path, cases: list[dict[str, Any]], processes: int = 2, timeout: float = 1000
) -> dict[str, list[Outcome]]:
    """By case, what came of it in each process."""
    done = torchrun(str(WORKER), written(folder, cases), processes=processes, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {case["name"]: [torch.load(folder / f"{case['name']}-{rank}.pt", weights_only=False) for rank in range(processes)] for case in cases}  # fmt: skip


def of_one(options: dict[str, Any], out: Path, **more: Any) -> Outcome:
    """One process with the batch of two."""
    return run_case(**case("", options, out, batch_size=2 * options["batch_size"], **more))


@pytest.fixture(scope="module")
def killed(stages: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first process got a kill -9 in the middle of its second save."""
    folder = tmp_path_factory.mktemp("killed")
    out = folder / "run"
    cases = [case("killed", stages["sft"], out, parallel="fsdp", save_every=1, hook="slow_second_save")]
    killed_while_saving(command(str(WORKER), written(folder, cases)), out, 2)
    return out


@pytest.fixture(scope="module")
def two(
    stages: dict[str, dict[str, Any]],
    killed: Path,
    slow_too: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """All runs of two processes, in one launch: its start takes longer than they do."""
    folder = tmp_path_factory.mktemp("two")
    cases = [{"name": "collectives"}, case("after-kill", stages["sft"], killed, parallel="fsdp", resume=True)]
    for mode in MODES:
        for name, options in stages.items():
            if slow_too or name in QUICK[mode]:
                cases.append(case(f"{name}-{mode}", options, folder / f"{name}-{mode}", parallel=mode))
        if mode == "replicate" and not slow_too:
            continue
        pretrain, sft = stages["pretrain"], stages["sft"]
        cases += [
            case(f"bf16-{mode}", pretrain, folder / f"bf16-{mode}", parallel=mode, bf16=True),
            case(f"recomputed-{mode}", sft, folder / f"rec-{mode}", parallel=mode, checkpoint_activations=True),
            case(f"first-{mode}", stages["grpo"], folder / f"half-{mode}", parallel=mode, stop_after=3),
            case(f"between-{mode}", stages["grpo"], folder / f"between-{mode}", parallel=mode, stop_after=3),
            case(f"rest-{mode}", stages["grpo"], folder / f"half-{mode}", parallel=mode, resume=True),
            case(f"signal-{mode}", sft, folder / f"signal-{mode}", parallel=mode, hook="signal_at_second_step"),
            case(f"nan-{mode}", sft, folder / f"nan-{mode}", parallel=mode, hook="nan_in_second_step", on_bad_step="skip"),
            case(f"full-{mode}", sft, folder / f"full-{mode}", parallel=mode, save_every=1, hook="disk_full_in_second_save"),
            case(f"after-full-{mode}", sft, folder / f"full-{mode}", parallel=mode, resume=True),
        ]  # fmt: skip
        # on another number of processes: two from one, and (a test) one from two
        run_case(**case("", sft, folder / f"from-one-{mode}", batch_size=4, stop_after=2))
        cases.append(case(f"from-one-{mode}", sft, folder / f"from-one-{mode}", parallel=mode, resume=True))
        cases.append(case(f"to-one-{mode}", sft, folder / f"to-one-{mode}", parallel=mode, stop_after=2))
    for name, how in CUT:
        options = stages["sft"] | {"packing": True} if name == "packed" else stages[name]
        cases.append(case(f"{name}-{how}", options, folder / f"{name}-{how}", parallel=how))
    return {"folder": folder, **outcomes(folder, cases)}


@pytest.fixture(scope="module")
def one(
    stages: dict[str, dict[str, Any]], slow_too: bool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("one")
    names = NAMES if slow_too else {name for mode in MODES for name in QUICK[mode]}
    return {name: of_one(options, folder / name) for name, options in stages.items() if name in names}


def same_run(got: Outcome, expected: Outcome, *, rel: float = 1e-5) -> None:
    """What was logged and measured, within float32's error of another order of sums."""
    assert len(got["rows"]) == len(expected["rows"]) > 0
    for a, b in zip(got["rows"], expected["rows"], strict=True):
        assert set(a) == set(b) and a["tokens"] == b["tokens"]
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=rel, abs=2e-6), (key, a, b)
    assert got["before"] == pytest.approx(expected["before"], rel=1e-5, abs=1e-6)
    assert got["after"] == pytest.approx(expected["after"], rel=rel, abs=1e-5)


def lr_of(options: dict[str, Any]) -> float:
    return options.get("lr", STAGES[options["stage"]][1]().lr)


def test_collectives(two: dict[str, Any]) -> None:
    """A gradient that one process alone has is a sum like the others; one that none has stays None."""
    for rank, outcome in enumerate(two["collectives"]):
        assert outcome["grads"] == [[3.0], [3.0], [2.0], None, None]
        assert outcome["failure"] == "of 0" and outcome["any"] is True and outcome["summed"] == [2.0, 0.5]
        values, own = outcome["everyones"]
        assert values.tolist() == [0, 1, 10, 11, 12] and values[own].tolist() == [[0, 1], [10, 11, 12]][rank]
        assert outcome["spread"] == [0, 10, 20] and outcome["done"] == [[0, 2], [1, 2]][rank]
    assert two["collectives"][1]["turns"] == "01"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=[] if name in QUICK[mode] else pytest.mark.slow)
        for mode in MODES
        for name in NAMES
    ],
)
def test_two_processes_are_one_with_the_batch_of_both(
    name: str, mode: str, two: dict[str, Any], one: dict[str, Outcome], stages: dict[str, Any]
) -> None:
    """Passes and processes with unequal counts of tokens, samples that a process draws alone: bugs 5, 12, 26, 35, 38.

    Adam moves each weight by up to the learning rate a step, whatever its gradient's size, so rounding shows against that; and a
    gradient's sums have another order where the rows go in other parts.
    """
    first, second = two[f"{name}-{mode}"]
    same_run(first, one[name])
    assert apart(first, one[name]) < 0.02 * lr_of(stages[name])
    whole = sum(weight.numel() for weight in first["weights"].values())
    assert first["sharded"] == (len(first["weights"]) if mode == "fsdp" else 0)
    assert first["held"] + second["held"] == (whole if mode == "fsdp" else 2 * whole)
    assert all(first[key] == second[key] for key in ("rows", "before", "after", "done"))
    assert apart(first, second) == 0


@pytest.mark.parametrize(("name", "how"), CUT)
def test_a_model_or_a_row_in_two_processes_is_that_of_one(
    name: str, how: str, two: dict[str, Any], stages: dict[str, Any], tmp_path: Path
) -> None:
    options = stages["sft"] | {"packing": True} if name == "packed" else stages[name]
    one = run_case(**case("", options, tmp_path / "one"))
    first, second = two[f"{name}-{how}"]
    same_run(first, one)
    assert apart(first, one) < 0.02 * lr_of(options)
    assert first["rows"] == second["rows"] and apart(first, second) == 0


@pytest.mark.parametrize(
    "name",
    [name if name in ("sft", "grpo") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_accumulation_is_a_large_batch(
    name: str, one: dict[str, Outcome], stages: dict[str, Any], tmp_path: Path
) -> None:
    """Eight passes of a row each: their samples, too, are those of two passes of four."""
    small = run_case(**case("", stages[name], tmp_path / "small", batch_size=1, accumulate=8))
    same_run(small, one[name])
    assert apart(small, one[name]) < 0.02 * lr_of(stages[name])


@modes
def test_bf16(mode: str, two: dict[str, Any], stages: dict[str, Any], tmp_path: Path) -> None:
    """Weights and the sum over processes stay float32, so only the GEMMs' rounding is bfloat16's."""
    got, _ = two[f"bf16-{mode}"]
    same_run(got, of_one(stages["pretrain"], tmp_path / "run", bf16=True), rel=2e-3)
    assert all(weight.dtype == torch.float32 for weight in got["weights"].values())
    assert got["rows"][0]["loss"] != two[f"pretrain-{mode}"][0]["rows"][0]["loss"]


@modes
def test_recomputed_activations_change_no_bit(mode: str, two: dict[str, Any]) -> None:
    got, expected = two[f"recomputed-{mode}"][0], two[f"sft-{mode}"][0]
    assert got["rows"] == expected["rows"] and apart(got, expected) == 0


@modes
def test_resume_bit_for_bit(mode: str, two: dict[str, Any]) -> None:
    """grpo, stopped between the two updates of one batch of samples, of which each process holds its own."""
    for rank in (0, 1):
        whole, rest = two[f"grpo-{mode}"][rank], two[f"rest-{mode}"][rank]
        assert two[f"first-{mode}"][rank]["done"] == 3
        assert rest["rows"] == whole["rows"] and rest["after"] == whole["after"]
        assert apart(rest, whole) == 0


@modes
def test_another_number_of_processes_goes_on(
    mode: str, two: dict[str, Any], one: dict[str, Outcome], stages: dict[str, Any]
) -> None:
    limit = 0.005 * lr_of(stages["sft"])
    from_one = two[f"from-one-{mode}"][0]
    same_run(from_one, one["sft"])
    assert apart(from_one, one["sft"]) < limit
    to_one = of_one(stages["sft"], two["folder"] / f"to-one-{mode}", resume=True)
    same_run(to_one, one["sft"])
    assert apart(to_one, one["sft"]) < limit
    # whose share of the samples is whose is known only to as many processes as drew them
    refused = of_one(stages["grpo"], two["folder"] / f"between-{mode}", resume=True)
    assert "between two updates of one batch of samples" in refused["error"]


@modes
def test_a_signal_to_one_process_stops_all_after_one_step(mode: str, two: dict[str, Any]) -> None:
    for outcome in two[f"signal-{mode}"]:
        assert outcome["done"] == 2 and len(outcome["rows"]) == 2
    folder = two["folder"] / f"signal-{mode}" / "checkpoint"
    assert checkpoint.latest(folder) == folder / "step-2"


@modes
def test_a_bad_gradient_in_one_process_is_skipped_by_all(
    mode: str, two: dict[str, Any], stages: dict[str, Any], tmp_path: Path
) -> None:
    expected = of_one(stages["sft"], tmp_path / "one", hook="nan_in_second_step", on_bad_step="skip")
    for outcome in two[f"nan-{mode}"]:
        assert [row["step"] for row in outcome["rows"]] == [0, 2, 3]
        same_run(outcome, expected)
    assert apart(*two[f"nan-{mode}"]) == 0 and apart(two[f"nan-{mode}"][0], expected) < 0.005 * lr_of(
        stages["sft"]
    )
    folders = (two["folder"] / f"nan-{mode}", tmp_path / "one")
    bad, same = (json.loads((folder / "log.jsonl").read_text().splitlines()[1]) for folder in folders)
    assert bad["examples"] == same["examples"] and "gradient norm nan" in bad["bad"]


@modes
def test_a_save_that_fails_in_one_process_fails_in_all(mode: str, two: dict[str, Any]) -> None:
    """The old checkpoint is there, and the run that goes on from it ends as one that never failed."""
    for outcome in two[f"full-{mode}"]:
        assert "OSError" in outcome["error"] and "process 1" in outcome["error"]
        assert "No space left on device" in outcome["error"]
    for rank in (0, 1):
        assert apart(two[f"after-full-{mode}"][rank], two[f"sft-{mode}"][rank]) == 0
    assert two[f"after-full-{mode}"][0]["rows"] == two[f"sft-{mode}"][0]["rows"]


def test_killed_in_the_middle_of_a_save(killed: Path, two: dict[str, Any]) -> None:
    """kill -9 of a process that has written its half of the second checkpoint: the first one is whole, and goes on."""
    for rank in (0, 1):
        rest, whole = two["after-kill"][rank], two["sft-fsdp"][rank]
        assert rest["rows"] == whole["rows"] and rest["after"] == whole["after"]
        assert apart(rest, whole) == 0
    assert sorted(os.listdir(killed / "checkpoint")) == ["step-1", "step-4"]


def test_command_line_under_torchrun(base: Path, tmp_path: Path) -> None:
    """Everything a user gets: measurements, report, exported folder; said once, by the first process."""
    out = tmp_path / "run"
    command = (
        "-m", "fastloss", "train", "sft", "--model", str(base), "--out", str(out), "--steps", "2", "--task", "arithmetic",
        "--numbers", "6", "--exact", "4", "--max-new-tokens", "3", "--seq-len", "64", "--batch-size", "2", "--parallel", "fsdp",
        "--checkpoint-activations", "--bf16", "--compare",
    )  # fmt: skip
    done = torchrun(*command)
    if "terminate called without an active exception" in done.stderr:
        # A C++ thread that outlives its owner ended one process in one run of many, here and nowhere else: once more.
        done = torchrun(*command, "--overwrite")
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("held back, before") == 1
    report = (out / "report.md").read_text()
    assert "| processes | 2, fsdp |" in report and "| MFU |" in report
    assert [row["step"] for row in logging.read(out / "log.jsonl")] == [0, 1]
    loaded = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    model: Any = load_model(str(base), "cpu")
    optimizer = make_optimizer(model, 0.1, (0.9, 0.95), 0.0)
    checkpoint.load(out / "checkpoint" / "step-2", model, optimizer)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, loaded[key]), key


def test_demo_takes_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for run in (run_demo, run_chain):
        with pytest.raises(ValueError, match="demo: expected one process, got 2"):
            run("")  # type: ignore[arg-type]
