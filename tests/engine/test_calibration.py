"""The table of schedules: what is written is what a head takes; a file that does not fit is not used, and says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

typer = pytest.importorskip("typer")
pytest.importorskip("rich")
from typer.testing import CliRunner  # noqa: E402

import fastloss  # noqa: E402
from fastloss.bench import calibration as bench  # noqa: E402
from fastloss.cli import _mount  # noqa: E402
from fastloss.engine import calibration  # noqa: E402
from fastloss.engine.native import cpu_backend  # noqa: E402

app = typer.Typer()
_mount(app)
pytestmark = pytest.mark.skipif(not cpu_backend().has_head, reason="no native CPU module")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    calibration.table.cache_clear()
    yield
    calibration.table.cache_clear()


def schedule(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    hidden = torch.zeros(40, 16, dtype=dtype, requires_grad=True)
    weight, target = torch.zeros(70, 16, dtype=dtype, requires_grad=True), torch.zeros(40, dtype=torch.int64)
    return fastloss.explain(fastloss.linear_cross_entropy, hidden, weight, target, backend="cpu")


@pytest.mark.parametrize("name", [calibration.BLOCKS, calibration.CHUNKS])
def test_a_file_decides(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"kind": calibration.KIND, "faster": {"float32": name}}))
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    assert schedule()["schedule"] == name
    assert calibration.table() == calibration.Table(path, {"float32": name})
    numbers = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=numbers), torch.randn(70, 16, generator=numbers)
    target = torch.randint(0, 70, (40,), generator=numbers)
    want = torch.nn.functional.cross_entropy(hidden @ weight.t(), target)
    torch.testing.assert_close(fastloss.linear_cross_entropy(hidden, weight, target, backend="cpu"), want)


def test_what_a_file_does_not_say_is_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"kind": calibration.KIND, "faster": {"bfloat16": calibration.CHUNKS}}))
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    is_slow = calibration.KIND in ("generic", *calibration.NOT_MEASURED)
    assert schedule()["schedule"] == (calibration.CHUNKS if is_slow else calibration.BLOCKS)
    assert schedule(torch.bfloat16)["schedule"] == calibration.CHUNKS
    monkeypatch.setattr(calibration, "KIND", "generic")
    assert calibration.faster(torch.float32)[0] == calibration.CHUNKS
    monkeypatch.setattr(calibration, "KIND", "neon")
    assert calibration.faster(torch.float32)[0] == calibration.CHUNKS
    assert "not been measured" in calibration.faster(torch.float32)[1]


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"kind": "another", "faster": {"float32": "chunks of rows"}}', "of the kind 'another'"),
        ('{"kind": 3}', "expected a table"),
        ("[1, 2]", "expected a table"),
        ("{", "Expecting"),
        (None, "is not there"),
    ],
)
def test_a_file_that_does_not_fit(
    content: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    found = calibration.table()
    assert found.path is None and not found.faster and reason in found.reason and str(path) in found.reason
    said = CliRunner().invoke(app, ["info"]).output
    assert "calibration: not used" in said.replace("\n", " ")


def test_the_command_writes_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.contention.Spins, "free", lambda self: True)
    path = tmp_path / "own" / "table.json"
    run = CliRunner().invoke(app, ["bench", "--calibrate", "--quick", "--repeats", "1", "--out", str(path)])
    assert run.exit_code == 0, run.output
    content = json.loads(path.read_text())
    assert content["kind"] == calibration.KIND and set(content["faster"]) >= {"float32"}
    assert all(m["blocks_ms"] > 0 and m["chunks_ms"] > 0 for m in content["measured"])
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    assert calibration.table().faster == content["faster"]
    assert schedule()["schedule"] == content["faster"]["float32"]


def test_a_machine_that_was_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.contention.Spins, "free", lambda self: False)
    path = tmp_path / "table.json"
    run = CliRunner().invoke(app, ["bench", "--calibrate", "--quick", "--repeats", "3", "--out", str(path)])
    assert run.exit_code == 1 and "nothing was written" in run.output.replace("\n", " ") and not path.exists()
    assert CliRunner().invoke(app, ["bench", "--calibrate", "--quick"]).exit_code == 2
