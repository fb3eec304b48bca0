"""Reward functions in TRL's convention: ``f(prompts, completions, **columns) -> list[float]``."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .rows import Row

Reward = Callable[..., Sequence[float | None]]


class Weighted:
    """A reward function times a number."""

    def __init__(self, function: Reward, weight: float) -> None:
        self.function, self.weight = function, weight
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, **columns: Any) -> list[float | None]:
        return [None if value is None else self.weight * value for value in self.function(**columns)]


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


def _load(path: str) -> Reward:
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
    totals = [math.nan] * len(rows)
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        if function is exact_answer and "answer" not in columns:
            raise ValueError("reward: expected --reward, or rows with an `answer`, got neither")
        values = list(
            function(
                prompts=[row["prompt"] for row in rows], completions=completions, completion_ids=list(ids), **columns
            )
        )  # fmt: skip
        if len(values) != len(rows):
            raise ValueError(f"reward: expected {len(rows)} values from {name}, got {len(values)}")
        for i, value in enumerate(values):
            if value is None:
                continue
            if not math.isfinite(float(value)):
                raise ValueError(f"reward: expected finite values from {name}, got {value} for {texts[i]!r}")
            totals[i] = float(value) + (0.0 if math.isnan(totals[i]) else totals[i])
    return totals
