"""No circles of imports: in the package by import-linter's contracts (pyproject.toml), between the scripts of tools/ too."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_package_keeps_its_import_contracts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cli = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)
    status = cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_the_scripts_of_tools_import_each_other_without_a_circle() -> None:
    folder = ROOT / "tools"
    names = {path.stem for path in folder.glob("*.py")}
    graph = {}
    for path in folder.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))  # functions' own imports too
        plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        graph[path.stem] = names & (plain | {n.module for n in nodes if isinstance(n, ast.ImportFrom)})
    assert graph["kernel_report_triton"] >= {"kernel_report_compile", "kernel_report_pointwise"}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle
