"""``fastloss bench``."""

from __future__ import annotations

import fnmatch
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastloss.bench import calibration, report, store
from fastloss.bench.case import Case
from fastloss.bench.cases import cases as all_cases
from fastloss.bench.machine import slug
from fastloss.bench.run import run_case
from fastloss.cli.tables import console as wide_console
from fastloss.cli.tables import show

WIDE = 176  # columns that the tables want


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Option(help="Only cases that match this pattern, e.g. 'row-*-inplace-*'; any number of them."),
    ] = None,
    providers: Annotated[
        list[str] | None,
        typer.Option(help="Only providers that match this pattern, e.g. 'torch*'; any number of them."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave out providers that match this pattern, e.g. 'torch.compile'; any number."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Small shapes: checks that everything runs, says nothing of speed."),
    ] = False,
    list_cases: Annotated[
        bool, typer.Option("--list", help="Print the cases' names, measure nothing.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 keeps PyTorch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each provider, at most.")] = 15,
    budget: Annotated[float, typer.Option(help="Seconds that a provider may take in a case.")] = 6.0,
    stop_after: Annotated[
        float, typer.Option(help="Begin no case after so many seconds; 0: measure all.")
    ] = 0.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results, whose other cases stay; default benchmarks/results/<machine>."
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure which schedule of the linear head is faster on this CPU, and write the table that fastloss reads "
            "(--out: its path); measure no case.",
        ),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="OLD NEW", help="Compare two results (files or folders), measure nothing."),
    ] = None,
) -> None:
    """Time, memory and error of fastloss and its peers, over the limit measured in the same run."""
    console = wide_console(WIDE)
    if compare is not None:
        _compare(console, *compare)
        return
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {device!r}", param_hint="--device")
    if calibrate:
        _calibrate(console, quick=quick, threads=threads, repeats=repeats, budget=budget, out=out)
        return
    chosen = _chosen(cases or ["*"], quick, device)
    if list_cases:
        console.print("\n".join(case.name for case in chosen), highlight=False)
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is there, nothing was measured", param_hint="--device")
    if threads:
        torch.set_num_threads(threads)
    results = store.begin(device, quick)
    folder = out or Path("benchmarks/results") / ("quick-" * quick + slug(results["machine"]))
    before = _before(folder, results)
    try:
        _measure(
            console,
            chosen,
            results,
            before,
            folder,
            device=device,
            repeats=repeats,
            budget=budget,
            patterns=tuple(providers or ("*",)),
            skip=tuple(skip or ()),
            stop_after=stop_after,
        )
    except KeyboardInterrupt:
        console.print("interrupted: what was measured so far follows")
    if not results["cases"]:
        raise typer.Exit(1)
    report.save(store.merge(before, results) if before else results, folder)
    if not quick and report.goal_rows(results):
        show(console, "to reach", report.GOAL_COLUMNS, report.goal_rows(results), words=2)
    for (name, reason), names in report.reasons(results).items():
        console.print(
            escape(f"{name} was not measured in {len(names)} of {len(results['cases'])} cases: {reason}")
        )
    if contended := report.contended(results):
        console.print(f"somebody else was running in {len(contended)} cases: {', '.join(contended)}")
    console.print(f"written to {folder}: results.json, results.md, results.png")


def _calibrate(
    console: Console, *, quick: bool, threads: int, repeats: int, budget: float, out: Path | None
) -> None:
    """The table of this CPU, printed and written; not written where somebody else was running."""
    if quick and out is None:
        raise typer.BadParameter(
            "expected a path with --quick, whose shapes say nothing of speed", param_hint="--out"
        )
    if threads:
        torch.set_num_threads(threads)
    try:
        found = calibration.measure(quick, repeats, budget, lambda what: console.print(what, highlight=False))
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--calibrate") from error
    columns = ("operands", "gradients", "shape", "blocks ms", "chunks ms", "chunks / blocks")
    show(console, f"a head on {found['cpu']}, {found['threads']} threads", columns, calibration.rows(found))
    for name, schedule in found["faster"].items():
        console.print(f"{name}: {schedule}")
    if found["contended"]:
        console.print("somebody else was running: nothing was written; repeat it on a free machine")
        raise typer.Exit(1)
    console.print(f"written to {calibration.write(found, out)}")


def _chosen(patterns: list[str], quick: bool, device: str) -> list[Case]:
    """The cases that match one of the patterns; each pattern must match one."""
    found = all_cases(quick, device)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(case.name, pattern) for case in found):
            raise typer.BadParameter(f"no case matches {pattern!r}", param_hint="--cases")
    return [case for case in found if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]


def _before(folder: Path, new: store.Results) -> store.Results | None:
    """What lies in the folder already: it stays, but for the cases that are measured again."""
    if not (folder / store.NAME).is_file():
        return None
    try:
        found = store.load(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    theirs, ours = (f"{'quick ' * run['quick']}results of {slug(run['machine'])}" for run in (found, new))
    if theirs != ours:
        raise typer.BadParameter(f"expected a folder of {ours}, got {theirs}", param_hint="--out")
    return found


def _measure(
    console: Console,
    chosen: list[Case],
    results: store.Results,
    before: store.Results | None,
    folder: Path,
    stop_after: float,
    **options: Any,
) -> None:
    """Every case's table as it is done; the JSON is written after each, so that a long run loses nothing."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for k, case in enumerate(chosen):
            if stop_after and time.monotonic() - began > stop_after:
                console.print(f"time is up: {len(chosen) - k} of {len(chosen)} cases were not measured")
                return

            def tell(what: str, name: str = case.name) -> None:
                progress.update(task, description=escape(f"{name}: {what}"))

            result = run_case(case, tell=tell, **options)
            results["cases"].append(result)
            store.write(store.merge(before, results) if before else results, folder)
            _print_case(console, result)
            progress.advance(task)


def _compare(console: Console, old: Path, new: Path) -> None:
    try:
        before, after = store.load(old), store.load(new)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from error
    lines = report.compare(before, after)
    if not lines:
        raise typer.BadParameter("the two runs have no case and provider in common", param_hint="--compare")
    if slug(before["machine"]) != slug(after["machine"]):
        console.print("different machines: only the last column means something")
    show(console, f"{old} → {new}", report.COMPARE_COLUMNS, lines, words=2)


def _print_case(console: Console, result: dict[str, Any]) -> None:
    """A narrow terminal gets fewer columns, none cut; the files have all."""
    columns: tuple[str, ...] = report.COLUMNS
    rows = report.rows(result)
    if console.width < WIDE:
        shown = [columns.index(name) for name in report.NARROW]
        columns, rows = report.NARROW, [tuple(row[k] for k in shown) for row in rows]
    show(console, report.title(result), columns, rows)
