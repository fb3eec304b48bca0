"""Supervision that Python itself carries: what its functions do, and arithmetic whose answers it checks."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from .corpus import modules
from .rows import Row

SHORTEST, LONGEST = 20, 100  # characters of a description


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


def preferences(seed: int = 0) -> list[Row]:
    """{"prompt", "chosen", "rejected"}: a function's own description, and another function's.

    Of functions whose description takes up a word of their name, against one that takes up none: what a small model
    can learn to see in minutes.
    """
    shuffled = random.Random(seed)
    known = [f for f in functions() if words(f.name) & words(f.description)]
    rows = []
    for f in known:
        other = f
        while words(f.name) & words(other.description):
            other = shuffled.choice(known)
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


def split(rows: list[Row], fraction: float, most: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Training and held-back rows, drawn by ``seed`` alone, so that every stage holds back the same ones."""
    count = min(round(len(rows) * fraction), most) if fraction else 0
    if fraction and len(rows) > 1:
        count = min(max(1, count), len(rows) - 1)
    held_back = set(random.Random(seed).sample(range(len(rows)), count))
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
