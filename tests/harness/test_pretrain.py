"""Runs end to end: bit-for-bit resume, checkpoints that survive, one curve under every loss, the costs."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from fastloss.cli.train import app
from fastloss.engine import head_blocks
from fastloss.harness import chat, logging, measure, pretrain
from fastloss.harness import config as configs
from fastloss.harness.config import PretrainConfig
from fastloss.harness.data import Rows
from fastloss.harness.loop import cosine, make_optimizer, run_steps
from fastloss.harness.losses import LOSSES, torch_loss
from fastloss.harness.model import build_model, head_of, model_config

MADE = (
    "config.yaml",
    "tokenizer.json",
    "log.jsonl",
    "checkpoint",
    "loss.png",
    "report.md",
    "model",
)
FIXED = ("step", "loss", "grad_norm", "lr", "tokens")  # the columns that are not times


@pytest.mark.parametrize(
    ("loss", "tie"),
    [
        pytest.param(name, tie, marks=pytest.mark.slow if tie and name != "fastloss" else [])
        for name in LOSSES
        for tie in (False, True)
    ],
)
def test_resume_bit_for_bit(
    tiny: PretrainConfig, quiet: Console, tmp_path: Path, loss: str, tie: bool
) -> None:
    config = replace(tiny, loss=loss, tie=tie, accumulate=2)
    whole = pretrain.run(replace(config, out=str(tmp_path / "whole")), console=quiet)
    half = replace(config, out=str(tmp_path / "half"))
    assert pretrain.run(replace(half, stop_after=3), console=quiet).done == 3
    rest = pretrain.run(half, resume=True, console=quiet)
    assert [[r[key] for key in FIXED] for r in whole.rows] == [[r[key] for key in FIXED] for r in rest.rows]
    assert whole.after == rest.after and whole.before == rest.before
    for (name, p), q in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_resume_makes_the_steps_after_the_checkpoint_again(tiny: PretrainConfig, quiet: Console) -> None:
    """Killed after the checkpoint of step 3: what the log has beyond it is dropped and made again, once."""
    folder = Path(tiny.out)
    whole = pretrain.run(tiny, console=quiet)
    pretrain.run(replace(tiny, stop_after=3), overwrite=True, console=quiet)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 99.0}) + '\n{"step": 4, "lo')
    rest = pretrain.run(tiny, resume=True, console=quiet)
    assert [r["step"] for r in rest.rows] == list(range(6))
    assert [r["loss"] for r in rest.rows] == [r["loss"] for r in whole.rows]


def test_dropout_resumes_from_the_saved_random_state(
    tiny: PretrainConfig, quiet: Console, tmp_path: Path
) -> None:
    llama = model_config(tiny)
    llama.attention_dropout = 0.3
    llama.save_pretrained(tmp_path / "llama")
    config = replace(tiny, model=str(tmp_path / "llama"))
    whole = pretrain.run(replace(config, out=str(tmp_path / "whole")), console=quiet)
    half = replace(config, out=str(tmp_path / "half"))
    pretrain.run(replace(half, stop_after=3), console=quiet)
    assert [r["loss"] for r in pretrain.run(half, resume=True, console=quiet).rows] == [
        r["loss"] for r in whole.rows
    ]


def test_checkpoint_of_another_model_or_other_data(tiny: PretrainConfig, quiet: Console) -> None:
    pretrain.run(replace(tiny, stop_after=1), console=quiet)
    with pytest.raises(ValueError, match="holds a checkpoint; --resume goes on"):
        pretrain.run(tiny, console=quiet)
    with pytest.raises(ValueError, match="expected shape"):
        pretrain.run(replace(tiny, intermediate=48), resume=True, console=quiet)
    with pytest.raises(ValueError, match="made from other data, another seq_len, seed"):
        pretrain.run(replace(tiny, seq_len=16), resume=True, console=quiet)


def test_losses_give_one_curve(tiny: PretrainConfig, quiet: Console, tmp_path: Path) -> None:
    curves = {}
    for loss in LOSSES:
        # no more rows than D: else the head on a CPU makes some logits twice, and the counter sees it
        config = replace(tiny, hidden=64, loss=loss, steps=12, out=str(tmp_path / loss))
        result = pretrain.run(config, console=quiet)
        curves[loss] = torch.tensor([row["loss"] for row in result.rows])
        assert result.after["loss"] < result.before["loss"]
        # every loss's FLOPs are seen by the counter (bug 37), and are the model's
        assert result.summary["model_flops"] > 0
        assert result.cost.counted_flops == pytest.approx(result.summary["model_flops"], rel=0.03), loss
        assert result.cost.loss_peak is not None and result.cost.loss_peak.bytes >= 0
        assert 0 < result.summary["loss_share"] < 1
    assert len(curves) == (3 if hasattr(F, "linear_cross_entropy") else 2)
    for curve in curves.values():
        torch.testing.assert_close(curve, curves["torch"], rtol=1e-5, atol=1e-5)
    assert curves["torch"][-1] < curves["torch"][0]


def test_gradients_left_out_are_logged(
    tiny: PretrainConfig, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_blocks, "why_not", lambda *_: "")  # not calibration's choice
    done = pretrain.run(replace(tiny, loss="fastloss", skip=0.99, steps=2, vocab_size=300), console=quiet)
    assert all(0 < row["skipped_share"] < 1 for row in done.rows)
    with pytest.raises(ValueError, match="skip: expected --loss fastloss"):
        pretrain.run(replace(tiny, skip=0.99, loss="torch"), console=quiet)


def test_flops_are_those_of_the_formula() -> None:
    """6·tokens·(weights of the products) and attention's 12·T²·width per layer and row."""
    config = PretrainConfig(
        vocab_size=300, hidden=32, layers=2, heads=2, intermediate=64, seq_len=32, batch_size=3
    )
    model: Any = build_model(model_config(config), 0, "cpu")
    rows = Rows(torch.arange(299, dtype=torch.int32), config.seq_len)
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 300 * 32
    attention = 2 * 2 * 2 * 32 * 32 * 32  # layers, two products, multiply-add, T·T·width: the forward
    got = pretrain.model_flops(model, head_of(model), rows, config)
    # the backward recomputes the scores: 2.5 times the forward (what torch's formula counts)
    assert got == 3 * (6 * 32 * weights + attention * 3.5)


