"""A loss that is not finite, or a spike: found before the update, reported with its data, skipped to the bit."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastloss.harness import checkpoint, dpo, grpo, logging, ppo, pretrain, reward, sft
from fastloss.harness.badsteps import FEWEST, MOST_IN_A_ROW, WINDOW, Watch
from fastloss.harness.config import DpoConfig, GrpoConfig, PpoConfig, PretrainConfig, RewardConfig, SftConfig
from fastloss.harness.data import Order
from fastloss.harness.loop import cosine, make_optimizer
from fastloss.harness.losses import LOSSES, torch_loss
from fastloss.harness.model import build_model, head_of, model_config
from fastloss.harness.run import Result


def test_a_spike_is_above_the_mean_and_so_many_deviations_of_the_last_good_steps() -> None:
    draw = random.Random(0)
    for centre in (-5.0, 0.0, 3.0):  # policy losses are of any sign
        watch, losses = Watch(4.0, skip=True), list[float]()
        for step in range(WINDOW + 40):
            loss = centre + draw.gauss(0, 0.1)
            limit = math.inf
            if step >= FEWEST:
                window = losses[-WINDOW:]
                limit = statistics.fmean(window) + 4 * statistics.pstdev(window)
                assert "loss above" in watch.judge(limit + 1e-6, 1.0)  # does not enter the window
                assert "gradient norm above" in watch.judge(loss, 9.0)
                assert not watch.judge(limit - 1e-6, 1.0) and watch.state["loss"].pop() == limit - 1e-6
                watch.state["gradient norm"].pop()
            assert loss < limit  # else another seed
            assert not watch.judge(loss, 1.0 + 1e-3 * (step % 2))
            losses.append(loss)


def test_what_is_never_a_spike_and_what_always_is_bad() -> None:
    early, off, flat = Watch(1.0), Watch(0.0), Watch(1.0)
    for step in range(FEWEST - 1):
        assert not early.judge(float(step % 2), 1.0) and not off.judge(float(step % 2), 1.0)
    assert not early.judge(1e6, 1.0), "too few steps to compare with"
    assert not any(off.judge(1.0, 1.0) or off.judge(1e6, 1e6) for _ in range(WINDOW))
    assert not any(flat.judge(0.0, 0.0) for _ in range(WINDOW))
    assert not flat.judge(0.5, 0.5), "the first reward after samples that all failed"
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)):
        assert f"loss {loss:g}, gradient norm {norm:g}" in off.judge(loss, norm)


def test_a_watch_goes_on_from_its_state() -> None:
    draw = random.Random(1)
    whole, saved = Watch(3.0, skip=True), Watch(3.0, skip=True)
    for step in range(300):
        loss = draw.gauss(0, 1) * (10 if step % 17 == 16 else 1)
        said = whole.judge(loss, abs(loss))
        saved = Watch(3.0, skip=True, state=json.loads(json.dumps(saved.state)))
        assert saved.judge(loss, abs(loss)) == said
        for watch in (whole, saved):
            assert not said or watch.stops(step, said) is None
    assert whole.state == saved.state and whole.state["skipped"] > 3
    assert len(whole.state["loss"]) == WINDOW


def raw(config: PretrainConfig) -> list[dict[str, Any]]:
    """Strict JSON: NaN is not."""
    lines = (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def step_of(config: PretrainConfig) -> int:
    saved = checkpoint.latest(Path(config.out) / "checkpoint")
    assert saved is not None
    return int(checkpoint.read_progress(saved)["step"])


class Poison:
    """Of the pretraining steps in ``steps`` the loss is multiplied: by their data, so in every run of them."""

    def __init__(self, config: PretrainConfig, console: Console, factors: dict[int, float]) -> None:
        folder = Path(config.out).parent / "data"
        folder.mkdir(exist_ok=True)
        self.data = pretrain.prepare(config, folder, console)
        rows = [(self.data.train.batch(step * 2, 2).targets.flatten(), by) for step, by in factors.items()]

        def loss(hidden: Any, head: Any, target: torch.Tensor, tokens: int) -> torch.Tensor:
            by = next((by for bad, by in rows if torch.equal(bad, target)), 1.0)
            return torch_loss(hidden, head, target, tokens) * by

        self.loss = loss


@pytest.fixture
def poison(
    tiny: PretrainConfig, quiet: Console, monkeypatch: pytest.MonkeyPatch, light: None
) -> Callable[[dict[int, float]], pretrain.Data]:
    def poisoned(factors: dict[int, float]) -> pretrain.Data:
        made = Poison(tiny, quiet, factors)
        monkeypatch.setitem(LOSSES, "torch", made.loss)
        return made.data

    return poisoned


def weights_without(data: pretrain.Data, config: PretrainConfig, left_out: set[int]) -> list[torch.Tensor]:
    """The same training as a plain loop that never takes those steps."""
    model: Any = build_model(model_config(config), config.seed, "cpu")
    optimizer = make_optimizer(model, config.lr, (config.beta1, config.beta2), config.weight_decay)
    step_fn = pretrain.make_step(model, head_of(model), torch_loss, data.train, config)
    for step in sorted(set(range(config.steps)) - left_out):
        for group in optimizer.param_groups:
            group["lr"] = cosine(
                step, steps=config.steps, peak=config.lr, warmup=config.warmup, least=config.min_lr
            )
        optimizer.zero_grad()
        step_fn(step)
        torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], config.clip
        )
        optimizer.step()
    return list(model.parameters())


def same_weights(result: Result, weights: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(result.model.parameters(), weights, strict=True))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_skipped_step_is_as_if_never_taken(
    tiny: PretrainConfig, quiet: Console, poison: Callable[..., pretrain.Data], factor: float, tmp_path: Path
) -> None:
    data = poison({3: factor})
    config = replace(tiny, on_bad_step="skip")
    run = partial(pretrain.run, data=data, console=quiet)
    result = run(config)
    assert result.done == 6 and [row["step"] for row in result.rows] == [0, 1, 2, 4, 5]
    assert same_weights(result, weights_without(data, config, {3}))
    assert not same_weights(result, weights_without(data, config, set()))

    bad = raw(config)[3]
    assert bad["step"] == 3 and bad["loss"] is None and bad["skipped"] is True
    assert bad["bad"].startswith(f"loss {factor}, gradient norm ")
    numbers = data.train.order.take(6, 2)
    assert list(bad["examples"]) == [str(number) for number in numbers]
    for number, text in bad["examples"].items():
        assert text and data.tokenizer.decode(data.train.row(int(number))[0].tolist()).startswith(text)
    said = quiet.file.getvalue()  # type: ignore[attr-defined]
    assert f"bad step 3: loss {factor}" in said and f"example {numbers[0]}: " in said
    assert "| bad steps, skipped | 1 |" in (Path(config.out) / "report.md").read_text()
    assert result.summary["tokens"] == sum(row["tokens"] for row in result.rows)

    # stopped right after the bad step, and before it: the rest is the same to the bit
    for after in (4, 3):
        half = replace(config, out=str(tmp_path / f"half{after}"))
        assert run(replace(half, stop_after=after)).done == after
        rest = run(half, resume=True)
        assert same_weights(rest, list(result.model.parameters()))
        assert [r["loss"] for r in rest.rows] == [r["loss"] for r in result.rows]
        assert rest.summary["skipped"] == 1


def test_a_bad_step_stops_the_run_and_skipping_goes_on_from_there(
    tiny: PretrainConfig, quiet: Console, poison: Callable[..., pretrain.Data]
) -> None:
    data = poison({3: math.nan})
    config = replace(tiny, save_every=2)
    with pytest.raises(
        FloatingPointError, match="step 3: loss nan, gradient norm nan: stopped before the update"
    ):
        pretrain.run(config, data=data, console=quiet)
    assert [row["step"] for row in raw(config)] == [0, 1, 2, 3]
    assert raw(config)[3]["skipped"] is False and len(raw(config)[3]["examples"]) == 2
    assert step_of(config) == 2
    rest = pretrain.run(replace(config, on_bad_step="skip"), data=data, resume=True, console=quiet)
    assert same_weights(rest, weights_without(data, config, {3}))
    assert [row["step"] for row in raw(config)] == list(range(6))


def test_a_spike_is_skipped_after_a_resume_too(
    tiny: PretrainConfig, quiet: Console, poison: Callable[..., pretrain.Data], tmp_path: Path
) -> None:
    at = FEWEST + 4
    data = poison({at: 30.0})
    config = replace(tiny, steps=FEWEST + 8, spike=6.0, on_bad_step="skip", clip=0.0)
    whole = pretrain.run(config, data=data, console=quiet)
    bad = [row for row in raw(config) if "bad" in row]
    assert [row["step"] for row in bad] == [at]
    assert "loss above" in bad[0]["bad"] and "gradient norm above" in bad[0]["bad"]
    assert bad[0]["loss"] > 5 * max(row["loss"] for row in whole.rows[FEWEST:])

    half = replace(config, out=str(tmp_path / "half"))
    pretrain.run(replace(half, stop_after=at - 1), data=data, console=quiet)
    rest = pretrain.run(half, data=data, resume=True, console=quiet)
    assert rest.summary["skipped"] == 1 and same_weights(rest, list(whole.model.parameters()))

    seen = pretrain.run(replace(config, spike=0.0, out=str(tmp_path / "off")), data=data, console=quiet)
    assert seen.summary["skipped"] == 0 and len(seen.rows) == config.steps
    with pytest.raises(
        FloatingPointError, match=f"step {at}: loss .*: loss above .* 6 deviations of {at} steps"
    ):
        stop = replace(config, on_bad_step="stop", out=str(tmp_path / "stop"))
        pretrain.run(stop, data=data, console=quiet)


def test_an_endless_run_of_bad_steps_ends(
    tiny: PretrainConfig, quiet: Console, poison: Callable[..., pretrain.Data]
) -> None:
    data = poison(dict.fromkeys(range(2, 30), math.nan))
    config = replace(tiny, steps=30, on_bad_step="skip", save_every=1)
    for again in (False, True):  # the second run resumes, and ends at once
        with pytest.raises(FloatingPointError, match=r"step 12: .*, the 11th bad step in a row"):
            pretrain.run(config, data=data, resume=again, console=quiet)
        assert step_of(config) == 2 + MOST_IN_A_ROW
        assert [row["skipped"] for row in raw(config)[2:]] == [True] * MOST_IN_A_ROW + [False]
    assert len(logging.read(Path(config.out) / "log.jsonl")) == 2


def low_ids(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that differs between the samples of random weights."""
    return [sum(i < 100 for i in ids) / len(ids) for ids in completion_ids]


