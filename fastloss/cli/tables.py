"""Tables on a terminal, the same for every command."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def console(wide: int) -> Console:
    """A pipe or a file has no width: lines there are as long as the tables."""
    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=wide)


def show(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1
) -> None:
    """``words``: the columns from the left that are text; with more than one they fold where there is no room."""
    console.print(Text(title, style="italic"))
    table = Table(box=SIMPLE_HEAD)
    for k, column in enumerate(columns):
        left = k < words
        table.add_column(
            column, justify="left" if left else "right", no_wrap=not (left and words > 1), overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
