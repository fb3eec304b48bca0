"""Rows to tokens: chat templates, where a turn ends, and which tokens are the model's to learn."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer

from .model import one_line
from .rows import Row
from .tokenizer import END, PAD

# the harness's own; a tokenizer that brings a template keeps it
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROBES = "¶§"  # contents that a template is asked to write, to see where it writes them
NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
Messages = list[dict[str, Any]]
Text = str | Messages  # plain, or messages
Piece = tuple[str, bool]  # text, and whether the model is to learn it


class Example(NamedTuple):
    ids: list[int]
    learned: list[bool]  # the model's own words, and the end after them


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0  # by how much the chosen one is said to be better


class Rewritten(ValueError):
    """The template writes what came before an answer differently once the answer is there."""


def wrap(bpe: Tokenizer, date: str = "") -> Any:
    """A transformers tokenizer around a BPE of the harness."""
    from transformers import PreTrainedTokenizerFast

    fresh = Tokenizer.from_str(bpe.to_str())  # `bpe` may read special tokens as text; here they are special
    pad = END if fresh.token_to_id(PAD) is None else PAD
    made = PreTrainedTokenizerFast(
        tokenizer_object=fresh, eos_token=END, pad_token=pad, chat_template=TEMPLATE
    )
    return _ready(made, date)


def load(folder: Path, date: str = "") -> Any:
    """The tokenizer of a transformers folder, with a chat template and an end of its own or the harness's.

    date: what its chat template takes for today, as 2026-11-26; none: the day of this call.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"model: expected a tokenizer.json in {folder}, got none")
    if not (folder / "tokenizer_config.json").is_file():
        return wrap(Tokenizer.from_file(str(folder / "tokenizer.json")), date)
    with one_line(f"cannot load the tokenizer of {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"model: expected a tokenizer that `tokenizers` runs, got {type(tokenizer).__name__}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: expected a tokenizer with an end-of-text token, got none in {folder}")
    if not tokenizer.chat_template:
        begins = plain(tokenizer, "") == [tokenizer.bos_token_id]  # as its texts do
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + TEMPLATE
    return _ready(tokenizer, date)


def _ready(tokenizer: Any, date: str) -> Any:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # some are published with a length; what is too long is the stages' to say
    backend.no_padding()
    tokenizer.today = datetime.date.fromisoformat(date) if date else datetime.date.today()
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def plain(tokenizer: Any, text: str) -> list[int]:
    """A text that is no chat: after what the tokenizer itself begins a text with (BOS, or nothing); without the end
    that some add, since ours follows."""
    encoding = tokenizer.backend_tokenizer.encode(text or "a")
    own = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
    if not own:  # nothing of the text is left, a space say
        return plain(tokenizer, "") if text else []
    return list(encoding.ids[: own[-1] + 1] if text else encoding.ids[: own[0]])


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def ends(tokenizer: Any, more: int | Collection[int] | None = None) -> frozenset[int]:
    """The tokens that end an answer: the end of text, the chat template's own end of a turn, and of ``more`` (a
    generation config's) those that the tokenizer knows as tokens of their own, not as pieces of text."""
    found = {int(tokenizer.eos_token_id)}
    if more is not None:
        more = [more] if isinstance(more, int) else more
        found |= tokenizer.added_tokens_decoder.keys() & set(more)
    turn = _closing(tokenizer, str(tokenizer.chat_template)).end
    return frozenset(found if turn is None else found | {turn})


class Closing(NamedTuple):
    """What a template writes after the last answer of a conversation."""

    end: int | None  # the token that ends the turn: <|im_end|>, <|eot_id|>, <end_of_turn> …
    text: str  # all of it
    after: str  # of that what follows the end: a line break, Phi-3's <|endoftext|>


@functools.lru_cache(maxsize=8)
def _closing(tokenizer: Any, template: str) -> Closing:
    asked = {"role": "user", "content": "a"}
    try:
        whole = _rendered(tokenizer, [asked, {"role": "assistant", "content": PROBES[0]}], answer_next=False)
    except (ValueError, TypeError):  # a template that wants more than that
        return Closing(None, "", "")
    text = whole.partition(PROBES[0])[2]
    for id in encode(tokenizer, text):
        if id in tokenizer.added_tokens_decoder:
            name = str(tokenizer.added_tokens_decoder[id])
            return Closing(id, text, text.partition(name)[2])
    return Closing(None, text, "")


def without_end(ids: list[int], ends: Collection[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in ends else ids


def options(row: Row) -> dict[str, Any]:
    """What the template gets beside the messages: a row's `tools`, and its `chat_template_kwargs` as in TRL."""
    more = row.get("chat_template_kwargs")
    return {
        **({"tools": row["tools"]} if row.get("tools") else {}),
        **(more if isinstance(more, dict) else {}),
    }


def prompt(tokenizer: Any, text: Text, more: Mapping[str, Any] | None = None) -> list[int]:
    """A plain prompt as the tokenizer begins a text; messages through the template, up to where the assistant begins."""
    if isinstance(text, str):
        return plain(tokenizer, text)
    return encode(tokenizer, _rendered(tokenizer, text, more, answer_next=True))


def completion(tokenizer: Any, text: Text, answer: Text, more: Mapping[str, Any] | None = None) -> list[int]:
    """What follows the prompt, the end included and nothing after it."""
    return _apart(tokenizer, text, answer, more)[1]


def example(tokenizer: Any, row: Row) -> Example:
    """Of a row that `rows.supervised_row` passed. Of a conversation every assistant turn is learned, nothing else is."""
    if "messages" in row:
        return _example(tokenizer, list(_turns(tokenizer, row["messages"], options(row))))
    if "prompt" not in row or "completion" not in row:
        ids = [*plain(tokenizer, row["text"]), int(tokenizer.eos_token_id)]
        return Example(ids, [True] * len(ids))
    text, answer = row["prompt"], row["completion"]
    if not isinstance(answer, str) and len(answer) > 1:  # tool calls and what came of them
        return _example(tokenizer, list(_turns(tokenizer, text + answer, options(row), first=len(text))))
    before, after = _apart(tokenizer, text, answer, options(row))
    return Example(before + after, [False] * len(before) + [True] * len(after))


def examples(tokenizer: Any, row: Row) -> list[Example]:
    """One; or one for each assistant turn, where the template writes a turn differently once others follow
    (it drops past reasoning, say): what is learned then follows what is sampled from."""
    try:
        return [example(tokenizer, row)]
    except Rewritten:
        if "messages" not in row:
            raise
    found = []
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            before, after = _apart(tokenizer, row["messages"][:i], [message], options(row))
            found.append(Example(before + after, [False] * len(before) + [True] * len(after)))
    return found


def pair(tokenizer: Any, row: Row) -> Pair:
    """Of a row that `rows.preference_row` passed."""
    text, more = row["prompt"], options(row)
    (before, chosen), (other, rejected) = (
        _apart(tokenizer, text, row[key], more) for key in ("chosen", "rejected")
    )
    if before != other:
        raise ValueError("chosen, rejected: the model's chat template begins them differently")
    return Pair(before, chosen, rejected, float(row.get("margin") or 0.0))


def taken(tokenizer: Any, row: Row) -> Row:
    """A checked row, if the chat template takes its messages; else a ValueError that says why not."""
    more = options(row)
    if "messages" in row:
        try:
            list(_turns(tokenizer, row["messages"], more))
        except Rewritten:
            for i, message in enumerate(row["messages"]):
                if message["role"] == "assistant":
                    _answer(tokenizer, row["messages"][:i], [message], more)
    elif isinstance(row.get("prompt"), list):
        _rendered(tokenizer, row["prompt"], more, answer_next=True)
        for key in ("completion", "chosen", "rejected"):
            if isinstance(row.get(key), list):
                _answer(tokenizer, row["prompt"], row[key], more)
    return row


def _apart(
    tokenizer: Any, text: Text, answer: Text, more: Mapping[str, Any] | None
) -> tuple[list[int], list[int]]:
    """Tokens of prompt and answer. The prompt's are those of sampling, also where the two together have others."""
    end = int(tokenizer.eos_token_id)
    if isinstance(text, str):
        before, whole = plain(tokenizer, text), plain(tokenizer, text + str(answer))
        joined = whole[: len(before)] == before
        return before, [*(whole[len(before) :] if joined else encode(tokenizer, str(answer))), end]
    assert not isinstance(answer, str)
    start, rest = _answer(tokenizer, text, answer, more)
    rest, _ = _said(tokenizer, rest)
    before, after = encode(tokenizer, start), encode(tokenizer, start + rest)
    after = after[len(before) :] if after[: len(before)] == before else encode(tokenizer, rest)
    return before, _ended(tokenizer, after)[0]


def _said(tokenizer: Any, answer: str) -> tuple[str, str]:
    """An answer's text parted after its end, where it closes as the last of a conversation does."""
    _, text, after = _closing(tokenizer, str(tokenizer.chat_template))
    at = len(answer) - len(after) if after and answer.endswith(text) else len(answer)
    return answer[:at], answer[at:]


def _ended(tokenizer: Any, ids: list[int]) -> tuple[list[int], list[int]]:
    """An answer up to its last end, one put there if the template writes none, and what follows that end."""
    stop = ends(tokenizer)
    last = max((i for i, id in enumerate(ids) if id in stop), default=None)
    if last is None:
        return [*ids, int(tokenizer.eos_token_id)], []
    return ids[: last + 1], ids[last + 1 :]


def _example(tokenizer: Any, pieces: list[Piece]) -> Example:
    """What follows an answer's end in its piece, as a line break, is not the model's to say."""
    while pieces and not pieces[-1][1]:
        pieces.pop()
    ids: list[int] = []
    learned: list[bool] = []
    tokens = _tokens(tokenizer, [text for text, _ in pieces])
    stop = ends(tokenizer)
    for number, (piece, (_, learn)) in enumerate(zip(tokens, pieces, strict=True)):
        tail: list[int] = []
        # inside a conversation the template's text stays as it is, with an end or without
        if learn and (number == len(pieces) - 1 or stop.intersection(piece)):
            piece, tail = _ended(tokenizer, piece)
        ids += piece
        learned += [learn] * len(piece)
        if number < len(pieces) - 1:
            ids += tail
            learned += [False] * len(tail)
    return Example(ids, learned)


def _tokens(tokenizer: Any, pieces: list[str]) -> list[list[int]]:
    """Each piece's share of the tokens of all; each by itself where a token would lie in two of them."""
    encoding = tokenizer.backend_tokenizer.encode("".join(pieces), add_special_tokens=False)
    bounds = list(accumulate(map(len, pieces)))
    found: list[list[int]] = [[] for _ in pieces]
    at = 0
    for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        while start >= bounds[at] and at < len(pieces) - 1:
            at += 1
        if end > bounds[at]:
            return [encode(tokenizer, piece) for piece in pieces]
        found[at].append(id)
    return found


def _turns(
    tokenizer: Any, messages: Messages, more: Mapping[str, Any] | None, first: int = 0
) -> Iterator[Piece]:
    """The conversation's text in order, and whether it is an assistant's, of those from the ``first`` message on; what
    follows the last of them is left out."""
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first:
            continue
        before, answer = _answer(tokenizer, messages[:i], [message], more)
        yield _rest(written, before), False
        said, after = _said(tokenizer, answer)
        yield said, True
        yield after, False
        written = before + answer


def _answer(
    tokenizer: Any, text: Messages, answer: Messages, more: Mapping[str, Any] | None
) -> tuple[str, str]:
    """What is written before an answer, and the answer with what ends it.

    The first is what is sampled from, if the template goes on from it; else (DeepSeek-R1 opens a thought that is not
    in the data; nothing came before) it is all that the template itself writes before the answer's own words.
    """
    before = _rendered(tokenizer, text, more, answer_next=True)
    whole = _rendered(tokenizer, text + answer, more, answer_next=False)
    if text and whole.startswith(before):
        return before, whole[len(before) :]
    known = _rendered(tokenizer, text, more, answer_next=False)
    _rest(known, whole)
    mark = next(mark for mark in PROBES if not str(answer[0]["content"]).lstrip().startswith(mark))
    probe = {"role": answer[0]["role"], "content": mark}
    other = _rendered(tokenizer, [*text, probe], more, answer_next=False)
    alike = next((i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), len(other))
    start = max(len(known), alike)
    if not text:  # a greeting: it begins where answers begin elsewhere, after <|im_start|>assistant
        asked = [{"role": "user", "content": "a"}]
        without, header = (_rendered(tokenizer, asked, more, answer_next=n) for n in (False, True))
        header = header.removeprefix(without)
        at = whole[:start].rfind(header) if header else -1
        start = at + len(header) if at >= 0 else start
    return whole[:start], whole[start:]


def _rest(start: str, whole: str) -> str:
    if not whole.startswith(start):
        raise Rewritten(
            "model: its chat template writes a conversation differently once an answer follows: "
            f"expected it to begin with {start[-60:]!r}, got {whole[: len(start)][-60:]!r}"
        )
    return whole[len(start) :]


def _rendered(
    tokenizer: Any, text: Messages, more: Mapping[str, Any] | None = None, *, answer_next: bool
) -> str:
    if not text:
        return ""
    options = dict(more or {})
    template = tokenizer.get_chat_template(options.pop("chat_template", None), options.get("tools"))
    try:
        return str(
            tokenizer.apply_chat_template(
                text, tokenize=False, add_generation_prompt=answer_next,
                chat_template=_dated(template, tokenizer.today), **options,
            )
        )  # fmt: skip
    except (
        TemplateError,
        TypeError,
    ) as error:  # many templates raise one for roles or an order that they do not know
        raise ValueError(f"messages: the model's chat template refuses them: {error}") from None


@functools.lru_cache(maxsize=8)
def _dated(template: str, today: datetime.date) -> str:
    """With the day written in: what a run learned on one day it goes on with on the next. (transformers hands no
    function of ours to a template.)"""
    return NOW.sub(lambda found: json.dumps(today.strftime(found[2])), template)
