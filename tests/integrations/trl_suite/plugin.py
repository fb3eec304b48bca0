"""pytest plugin of the runs: data sets from this machine, fastloss applied or not, one line per test into a file.

TRL_SUITE_HOME: the stand-ins. TRL_SUITE_FASTLOSS=1: ``fastloss.integrations.trl.apply()`` for the whole process.
TRL_SUITE_OUT: where {"test", "outcome", "why", "seconds"} goes, line by line.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets

from integrations.trl_suite import stand_ins

LONGEST = 200  # characters of a failure's last line


def fill_in(tests: ast.Module) -> None:
    """A checkout that is not exactly the package's version imports names that the package does not have: the tests that call one of
    them fail, and not their whole file."""
    for node in tests.body:
        if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("trl"):
            continue
        try:
            module = importlib.import_module(str(node.module))
        except ImportError:
            continue
        for name in (alias.name for alias in node.names):
            if not hasattr(module, name):
                setattr(module, name, absent(str(node.module), name))


def absent(module: str, name: str) -> Any:
    package = re.fullmatch(r"is_(\w+)_available", name)
    if package:
        there = importlib.util.find_spec(package[1]) is not None
        return lambda: there

    def missing(*args: Any, **how: Any) -> Any:
        raise AttributeError(f"{module} has no {name}: the checkout is of another version")

    return missing


def pytest_configure(config: Any) -> None:
    home = Path(os.environ["TRL_SUITE_HOME"])
    datasets.load_dataset = stand_ins.load_dataset(home)
    for path in (Path(str(config.rootpath)) / "tests").glob("*.py"):
        fill_in(ast.parse(path.read_text(encoding="utf-8")))
    if os.environ.get("TRL_SUITE_FASTLOSS") == "1":
        from fastloss.integrations.trl import apply

        apply()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    why = ""
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        why = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:LONGEST]
    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "why": why,
        "seconds": round(report.duration, 2),
    }
    with open(os.environ["TRL_SUITE_OUT"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
