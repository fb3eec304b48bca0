"""A machine's results: one JSON file of what was measured, from which tables and picture are made.

A line per provider; no single calls, and nothing that follows from the rest (bench/ratios.py).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from fastloss.bench.machine import machine
from fastloss.bench.ratios import add_ratios

Results = dict[str, Any]

NAME = "results.json"
OF_A_RUN = ("date", "commit", "fastloss", "python", "versions", "os", "load")
OF_A_CASE = (
    "name",
    "only",
    "run",
    "kind",
    "shape",
    "dtype",
    "logits_bytes",
    "calls",
    "gradient_scale",
    "load",
    "slowdown",
)
OF_A_PROVIDER = (
    "name",
    "reason",
    "median",
    "min",
    "iqr",
    "n",
    "contended",
    "extra_bytes",
    "resident_bytes",
    "errors",
)
DIGITS = 4  # of a number that was measured


def begin(device: str, quick: bool) -> Results:
    """Of a run that has measured nothing yet."""
    info = machine(device)
    run = {key: info.pop(key) for key in OF_A_RUN}
    return {"machine": info, "quick": quick, "runs": [run], "cases": []}


def merge(old: Results, new: Results) -> Results:
    """``old`` with the cases of ``new`` in place of its own: a case is replaced whole, for its ratios are of one run, and
    one that was measured with some providers alone (``only``) replaces one with the same."""
    replaced = {_key(case) for case in new["cases"]}
    kept = [case for case in old["cases"] if _key(case) not in replaced]
    used = sorted({case["run"] for case in kept})
    runs = [old["runs"][index] for index in used]
    cases = [{**case, "run": used.index(case["run"])} for case in kept]
    cases += [{**case, "run": case["run"] + len(runs)} for case in new["cases"]]
    return {
        "machine": new["machine"],
        "quick": new["quick"],
        "runs": [*runs, *new["runs"]],
        "cases": sorted(cases, key=lambda case: (case["kind"], not case["calls"] > 1)),
    }


def _key(case: dict[str, Any]) -> tuple[str, str]:
    return case["name"], case.get("only", "*")


def load(path: Path) -> Results:
    """``path`` is the JSON file or its folder.

    Raises:
        ValueError: a file that is not of this form.
    """
    path = path / NAME if path.is_dir() else path
    try:
        results = json.loads(path.read_text())
        for case in results["cases"]:
            results["runs"][case["run"]]
            add_ratios(case)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: expected results of `fastloss bench`, got {error!r}") from error
    return results


def write(results: Results, folder: Path) -> None:
    """The file is whole at any time: a run that is ended in the middle loses nothing of what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (NAME + ".part")
    part.write_text(dumps(results))
    os.replace(part, folder / NAME)


def dumps(results: Results) -> str:
    runs = ",\n".join(_line(run) for run in results["runs"])
    cases = ",\n".join(_case(case) for case in results["cases"])
    return (
        f'{{"machine": {_line(results["machine"])},\n"quick": {_line(results["quick"])},\n'
        f'"runs": [\n{runs}\n],\n"cases": [\n{cases}\n]}}\n'
    )


def _case(case: dict[str, Any]) -> str:
    head = _line({key: case[key] for key in OF_A_CASE if key in case})
    providers = ",\n  ".join(
        _line({key: p[key] for key in OF_A_PROVIDER if key in p}) for p in case["providers"]
    )
    return f'{head[:-1]}, "providers": [\n  {providers}\n]}}'


def _line(value: Any) -> str:
    return json.dumps(_rounded(value))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value
