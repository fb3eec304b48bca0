"""TRL's own tests of its trainers, twice: as it is, and with ``fastloss.integrations.trl.apply()``.

    python -m integrations.trl_suite.run CHECKOUT [--tests sft dpo …] [--out build/trl_suite] [--record rows.jsonl]

CHECKOUT is TRL's repository at the installed version, or near it. The tests download tiny models; here stand-ins take their place
(stand_ins.py), so a test of a model that has none fails in both runs and counts in neither. The run is right if every
test that passes as it is passes with fastloss.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import trl

from integrations.table import suites
from integrations.trl_suite import stand_ins

TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo", "reward")
TESTS = Path(__file__).resolve().parents[2]


def one_run(folder: Path, files: list[str], fastloss: bool, workers: int) -> dict[str, dict]:
    """Outcome of every test, by its name. ``folder`` holds tests/ and the stand-ins."""
    out = folder / ("fastloss.jsonl" if fastloss else "stock.jsonl")
    out.unlink(missing_ok=True)
    here = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part for part in here if part),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TRL_SUITE_HOME": str(folder),
        "TRL_SUITE_OUT": str(out),
        "TRL_SUITE_FASTLOSS": "1" if fastloss else "0",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "integrations.trl_suite.plugin",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-n", str(workers)] if workers > 1 else []
    with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
        subprocess.run([*command, *files], cwd=folder, env=environment, stdout=log, stderr=log, check=False)
    if not out.exists():
        raise SystemExit(f"no test ran: {out.with_suffix('.log')}")
    found: dict[str, dict] = {}
    for line in out.read_text(encoding="utf-8").splitlines():
        report = json.loads(line)
        if found.get(report["test"], {}).get("outcome") != "failed":  # a failure in the teardown counts too
            found[report["test"]] = report
    return found


def compare(stock: dict[str, dict], ours: dict[str, dict], tests_of: str) -> tuple[list[dict], list[dict]]:
    """Counts per file, and what passes as it is and not with fastloss."""
    rows, worse = [], []
    for file in sorted({name.split("::")[0] for name in stock}):
        names = [name for name in stock if name.startswith(file + "::")]
        passed = [name for name in names if stock[name]["outcome"] == "passed"]
        lost = [name for name in passed if ours.get(name, {}).get("outcome") != "passed"]
        worse += [ours.get(name, {"test": name, "outcome": "not run", "why": ""}) for name in lost]
        outcomes = Counter(stock[name]["outcome"] for name in names)
        rows.append(
            {
                "suite": Path(file).name,
                "version": trl.__version__,
                "tests of": tests_of,
                "run": len(names),
                "passed": len(passed),
                "passed with fastloss": len(passed) - len(lost),
                "failed": outcomes["failed"],
                "skipped": outcomes["skipped"],
            }
        )
    return rows, worse


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--tests", nargs="+", default=TRAINERS, choices=TRAINERS)
    parser.add_argument("--out", type=Path, default=Path("build/trl_suite"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", help="pytest's -k")
    parser.add_argument(
        "--record", type=Path, help="file of rows of the compatibility table (integrations/table.py)"
    )
    given = parser.parse_args()
    folder = given.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Without TRL's package beside them, the tests import the installed one.
    shutil.copytree(given.checkout / "tests", folder / "tests")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n    low_priority\n")

    stand_ins.build(given.checkout.resolve(), folder)
    files = [f"tests/test_{name}_trainer.py" for name in given.tests] + (
        ["-k", given.only] if given.only else []
    )
    stock = one_run(folder, files, fastloss=False, workers=given.workers)
    ours = one_run(folder, files, fastloss=True, workers=given.workers)
    rows, worse = compare(stock, ours, (given.checkout / "VERSION").read_text(encoding="utf-8").strip())
    print(suites(rows))
    if given.record is not None:
        with given.record.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    for report in worse:
        print(f"{report['test']}: {report['outcome']}: {report['why']}")
    return 1 if worse or not any(r["outcome"] == "passed" for r in stock.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
