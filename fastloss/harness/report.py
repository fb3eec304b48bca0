"""The page a run ends with, in the terminal and as report.md."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(path: Path, title: str, sections: list[str], console: Console) -> None:
    text = "\n\n".join([f"# {title}", *sections]) + "\n"
    path.write_text(text, encoding="utf-8")
    shown = "\n".join(line for line in text.splitlines() if not line.startswith("!["))
    console.print(Markdown(shown))
    console.print(f"report: {path}")


def count(value: float, unit: str = "") -> str:
    """1234567 -> '1.23 M'; keeps three figures."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"
