"""The text to train on: the user's files, or the English that every Python carries."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from . import rows

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
    for _, tree in modules(root):
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        texts = [text for node in nodes if len(text := ast.get_docstring(node) or "") >= SHORTEST]
        if texts:
            yield "\n\n".join(texts)


def modules(root: Path | None = None) -> Iterator[tuple[str, ast.Module]]:
    """Name and syntax tree of each module of the standard library, in the order of the paths."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), tree


def read_files(
    names: Iterable[str], *, columns: Sequence[str] = (), skip: bool = False
) -> tuple[list[str], list[str]]:
    """Documents: text files (one each) and the field ``text`` of rows; and what was skipped."""
    names = list(names)
    found, skipped = rows.read(names, rows.text_row, columns=columns, skip=skip)
    documents = [row["text"] for row in found if row["text"].strip()]
    if not documents:
        raise ValueError(f"data: no text in {', '.join(names)}")
    return documents, skipped


def split(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Training and held-back documents: every k-th one, or the end of the text where documents are few."""
    if fraction == 0:
        return texts, []
    every = max(2, round(1 / fraction))
    if len(texts) >= 2 * every:
        held_back = texts[every - 1 :: every]
        return [text for i, text in enumerate(texts) if i % every != every - 1], held_back
    whole = "\n\n".join(texts)
    cut = len(whole) - int(len(whole) * fraction)
    return [whole[:cut]], [whole[cut:]]
