"""Results as tables, Markdown and JSON; two runs compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastloss.bench import goals, limits
from fastloss.bench.plot import plot

Lines = list[tuple[str, ...]]

COLUMNS = (
    "provider",
    "median ms",
    "IQR ms",
    "n",
    "× limit",
    "× kept",
    "vs eager",
    "fastloss is",
    "extra MiB",
    "of logits",
    "RSS MiB",
    "loss err",
    "grad err",
)
# What a terminal of 80 columns has room for.
NARROW = ("provider", "median ms", "× limit", "fastloss is", "of logits")
GOAL_COLUMNS = ("goal", "case", "measured", "to reach", "")
COMPARE_COLUMNS = ("case", "provider", "old ms", "new ms", "new / old", "new / old, of the limit")


def rows(case: dict[str, Any]) -> Lines:
    """One line per provider that ran; an arrow marks the limit that the ratios are to."""
    return [_row(case, p) for p in case["providers"] if "reason" not in p]


def _row(case: dict[str, Any], p: dict[str, Any]) -> tuple[str, ...]:
    digits = 4 if case["calls"] > 1 else 2
    error = p.get("errors", {})
    gradients = [value for name, value in error.items() if name != "loss"]
    extra, resident = p.get("extra_bytes"), p.get("resident_bytes")
    return (
        "→ " * (p["name"] == case["limit"]) + p["name"],
        f"{p['median'] * 1e3:.{digits}f}",
        f"{p['iqr'] * 1e3:.{digits}f}" if p["n"] > 1 else "–",
        str(p["n"]),
        _number(p.get("over_limit"), ".2f"),
        _number(p.get("over_kept"), ".2f"),
        _number(p.get("speedup_over_eager"), ".2f", "×"),
        _number(p.get("fastloss_speedup"), ".2f", "× as fast"),
        "" if extra is None else f"{extra / 2**20:.1f}",
        f"{100 * extra / case['logits_bytes']:.1f}%" if extra is not None and case["logits_bytes"] else "",
        "" if resident is None else f"{resident / 2**20:.1f}",
        _number(error.get("loss"), ".1e"),
        f"{max(gradients):.1e}" if gradients else "",
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def title(case: dict[str, Any]) -> str:
    largest = ", ".join(f"{name} {value:.1e}" for name, value in case["gradient_scale"].items())
    gradients = f"; largest gradient: {largest}" if largest else ""
    return f"{case['name']} (load {case['load'][0]:.1f}{gradients})"


def reasons(results: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """(provider, why it did not run) to the cases."""
    out: dict[tuple[str, str], list[str]] = {}
    for case in results["cases"]:
        for p in case["providers"]:
            if "reason" in p:
                out.setdefault((p["name"], p["reason"]), []).append(case["name"])
    return out


def goal_rows(results: dict[str, Any]) -> Lines:
    return [
        (o.what, o.case, f"{o.measured:.3g}", o.bound, "reached" if o.reached else "not reached")
        for o in goals.met(results)
    ]


def markdown(results: dict[str, Any]) -> str:
    out = _head(results["machine"])
    if results["quick"]:
        out += ["", "Small shapes (`--quick`): says that everything runs, nothing of speed."]
    elif goal_rows(results):
        out += ["", "## To reach", "", *_table(GOAL_COLUMNS, goal_rows(results))]
    for case in results["cases"]:
        out += ["", f"## {title(case)}", "", *_table(COLUMNS, rows(case))]
    if costs := goals.per_token(results):
        lines: Lines = [(str(n), f"{seconds * 1e6:.2f}") for n, seconds in costs.items()]
        out += ["", "## fastloss: cost per token", "", *_table(("tokens", "µs per token"), lines)]
    if why := reasons(results):
        lines = [(name, reason, str(len(names))) for (name, reason), names in why.items()]
        out += ["", "## Not measured", "", *_table(("provider", "why", "cases"), lines)]
    return "\n".join(out) + "\n"


def _head(info: dict[str, Any]) -> list[str]:
    caches = ", ".join(f"{name} {size}" for name, size in info["caches"].items())
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    return [
        f"# {info['gpu'] or info['cpu']}, {info['threads']} threads",
        "",
        f"fastloss {info['fastloss']} at {info['commit'] or 'no commit'}, {versions}; Python {info['python']}; "
        f"{info['date']}.",
        f"{info['cores']} cores ({' '.join(info['flags'])}), caches {caches or 'not known'}; load at the start "
        f"{info['load'][0]:.1f}. Made by `fastloss bench`; docs/benchmarks.md says how to read it.",
    ]


def _table(columns: tuple[str, ...], lines: Lines) -> list[str]:
    cells = [tuple(cell.replace("|", "\\|") for cell in line) for line in lines]
    return ["| " + " | ".join(line) + " |" for line in (columns, ("---",) * len(columns), *cells)]


def compare(old: dict[str, Any], new: dict[str, Any]) -> Lines:
    """What both runs measured: times, their ratio, and the ratio after each is divided by its own run's limit."""
    before = {(c["name"], p["name"]): p for c in old["cases"] for p in c["providers"] if "reason" not in p}
    out: Lines = []
    for case in new["cases"]:
        for p in case["providers"]:
            was = before.get((case["name"], p["name"]))
            if was is None or "reason" in p:
                continue
            both = "over_limit" in p and "over_limit" in was and not p["name"].startswith(limits.PREFIX)
            out.append(
                (
                    case["name"],
                    p["name"],
                    f"{was['median'] * 1e3:.4g}",
                    f"{p['median'] * 1e3:.4g}",
                    f"{p['median'] / was['median']:.3f}",
                    f"{p['over_limit'] / was['over_limit']:.3f}" if both else "",
                )
            )
    return out


def save(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(results))
    plot(results, folder / "results.png")
