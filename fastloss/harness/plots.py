"""The picture of a run."""

from __future__ import annotations

from pathlib import Path


def loss_curves(
    path: Path, curves: dict[str, list[float]], title: str, difference: list[float] | None = None
) -> None:
    """One line per run; with ``difference``, a second panel with it on a log axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6 if difference else 4.5), layout="constrained")  # no pyplot: no global state
    FigureCanvasAgg(figure)
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
