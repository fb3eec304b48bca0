"""The text to train on: the user's files, or the English that every Python carries."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
SHORTEST = 40  # characters; shorter docstrings are labels, not prose


def python_corpus() -> list[str]:
    """The language reference as pydoc keeps it, then the docstrings of each module of the standard library.

    The order is that of topic names and file paths, so one Python always gives one corpus.
    """
    return [*_topics(), *_docstrings(Path(sysconfig.get_paths()["stdlib"]))]


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics):
        yield topics[name].strip()


def _docstrings(root: Path) -> Iterator[str]:
    """One document per module: its docstrings in the order of the source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        texts = [text for node in nodes if len(text := ast.get_docstring(node) or "") >= SHORTEST]
        if texts:
            yield "\n\n".join(texts)


def read_files(paths: Iterable[str]) -> list[str]:
    """Documents of text files (one each) and of JSONL files (one per row, field ``text``)."""
    documents: list[str] = []
    for name in paths:
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"data: cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} "
                f"at position {error.start}"
            ) from None
        documents += _rows(path, text) if path.suffix in (".jsonl", ".ndjson") else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"data: no text in {', '.join(map(str, paths))}")
    return documents


def _rows(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            got = f"an object with {sorted(row)}" if isinstance(row, dict) else type(row).__name__
            if isinstance(row, dict) and "text" in row:
                got = f"text of type {type(row['text']).__name__}"
            raise ValueError(f"{path}:{number}: expected an object with a string in `text`, got {got}")
        yield row["text"]


def documents(data: tuple[str, ...]) -> list[str]:
    return read_files(data) if data else python_corpus()


def split(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Training and held-back documents: every k-th one, or the end of the text where documents are few."""
    if fraction == 0:
        return texts, []
    if not fraction < 1:
        raise ValueError(f"val_fraction: expected less than 1, got {fraction}")
    every = max(2, round(1 / fraction))
    if len(texts) >= 2 * every:
        held_back = texts[every - 1 :: every]
        return [text for i, text in enumerate(texts) if i % every != every - 1], held_back
    whole = "\n\n".join(texts)
    cut = len(whole) - int(len(whole) * fraction)
    return [whole[:cut]], [whole[cut:]]
