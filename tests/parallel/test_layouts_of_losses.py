"""Every loss under tensor parallelism, with sequence parallelism, FSDP2, both, and sequences that are cut: tests/parallel/layout_cases.py."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_loss_of_every_layout_is_that_of_one_process(tmp_path: Path, world: int) -> None:
    done = processes.run("layout_cases.py", world, tmp_path / "store", str(tmp_path / "{rank}.json"))
    assert all(status == 0 for status, _ in done), "\n".join(text[-3000:] for _, text in done)
    for rank in range(world):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        # 11 losses, even and uneven; a mesh of two dimensions takes 4 processes.
        assert len(found) == 22 * (4 if world == 2 else 5)
        wrong = {case: off for case, off in found.items() if not all(x <= 1e-12 for x in off.values())}
        assert not wrong, (rank, wrong)
