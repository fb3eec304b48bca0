"""What a chat model is: where its turns end, how its texts begin, and which tokens of a conversation are its own."""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from templates import FAMILIES, own_mask, tokenizer_of
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, OPTConfig, PreTrainedTokenizerFast

from fastloss.harness import chat, grpo, model, rows, run, sft, tokenizer
from fastloss.harness.config import GrpoConfig, SftConfig
from fastloss.harness.model import build_model, check_positions, head_of, load_model
from fastloss.harness.sampler import sample

SYSTEM, USER = {"role": "system", "content": "sums"}, {"role": "user", "content": "2+3="}
ANSWER, MORE = {"role": "assistant", "content": "it is 5"}, {"role": "user", "content": "and 4+4="}
LAST = {"role": "assistant", "content": "8, I think"}


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizer.train_bpe([f"hello world what is it? the answer is {i}" for i in range(100)], 300)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind = FAMILIES[request.param]
    folder = tokenizer_of(kind, bpe, tmp_path_factory.mktemp("family"))
    return kind, chat.load(folder)


def text_of(tok: Any, example: chat.Example) -> str:
    """What is learned; a break where something that is not lies between."""
    parts = [""]
    for id, learned in zip(*example, strict=True):
        if learned:
            parts[-1] += ""
        parts = [*parts, ""] if not learned and parts[-1] else parts
        parts[-1] = parts[-1] + f"{id} " if learned else parts[-1]
    return "|".join(tok.decode([int(i) for i in part.split()]) for part in parts if part)


def conversations(kind: Any) -> list[list[dict[str, Any]]]:
    found = [[USER, ANSWER], [USER, ANSWER, MORE, LAST], [USER, ANSWER, MORE]]
    found += [[SYSTEM, USER, ANSWER, MORE, LAST]] if kind.system else []
    return found + ([[LAST, USER, ANSWER]] if kind.first else [])


def test_learned_is_what_the_template_marks_as_the_models(family: Any) -> None:
    kind, tok = family
    for messages in conversations(kind):
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        found = chat.examples(tok, rows.supervised_row({"messages": messages}))
        assert len(found) == (len(turns) if kind.apart and len(turns) > 1 else 1)
        for example, last in zip(found, turns if len(found) > 1 else turns[-1:], strict=True):
            ids, marked = own_mask(tok, kind, messages[: last + 1])
            if len(found) > 1:  # the turns before it have examples of their own
                before = len(own_mask(tok, kind, messages[:last])[0]) if last else 0
                before = max(before, len(chat.prompt(tok, messages[:last])) if last else 0)
                marked = [m and i >= before for i, m in enumerate(marked)]
            assert example.ids == ids[: len(example.ids)], (messages, tok.decode(example.ids))
            assert example.learned == marked[: len(example.ids)], (tok.decode(ids), text_of(tok, example))
            assert not any(marked[len(example.ids) :])
            assert example.ids[-1] in chat.ends(tok) and example.learned[-1]


def test_learned_by_hand(family: Any) -> None:
    kind, tok = family
    (example,) = chat.examples(tok, {"prompt": [USER], "completion": [ANSWER]})
    said = kind.says.format("it is 5") + kind.end
    assert text_of(tok, example) == said
    prompt = chat.prompt(tok, [USER])
    assert kind.template == FAMILIES["deepseek-r1"].template or example.ids[: len(prompt)] == prompt
    assert chat.completion(tok, [USER], [ANSWER]) == [i for i, m in zip(*example, strict=True) if m]
    pair = chat.pair(tok, rows.preference_row({"prompt": [USER], "chosen": [ANSWER], "rejected": [LAST]}))
    assert pair.prompt + pair.chosen == example.ids and tok.decode(pair.rejected[-1:]) == kind.end
    if kind.bos:
        assert example.ids.count(tok.bos_token_id) == 1 and example.ids[0] == tok.bos_token_id


def test_a_turn_ends_where_the_template_ends_it(family: Any) -> None:
    kind, tok = family
    eos, end = (tok.convert_tokens_to_ids(token) for token in (kind.eos, kind.end))
    assert chat.ends(tok) == {eos, end}
    # of a generation config's ends those that are tokens of their own: 300 others may be pieces of words
    assert chat.ends(tok, [end, 7, 10_000]) == {eos, end}
    assert chat.ends(tok, 0) == {eos, end, 0} and tok.convert_ids_to_tokens(0) == tokenizer.END


