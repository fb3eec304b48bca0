"""Matrices in parts (tp), rows in pieces (cp), weights in shards (fsdp): four processes (gloo) are one with the whole batch."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import apart, case, run_case, written
from test_distributed import WORKER, lr_of, outcomes, same_run, torchrun
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from fastloss.harness import checkpoint, context, layers, parallel, pretrain
from fastloss.harness.config import DpoConfig, GrpoConfig, PretrainConfig, SftConfig
from fastloss.harness.data import Batch
from fastloss.harness.layout import Layout

# of four processes: stage, --parallel, how many replicas
RUNS = (
    ("pretrain", "tp=2,fsdp", 2), ("pretrain-tied", "tp=2,fsdp", 2), ("pretrain", "tp=4", 1), ("pretrain", "tp=2,cp=2", 1),
    ("pretrain", "cp=2,fsdp", 2), ("pretrain-tied", "tp=2", 2), ("sft", "tp=2,fsdp", 2), ("sft", "cp=2", 2), ("packed", "cp=4", 1),
    ("reward", "tp=2", 2), ("dpo", "tp=2,fsdp", 2), ("grpo", "tp=2", 2), ("ppo", "tp=2,fsdp", 2),
)  # fmt: skip


def with_packed(stages: dict[str, Any]) -> dict[str, Any]:
    # four heads, so that four processes have one each
    shape = {"heads": 4, "batch_size": 2}
    return {
        **{
            name: options | (shape if options["stage"] == "pretrain" else {})
            for name, options in stages.items()
        },
        "packed": stages["sft"] | {"packing": True},
    }


# stopped after two steps in one layout, then on in another: the same rows a step, of 4, 2 or 1 replicas
CHANGES = (("tp=2,fsdp", "cp=2,fsdp"), ("cp=2", "tp=4"), ("fsdp", "tp=2,fsdp"))
REPLICAS = {"tp=4": 1, "fsdp": 4}


def of(how: str, options: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    """A run of four rows a pass, however many replicas share them."""
    name = f"{out.name}-{'rest' if 'resume' in more else 'start'}"
    return case(name, options, out, parallel=how, batch_size=4 // REPLICAS.get(how, 2), **more)


@pytest.fixture(scope="module")
def four(stages: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, options = tmp_path_factory.mktemp("four"), with_packed(stages)
    cases = [
        case(f"{name}-{how}", options[name], folder / f"{name}-{how}", parallel=how) for name, how, _ in RUNS
    ]
    for before, after in CHANGES:
        out = folder / f"{before}-{after}"
        cases.append(of(before, options["pretrain"], out, stop_after=2))
        cases.append(of(after, options["pretrain"], out, resume=True))
    cases.append(of("tp=2,fsdp", options["pretrain"], folder / "to-one", stop_after=2))
    return {"folder": folder, **outcomes(folder, cases, processes=4, timeout=900)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "replicas"), RUNS)
def test_four_processes_are_one(
    name: str, how: str, replicas: int, four: dict[str, Any], stages: dict[str, Any], tmp_path: Path
) -> None:
    """Every metric, held-back figure and weight after four steps; what the other processes have is the same to the bit."""
    options = with_packed(stages)[name]
    one = run_case(**case("", options, tmp_path / "one", batch_size=replicas * options["batch_size"]))
    got = four[f"{name}-{how}"]
    same_run(got[0], one)
    assert apart(got[0], one) < 0.02 * lr_of(options)
    for other in got[1:]:
        assert other["rows"] == got[0]["rows"] and apart(other, got[0]) == 0
    held, whole = sum(each["held"] for each in got), sum(w.numel() for w in got[0]["weights"].values())
    shape = dict(part.split("=") for part in how.split(",") if "=" in part)
    copies = 1 if "fsdp" in how else 4 // int(shape.get("tp", 1))
    assert held >= copies * whole and held < copies * whole * (
        1.2 if "tp" in how else 1.001
    )  # norms are whole


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_another_layout(
    four: dict[str, Any], stages: dict[str, Any], tmp_path: Path
) -> None:
    options = with_packed(stages)["pretrain"]
    one = run_case(**case("", options, tmp_path / "one", batch_size=4))
    for before, after in CHANGES:
        assert four[f"{before}-{after}-start"][0]["done"] == 2
        rest = four[f"{before}-{after}-rest"][0]
        same_run(rest, one)
        assert apart(rest, one) < 0.02 * lr_of(options)
    to_one = run_case(**case("", options, four["folder"] / "to-one", batch_size=4, resume=True))
    same_run(to_one, one)
    assert apart(to_one, one) < 0.02 * lr_of(options)


KILLS = ("kill_in_third_step", "kill_in_second_save")
KILLED = "tp=2,fsdp"


@pytest.mark.slow
def test_a_killed_run_goes_on(stages: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 of one of four processes: the others end and name it; what goes on from the last whole checkpoint ends as if nothing had been,
    with four processes to the bit, with two within float error."""
    options = with_packed(stages)["pretrain"]
    for kill in KILLS:
        cases = [of(KILLED, options, tmp_path / kill, save_every=1, hook=kill)]
        began = time.monotonic()
        done = torchrun(str(WORKER), written(tmp_path / f"{kill}-cases", cases), processes=4)
        assert done.returncode != 0 and time.monotonic() - began < 120
        named = [line for line in done.stderr.splitlines() if "ProcessFailed: " in line]
        assert named and all("process 1 of 4 ended" in line for line in named), done.stderr[-4000:]
        assert "Signal 9 (SIGKILL)" in done.stderr
        last = checkpoint.latest(tmp_path / kill / "checkpoint")
        assert last is not None and last.name == ("step-2" if kill == "kill_in_third_step" else "step-1")
        checkpoint.check(last)
        shutil.copytree(tmp_path / kill, tmp_path / f"{kill}-two")
    cases = [of(KILLED, options, tmp_path / "whole", save_every=1)]
    cases += [of(KILLED, options, tmp_path / kill, save_every=1, resume=True) for kill in KILLS]
    by_four = outcomes(tmp_path / "by-four", cases, processes=4)
    cases = [
        case(kill, options, tmp_path / f"{kill}-two", parallel="tp=2", batch_size=4, resume=True)
        for kill in KILLS
    ]
    by_two = outcomes(tmp_path / "by-two", cases, processes=2)
    for kill in KILLS:
        for whole, rest in zip(by_four["whole-start"], by_four[f"{kill}-rest"], strict=True):
            assert (
                rest["rows"] == whole["rows"] and rest["after"] == whole["after"] and apart(rest, whole) == 0
            )
        same_run(by_two[kill][0], by_four["whole-start"][0])
        assert apart(by_two[kill][0], by_four["whole-start"][0]) < 0.02 * lr_of(options)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (PretrainConfig, {"parallel": "tp=0"}, "parallel: expected parts of replicate, fsdp, tp=N and cp=N"),
        (PretrainConfig, {"parallel": "fsdp,tp"}, "parallel: expected parts of"),
        (PretrainConfig, {"parallel": "tp=2,tp=4"}, "parallel: expected tp once"),
        (PretrainConfig, {"parallel": "replicate,fsdp"}, "parallel: expected replicate or fsdp, got both"),
        (DpoConfig, {"parallel": "cp=2"}, "parallel: cp=2 is for pretrain and sft"),
        (GrpoConfig, {"parallel": "tp=2", "lora_rank": 4}, "parallel: tp=2 takes no LoRA"),
        (SftConfig, {"parallel": "tp=2", "loss": "torch-linear"}, "parallel: tp=2 cuts the matrix"),
    ],
)
def test_what_does_not_go_together_is_one_line(kind: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        kind(**options)
    assert "\n" not in str(error.value)


def test_a_number_of_processes_that_does_not_fit(tiny: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="expected a multiple of 6 processes for tp=2 and cp=3, got 1"):
        pretrain.run(replace(tiny, parallel="tp=2,cp=3"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64), "a plan of colwise and rowwise layers for tp=2, got GPT2"),
        (Phi3Config(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, pad_token_id=0), "got Phi3ForCausalLM with colwise_gather_output"),
        (LlamaConfig(hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3, vocab_size=64), "num_attention_heads in a multiple of tp=2, got 3"),
    ],
)  # fmt: skip
def test_a_model_that_tp_cannot_cut(model: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "layout", Layout.parse("tp=2"))
    with pytest.raises(ValueError, match=said):
        layers.part(AutoModelForCausalLM.from_config(model))


def test_a_piece_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 packed documents of 3 and 2 tokens in 2 pieces, the second one padded: whom each token sees."""
    monkeypatch.setattr(parallel, "layout", Layout.parse("cp=2"))
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    row = Batch(
        torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[6, 7, -100, 9, 1]]), torch.tensor([[0, 1, 2, 0, 1]])
    )
    piece = context.own_piece(row)
    assert piece.inputs.tolist() == [[8, 9, 0]] and piece.targets.tolist() == [[9, 1, -100]]
    assert piece.positions is not None and piece.positions.tolist() == [[0, 1, 0]]
    assert piece.mask is not None and piece.mask.int().tolist() == [
        [[[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]]
    ]
