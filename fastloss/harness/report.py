"""The page a run ends with, in the terminal and as report.md."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown


class Terminal(Console):
    """Where nobody reads any more (`| head`) a run goes on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # not a file of the system
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())  # what is still in its buffer
            os.close(nowhere)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(
    path: Path, title: str, sections: list[str], console: Console, appendix: Sequence[str] = ()
) -> None:
    """The appendix is in the file alone."""
    page = [f"# {title}", *sections]
    path.write_text("\n\n".join([*page, *appendix]) + "\n", encoding="utf-8")
    lines = "\n\n".join(page).splitlines()
    console.print(Markdown("\n".join(line for line in lines if not line.startswith("!["))))
    console.print(f"report: {path}")


def count(value: float, unit: str = "") -> str:
    """1234567 -> '1.23 M'; keeps three figures."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def number(value: float) -> str:
    """Three decimals, or none where the number is large enough to do without."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """The curve in one line, means of equal parts: '█▆▅▃▂▁▁'; what is not finite has no place on it."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    parts = min(width, len(values))
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span)] for mean in means)


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"