def test_padding_and_accumulation_weigh_every_token_once(tiny: PretrainConfig) -> None:
    """Passes with unequal counts of real tokens: the mean is over the whole step's tokens (bug 5)."""
    config = replace(tiny, batch_size=2, seq_len=16)
    model: Any = build_model(model_config(config), 0, "cpu")
    head = head_of(model)
    rows = Rows(
        torch.arange(1, 40, dtype=torch.int32), 16
    )  # 3 rows, the last padded; 4 positions wrap around
    one = pretrain.make_step(model, head, torch_loss, rows, replace(config, batch_size=4))(0)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    two = pretrain.make_step(model, head, torch_loss, rows, replace(config, accumulate=2))(0)
    assert one["tokens"] == two["tokens"] < 64
    torch.testing.assert_close(torch.tensor(one["loss"]), torch.tensor(two["loss"]))
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_cut_graph_gives_the_gradients_of_one_backward(tiny: PretrainConfig, tie: bool) -> None:
    config = replace(tiny, tie=tie)
    model: Any = build_model(model_config(config), 0, "cpu")
    rows = Rows(torch.arange(1, 200, dtype=torch.int32), 32)
    pretrain.make_step(model, head_of(model), torch_loss, rows, config)(0)
    cut = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    inputs, targets, *_ = rows.batch(0, 2)
    logits = model(input_ids=inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for p, grad in zip(model.parameters(), cut, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-7)


def test_bf16_autocast_trains(tiny: PretrainConfig, quiet: Console) -> None:
    result = pretrain.run(replace(tiny, loss="fastloss", bf16=True), console=quiet)
    assert math.isfinite(result.rows[-1]["loss"])
    assert all(
        p.dtype == p.grad.dtype == torch.float32 for p in result.model.parameters() if p.grad is not None
    )


def test_exported_folder_is_the_trained_model(tiny: PretrainConfig, quiet: Console) -> None:
    result = pretrain.run(tiny, console=quiet)
    loaded = AutoModelForCausalLM.from_pretrained(Path(tiny.out) / "model")
    for p, q in zip(result.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q)


def test_not_finite_loss_stops_before_the_update() -> None:
    model = torch.nn.Linear(2, 1)
    before = model.weight.detach().clone()

    def step_fn(step: int) -> dict[str, float | torch.Tensor]:
        loss = (model(torch.ones(1, 2)) * float("nan")).sum()
        loss.backward()
        return {"loss": loss.detach(), "tokens": 1}

    optimizer = make_optimizer(model, 0.1, (0.9, 0.95), 0.0)
    lr_at = partial(cosine, steps=3, peak=0.1, warmup=0, least=0.1)
    with pytest.raises(FloatingPointError, match="step 0: loss nan"):
        run_steps(
            step_fn, optimizer, first=0, last=3, lr_at=lr_at, log=lambda row: None, save=lambda done: None
        )
    assert torch.equal(model.weight, before)


def test_first_signal_saves_after_its_step() -> None:
    model = torch.nn.Linear(2, 1)
    saved: list[int] = []

    def step_fn(step: int) -> dict[str, float | torch.Tensor]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        return {"loss": loss.detach(), "tokens": 1}

    handler = signal.getsignal(signal.SIGTERM)
    done = run_steps(
        step_fn, make_optimizer(model, 0.1, (0.9, 0.95), 0.0), first=0, last=9, lr_at=lambda step: 0.1,
        log=lambda row: None, save=saved.append,
    )  # fmt: skip
    assert done == 2 and saved == [2] and signal.getsignal(signal.SIGTERM) is handler


def test_peak_bytes_is_what_was_allocated() -> None:
    size = 48 * 2**20

    def two_buffers_then_one() -> None:
        a = torch.ones(size // 4)
        b = a + 1
        del a
        b.add_(1)

    for _ in range(2):  # freed pages of the first measurement do not hide the second's
        peak = measure.peak_bytes(two_buffers_then_one, torch.device("cpu"))
        assert peak.bytes == pytest.approx(2 * size, rel=0.1), peak.how
    assert measure._allocated_peak(two_buffers_then_one) == pytest.approx(2 * size, rel=0.01)


def test_command_line_end_to_end(tiny: PretrainConfig, tmp_path: Path) -> None:
    configs.save(replace(tiny, loss="fastloss"), tmp_path / "tiny.yaml")
    out = tmp_path / "cli"
    arguments = ["pretrain", "--config", str(tmp_path / "tiny.yaml"), "--out", str(out), "--no-tie"]
    first = CliRunner().invoke(app, [*arguments, "--stop-after", "2"])
    assert first.exit_code == 0, first.output
    assert all((out / name).exists() for name in MADE) and list((out / "tensorboard").iterdir())
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "holds a checkpoint" in again.output
    resumed = CliRunner().invoke(app, ["pretrain", "--resume", "--out", str(out), "--stop-after", "0"])
    assert resumed.exit_code == 0, resumed.output
    assert (
        "resumed at step 2" in resumed.output
        and "held back" in resumed.output
        and "perplexity" in resumed.output
    )
    rows = logging.read(out / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    assert set(rows[0]) == {
        "step",
        "loss",
        "tokens",
        "loss_s",
        "lr",
        "grad_norm",
        "step_s",
        "tokens_per_s",
        "mfu",
    }
    assert "| MFU |" in (out / "report.md").read_text()
    assert configs.load(PretrainConfig, out / "config.yaml").loss == "fastloss"


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 1}\n')
    result = CliRunner().invoke(app, ["pretrain", "--data", str(bad), "--out", str(tmp_path / "run")])
    assert (
        result.exit_code == 2
        and "bad.jsonl:2: expected" in result.output
        and "Traceback" not in result.output
    )
    (tmp_path / "odd.json").write_text('{"learning_rate": 1}')
    result = CliRunner().invoke(app, ["pretrain", "--config", str(tmp_path / "odd.json")])
    assert result.exit_code == 2 and "learning_rate" in result.output


def test_demo_compares_two_runs(tiny: PretrainConfig, quiet: Console) -> None:
    from fastloss.harness.demo import run_demo

    results = run_demo(replace(tiny, steps=4), console=quiet)
    text = (Path(tiny.out) / "report.md").read_text()
    assert (
        set(results) == {"fastloss", "torch"}
        and "largest difference" in text
        and "in turns: the loss's share" in text
    )
    assert (Path(tiny.out) / "loss.png").stat().st_size > 5000


def test_continued_pretraining_keeps_weights_and_tokenizer(
    tiny: PretrainConfig, quiet: Console, tmp_path: Path
) -> None:
    """Of a folder whose tokenizer has other names for its special tokens: the next stage can start from the result."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        ["some text"], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    folder, config = tmp_path / "start", replace(tiny, vocab_size=bpe.get_vocab_size(), save_every=0)
    start = build_model(model_config(config), 7, "cpu")
    start.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(folder)

    config = replace(config, model=str(folder), keep_weights=True, lr=0.0, steps=1)
    result = pretrain.run(config, console=quiet)
    for p, q in zip(result.model.parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q)
    tok = chat.load(Path(config.out) / "model")
    assert tok.eos_token == "</s>" and len(tok) == bpe.get_vocab_size()
    fresh = pretrain.run(replace(config, keep_weights=False), overwrite=True, console=quiet)
    assert fresh.before["loss"] != result.before["loss"]