def test_a_template_that_ends_nothing_gets_an_end(bpe: Tokenizer, tmp_path: Path) -> None:
    kind = FAMILIES["vicuna"]
    folder = tokenizer_of(kind._replace(template=kind.template.replace(" + eos_token", "")), bpe, tmp_path)
    tok = chat.load(folder)
    (example,) = chat.examples(tok, {"messages": [USER, ANSWER, MORE, LAST]})
    assert text_of(tok, example) == " it is 5| 8, I think</s>"
    assert example.ids.count(tok.eos_token_id) == 1 and chat.ends(tok) == {tok.eos_token_id}


def test_tool_calls_are_learned_and_what_came_of_them_is_not(bpe: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }} "
        "{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function.arguments | tojson }}</call>"
        "{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    tok = chat.load(tokenizer_of(FAMILIES["chatml"]._replace(template=template), bpe, tmp_path))
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        ANSWER,
    ]
    schema = {"type": "function", "function": {"name": "add", "parameters": {}}}
    for row in (
        {"messages": turns, "tools": [schema]},
        {"prompt": turns[:1], "completion": turns[1:], "tools": json.dumps([schema])},
    ):
        (example,) = chat.examples(tok, chat.taken(tok, rows.supervised_row(row)))
        whole = tok.decode(example.ids)
        assert whole.startswith('<|im_start|>tools [{"type": "function"') and "assistant {}" not in whole
        assert text_of(tok, example) == '<call>{"a": 2}</call><|im_end|>|it is 5<|im_end|>'
    asked = rows.prompt_row({"prompt": [USER], "tools": [schema]})
    assert "tools" in tok.decode(chat.prompt(tok, asked["prompt"], chat.options(asked)))
    assert chat.options({"chat_template_kwargs": {"enable_thinking": False}}) == {"enable_thinking": False}


