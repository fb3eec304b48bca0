"""Checkpoints of one process: to the bit, whole or not there; and what recomputed activations change: nothing."""

from __future__ import annotations

import os
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import SHAPE, apart, case, killed_while_saving, run_case, written
from torch import Tensor, nn

import fastloss
from fastloss.harness import checkpoint, layers, measure, pretrain
from fastloss.harness.config import PretrainConfig
from fastloss.harness.data import Rows
from fastloss.harness.loop import make_optimizer
from fastloss.harness.losses import torch_loss
from fastloss.harness.model import build_model, head_of, model_config

STAGES = ("pretrain", "sft", "reward", "dpo", "grpo", "ppo")


def of(options: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    return run_case(**case("", options, out, **more))


@pytest.mark.parametrize("name", STAGES)
def test_resume_after_a_stop_at_any_step(name: str, stages: dict[str, Any], tmp_path: Path) -> None:
    stop = random.SystemRandom().randrange(1, 6)
    whole = of(stages[name], tmp_path / "whole", steps=6)
    assert of(stages[name], tmp_path / "half", steps=6, stop_after=stop)["done"] == stop
    rest = of(stages[name], tmp_path / "half", steps=6, resume=True)
    assert rest["rows"] == whole["rows"] and rest["after"] == whole["after"], stop
    assert rest["before"] == whole["before"] and apart(rest, whole) == 0, stop


def test_killed_in_the_middle_of_a_save(stages: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 when the second checkpoint's tensors are on disk and its metadata is not."""
    out, worker = tmp_path / "run", Path(__file__).with_name("stage_runs.py")
    cases = [case("killed", stages["dpo"], out, save_every=1, hook="slow_second_save")]
    killed_while_saving([sys.executable, str(worker), written(tmp_path / "cases", cases)], out, 1)
    assert checkpoint.latest(out / "checkpoint") == out / "checkpoint" / "step-1"
    whole = of(stages["dpo"], tmp_path / "whole")
    rest = of(stages["dpo"], out, resume=True)
    assert rest["rows"] == whole["rows"] and apart(rest, whole) == 0
    assert sorted(os.listdir(out / "checkpoint")) == ["step-1", "step-4"]


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 3)
    optimizer = make_optimizer(model, 0.1, (0.9, 0.95), 0.0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("where", ["write_data", "finish"])
def test_failed_save_keeps_the_old_checkpoint(
    where: str, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, *trained, {"step": 1})
    before = files(tmp_path)
    original = getattr(checkpoint.FileSystemWriter, where)

    def disk_full(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.FileSystemWriter, where, disk_full)
    for step in (1, 2):  # the same step again, too
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, step, *trained, {"step": step})
        assert files(tmp_path) == before and os.listdir(tmp_path) == ["step-1"]
    path = checkpoint.latest(tmp_path)
    assert path is not None and checkpoint.load(path, *trained) == {"step": 1}


def test_the_youngest_are_kept_and_leftovers_go(trained: Any, tmp_path: Path) -> None:
    for step in (2, 9, 10):
        checkpoint.save(tmp_path, step, *trained, {"step": step}, keep=2)
    (tmp_path / "step-11.tmp").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-10"  # by number, not by name
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-11.tmp", "step-9"]
    # killed between the two renames of a step saved again
    (tmp_path / "step-10").rename(tmp_path / "step-10.old")
    checkpoint.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-9"]
    checkpoint.save(tmp_path, 10, *trained, {"step": 10, "again": True}, keep=1)
    assert os.listdir(tmp_path) == ["step-10"]
    assert checkpoint.read_progress(tmp_path / "step-10") == {"step": 10, "again": True}


def test_what_a_stage_carries_comes_back(trained: Any, tmp_path: Path) -> None:
    carry = {
        "inputs": torch.arange(6).view(2, 3),
        "old": torch.randn(2, 3),
        "kept": torch.tensor([True, False]),
    }
    path = checkpoint.save(tmp_path, 1, *trained, {"step": 1}, carry)
    back: dict[str, Tensor] = {}
    checkpoint.load(path, *trained, back)
    assert set(back) == set(carry) and all(torch.equal(back[key], carry[key]) for key in carry)


@pytest.mark.parametrize("name", STAGES)
def test_recomputed_activations_change_no_bit(name: str, stages: dict[str, Any], tmp_path: Path) -> None:
    """dpo, grpo and ppo train a model in eval mode, where transformers' own switch does nothing."""
    kept, recomputed = (
        of(stages[name], tmp_path / str(on), steps=3, checkpoint_activations=on) for on in (False, True)
    )
    assert kept["rows"] == recomputed["rows"] and apart(kept, recomputed) == 0


def test_recomputing_holds_less_and_is_no_model_flop() -> None:
    config = PretrainConfig(vocab_size=300, seq_len=128, batch_size=8, **SHAPE | {"layers": 6})
    rows, flops, saved = Rows(torch.arange(1, 2000, dtype=torch.int32) % 299, 128), [], []
    for on in (False, True):
        model: Any = build_model(model_config(config), 0, "cpu")
        if on:
            layers.recompute(model)
        step = pretrain.make_step(model, head_of(model), torch_loss, rows, config)
        held: list[int] = []

        def pack(tensor: Tensor, held: list[int] = held) -> Tensor:
            held.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=rows.batch(0, 8).inputs, use_cache=False)
        saved.append(sum(held))
        counted = measure.count_flops(partial(step, 0))
        with layers.activations_kept(model):
            flops.append((counted, measure.count_flops(partial(step, 0))))
    assert saved[1] < saved[0] / 3
    assert flops[0][0] == flops[0][1] == flops[1][1] < flops[1][0]


@pytest.mark.parametrize("name", ["pretrain", "grpo", "ppo"])
def test_fifty_steps_equal_the_definitions(name: str, stages: dict[str, Any], tmp_path: Path) -> None:
    """sft, reward and dpo: test_stages.py."""
    ours = of(stages[name], tmp_path / "auto", steps=50, lr=1e-4)
    with fastloss.use_backend("reference"):
        theirs = of(stages[name], tmp_path / "reference", steps=50, lr=1e-4)
    a, b = (torch.tensor([row["loss"] for row in run["rows"]]) for run in (ours, theirs))
    assert len(a) == 50 and float(a.abs().max()) > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
