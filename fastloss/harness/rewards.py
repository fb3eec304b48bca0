"""Reward functions in TRL's convention: ``f(prompts, completions, **columns) -> list[float]``."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .rows import Row

Function = Callable[..., Sequence[float | None]]


class Weighted(NamedTuple):
    """A reward function, and the number that its rewards are multiplied by."""

    function: Function
    weight: float


Reward = Function | Weighted


def exact_answer(
    prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any
) -> list[float]:
    """1 where the completion is the row's ``answer``, else 0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text.strip() == str(right).strip()) for text, right in zip(texts, answer, strict=True)]


def load(paths: Sequence[str]) -> list[Reward]:
    """Functions by import path, "package.module:function" or "…=weight"; the working directory is looked in too."""
    return [_weighted(path) for path in paths] or [exact_answer]


def _weighted(option: str) -> Reward:
    path, equals, weight = option.partition("=")
    try:
        number = float(weight) if equals else 1.0
    except ValueError:
        raise ValueError(f"reward: expected a number as the weight of {path}, got {weight!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"reward: expected a finite weight of {path}, got {weight}")
    return Weighted(_load(path), number) if equals else _load(path)


def _load(path: str) -> Function:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"reward: expected package.module:function, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward: cannot load {path!r}: {error}") from None
    if not callable(function):
        raise ValueError(f"reward: expected a function, got {path!r} of type {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def score(
    functions: Sequence[Reward], rows: Sequence[Row], texts: Sequence[str], ids: Sequence[list[int]]
) -> list[float]:
    """The sum of the functions' rewards of each completion, as in TRL.

    None, for "not applicable", is left out of the sum; NaN is the reward of a completion for which every function gave None.
    Rows of messages have completions of messages. Every other field of the rows is a keyword, a list of its values.
    """
    chat = [isinstance(row["prompt"], list) for row in rows]
    completions = [
        [{"role": "assistant", "content": text}] if is_chat else text
        for text, is_chat in zip(texts, chat, strict=True)
    ]
    names = sorted({key for row in rows for key in row} - {"prompt", "completion"})
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    arguments = {
        "prompts": [row["prompt"] for row in rows], "completions": completions, "completion_ids": list(ids), **columns
    }  # fmt: skip
    totals = [math.nan] * len(rows)
    for reward in functions:
        function, weight = reward if isinstance(reward, Weighted) else (reward, 1.0)
        if function is exact_answer and "answer" not in columns:
            raise ValueError("reward: expected --reward, or rows with an `answer`, got neither")
        for i, value in enumerate(_values(function, arguments, texts)):
            if value is not None:
                totals[i] = weight * value + (0.0 if math.isnan(totals[i]) else totals[i])
    return totals


def _values(function: Function, arguments: dict[str, Any], texts: Sequence[str]) -> list[float | None]:
    """What a function gives for each sample; where it gives something else, one line that says what and for which."""
    name, count = getattr(function, "__name__", type(function).__name__), len(texts)
    wanted = f"reward: expected {name} to return a list of {count} numbers (or None)"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # one of C has none
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ValueError(
                f"reward: expected {name} to take prompts, completions, **columns, got {name}{signature}: {error} "
                f"(the columns are {', '.join(sorted(arguments))})"
            ) from None
    try:
        values = function(**arguments)
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(
            f"{wanted}; it raised {what} for {_culprit(function, arguments, texts)}; --debug shows where"
        ) from error
    if inspect.isawaitable(values):
        if inspect.iscoroutine(values):
            values.close()
        raise ValueError(f"{wanted}, got a coroutine: an `async def` is not awaited here")
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise ValueError(f"{wanted}, got {type(values).__name__}")
    try:
        values = list(values)
    except TypeError:  # a tensor or an array of no dimension
        raise ValueError(f"{wanted}, got a single number, {values!r:.60}") from None
    if len(values) != count:
        raise ValueError(f"reward: expected {count} values from {name}, got {len(values)}")
    return [None if v is None else _finite(v, name, text) for v, text in zip(values, texts, strict=True)]


def _finite(value: Any, name: str, text: str) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        got = value if isinstance(value, int | float) else f"{value!r:.60} of type {type(value).__name__}"
        raise ValueError(f"reward: expected finite values from {name}, got {got} for {text!r:.200}")
    return number


def _culprit(function: Function, arguments: dict[str, Any], texts: Sequence[str]) -> str:
    """The first sample for which the function raises by itself too."""
    for i, text in enumerate(texts):
        try:
            function(**{name: values[i : i + 1] for name, values in arguments.items()})
        except Exception:
            return f"sample {i}, {text!r:.200}"
    return f"all {len(texts)} samples together, for none alone"
