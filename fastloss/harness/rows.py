"""Rows of the user's data in TRL's dataset formats: each checked, each error with its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from . import shapes, sources

Row = sources.Row
Check = Callable[[Row], Row]  # the row as the stage wants it, or a ValueError that says what is wrong
RENAME = "; a column of another name: --column prompt=ITS_NAME"


def read(
    names: Iterable[str], check: Check, *, columns: Sequence[str] = (), skip: bool = False
) -> tuple[list[Row], list[str]]:
    """The rows, and what is wrong with those that were skipped; without ``skip`` the first wrong one is raised.

    ``columns``: "ours=theirs", one for each column that has another name in the data.
    """
    names, renamed = list(names), _renamed(columns)
    rows: list[Row] = []
    skipped: list[str] = []
    for place, row in sources.read(names):
        try:
            if isinstance(row, ValueError):
                raise row
            row = _named(row, renamed)
            shapes.check_text(row)
            rows.append(check(row))
        except ValueError as error:
            if not skip:
                raise ValueError(f"{place}: {error}") from None
            skipped.append(f"{place}: {error}")
    if not rows:
        why = f"; the first of {len(skipped)} skipped: {skipped[0]}" if skipped else ""
        raise ValueError(f"data: no rows in {', '.join(names)}{why}")
    return rows, skipped


def _renamed(columns: Sequence[str]) -> dict[str, str]:
    """Their name -> ours."""
    pairs = [column.partition("=") for column in columns]
    for column, (ours, _, theirs) in zip(columns, pairs, strict=True):
        if not (ours and theirs):
            raise ValueError(f"column: expected a pair like completion=answer, got {column!r}")
    for names in zip(*((ours, theirs) for ours, _, theirs in pairs), strict=True):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"column: expected each name once, got {twice[0]} twice in {' '.join(columns)}")
    return {theirs: ours for ours, _, theirs in pairs}


def _named(row: Row, renamed: dict[str, str]) -> Row:
    """Columns under our names."""
    for theirs in renamed:
        if theirs not in row:
            raise ValueError(f"column: expected `{theirs}`, got {sorted(row)}")
    kept = {key: value for key, value in row.items() if key not in renamed.values()}
    return {renamed.get(key, key): value for key, value in kept.items()}


def text_row(row: Row) -> Row:
    """{"text"}"""
    return {"text": _string(row, "text")}


def supervised_row(row: Row) -> Row:
    """{"messages"}, {"prompt", "completion"} or {"text"}"""
    row = shapes.as_trl(row)
    if "messages" in row:
        _answered("messages", _messages(row, "messages"))
    elif "prompt" in row and "completion" in row:
        _same_kind(row, "prompt", "completion")
        if not isinstance(row["completion"], str):
            _answered("completion", row["completion"])
    elif "text" in row:
        _string(row, "text")
    else:
        raise ValueError(
            f"expected `prompt` and `completion`, `messages` or `text`, got {sorted(row)}{RENAME}"
        )
    return row


def _answered(key: str, messages: list[Row]) -> None:
    if all(message["role"] != "assistant" for message in messages):
        roles = sorted({message["role"] for message in messages})
        raise ValueError(f"{key}: expected at least one of role assistant, got {', '.join(roles)}")


def preference_row(row: Row) -> Row:
    """{"prompt", "chosen", "rejected"}; without a prompt, what both answers begin with is the prompt.

    `margin`, or the difference of `score_chosen` and `score_rejected`, says by how much the chosen one is better.
    """
    row = shapes.as_trl(row)
    if not {"chosen", "rejected"} <= set(row):
        raise ValueError(f"expected `chosen` and `rejected`, got {sorted(row)}{RENAME}")
    if "prompt" not in row:
        _same_kind(row, "chosen", "rejected")
        chosen, rejected = row["chosen"], row["rejected"]
        shared = next((i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r), None)
        if shared is None:  # one begins with the whole of the other, or they are one
            shared = max(0, min(len(chosen), len(rejected)) - 1)
        if shared and chosen[shared - 1] == " ":  # a space begins the answer's first token, as in TRL
            shared -= 1
        row = row | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    _same_kind(row, "prompt", "chosen", "rejected")
    if not row["prompt"] and not isinstance(row["prompt"], str):
        raise ValueError("prompt: expected at least one message, got none (chosen and rejected share none)")
    if row["chosen"] == row["rejected"]:
        raise ValueError("chosen and rejected: expected two answers, got one and the same")
    if "margin" not in row and {"score_chosen", "score_rejected"} <= set(row):
        row = row | {"margin": _number(row, "score_chosen") - _number(row, "score_rejected")}
    if row.get("margin") is not None:
        row = row | {"margin": _number(row, "margin")}
    return row


def prompt_row(row: Row) -> Row:
    """{"prompt", …}: the other fields go to the reward function."""
    row = shapes.as_trl(row)
    if "prompt" not in row:
        raise ValueError(f"expected `prompt`, got {sorted(row)}{RENAME}")
    _same_kind(row, "prompt")
    return row


def _string(row: Row, key: str) -> str:
    if key not in row:
        raise ValueError(
            f"expected an object with a string in `{key}`, got an object with {sorted(row)}{RENAME.replace('prompt', key)}"
        )
    if not isinstance(row[key], str):
        got = type(row[key]).__name__
        raise ValueError(f"expected an object with a string in `{key}`, got {key} of type {got}")
    return row[key]


def _number(row: Row, key: str) -> float:
    try:
        value = float(row[key])  # of a CSV file it is a string
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{key}: expected a finite number, got {row[key]!r:.60}")
    return value


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
