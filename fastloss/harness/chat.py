"""Rows to tokens: chat templates, and which tokens are the model's to learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer

from .rows import Row
from .tokenizer import END, PAD

# the harness's own; a tokenizer that brings a template keeps it
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Text = str | list[dict[str, str]]  # plain, or messages


class Example(NamedTuple):
    ids: list[int]
    learned: list[bool]  # the model's own words, and the end after them


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def wrap(bpe: Tokenizer) -> Any:
    """A transformers tokenizer around a BPE of the harness."""
    from transformers import PreTrainedTokenizerFast

    fresh = Tokenizer.from_str(bpe.to_str())  # `bpe` may read special tokens as text; here they are special
    pad = END if fresh.token_to_id(PAD) is None else PAD
    return PreTrainedTokenizerFast(
        tokenizer_object=fresh, eos_token=END, pad_token=pad, chat_template=TEMPLATE
    )


def load(folder: Path) -> Any:
    """The tokenizer of a transformers folder, with a chat template and an end of its own or the harness's."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"model: expected a tokenizer.json in {folder}, got none")
    if not (folder / "tokenizer_config.json").is_file():
        return wrap(Tokenizer.from_file(str(folder / "tokenizer.json")))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: expected a tokenizer with an end-of-text token, got none in {folder}")
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def prompt(tokenizer: Any, text: Text) -> list[int]:
    """A plain prompt as it is; messages through the template, up to where the assistant begins."""
    return encode(tokenizer, _rendered(tokenizer, text, answer_next=True))


def completion(tokenizer: Any, text: Text, answer: Text) -> list[int]:
    """What follows the prompt, the end included. Encoded apart: the prompt's tokens are those of sampling."""
    if isinstance(answer, str):
        return [*encode(tokenizer, answer), int(tokenizer.eos_token_id)]
    assert isinstance(text, list)
    return encode(tokenizer, _after(tokenizer, text, answer))


def example(tokenizer: Any, row: Row) -> Example:
    """Of a row that `rows.supervised_row` passed."""
    if "messages" in row:
        return _conversation(tokenizer, row["messages"])
    if "text" in row:
        ids = [*encode(tokenizer, row["text"]), int(tokenizer.eos_token_id)]
        return Example(ids, [True] * len(ids))
    before = prompt(tokenizer, row["prompt"])
    after = completion(tokenizer, row["prompt"], row["completion"])
    return Example(before + after, [False] * len(before) + [True] * len(after))


def pair(tokenizer: Any, row: Row) -> Pair:
    """Of a row that `rows.preference_row` passed."""
    text = row["prompt"]
    chosen, rejected = (completion(tokenizer, text, row[key]) for key in ("chosen", "rejected"))
    return Pair(prompt(tokenizer, text), chosen, rejected)


def taken(tokenizer: Any, row: Row) -> Row:
    """A checked row, if the chat template takes its messages; else a ValueError that says why not."""
    if "messages" in row:
        list(_turns(tokenizer, row["messages"]))
    elif isinstance(row.get("prompt"), list):
        _rendered(tokenizer, row["prompt"], answer_next=True)
        for key in ("completion", "chosen", "rejected"):
            if isinstance(row.get(key), list):
                _after(tokenizer, row["prompt"], row[key])
    return row


def _conversation(tokenizer: Any, messages: list[dict[str, str]]) -> Example:
    """Every assistant turn is learned, nothing else is."""
    ids: list[int] = []
    learned: list[bool] = []
    for text, learn in _turns(tokenizer, messages):
        piece = encode(tokenizer, text)
        ids += piece
        learned += [learn] * len(piece)
    return Example(ids, learned)


def _turns(tokenizer: Any, messages: list[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """The conversation's text in order, and whether it is an assistant's; what follows the last of them is left out."""
    done = 0  # messages already given
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        seen = _rendered(tokenizer, messages[:done], answer_next=False)
        whole = _rendered(tokenizer, messages[:i], answer_next=True)
        yield _rest(seen, whole), False
        yield _after(tokenizer, messages[:i], [message]), True
        done = i + 1


def _after(tokenizer: Any, text: list[dict[str, str]], answer: list[dict[str, str]]) -> str:
    before = _rendered(tokenizer, text, answer_next=True)
    return _rest(before, _rendered(tokenizer, text + answer, answer_next=False))


def _rest(start: str, whole: str) -> str:
    if not whole.startswith(start):
        raise ValueError(
            "model: its chat template writes a conversation differently once an answer follows: "
            f"expected it to begin with {start[-60:]!r}, got {whole[: len(start)][-60:]!r}"
        )
    return whole[len(start) :]


def _rendered(tokenizer: Any, text: Text, *, answer_next: bool) -> str:
    if isinstance(text, str):
        return text
    if not text:
        return ""
    try:
        return str(tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=answer_next))
    except TemplateError as error:  # many templates raise one for roles or an order that they do not know
        raise ValueError(f"messages: the model's chat template refuses them: {error}") from None
