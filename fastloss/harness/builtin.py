"""Supervision that Python itself carries: what its functions do, and arithmetic whose answers it checks."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

from .corpus import modules
from .rows import Row

T = TypeVar("T")

SHORTEST, LONGEST = 20, 100  # characters of a description
NEGATIVES = 4  # pairs of a description with another's


class Function(NamedTuple):
    name: str  # json.loads, or json.JSONDecoder.decode
    description: str  # the docstring's first sentence


@cache
def functions() -> tuple[Function, ...]:
    """The documented functions of the standard library, in the order of the files."""
    found = []
    for module, tree in modules():
        for name, node in _definitions(tree, module):
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            sentence = paragraph.split(". ")[0].rstrip(".") + "."
            if SHORTEST <= len(sentence) <= LONGEST:
                found.append(Function(name, sentence))
    return tuple(found)


def _definitions(tree: ast.AST, scope: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{scope}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{scope}.{node.name}")


def descriptions() -> list[Row]:
    """{"prompt", "completion", "task"}: a function's name, and what it does."""
    return [
        {"prompt": [_question(f)], "completion": [_answer(f.description)], "task": "describe"}
        for f in functions()
    ]


def preferences(fraction: float, most: int) -> tuple[list[Row], list[Row]]:
    """{"prompt", "chosen", "rejected"}: a function's own description, and another function's. Training, held back.

    Of functions whose description takes up a word of their name, against one that takes up none: what a small model
    can learn to see in minutes. A description is as often the right answer as the wrong one, and never on both sides of
    the split: what is learned of it alone helps nowhere, and cannot be mistaken for the preference.
    """
    train, held_back = split(functions(), fraction, most)
    return _contrasts(train, NEGATIVES), _contrasts(held_back, 1)


def _contrasts(known: Sequence[Function], negatives: int) -> list[Row]:
    known = [f for f in known if words(f.name) & words(f.description)]
    shuffled = random.Random(0)
    rows = []
    for _ in range(negatives):
        others = shuffled.sample(known, len(known))
        for f, other in zip(known, others, strict=True):
            if not words(f.name) & words(other.description):
                rows.append(
                    {"prompt": [_question(f)], "chosen": [_answer(f.description)],
                     "rejected": [_answer(other.description)]}
                )  # fmt: skip
    return rows


def arithmetic(numbers: int) -> list[Row]:
    """{"prompt", "completion", "answer", "task"}: a+b and a-b for all operands below ``numbers``."""
    rows = []
    for a in range(numbers):
        for b in range(numbers):
            for sign, value in (("+", a + b), ("-", a - b)):
                rows.append(
                    {"prompt": [{"role": "user", "content": f"{a}{sign}{b}="}],
                     "completion": [_answer(str(value))], "answer": str(value), "task": "arithmetic"}
                )  # fmt: skip
    return rows


def demonstrations(rows: Sequence[Row], repeat: int, wrong: float) -> list[Row]:
    """Arithmetic rows ``repeat`` times; a share ``wrong`` of the answers is another number, drawn anew each time.

    As in text that people write. Imitation learns the mistakes too; a reward that checks the answer unlearns them.
    """
    drawn = random.Random(0)
    numbers = [int(row["answer"]) for row in rows]
    low, high = min(numbers), max(numbers)
    shown = []
    for _ in range(repeat):
        for row in rows:
            slip = drawn.random() < wrong
            answer = str(drawn.randint(low, high)) if slip else row["answer"]
            shown.append(row | {"completion": [_answer(answer)]})
    return shown


def split(rows: Sequence[T], fraction: float, most: int) -> tuple[list[T], list[T]]:
    """Training and held-back rows: always the same ones, and of a smaller share a part of the larger's."""
    count = min(round(len(rows) * fraction), most) if fraction else 0
    if fraction and len(rows) > 1:
        count = min(max(1, count), len(rows) - 1)
    held_back = set(random.Random(0).sample(range(len(rows)), len(rows))[:count])
    return [row for i, row in enumerate(rows) if i not in held_back], [rows[i] for i in sorted(held_back)]


def words(text: str) -> set[str]:
    """Of four letters and more, with camelCase and snake_case taken apart."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]{3,}|[A-Z]{4,}", text) if len(word) > 3}


def _question(f: Function) -> dict[str, str]:
    # the name once more as words with spaces before them: the tokens that the answer would use
    spelled = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", f.name)).lower()
    return {"role": "user", "content": f"What does `{f.name}` do ({spelled})?"}


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
