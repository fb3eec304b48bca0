"""The user's files: rows of JSONL in TRL's dataset formats, each checked, each error with its file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Check = Callable[[Row], Row]  # the row as the stage wants it, or a ValueError that says what is wrong
JSONL = (".jsonl", ".ndjson")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte, where = error.object[error.start], error.start
        raise ValueError(f"{path}: expected UTF-8 text, got byte {byte:#04x} at position {where}") from None


def parse(path: Path, text: str, check: Check, skip: bool, skipped: list[str]) -> Iterator[Row]:
    """Each line of a JSONL file; with ``skip``, what is wrong goes to ``skipped`` instead of being raised."""
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            row = check(row)
        except ValueError as error:
            if not skip:
                raise ValueError(f"{path}:{number}: {error}") from None
            skipped.append(f"{path}:{number}: {error}")
            continue
        yield row


def read(paths: Iterable[str], check: Check, *, skip: bool = False) -> tuple[list[Row], list[str]]:
    """Rows of JSONL files, and what was skipped."""
    rows: list[Row] = []
    skipped: list[str] = []
    for path in map(Path, paths):
        if path.suffix not in JSONL:
            raise ValueError(f"data: expected a .jsonl or .ndjson file, got {path}")
        rows += parse(path, read_text(path), check, skip, skipped)
    if not rows:
        raise ValueError(f"data: no rows in {', '.join(map(str, paths))}")
    return rows, skipped


def text_row(row: Row) -> Row:
    """{"text"}"""
    return {"text": _string(row, "text")}


def supervised_row(row: Row) -> Row:
    """{"prompt", "completion"}, {"messages"} or {"text"}"""
    if "messages" in row:
        messages = _messages(row, "messages")
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError("messages: expected at least one of role assistant, got none")
    elif "text" in row:
        _string(row, "text")
    elif "prompt" in row and "completion" in row:
        _same_kind(row, "prompt", "completion")
    else:
        raise ValueError(f"expected `prompt` and `completion`, `messages` or `text`, got {sorted(row)}")
    return row


def preference_row(row: Row) -> Row:
    """{"prompt", "chosen", "rejected"}; without a prompt, what both answers begin with is the prompt."""
    if not {"chosen", "rejected"} <= set(row):
        raise ValueError(f"expected `chosen` and `rejected`, got {sorted(row)}")
    if "prompt" not in row:
        _same_kind(row, "chosen", "rejected")
        chosen, rejected = row["chosen"], row["rejected"]
        shared = next((i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r), None)
        if shared is None:  # one begins with the whole of the other, or they are one
            shared = max(0, min(len(chosen), len(rejected)) - 1)
        row = row | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    _same_kind(row, "prompt", "chosen", "rejected")
    if not row["prompt"] and not isinstance(row["prompt"], str):
        raise ValueError("prompt: expected at least one message, got none (chosen and rejected share none)")
    if row["chosen"] == row["rejected"]:
        raise ValueError("chosen and rejected: expected two answers, got one and the same")
    return row


def prompt_row(row: Row) -> Row:
    """{"prompt", …}: the other fields go to the reward function."""
    if "prompt" not in row:
        raise ValueError(f"expected `prompt`, got {sorted(row)}")
    _same_kind(row, "prompt")
    return row


def _string(row: Row, key: str) -> str:
    if key not in row:
        raise ValueError(f"expected an object with a string in `{key}`, got an object with {sorted(row)}")
    if not isinstance(row[key], str):
        got = type(row[key]).__name__
        raise ValueError(f"expected an object with a string in `{key}`, got {key} of type {got}")
    return row[key]


def _messages(row: Row, key: str) -> list[Row]:
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key}: expected a list of messages, got {messages!r:.60}")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(part), str) for part in ("role", "content")
        ):
            raise ValueError(f"{key}: expected messages of a role and a content, got {message!r:.60}")
    return messages


def _same_kind(row: Row, *keys: str) -> None:
    """All strings, or all lists of messages."""
    kinds = {key: type(row[key]) for key in keys}
    if all(kind is str for kind in kinds.values()):
        return
    if all(kind is list for kind in kinds.values()):
        for key in keys:
            if row[key] or key != "prompt":
                _messages(row, key)
        return
    got = ", ".join(f"{key} of type {kind.__name__}" for key, kind in kinds.items())
    raise ValueError(f"expected strings, or lists of messages, got {got}")