@pytest.mark.parametrize("adds", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_a_text_begins_as_its_tokenizer_begins_it(adds: str, bpe: Tokenizer, tmp_path: Path) -> None:
    own = Tokenizer.from_str(bpe.to_str())
    own.add_special_tokens(["<s>", "</s>"])
    special = [(token, own.token_to_id(token)) for token in ("<s>", "</s>")]
    own.post_processor = TemplateProcessing(single=adds, special_tokens=special)
    own.enable_truncation(4)  # some are published so
    made = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(tmp_path)
    tok = chat.load(tmp_path)
    begin = [tok.bos_token_id] * adds.startswith("<s>")
    text = "hello what is the answer"
    bare = chat.encode(tok, text)
    assert len(bare) > 4
    assert chat.prompt(tok, text) == begin + bare and chat.plain(tok, "") == begin
    assert chat.example(tok, {"text": text}).ids == [*begin, *bare, tok.eos_token_id]
    example = chat.example(tok, {"prompt": "hello", "completion": " what"})
    assert example.ids == [*begin, *chat.encode(tok, "hello what"), tok.eos_token_id]
    assert example.learned.count(True) == len(chat.encode(tok, " what")) + 1
    # the harness's own template, which the tokenizer has not, begins likewise
    assert chat.prompt(tok, [USER])[: len(begin) + 1] == [*begin, tok.convert_tokens_to_ids("<|user|>")]
    documents = tokenizer.encode(tok.backend_tokenizer, [text, "hello"], tok.eos_token_id).tolist()
    assert documents == [
        *begin,
        *bare,
        tok.eos_token_id,
        *begin,
        *chat.encode(tok, "hello"),
        tok.eos_token_id,
    ]


def test_tokens_of_prompt_and_answer_together_where_they_are_the_prompts(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    """A tokenizer that begins each text with a space: the answer is not another text."""
    from tokenizers import models, pre_tokenizers

    words = {piece: i for i, piece in enumerate(["<unk>", "</s>", "▁2+3=", "▁5", "5", "▁"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path)
    tok = chat.load(tmp_path)
    assert chat.example(tok, {"prompt": "2+3=", "completion": " 5"}).ids == [2, 3, 1]


@pytest.mark.usefixtures("light")
def test_a_run_keeps_the_date_of_its_beginning(
    base: Path, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = tmp_path / "model"
    load_model(str(base), "cpu").save_pretrained(dated)
    tok = AutoTokenizer.from_pretrained(base)
    tok.chat_template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {{ strftime_now( \"%H\" ) }}{% endif %}"
        + chat.TEMPLATE
    )
    tok.save_pretrained(dated)
    assert tok.decode(chat.prompt(chat.load(dated, "2031-01-02"), [USER])).startswith(
        "02 Jan 2031 00<|user|>"
    )
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": [USER], "completion": [ANSWER], "n": i}) for i in range(12))
    )
    config = SftConfig(
        model=str(dated), data=(str(data),), out=str(tmp_path / "run"), steps=4, seq_len=64, batch_size=2, exact=0,
        warmup=1, save_every=0,
    )  # fmt: skip

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2031, 1, 2)

    sft.run(replace(config, stop_after=2), overwrite=True, console=quiet)
    monkeypatch.setattr(run.datetime, "date", Tomorrow)
    assert sft.run(config, resume=True, console=quiet).done == 4
    with pytest.raises(ValueError, match="made from other data"):  # the day is in the data
        sft.run(replace(config, steps=6, date="2031-01-02"), resume=True, console=quiet)
    assert sft.run(config, overwrite=True, console=quiet).done == 4  # a new run has the new day
    assert "2031-01-02" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.usefixtures("light")
def test_an_option_that_does_not_touch_the_data_forbids_no_resume(
    base: Path, tmp_path: Path, quiet: Console
) -> None:
    config = GrpoConfig(
        model=str(base), out=str(tmp_path), reward=("stage_runs:low_ids",), numbers=4, max_new_tokens=3, evaluate=4,
        group_size=2, steps=3, batch_size=2, warmup=1, save_every=0, stop_after=1,
    )  # fmt: skip
    grpo.run(config, console=quiet)
    other = replace(config, stop_after=0, temperature=0.7, group_size=4, lr=1e-3, clip_high=0.3, evaluate=2)
    assert grpo.run(other, resume=True, console=quiet).done == 3


@pytest.mark.usefixtures("light")
def test_sampling_and_the_exported_model_stop_at_the_turns_end(
    bpe: Tokenizer, tmp_path: Path, quiet: Console
) -> None:
    kind = FAMILIES["chatml"]
    folder = tokenizer_of(kind, bpe, tmp_path / "model")
    tok = chat.load(folder)
    shape = GPT2Config(
        vocab_size=len(tok), n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    build_model(shape, 0, "cpu").save_pretrained(folder)
    causal = load_model(str(folder), "cpu").eval()
    head, prompts = head_of(causal), [chat.prompt(tok, [USER]), chat.prompt(tok, [MORE])]
    free = sample(causal, head, prompts, max_new_tokens=6, end=-1, temperature=0)
    stops = {free[0][1], free[1][3]}
    cut = sample(causal, head, prompts, max_new_tokens=6, end=stops, temperature=0)
    for whole, short in zip(free, cut, strict=True):
        first = next(i for i, id in enumerate(whole) if id in stops)
        assert short == whole[: first + 1]
    with pytest.raises(ValueError, match="prompts: expected at least one token"):
        sample(causal, head, [[1], []], max_new_tokens=1, end=0, temperature=0)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": [USER], "completion": [ANSWER]}) for _ in range(8)))
    config = SftConfig(
        model=str(folder), data=(str(data),), out=str(tmp_path / "run"), steps=30, seq_len=48, batch_size=4, lr=1e-2,
        warmup=1, exact=1, max_new_tokens=20, save_every=0, val_fraction=0.2,
    )  # fmt: skip
    result = sft.run(config, console=quiet)
    assert result.after["exact"] == 1  # with an answer that ends, and nothing after it
    exported = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == sorted(chat.ends(tok))
    answer = result.model.generate(
        torch.tensor([chat.prompt(tok, [USER])]), max_new_tokens=20, do_sample=False
    )
    assert tok.decode(answer[0]).endswith("it is 5<|im_end|>")


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj", "llama"])
def test_rows_longer_than_the_learned_positions(name: str, base: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name == "llama":  # rotary positions go on
        check_positions(load_model(str(base), "cpu"), 4096)
        return
    if name == "gpt2":
        config: Any = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **small)
    elif name == "opt":
        config = OPTConfig(
            hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
            word_embed_proj_dim=16, **small,
        )  # fmt: skip
    else:
        from transformers import GPTJConfig

        config = GPTJConfig(n_embd=16, n_layer=1, n_head=2, n_positions=32, rotary_dim=4, **small)
    made: Any = build_model(config, 0, "cpu")
    check_positions(made, 32)
    assert model.hidden_states(made, torch.zeros(1, 32, dtype=torch.long)).shape == (1, 32, 16)
    with pytest.raises(ValueError, match=r"seq_len: expected at most 32, the positions of \w+, got 33"):
        check_positions(made, 33)


def test_a_damaged_tokenizer_or_model_is_one_line(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    for name, load in (
        ("tokenizer.json", chat.load),
        ("model.safetensors", lambda path: load_model(str(path), "cpu")),
    ):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 3])
        with pytest.raises(ValueError, match=r"^model: cannot load .*model: [^\n]+$"):
            load(folder)
        (folder / name).write_bytes(data)
        load(folder)
