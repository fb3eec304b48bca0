"""``fastloss bench``."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastloss.bench import report
from fastloss.bench.cases import cases as all_cases
from fastloss.bench.run import run_case


def bench(
    cases: Annotated[
        str, typer.Option(help="Only cases that match this pattern, e.g. 'row-*-inplace-*'.")
    ] = "*",
    quick: Annotated[
        bool, typer.Option(help="Small shapes: checks that everything runs, says nothing of speed.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 keeps PyTorch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Calls of each provider, at most.")] = 9,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default benchmarks/results/<machine>.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="OLD.json NEW.json: compare two runs, measure nothing.")
    ] = None,
) -> None:
    """Time, memory and error of fastloss and its peers, over the limit measured in the same run."""
    console = Console()
    if compare is not None:
        old, new = (json.loads(path.read_text()) for path in compare)
        _print(
            console,
            ("case", "provider", "new / old (of the limit)"),
            [(c, p, f"{r:.3f}") for c, p, r in report.compare(old, new)],
        )
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is there, nothing was measured", param_hint="--device")
    if threads:
        torch.set_num_threads(threads)
    chosen = [case for case in all_cases(quick) if fnmatch.fnmatch(case.name, cases)]
    if not chosen:
        raise typer.BadParameter(f"no case matches {cases!r}", param_hint="--cases")
    results: dict[str, Any] = {
        "machine": report.machine(device),
        "quick": quick,
        "cases": [run_case(case, device, repeats) for case in track(chosen, "measuring", console=console)],
    }
    _print(console, report.COLUMNS, report.rows(results))
    folder = out or Path("benchmarks/results") / (
        ("quick-" if quick else "") + report.slug(results["machine"])
    )
    report.save(results, folder)
    console.print(f"written to {folder}: results.json, results.md, results.png")


def _print(console: Console, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
