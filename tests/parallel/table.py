"""The page of what 2 and 4 processes were compared with: ``python tests/parallel/table.py > docs/parallel_table.md``.

It runs shard_cases.py and engine_cases.py, which the tests run too, and writes down the differences that they found.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import processes  # noqa: E402

HEADER = """# Losses over several processes, checked

Made by `python tests/parallel/table.py > docs/parallel_table.md`, on a CPU, with gloo, torch {torch}. Each number is the
largest difference from one process that has everything, in float64: of values, statistics and all gradients, over all
processes, relative to the largest number of what was compared (values: at least 1).

## A vocabulary of 97 classes, cut

"even" is 49 + 48 and 25 + 24 + 24 + 24 classes, "uneven" 90 + 7 and 1 + 60 + 30 + 6, "empty" 97 + 0 and 0 + 50 + 47 + 0. A bias is cut with
the weight. In two processes the weight is trained, and frozen. The columns of float32 and bfloat16 are of the uneven cut in two processes: the dtypes' own rounding.

"""
COLUMNS = [
    (2, "even", "float64"),
    (2, "uneven", "float64"),
    (2, "empty", "float64"),
    (4, "even", "float64"),
    (4, "uneven", "float64"),
    (4, "empty", "float64"),
    (2, "uneven", "float32"),
    (2, "uneven", "bfloat16"),
]
Found = list[dict[str, Any]]


def run(script: str, world: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        done = processes.run(script, world, Path(folder) / "store", str(Path(folder) / "{rank}.json"))
        for status, text in done:
            if status:
                raise SystemExit(text)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def worst(of: Iterable[dict[str, Any]], without: tuple[str, ...] = ()) -> float:
    return max(v for numbers in of for k, v in numbers.items() if k not in without)


def row(*cells: Any) -> str:
    shown = (
        f"{cell:.0e}"
        if isinstance(cell, float) and cell
        else f"{cell:g}"
        if isinstance(cell, float)
        else str(cell)
        for cell in cells
    )
    return f"| {' | '.join(shown)} |\n"


def head(*names: str) -> str:
    return row(*names) + row(*["---"] * len(names))


def vocabulary(found: dict[int, Found]) -> str:
    first = [key.split(", ", 2) for key in found[2][0]["cases"]]
    names = [name for layout, dtype, name in first if (layout, dtype) == ("even", "float64")]
    names = [name for name in names if not name.endswith(", frozen")]
    text = head(
        "loss",
        *(
            f"{world}: {layout}{'' if dtype == 'float64' else ', ' + dtype}"
            for world, layout, dtype in COLUMNS
        ),
    )
    for name in names:
        cells: list[Any] = []
        for world, layout, dtype in COLUMNS:
            keys = [f"{layout}, {dtype}, {name}{more}" for more in ("", ", frozen")]
            here = [each["cases"][key] for each in found[world] for key in keys if key in each["cases"]]
            cells.append(worst(here, ("bits",)) if here else "")
        text += row(name, *cells)
    same = all(
        each["cases"][key]["bits"] == numbers["bits"]
        for every in found.values()
        for key, numbers in every[0]["cases"].items()
        for each in every
    )
    return text + f"\nValues and statistics have the same bits on every process: {'yes' if same else 'NO'}.\n"


def layouts(found: dict[int, Found]) -> str:
    text = """
## Layouts of a training run

`tests/parallel/layout_cases.py`: a layer and a head in float64, 2 and 4 processes (tp+fsdp: 4, a mesh of 2 x 2), the larger difference of loss, metrics
(where they are of the whole batch) and all gradients. tp: `group=`. tp+sequence: DTensors, weight `Shard(0)`, hidden states `Shard(0)`. fsdp: FSDP2, each
process its sequences. cp: positions are cut; what needs whole sequences takes `sum_over_shards`. "uneven": 97 classes, 10 sequences and 8 positions, of which each
process but the first has one class (tp), one pair (fsdp), one position (cp); a DTensor's uneven cut is 49 + 48 and 25 + 25 + 25 + 22.