STAGES: dict[str, tuple[Callable[..., Result], Callable[..., Any]]] = {
    "sft": (sft.run, SftConfig), "reward": (reward.run, RewardConfig), "dpo": (dpo.run, DpoConfig),
    "grpo": (grpo.run, GrpoConfig), "ppo": (ppo.run, PpoConfig),
}  # fmt: skip


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_names_the_examples_of_a_bad_step(
    name: str, base: Path, pairs_file: Path, quiet: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate that ends in NaN; what the step took from the data is what is named."""
    run, kind = STAGES[name]
    options: dict[str, Any] = {
        "model": str(base), "out": str(tmp_path / "run"), "steps": 4, "batch_size": 4, "lr": 1e30, "clip": 0.0,
        "warmup": 0,
    }  # fmt: skip
    if name in ("reward", "dpo"):
        options["data"] = (str(pairs_file),)
    if name in ("grpo", "ppo"):  # the second step is on the samples of the first
        options |= {"updates": 3, "numbers": 6, "max_new_tokens": 4, "evaluate": 2}
        options["reward"] = (f"{__name__}:low_ids",)
    if name == "sft":
        options |= {"seq_len": 64, "task": "arithmetic", "numbers": 12, "exact": 0}
    taken: list[list[int]] = []
    take = Order.take

    def recorded(order: Order, position: int, size: int) -> list[int]:
        taken.append(take(order, position, size))
        return taken[-1]

    monkeypatch.setattr(Order, "take", recorded)
    made: dict[str, sft.Data] = {}
    prepare = sft.prepare
    monkeypatch.setattr(sft, "prepare", lambda *a: made.setdefault("sft", prepare(*a)))
    with pytest.raises(FloatingPointError, match=r"step [1-3]: loss"):
        run(kind(**options), console=quiet)
    step, report = taken[-2:]  # the batch, and what is read for the report
    assert step == report
    expected = [i for row in step for i in made["sft"].groups[row]] if name == "sft" else step
    bad = json.loads((tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert list(map(int, bad["examples"])) == list(dict.fromkeys(expected))
    assert all(bad["examples"].values())
