"""A picture of a run: time over the limit, memory beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LEAST_SHARE = 1e-4  # of the logits' bytes: a logarithmic axis has no 0


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [
        (c, [p for p in c["providers"] if "over_limit" in p and "extra_bytes" in p]) for c in results["cases"]
    ]
    names = list(dict.fromkeys(p["name"] for _, providers in cases for p in providers))
    colors = {name: plt.get_cmap("tab20")(k % 20) for k, name in enumerate(names)}
    height = 0.16 * sum(len(providers) + 1 for _, providers in cases) + 1.5
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(12, height), width_ratios=(2, 1), layout="constrained"
    )
    top, ticks = 0, []
    for case, providers in cases:
        for k, p in enumerate(providers):
            left.barh(top + k, p["over_limit"], height=0.9, color=colors[p["name"]])
            left.text(p["over_limit"] * 1.03, top + k, f"{p['over_limit']:.2f}", va="center", fontsize=5)
            if case["logits_bytes"]:
                share = max(p["extra_bytes"] / case["logits_bytes"], LEAST_SHARE)
                right.barh(top + k, share, height=0.9, color=colors[p["name"]])
        ticks.append(top + (len(providers) - 1) / 2)
        top += len(providers) + 1
    left.set_yticks(ticks, [case["name"] for case, _ in cases], fontsize=7)
    left.invert_yaxis()
    left.set(xscale="log", xlabel="time over the limit of the same run")
    right.set(xscale="log", xlabel="peak extra memory over the logits' bytes")
    for axis in (left, right):
        axis.axvline(1.0, color="black", linewidth=0.8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=min(5, max(1, len(names))), fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
