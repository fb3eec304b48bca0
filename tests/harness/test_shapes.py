"""The shapes in which people keep supervised data, and what is wrong with a row, in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastloss.harness import chat, dpo, grpo, pairs, reward, rollout, rows, sft, shapes
from fastloss.harness.config import DpoConfig, GrpoConfig, RewardConfig, SftConfig

USER, ANSWER = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}
WRONG, SYSTEM = {"role": "assistant", "content": "6"}, {"role": "system", "content": "sums"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
CALLED = CALL | {"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}


@pytest.mark.parametrize(
    ("row", "as_trl"),
    [
        ({"conversations": [{"from": "human", "value": "2+3="}, {"from": "gpt", "value": "5"}]},
         {"messages": [USER, ANSWER]}),
        ({"conversations": [{"from": "human", "value": "2+3="}, {"from": "gpt", "value": "5"}], "system": "sums"},
         {"messages": [SYSTEM, USER, ANSWER], "system": "sums"}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "3="}]}, ANSWER]},
         {"messages": [USER, ANSWER]}),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
         {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}]}),
        ({"messages": [USER, ANSWER | {"tool_calls": None}]}, {"messages": [USER, ANSWER]}),
        ({"messages": [USER, ANSWER | {"tool_calls": []}]}, {"messages": [USER, ANSWER]}),
        ({"instruction": "add", "input": "2+3", "output": "5", "text": "Below is an instruction"},
         {"instruction": "add", "input": "2+3", "output": "5", "text": "Below is an instruction",
          "prompt": [{"role": "user", "content": "add\n\n2+3"}], "completion": [ANSWER]}),
        ({"instruction": "2+3=", "input": "", "output": "5"},
         {"instruction": "2+3=", "input": "", "output": "5", "prompt": [USER], "completion": [ANSWER]}),
        ({"prompt": "2+3=", "completion": [ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}),
        ({"prompt": [USER], "completion": "5"}, {"prompt": [USER], "completion": [ANSWER]}),
        ({"prompt": "2+3=", "completion": "5"}, {"prompt": "2+3=", "completion": "5"}),
        ({"messages": [USER, ANSWER], "tools": '[{"name": "add"}]'},
         {"messages": [USER, ANSWER], "tools": [{"name": "add"}]}),
    ],
)  # fmt: skip
def test_shapes_of_supervised_rows(row: dict[str, Any], as_trl: dict[str, Any]) -> None:
    before = json.dumps(row)
    assert rows.supervised_row(row) == as_trl
    assert json.dumps(row) == before  # not changed in place
    assert rows.supervised_row(as_trl) == as_trl


def test_shapes_of_pairs() -> None:
    # UltraFeedback: the prompt as a string, and at the head of both answers
    got = rows.preference_row({"prompt": "2+3=", "chosen": [USER, ANSWER], "rejected": [USER, WRONG]})
    assert got == {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]}
    got = rows.preference_row(
        {"prompt": "2+3=", "chosen": "5", "rejected": [WRONG], "score_chosen": "8.5", "score_rejected": 6}
    )
    assert (got["prompt"], got["chosen"], got["margin"]) == ([USER], [ANSWER], 2.5)
    given = {
        "chosen": [USER, ANSWER],
        "rejected": [USER, WRONG],
        "margin": 1,
        "score_chosen": 9,
        "score_rejected": 1,
    }
    assert rows.preference_row(given)["margin"] == 1  # said outright
    assert "margin" not in rows.preference_row(
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 9}
    )
    with pytest.raises(ValueError, match="score_rejected: expected a finite number, got 'good'"):
        rows.preference_row(
            {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": "good"}
        )


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
         "messages: expected a content of text parts, got a part of type image_url"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages: expected messages of a role and a content"),
        ({"messages": [USER, ANSWER], "tools": "add"}, "tools: expected a list of JSON schemas, got what is not JSON"),
        ({"messages": [USER, ANSWER], "tools": [3]}, "tools: expected a list of JSON schemas"),
        ({"messages": [USER, None]}, "messages: expected messages of a role and a content, got None"),
        ({"instruction": "a", "output": 3}, "expected strings in `instruction`, `input` and `output`"),
        ({"prompt": "\ud83d hi", "completion": "b"}, r"prompt: expected Unicode text, got half of a character, '\\ud83d', at position 0"),
        ({"prompt": "a", "completion": "b", "note": ["\udc00"]}, "note: expected Unicode text"),
        ({"messages": []}, "messages: expected a list of messages"),
    ],
)  # fmt: skip
def test_what_no_row_may_be(row: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ({"prompt": "a", "completion": "b"}, row))))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {complaint}"):
        rows.read([str(path)], rows.supervised_row)
    assert len(rows.read([str(path)], rows.supervised_row, skip=True)[0]) == 1


def test_text_rows_are_read_whatever_else_stands_beside_the_text() -> None:
    assert rows.text_row({"text": "a", "tools": "none", "messages": 3}) == {"text": "a"}
    shapes.check_text({"a": ["b", {"c": "\U0001f600"}], "n": 3})


@pytest.mark.usefixtures("light")
def test_empty_prompts(base: Path, tmp_path: Path, quiet: Console) -> None:
    """Where something is sampled after it, it is a bad row; else the answer is all there is."""
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "", "completion": "5 and 6", "chosen": "5 and 6", "rejected": "7", "answer": "5"}
    path.write_text("\n".join(json.dumps(row | {"n": i}) for i in range(8)))
    common: dict[str, Any] = {
        "model": str(base), "data": (str(path),), "seq_len": 32, "steps": 1, "batch_size": 2, "warmup": 0, "save_every": 0,
        "val_fraction": 0.25,
    }  # fmt: skip
    tok = chat.load(base)
    data = sft.prepare(SftConfig(**common, exact=4, max_new_tokens=4), tok, quiet)
    assert not data.questions and len(data.val) == 2 and all(example.learned[0] for example in data.train)
    for stage, config in ((dpo, DpoConfig), (reward, RewardConfig)):
        result = stage.run(config(**common, out=str(tmp_path / stage.__name__)), console=quiet)  # type: ignore[attr-defined]
        assert torch.isfinite(torch.tensor(result.rows[0]["loss"]))
    options: Any = GrpoConfig(**common, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: prompt: expected at least one token, got none"):
        rollout.prepare(options, tok, quiet)
    path.write_text(path.read_text() + "\n" + json.dumps(row | {"prompt": "2+3="}))
    assert "8 rows skipped" in rollout.prepare(replace(options, skip_bad_rows=True), tok, quiet).source


@pytest.mark.usefixtures("light")
def test_margins_reach_the_reward_models_loss(base: Path, tmp_path: Path, quiet: Console) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "2+3=", "chosen": "5", "rejected": "6", "score_chosen": 9.0, "score_rejected": 7.0}
    path.write_text("\n".join(json.dumps(pair) for _ in range(4)))
    config = RewardConfig(
        model=str(base),
        data=(str(path),),
        seq_len=32,
        steps=1,
        batch_size=2,
        warmup=0,
        save_every=0,
        val_fraction=0.0,
    )
    assert "with margins" in pairs.prepare(config, chat.load(base), quiet).source
    losses = {}
    for margin in (0.0, 1.0):
        for loss in ("fastloss", "torch"):
            one = replace(config, margin=margin, loss=loss, out=str(tmp_path / f"{loss}{margin}"))
            losses[margin, loss] = reward.run(one, console=quiet).rows[0]["loss"]
    for margin in (0.0, 1.0):
        assert losses[margin, "fastloss"] == pytest.approx(losses[margin, "torch"], rel=1e-5)
    # -log sigmoid(d - 2) for the d of which -log sigmoid(d) is known
    d = -torch.tensor(losses[0.0, "torch"]).expm1().log()
    assert losses[1.0, "torch"] == pytest.approx(float(torch.nn.functional.softplus(2 - d)), rel=1e-4)


def test_tools_of_a_prompt_are_the_samplers_too(base: Path) -> None:
    tok = chat.load(base)
    tok.chat_template = "{{ tools | length if tools else 0 }}" + chat.TEMPLATE
    row = rows.prompt_row({"prompt": [USER], "tools": [{"type": "function", "function": {"name": "add"}}]})
    assert tok.decode(rollout.asked_ids(tok, row)).startswith("1<|user|>")
    assert grpo.asked_ids is rollout.asked_ids
