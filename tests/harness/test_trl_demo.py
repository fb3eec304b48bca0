"""`fastloss demo --trainer trl`: both sides train, and the report compares them."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fastloss.cli.train import demo


@pytest.mark.slow
def test_the_report_compares_trl_with_and_without_fastloss(tmp_path: Path) -> None:
    pytest.importorskip("trl", minversion="1.16")
    from fastloss.harness.trl_demo import STEPS, run_trl_demo

    found = run_trl_demo(str(tmp_path / "trl"), steps=1)
    assert list(found) == list(STEPS)
    text = (tmp_path / "trl" / "report.md").read_text()
    for kind, one in found.items():
        (stock,), (ours,) = one["curves"].values()
        assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-4, abs=1e-6)
        assert f"| {kind} | 1 |" in text and (tmp_path / "trl" / f"{kind}.png").stat().st_size > 5000


def test_a_reward_is_the_share_of_characters() -> None:
    pytest.importorskip("trl", minversion="1.16")
    from fastloss.harness.trl_demo import characters_right

    assert characters_right([], ["12", " 13", "7", ""], ["12", "12", 12, "12"]) == [1.0, 0.5, 0.0, 0.0]


def test_another_trainer_is_an_error() -> None:
    app = typer.Typer()
    app.command()(demo)
    result = CliRunner().invoke(app, ["--trainer", "verl"])
    assert result.exit_code == 2 and "trainer: expected trl, without --chain, got 'verl'" in result.output
