"""Rows to tokens: what Python carries, the user's files, chat templates, packing, rewards, samples."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import Gemma2Config, GPT2Config, MistralConfig

from fastloss.harness import builtin, chat, model, pairs, rewards, rollout, rows, sft
from fastloss.harness.chat import Example
from fastloss.harness.config import DpoConfig, GrpoConfig, SftConfig
from fastloss.harness.data import IGNORE, fit, pack, packed, padded
from fastloss.harness.model import check_packing, head_of, hidden_states, load_model
from fastloss.harness.sampler import check_sampler, sample

USER, ANSWER = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}


def test_builtin_rows() -> None:
    described = builtin.descriptions()
    assert len(described) > 2000
    assert all(row["completion"][0]["content"].strip() for row in described)
    sums = builtin.arithmetic(5)
    assert len(sums) == 50
    for row in sums:  # Python itself checks
        assert int(row["answer"]) == eval(row["prompt"][0]["content"].rstrip("="))
        assert row["completion"][0]["content"] == row["answer"]


def test_builtin_pairs_teach_nothing_but_the_preference() -> None:
    train, held_back = builtin.preferences(0.1, most=500)
    assert (train, held_back) == builtin.preferences(0.1, most=500)
    assert len(train) > 5000 and len(held_back) > 200
    for row in train[:200]:
        assert row["chosen"] != row["rejected"] and rows.preference_row(row) == row
    sides = [
        {json.dumps(r[key]) for r in part for key in ("chosen", "rejected")} for part in (train, held_back)
    ]
    twice = sides[0] & sides[1]  # functions that share a docstring
    assert len(twice) < 0.15 * len(sides[1])
    chosen = Counter(json.dumps(r["chosen"]) for r in train)
    rejected = Counter(json.dumps(r["rejected"]) for r in train)
    assert sum((chosen - rejected).values()) < 0.05 * len(train)


def test_split_is_the_same_in_every_stage() -> None:
    train, held_back = builtin.split(builtin.arithmetic(20), 0.1, most=50)
    assert len(held_back) == 50 and len(train) == 750
    prompts = {row["prompt"][0]["content"] for row in train}
    assert not any(row["prompt"][0]["content"] in prompts for row in held_back)
    assert builtin.split(builtin.arithmetic(20), 0.1, most=50) == (train, held_back)
    fewer = builtin.split(builtin.arithmetic(20), 0.02, most=50)[1]
    assert len(fewer) == 16 and all(row in held_back for row in fewer)
    assert builtin.split([{"a": 1}], 0.5, most=9) == ([{"a": 1}], [])


@pytest.mark.parametrize(
    ("check", "row", "complaint"),
    [
        (rows.supervised_row, {"prompt": "a"}, r"expected `prompt` and `completion`.*got \['prompt'\]"),
        (rows.supervised_row, {"prompt": "a", "completion": 3}, "strings, or lists of messages"),
        (
            rows.supervised_row,
            {"prompt": "a", "completion": [USER]},
            "completion: .*of role assistant, got user",
        ),
        (rows.supervised_row, {"messages": [USER]}, "at least one of role assistant"),
        (rows.supervised_row, {"messages": [{"role": "user"}]}, "a role and a content"),
        (rows.supervised_row, {"messages": "hello"}, "expected a list of messages"),
        (rows.supervised_row, {"text": 3}, "text of type int"),
        (rows.preference_row, {"chosen": "a"}, "expected `chosen` and `rejected`"),
        (rows.preference_row, {"prompt": "q", "chosen": "a", "rejected": "a"}, "one and the same"),
        (rows.preference_row, {"chosen": [ANSWER], "rejected": [USER]}, "at least one message"),
        (rows.prompt_row, {"question": "a"}, "expected `prompt`"),
    ],
)
def test_bad_rows(check: rows.Check, row: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = {
        "prompt": "q", "completion": "a", "chosen": "a", "rejected": "b", "messages": [USER, ANSWER],
    }  # fmt: skip
    path.write_text("\n".join(map(json.dumps, (good, row, good))))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{complaint}"):
        rows.read([str(path)], check)
    kept, skipped = rows.read([str(path)], check, skip=True)
    assert len(kept) == 2 and len(skipped) == 1 and "rows.jsonl:2" in skipped[0]


def test_files_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*rows\.csv: No such file"):
        rows.read([str(tmp_path / "rows.csv")], rows.prompt_row)
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows in"):
        rows.read([str(tmp_path / "none.jsonl")], rows.prompt_row)


def test_prompt_of_a_pair_is_what_both_begin_with() -> None:
    other = {"role": "assistant", "content": "6"}
    row = rows.preference_row({"chosen": [USER, ANSWER], "rejected": [USER, other]})
    assert row["prompt"] == [USER] and row["chosen"] == [ANSWER] and row["rejected"] == [other]
    row = rows.preference_row({"chosen": "to be", "rejected": "to go"})
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("to", " be", " go")
    row = rows.preference_row({"chosen": "yes, sir", "rejected": "yes"})
    assert row["chosen"] and row["rejected"]


def test_only_the_answers_are_learned(base: Path) -> None:
    tok = chat.load(base)
    end = tok.eos_token

    def learned(row: dict[str, Any]) -> tuple[str, str]:
        ids, mask = chat.example(tok, rows.supervised_row(row))
        taught = [i for i, m in zip(ids, mask, strict=True) if m]
        return tok.decode(ids), tok.decode(taught)

    assert learned({"prompt": [USER], "completion": [ANSWER]}) == (
        f"<|user|>2+3=<|assistant|>5{end}",
        f"5{end}",
    )
    assert learned({"prompt": "2+3=", "completion": "5"}) == (f"2+3=5{end}", f"5{end}")
    assert learned({"text": "five"}) == (f"five{end}", f"five{end}")
    turns = [{"role": "system", "content": "sums"}, USER, ANSWER, USER, ANSWER]
    whole, taught = learned({"messages": turns})
    assert whole == tok.apply_chat_template(turns, tokenize=False) and taught == f"5{end}5{end}"
    # what is sampled from is what was learned after
    example = chat.example(tok, {"prompt": [USER], "completion": [ANSWER]})
    assert example.ids[: example.learned.index(True)] == chat.prompt(tok, [USER])
    # a marker that is special is one token; digits are tokens of their own
    assert len(chat.prompt(tok, [{"role": "user", "content": "12"}])) == 4


def test_template_that_rewrites_the_past_is_refused(base: Path) -> None:
    tok = chat.load(base)
    tok.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="writes a conversation differently"):
        chat.example(tok, {"prompt": [USER], "completion": [ANSWER]})


def test_messages_that_the_template_refuses_are_bad_rows(base: Path, tmp_path: Path, quiet: Console) -> None:
    tok = chat.load(base)
    tok.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    system, path = {"role": "system", "content": "sums"}, tmp_path / "rows.jsonl"
    good = {"messages": [USER, ANSWER], "prompt": [USER], "chosen": [ANSWER], "rejected": [USER]}
    bad = {
        "messages": [system, USER, ANSWER], "prompt": [system, USER], "chosen": [ANSWER], "rejected": [USER]
    }  # fmt: skip
    path.write_text("\n".join(map(json.dumps, (good, bad, good))))
    for prepare, config in (
        (sft.prepare, SftConfig),
        (pairs.prepare, DpoConfig),
        (rollout.prepare, GrpoConfig),
    ):
        options: Any = config(data=(str(path),))
        with pytest.raises(
            ValueError, match=r"rows\.jsonl:2: messages: .*template refuses them: no system role"
        ):
            prepare(options, tok, quiet)
        assert "1 rows skipped" in prepare(replace(options, skip_bad_rows=True), tok, quiet).source


def some_examples(lengths: list[int]) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        made.append(Example(ids, [i >= length // 2 for i in range(length)]))
    return made


SMALL: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# a window of 4 is shorter than most of the documents; Gemma 2 has it in every other layer
ARCHITECTURES: dict[str, Any] = {
    "mistral": MistralConfig(**SMALL, sliding_window=4),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
                       eos_token_id=0),
}  # fmt: skip


def causal_lm(name: str, base: Path) -> Any:
    if name == "llama":
        return load_model(str(base), "cpu").eval()
    made: Any = model.build_model(ARCHITECTURES[name], 0, "cpu").eval()
    with torch.no_grad():  # small random weights would attend to everything alike
        for p in made.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return made


@pytest.mark.parametrize("name", ["llama", *ARCHITECTURES])
def test_packed_rows_are_the_rows_apart(name: str, base: Path) -> None:
    """Logits, loss and gradients: no document sees another (and the padding sees none)."""
    causal = causal_lm(name, base)
    check_packing(causal, 300)
    examples = some_examples([9, 2, 14, 5, 7])
    groups = pack(examples, 24)
    assert sorted(i for group in groups for i in group) == list(range(5)) and len(groups) == 2
    together = packed([[examples[i] for i in group] for group in groups], 24)
    order = [examples[i] for group in groups for i in group]
    results = []
    for batches in ([together], [padded([example]) for example in order]):
        causal.zero_grad()
        states, targets = [], []
        for batch in batches:
            hidden = hidden_states(causal, batch.inputs, batch.positions)
            states.append(hidden[batch.targets != IGNORE])
            targets.append(batch.targets[batch.targets != IGNORE])
        logits = head_of(causal).logits(torch.cat(states))
        loss = torch.nn.functional.cross_entropy(logits, torch.cat(targets))
        loss.backward()
        grads = [p.grad.clone() for p in causal.parameters()]
        results.append((torch.cat(targets), loss, logits.detach(), grads))
    (target_a, loss_a, logits_a, grads_a), (target_b, loss_b, logits_b, grads_b) = results
    assert torch.equal(target_a, target_b)
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits_a, logits_b, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_model_that_cannot_pack_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = load_model(str(base), "cpu")
    check_packing(causal, 300)
    blind = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda m, inputs, positions=None: blind(m, inputs))
    with pytest.raises(ValueError, match="looks from one document into another; use --no-packing"):
        check_packing(causal, 300)


def test_pack_wastes_little_and_loses_nothing() -> None:
    lengths = [int(n) for n in torch.randint(2, 40, (500,), generator=torch.Generator().manual_seed(1))]
    examples = some_examples(lengths)
    groups = pack(examples, 64)
    assert sorted(i for group in groups for i in group) == list(range(500))
    used = [sum(len(examples[i].ids) - 1 for i in group) for group in groups]
    assert max(used) <= 64 and sum(used) / (64 * len(groups)) > 0.95
    assert pack(examples[:5], 64, most=1) == [[0], [1], [2], [3], [4]]
    kept, cut, dropped = fit(some_examples([10, 30, 50]), 16)
    assert (len(kept), cut, dropped) == (2, 1, 1)  # of 50 tokens the first 25 are not to be learned
    assert len(kept[1].ids) == 17


@pytest.mark.parametrize("name", ["llama", *ARCHITECTURES])
def test_sampler_is_the_models_own_argmax(name: str, base: Path) -> None:
    """Prompts of different length, left-padded, with a cache: the tokens of one forward at a time without."""
    causal = causal_lm(name, base)
    check_sampler(causal, head_of(causal), 300)
    head, prompts = head_of(causal), [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    answers = sample(causal, head, prompts, max_new_tokens=6, end=-1, temperature=0)
    for ids, answer in zip(prompts, answers, strict=True):
        ids = list(ids)
        for _ in range(6):
            ids.append(int(causal(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[-6:] == answer
    end = answers[0][2]
    stopped = sample(causal, head, prompts, max_new_tokens=6, end=end, temperature=0)
    assert stopped[0] == answers[0][: answers[0].index(end) + 1]
    assert causal.training is False


def test_sampler_draws_from_its_own_generator(base: Path) -> None:
    causal = load_model(str(base), "cpu")
    head, prompts = head_of(causal), [[5, 6, 7], [9], [11, 12, 13, 14, 15]]

    def drawn(seed: int) -> list[list[int]]:
        noise = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        together = sample(causal, head, prompts, max_new_tokens=6, end=-1, temperature=1, noise=noise)
        alone = sample(causal, head, prompts[1:2], max_new_tokens=6, end=-1, temperature=1, noise=noise[1:2])
        assert together[1:2] == alone  # a sample does not depend on what shares its batch
        return together

    state = torch.get_rng_state()
    assert drawn(3) == drawn(3) != drawn(4)
    assert torch.equal(state, torch.get_rng_state())  # bug 22


def test_samples_follow_the_models_distribution(base: Path) -> None:
    causal = load_model(str(base), "cpu")
    with torch.no_grad():
        causal.lm_head.weight.mul_(40)  # away from uniform
        expected = torch.softmax(causal(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / 0.7, -1)
    noise = torch.rand(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = sample(
        causal, head_of(causal), [[5, 6]] * 4000, max_new_tokens=1, end=-1, temperature=0.7, noise=noise
    )  # fmt: skip
    seen = torch.bincount(torch.tensor(tokens).flatten(), minlength=len(expected)) / 4000
    assert float((seen - expected).abs().sum()) < 0.25 and float(expected.max()) > 0.05


def test_reward_functions_in_trls_convention() -> None:
    asked = [{"prompt": [USER], "answer": "5", "task": "a"}, {"prompt": "1+1=", "answer": "2"}]
    assert rewards.score([rewards.exact_answer], asked, ["5", " 2\n"], [[1], [2]]) == [1, 1]
    assert rewards.score([rewards.exact_answer], asked, ["6", "22"], [[1], [2]]) == [0, 0]

    def judge(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        assert prompts == [[USER], "1+1="] and columns["task"] == ["a", None]
        assert completions == [[{"role": "assistant", "content": "5"}], "2"]
        assert columns["completion_ids"] == [[1], [2]] and columns["answer"] == ["5", "2"]
        return [0.25, None]

    assert rewards.score([rewards.exact_answer, judge], asked, ["5", "2"], [[1], [2]]) == [1.25, 1]
    alone = rewards.score([judge], asked, ["5", "2"], [[1], [2]])
    assert alone[0] == 0.25 and math.isnan(alone[1])  # nobody could score it
    with pytest.raises(ValueError, match="expected 2 values from <lambda>, got 1"):
        rewards.score([lambda **_: [1.0]], asked, ["5", "2"], [[1], [2]])
    with pytest.raises(ValueError, match="expected finite values from <lambda>, got nan for '2'"):
        rewards.score([lambda **_: [1.0, float("nan")]], asked, ["5", "2"], [[1], [2]])
    with pytest.raises(ValueError, match="rows with an `answer`"):
        rewards.score([rewards.exact_answer], [{"prompt": "a"}], ["b"], [[1]])
    path = "fastloss.harness.rewards:exact_answer"
    assert rewards.load([path]) == rewards.load([]) == [rewards.exact_answer]
    weighted = rewards.load([path, f"{path}=-0.5"])
    assert rewards.score([*weighted, judge], asked, ["5", "2"], [[1], [2]]) == [0.75, 0.5]
    with pytest.raises(ValueError, match="expected a number as the weight of a:b, got 'c'"):
        rewards.load(["a:b=c"])
    with pytest.raises(ValueError, match="expected 2 values from <lambda>, got 1"):
        rewards.score([rewards.Weighted(lambda **_: [1.0], 2)], asked, ["5", "2"], [[1], [2]])
