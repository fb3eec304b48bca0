"""The matrix as a table for the terminal, Markdown or JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence

import torch

from fastloss.conformance.check import Check, Result
from fastloss.conformance.providers import Provider

MARK = {"pass": "pass", "fail": "FAIL", "error": "ERROR", "refused": "no", "not supported": "–"}


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> str:
    return f"{processor()}, Python {platform.python_version()}, torch {torch.__version__}"


def cells(
    checks: Sequence[Check], providers: Sequence[Provider], results: Sequence[Result]
) -> list[list[str]]:
    found = {(result.check, result.provider): MARK[result.state] for result in results}
    return [[check.name, *(found[check.name, p.name] for p in providers)] for check in checks]


def counts(providers: Sequence[Provider], results: Sequence[Result]) -> list[list[str]]:
    rows = []
    for p in providers:
        states = [result.state for result in results if result.provider == p.name]
        rows.append([p.name, p.version, *(str(states.count(state)) for state in MARK)])
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(
    checks: Sequence[Check],
    providers: Sequence[Provider],
    results: Sequence[Result],
    missing: dict[str, str],
) -> str:
    parts = [
        machine(),
        _table(["provider", "version", *MARK], counts(providers, results)),
        _table(["check", *(p.name for p in providers)], cells(checks, providers, results)),
    ]
    if missing:
        parts.append("Not run here: " + "; ".join(f"{name} ({why})" for name, why in missing.items()) + ".")
    failed = [[r.provider, r.check, r.detail] for r in results if r.state == "fail"]
    if failed:
        parts.append(_table(["provider", "check", "number and right number"], failed))
    for state, heading in (("error", "ended in an error"), ("refused", "refused")):
        found = [[r.provider, r.check, r.detail] for r in results if r.state == state]
        if found:
            parts.append(_table(["provider", heading, "with"], found))
    return "\n\n".join(parts) + "\n"


def sources(checks: Sequence[Check]) -> str:
    """Every check with what it is about, its tolerance and where its right value comes from."""
    rows = [[c.name, c.bug, c.source, f"{c.tolerance.units:g} × eps: {c.tolerance.reason}"] for c in checks]
    return _table(["check", "how a loss goes wrong", "the right value", "tolerance"], rows) + "\n"


def as_json(providers: Sequence[Provider], results: Sequence[Result], missing: dict[str, str]) -> str:
    return json.dumps(
        {
            "machine": machine(),
            "providers": {p.name: p.version for p in providers},
            "not run": missing,
            "results": [vars(result) for result in results],
        },
        indent=1,
    )
