"""The shapes in which people keep supervised data, as TRL's dataset formats: ShareGPT, Alpaca, parts of text, tool calls."""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]

CONVERSATIONS = ("prompt", "completion", "chosen", "rejected", "messages")
# of the data's own names for who speaks; other roles are the chat template's to know
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "function_response": "tool", "observation": "tool",
}  # fmt: skip


def as_trl(row: Row) -> Row:
    """The row in TRL's formats, as far as its shape is known; what is no such shape is left to the checks.

    ShareGPT: `conversations` of `from` and `value`, roles human and gpt, `system` beside them. Alpaca: `instruction`,
    `input`, `output`. Contents that are lists of texts, or null beside `tool_calls`. `tools` as JSON. A prompt that is a
    string beside answers that are messages.
    """
    row = dict(row)
    if "conversations" in row and "messages" not in row:
        row["messages"] = row.pop("conversations")
    for key in CONVERSATIONS:
        if isinstance(row.get(key), list):
            row[key] = [_message(message, key) for message in row[key]]
    if not {"prompt", "messages"} & set(row) and {"instruction", "output"} <= set(row):
        _from_alpaca(row)
    _one_kind(row)
    key = "messages" if "messages" in row else "prompt"
    if isinstance(row.get("system"), str) and row["system"] and isinstance(row.get(key), list):
        if all(m.get("role") != "system" for m in row[key] if isinstance(m, dict)):
            row[key] = [{"role": "system", "content": row["system"]}, *row[key]]
    if "tools" in row:
        row["tools"] = _tools(row["tools"])
    return row


def _message(message: Any, key: str) -> Any:
    """Of `from` and `value` too; its content one string."""
    if not isinstance(message, dict):
        return message
    names = {"from": "role", "value": "content"} if {"from", "value"} & set(message) else {}
    message = {names.get(name, name): value for name, value in message.items()}
    if isinstance(message.get("role"), str):
        message["role"] = ROLES.get(message["role"], message["role"])
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = "".join(_part(part, key) for part in content)
    calls = message.get("tool_calls")
    if calls:
        if content is None:
            message["content"] = ""
        if isinstance(calls, list):
            message["tool_calls"] = [_call(call) for call in calls]
    elif calls is not None or "tool_calls" in message:
        del message["tool_calls"]  # null, or none: many templates only ask whether the name is there
    return message


def _part(part: Any, key: str) -> str:
    """Of OpenAI's content parts the texts."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    got = part.get("type", sorted(part)) if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"{key}: expected a content of text parts, got a part of type {got}")


def _call(call: Any) -> Any:
    """Chat templates write a call's arguments as JSON; OpenAI's data has them as JSON already."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"])}
    if isinstance(call, dict) and isinstance(call.get("arguments"), str):
        try:
            return call | {"arguments": json.loads(call["arguments"])}
        except ValueError:
            return call
    return call


def _from_alpaca(row: Row) -> None:
    asked, more, answer = row["instruction"], row.get("input") or "", row["output"]
    if not all(isinstance(text, str) for text in (asked, more, answer)):
        raise ValueError("expected strings in `instruction`, `input` and `output`")
    asked = f"{asked}\n\n{more}" if more.strip() else asked
    row["prompt"] = [{"role": "user", "content": asked}]
    row["completion"] = [{"role": "assistant", "content": answer}]


def _one_kind(row: Row) -> None:
    """Where some of prompt, completion, chosen and rejected are messages, strings become messages too."""
    keys = [key for key in ("prompt", "completion", "chosen", "rejected") if key in row]
    if not any(isinstance(row[key], list) for key in keys):
        return
    for key in keys:
        if isinstance(row[key], str):
            role = "user" if key == "prompt" else "assistant"
            row[key] = [{"role": role, "content": row[key]}] if row[key] or key != "prompt" else []
    asked, answers = row.get("prompt"), [key for key in keys if key != "prompt"]
    if asked and answers and all(isinstance(row[k], list) and row[k][: len(asked)] == asked for k in answers):
        for key in answers:  # as in UltraFeedback: each answer begins with the prompt
            row[key] = row[key][len(asked) :]


def _tools(tools: Any) -> list[Any]:
    """What the chat template takes: JSON schemas."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except ValueError as error:
            raise ValueError(
                f"tools: expected a list of JSON schemas, got what is not JSON: {error}"
            ) from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools: expected a list of JSON schemas, got {tools!r:.60}")
    return tools


def check_text(value: Any, key: str = "row") -> None:
    """No string in a row holds a lone surrogate, as JSON's \\ud83d without its other half is: no tokenizer can take that."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise ValueError(
                f"{key}: expected Unicode text, got half of a character, {half!r}, at position {error.start}"
            ) from None
    elif isinstance(value, dict):
        for name, item in value.items():
            check_text(name, key)
            check_text(item, str(name))
    elif isinstance(value, list):
        for item in value:
            check_text(item, key)