"""
    keys = [tuple(key.split(", ")) for key in found[4][0]]
    columns = list(dict.fromkeys((layout, cut) for layout, cut, _ in keys))
    text += head("loss", *(f"{layout}: {cut}" for layout, cut in columns))
    for name in dict.fromkeys(name for *_, name in keys):
        cells = []
        for layout, cut in columns:
            key = f"{layout}, {cut}, {name}"
            cells.append(worst(each[key] for every in found.values() for each in every if key in each))
        text += row(name, *cells)
    return text


def sequences(found: dict[int, Found]) -> str:
    text = "\n## Sequences, cut\n\n`sequence_shard`; the mean cross-entropy and DPO of responses whose tokens lie on all processes.\n\n"
    text += head(
        "layout",
        *(f"{world}: {what}" for world in found for what in ("cross-entropy, gradient", "DPO, gradient")),
    )
    for name in found[2][0]["sequences"]:
        cells = []
        for every in found.values():
            numbers = [each["sequences"][name] for each in every]
            cells.append(max(max(n["loss"], n["gradient"]) for n in numbers))
            cells.append(max(max(n["DPO"], n["DPO gradient"]) for n in numbers))
        text += row(name, *cells)
    return text


def dtensors(found: dict[int, Found]) -> str:
    text = "\n## DTensors\n\n" + head("input, weight", *(f"{world} processes" for world in found))
    names = {
        "replicated": "Replicate, Shard(0)",
        "tokens": "Shard(0), Shard(0)",
        "whole": "Replicate, Replicate",
    }
    for name, told in names.items():
        text += row(
            told, *(worst((each["dtensors"][name] for each in every), ("kinds",)) for every in found.values())
        )
    for name in ("statistics", "torch's loss_parallel"):
        text += row(name, *(max(each["dtensors"][name] for each in every) for every in found.values()))
    for name in found[2][0]["dtensors"]["functions"]:
        cells = (max(each["dtensors"]["functions"][name] for each in every) for every in found.values())
        tokens, told = name.split(": ", 1)
        text += row(f"{told}, input {'Shard(0)' if tokens == 'tokens' else 'Replicate'}", *cells)
    return text


def engines(every: Found) -> str:
    text = "\n## FSDP2 and pipelines of PyTorch, 2 processes\n\n" + head("what", "loss", "gradients")
    for name, numbers in every[0].items():
        if not isinstance(numbers, dict) or "gradients" not in numbers:
            continue
        grads = [each[name]["gradients"] for each in every]
        largest = max(max(g.values()) if isinstance(g, dict) else max(g) for g in grads if g)
        text += row(name, max(float(each[name]["loss"]) for each in every), float(largest))
    return text


def sent(found: dict[int, Found]) -> str:
    text = (
        "\n## Bytes that a process sent for one call of 24 tokens, D = 16, float32, with label smoothing\n\n"
    )
    text += head(
        "processes", "forward, counted", "forward, told by explain", "backward, counted", "backward, told"
    )
    for world, every in found.items():
        counted, told = every[0]["bytes"]["counted"], every[0]["bytes"]["told"]
        text += row(
            world, counted["gathered"], told["gathered_bytes"], counted["reduced"], told["reduced_bytes"]
        )
    text += "\nOther losses, forward and backward: gathered + reduced, counted; told by `explain` the same: "
    same = all(
        n["counted"] == n["told"]
        for every in found.values()
        for each in every
        for n in each["messages"].values()
    )
    text += f"{'yes' if same else 'NO'}.\n\n" + head("loss", *(f"{world} processes" for world in found))
    for name in found[2][0]["messages"]:
        cells = (every[0]["messages"][name]["counted"] for every in found.values())
        text += row(name, *(f"{gathered} + {reduced}" for gathered, reduced in cells))
    return text


def main() -> None:
    found = {world: run("shard_cases.py", world) for world in (2, 4)}
    page = HEADER.format(torch=torch.__version__) + vocabulary(found)
    page += (
        layouts({world: run("layout_cases.py", world) for world in (2, 4)})
        + sequences(found)
        + dtensors(found)
    )
    print(page + engines(run("engine_cases.py", 2)) + sent(found), end="")


if __name__ == "__main__":
    main()
