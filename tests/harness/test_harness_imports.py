"""The harness's own files import each other in one direction."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fastloss.harness

FOLDER = Path(fastloss.harness.__file__).parent


def imported(path: Path, names: set[str]) -> set[str]:
    """Of the folder's files, also where a type alone is meant or the import stands in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastloss.harness"):
            rest = str(node.module).removeprefix("fastloss.harness").lstrip(".")
            found |= {rest} if rest else {alias.name for alias in node.names}
    return found & names


def test_no_circle_of_imports() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    graph = {name: imported(FOLDER / f"{name}.py", names) for name in names}
    assert graph["run"] >= {"stage", "cost"} and "stage" in graph["cost"]
    order = list(TopologicalSorter(graph).static_order())  # a CycleError names the circle
    assert len(order) == len(names)
