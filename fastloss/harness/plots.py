"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def curves(path: Path, columns: Mapping[str, str], rows: Sequence[Mapping[str, float]], title: str) -> None:
    """One panel per column of the log, over the steps."""
    figure = _figure(8, 3 + 1.8 * len(columns))
    panels = figure.subplots(len(columns), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (column, label) in zip(panels, columns.items(), strict=True):
        _draw(axis, rows, column)
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    panels[0].set(title=title)
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=130)


def loss_curves(
    path: Path, curves: dict[str, list[float]], title: str, difference: list[float] | None = None
) -> None:
    """One line per run; with ``difference``, a second panel with it on a log axis."""
    figure = _figure(8, 6 if difference else 4.5)
    heights = [3, 1] if difference else [1]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for (name, losses), style in zip(curves.items(), ("-", "--", ":", "-."), strict=False):
        axes[0].plot(range(1, len(losses) + 1), losses, style, label=name, linewidth=1.6)
    axes[0].set(ylabel="loss (nats per token)", title=title)
    axes[0].legend()
    if difference:
        axes[1].semilogy(
            range(1, len(difference) + 1), [max(d, 1e-9) for d in difference], linewidth=1.0, color="C3"
        )
        axes[1].set(ylabel="|difference|")
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def chain(path: Path, stages: Sequence[tuple[str, Mapping[str, str], Sequence[Mapping[str, float]]]]) -> None:
    """A panel per stage: the first column of its curves."""
    across = min(3, len(stages))
    down = -(-len(stages) // across)
    figure = _figure(4.2 * across, 3.2 * down)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axis, (title, columns, rows) in zip(panels, stages, strict=False):
        column, label = next(iter(columns.items()))
        _draw(axis, rows, column)
        axis.set_title(title, fontsize="medium")
        axis.set(ylabel=label, xlabel="step")
        axis.grid(alpha=0.3)
    for axis in panels[len(stages) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=130)


def _draw(axis: Any, rows: Sequence[Mapping[str, float]], column: str) -> None:
    """Every step, and where steps are many the mean of the steps around it."""
    steps, values = [row["step"] + 1 for row in rows], [row[column] for row in rows]
    reach = len(values) // 50
    if not reach:
        axis.plot(steps, values, linewidth=1.4)
        return
    axis.plot(steps, values, linewidth=0.8, alpha=0.35, color="C0")
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    axis.plot(steps, [sum(part) / len(part) for part in around], linewidth=1.6, color="C0")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state
    FigureCanvasAgg(figure)
    return figure
