"""What the runner of TRL's own tests makes of two runs; the runs themselves with TRL_CHECKOUT alone."""

import os
from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

from integrations.trl_suite import run


def report(name, outcome):
    return {"test": name, "outcome": outcome, "why": "" if outcome == "passed" else "why"}


def test_a_test_that_passes_as_it_is_and_not_with_fastloss_is_named():
    outcomes = {"a::1": ("passed", "passed"), "a::2": ("passed", "failed"), "a::3": ("failed", "failed"), "b::1": ("passed", None),
                "b::2": ("skipped", "skipped"), "b::3": ("failed", "passed")}  # fmt: skip
    stock = {name: report(name, first) for name, (first, _) in outcomes.items()}
    ours = {name: report(name, second) for name, (_, second) in outcomes.items() if second is not None}
    rows, worse = run.compare(stock, ours, "1.2")
    assert [
        (r["suite"], r["run"], r["passed"], r["passed with fastloss"], r["failed"], r["skipped"])
        for r in rows
    ] == [
        ("a", 3, 2, 1, 1, 0),
        ("b", 3, 1, 0, 1, 1),
    ]
    assert [r["test"] for r in worse] == ["a::2", "b::1"]
    assert "| a | 1.2 |" in run.suites(rows)


@pytest.mark.skipif(os.environ.get("FASTLOSS_TEST_SLOW") != "1", reason="FASTLOSS_TEST_SLOW=1 runs it")
def test_dpo_passes_where_it_passes_as_it_is(tmp_path, monkeypatch):
    checkout = os.environ.get("TRL_CHECKOUT")
    if not checkout:
        pytest.skip("TRL_CHECKOUT names no copy of TRL's repository")
    arguments = [
        "run",
        str(Path(checkout)),
        "--tests",
        "dpo",
        "--only",
        "test_train",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert run.main() == 0
