"""A head under FSDP2 and in a pipeline of PyTorch's own engines, and what becomes of the others when a process fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import torch

import fastloss


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engines")
    done = processes.run("engine_cases.py", 2, folder / "store", str(folder / "{rank}.json"))
    assert all(status == 0 for status, _ in done), "\n".join(text[-3000:] for _, text in done)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("weights", ["own weight, one group", "own weight, head alone", "tied, one group"])
@pytest.mark.parametrize("precision", ["float64", "mixed"])
def test_fsdp_has_the_gradients_of_one_process(
    found: list[dict[str, Any]], weights: str, precision: str
) -> None:
    if precision == "mixed" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch 2.8's FSDP2 adds up float32 gradients over gloo instead of averaging them")
    tolerance = 1e-12 if precision == "float64" else 2e-2  # bfloat16 has 8 bits
    for each in found:
        numbers = each[f"{weights}, {precision}"]
        assert numbers["loss"] <= tolerance
        assert len(numbers["gradients"]) == (3 if weights.startswith("tied") else 4)
        assert max(numbers["gradients"].values()) <= tolerance, numbers
        # Each group's weights are gathered once, and their gradients reduced once.
        groups = 2 if "head alone" in weights else 1
        assert (numbers["gathers"], numbers["scatters"]) == (groups, groups)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4])
def test_a_pipeline_has_the_loss_of_the_whole_batch(found: list[dict[str, Any]], micro_batches: int) -> None:
    if micro_batches == 1 and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch 2.8's GPipe takes no fewer microbatches than stages")
    for each in found:
        numbers = each[f"pipeline of {micro_batches}"]
        assert numbers["loss"] <= 1e-12
        assert numbers["gradients"] and max(numbers["gradients"]) <= 1e-12


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("killed", "ProcessFailed: group: process 1 of 3 ended"),
        ("raises", "process 1 of 3 ended"),
        ("bad label", "IndexError: target: Target 15 of process 1 is out of bounds"),
        ("other tokens", "process 0: 6, process 1: 5, process 2: 6"),
    ],
)
def test_no_process_waits_for_one_that_failed(tmp_path: Path, how: str, word: str) -> None:
    done = processes.run("failing_cases.py", 3, tmp_path / "store", how, timeout=600)
    for rank, (status, text) in enumerate(done):
        assert status != 0, (rank, text)
        assert "as if nothing were wrong" not in text
        if not (rank == 1 and how in ("killed", "raises")):
            assert word in text, text[-2000:]


def test_a_zero_3_parameter_that_is_not_gathered_is_refused_by_name() -> None:
    for function in (fastloss.linear_cross_entropy, fastloss.linear_token_stats):
        with pytest.raises(ValueError, match=r"linear_weight: .*ZeRO-3.*GatheredParameters"):
            function(
                torch.zeros(2, 8),
                torch.zeros(0, requires_grad=True),
                torch.zeros(2, dtype=torch.int64),
            )
