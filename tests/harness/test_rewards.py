"""Rewards that do not apply to every sample: left out of baselines, of the loss and of the means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fastloss.cli.train import app
from fastloss.harness import chat, grpo, ppo, rewards, rollout
from fastloss.harness.config import GrpoConfig, PpoConfig
from fastloss.harness.data import IGNORE
from fastloss.harness.start import language_model


def some(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """Sums alone are scored, differences are not."""
    return [
        sum(ids) / 400 if "+" in prompt[0]["content"] else None
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


@pytest.fixture
def common(base: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(base), "out": str(tmp_path / "run"), "numbers": 6, "max_new_tokens": 4, "evaluate": 60,
        "batch_size": 1, "accumulate": 12, "steps": 2, "save_every": 0, "val_fraction": 0.3,
    }  # fmt: skip


def gradients(model: torch.nn.Module, step: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
    model.zero_grad()
    metrics = step(1)
    return metrics, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def kept_rows(carry: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    scored = ~carry["rewards"].isnan()
    yield from ((name, t[scored]) for name, t in carry.items())


@pytest.mark.parametrize(
    ("loss", "loss_type"), [("fastloss", "dapo"), ("fastloss", "grpo"), ("torch", "dapo")]
)
def test_grpo_as_if_the_others_had_not_been_asked(
    common: dict[str, Any], quiet: Console, base: Path, loss: str, loss_type: str
) -> None:
    config = GrpoConfig(**common, group_size=4, loss_type=loss_type, updates=2)
    tok = chat.load(base)
    model = language_model(config, tok).eval()
    data = rollout.prepare(config, tok, quiet)
    actor = rollout.Actor(model, grpo.head_of(model), tok, [some], config)
    carry = grpo.sampled(actor, None, loss, data, config, 0)
    left_out = carry["rewards"].isnan()
    assert 0 < int(left_out.sum()) < 48 and not bool((carry["targets"][left_out] != IGNORE).any())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    metrics, grads = gradients(model, grpo.make_step(actor, None, loss, data, config, carry))

    fewer = dict(kept_rows(carry))
    passes = replace(config, accumulate=len(fewer["rewards"]) // 4)
    alone, expected = gradients(model, grpo.make_step(actor, None, loss, data, passes, fewer))
    for name in ("loss", "tokens", "reward", "length", "approx_kl_k3"):
        assert float(metrics[name]) == pytest.approx(float(alone[name]), rel=1e-5), name
    assert float(alone["mixed_groups"]) >= float(metrics["mixed_groups"]) > 0
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("loss", ["fastloss", "torch"])
def test_ppo_and_the_means(loss: str, common: dict[str, Any], quiet: Console) -> None:
    config = PpoConfig(**common, reward=(f"{__name__}:some",), loss=loss)
    result = ppo.run(config, console=quiet)
    for row in result.rows:
        assert 0 < row["reward"] < 4 and torch.isfinite(torch.tensor([*row.values()])).all()
    assert 0 < result.before["reward"] < 4  # of the held-back sums alone


def none(prompts: list[Any], **columns: Any) -> list[None]:
    return [None] * len(prompts)


@pytest.mark.usefixtures("light")
def test_a_step_that_nothing_scores_is_an_error(common: dict[str, Any], quiet: Console) -> None:
    config = GrpoConfig(**common, group_size=2, reward=(f"{__name__}:none",))
    with pytest.raises(ValueError, match="expected a value, got None for each of the 24 samples of a step"):
        grpo.run(config, console=quiet)


def raises_on_words(completions: list[str], **columns: Any) -> list[float]:
    return [float(int(text)) for text in completions]


def needs_another(prompts: list[Any], completions: list[Any], difficulty: list[float]) -> list[float]:
    return difficulty


async def later(completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def together_only(completions: list[str], **columns: Any) -> list[float]:
    if len(completions) > 1:
        raise KeyError
    return [1.0]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (raises_on_words, r"expected raises_on_words to return a list of 2 numbers \(or None\); it raised ValueError: "
                          r"invalid literal.*for sample 1, 'six'; --debug shows where"),
        (needs_another, r"expected needs_another to take prompts, completions, \*\*columns, got needs_another\(prompts.*"
                        r"missing a required argument: 'difficulty' \(the columns are .*completion_ids, completions, "),
        (lambda prompts: [1.0, 1.0], r"expected <lambda> to take prompts.*got <lambda>\(prompts\): got an unexpected keyword"),
        (later, "got a coroutine: an `async def` is not awaited here"),
        (together_only, "it raised KeyError for all 2 samples together, for none alone"),
        (lambda **_: 1.0, "return a list of 2 numbers .*, got float"),
        (lambda **_: None, "return a list of 2 numbers .*, got NoneType"),
        (lambda **_: "11", "return a list of 2 numbers .*, got str"),
        (lambda **_: {"a": 1.0, "b": 2.0}, "return a list of 2 numbers .*, got dict"),
        (lambda **_: torch.tensor(1.0), "return a list of 2 numbers .*, got a single number"),
        (lambda **_: [{"score": 1.0}, {"score": 2.0}], r"finite values from <lambda>, got \{'score': 1.0\} of type dict for '5'"),
        (lambda **_: [1.0, "2"], "finite values from <lambda>, got '2' of type str for 'six'"),
        (lambda **_: [1.0, [2.0, 3.0]], r"finite values from <lambda>, got \[2.0, 3.0\] of type list for 'six'"),
        (lambda **_: torch.ones(2, 3), "finite values from <lambda>"),
    ],
)  # fmt: skip
def test_what_a_reward_function_does_wrong_is_one_line(function: Any, complaint: str) -> None:
    asked = [{"prompt": "2+3=", "answer": "5"}, {"prompt": "3+3=", "answer": "6"}]
    for reward in (function, rewards.Weighted(function, 2.0)):
        with pytest.raises(
            ValueError, match=f"^reward: {complaint}|^reward: expected .*{complaint}"
        ) as caught:
            rewards.score([reward], asked, ["5", "six"], [[1], [2]])
        assert "\n" not in str(caught.value)
    assert rewards.score([lambda **_: torch.tensor([1, 2])], asked, ["5", "six"], [[1], [2]]) == [1, 2]
    assert rewards.score([lambda **_: (v for v in (True, None))], asked, ["5", "6"], [[1], [2]])[0] == 1


def test_debug_shows_where_a_reward_function_raised(
    common: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(common | {"reward": [f"{__name__}:raises_on_words"]}))
    for more, lines in (([], 1), (["--debug"], 10)):
        got = CliRunner().invoke(app, ["grpo", "--config", str(tmp_path / "config.yaml"), *more])
        assert got.exit_code == 2
        err = got.stderr if got.stderr else capfd.readouterr().err
        assert "error: reward: expected raises_on_words to return" in err
        assert ("in raises_on_words" in err) == bool(more) and len(err.strip().splitlines()) >= lines
        assert more or len(err.strip().splitlines()) == 1
