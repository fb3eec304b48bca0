"""Vocabularies and sequences that are cut over 2 and 4 processes (gloo) against whole ones in float64: tests/parallel/shard_cases.py."""

from __future__ import annotations

import json
from typing import Any

import processes
import pytest

# Roundings of the dtype along a sum of 16 products and of 97 classes; bfloat16's results are rounded to 8 bits.
TOLERANCE = {"float64": 1e-12, "float32": 4e-6, "bfloat16": 2e-2}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process wrote."""
    world, folder = request.param, tmp_path_factory.mktemp("shards")
    done = processes.run("shard_cases.py", world, folder / "store", str(folder / "{rank}.json"))
    assert all(status == 0 for status, _ in done), "\n".join(text[-3000:] for _, text in done)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def test_every_loss_of_a_cut_vocabulary_is_that_of_the_whole(found: list[dict[str, Any]]) -> None:
    wrong = []
    for rank, each in enumerate(found):
        for name, numbers in each["cases"].items():
            worst = max(value for key, value in numbers.items() if key != "bits")
            if not worst <= TOLERANCE[name.split(", ")[1]]:
                wrong.append((rank, name, numbers))
    assert len(found[0]["cases"]) > 80
    assert not wrong


def test_every_process_has_the_same_bits(found: list[dict[str, Any]]) -> None:
    for name, numbers in found[0]["cases"].items():
        assert all(each["cases"][name]["bits"] == numbers["bits"] for each in found), name


def test_targets_cross_the_border_of_a_shard_of_sequences(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert len(each["sequences"]) == 6
        for name, numbers in each["sequences"].items():
            assert numbers["same targets"], name
            assert numbers["tokens"][0] == numbers["tokens"][1], name
            assert all(numbers[key] <= 1e-12 for key in ("loss", "gradient", "DPO", "DPO gradient")), (
                name,
                numbers,
            )


def test_dtensors_are_taken_and_given_back(found: list[dict[str, Any]]) -> None:
    for each in found:
        for name in ("replicated", "tokens", "whole"):
            numbers = each["dtensors"][name]
            assert numbers["kinds"] == [True, True, True], name
            assert max(numbers["loss"], numbers["hidden"], numbers["weight"]) <= 1e-12, (name, numbers)
        assert each["dtensors"]["statistics"] <= 1e-12
        assert each["dtensors"]["LoRA"] <= 1e-12
        assert each["dtensors"]["torch's loss_parallel"] <= 1e-12


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("weight by columns", "ValueError: linear_weight: expected placements Shard(0)"),
        ("group beside it", "ValueError: group: expected None beside"),
        ("LoRA over tokens", "ValueError: lora: expected None beside an input that is sharded"),
        ("LoRA cut otherwise", "ValueError: lora's B: expected the placements of linear_weight"),
        ("tokens without a cut", "ValueError: input: expected Replicate()"),
        ("no group", "TypeError: group: expected a ProcessGroup"),
        ("places", "NotImplementedError: group:"),
        ("a teacher cut elsewhere", "ShapeError: group: expected the teacher's vocabulary cut at"),
        ("again", "NotImplementedError: group:"),
        ("target of no shard", "IndexError: target: Target 1000000 of process 0 is out of bounds"),
        ("target of one process", "IndexError: target: Target -1 of process 0 is out of bounds"),
        (
            "tokens of one process",
            "ShapeError: group: expected the same tokens on every process, got process 0: 24, process 1: 23",
        ),
        ("dtype of one process", "ShapeError: group: expected the same dtype"),
    ],
)
def test_what_cannot_be_is_refused_by_name(found: list[dict[str, Any]], name: str, word: str) -> None:
    for each in found:
        assert each["dtensors"][name].startswith(word), each["dtensors"][name]


def test_explain_tells_the_bytes_that_are_sent(found: list[dict[str, Any]]) -> None:
    for each in found:
        counted, told = each["bytes"]["counted"], each["bytes"]["told"]
        assert sum(told["vocabulary_shards"]) == 97
        assert told["gathered_bytes"] == counted["gathered"]
        assert told["reduced_bytes"] == counted["reduced"]
        plan = each["bytes"]["plan"]
        assert plan["counted"] == plan["told"]
        assert plan["planned"] == pytest.approx(plan["counted"])


def test_every_function_tells_the_bytes_of_its_messages(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert len(each["messages"]) == 14
        for name, numbers in each["messages"].items():
            assert numbers["told"] == numbers["counted"], (name, numbers)
            assert sum(numbers["told"]) > 0


def test_every_function_takes_dtensors(found: list[dict[str, Any]]) -> None:
    for each in found:
        functions = each["dtensors"]["functions"]
        assert len(functions) == 18
        assert max(functions.values()) <= 1e-12, functions


def test_megatrons_function_over_a_group(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert max(each["megatron"].values()) <= 1e-12


def test_class_weights_that_want_a_gradient_get_it(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["class weights"] <= 1e-12
