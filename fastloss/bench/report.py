"""Results as tables, Markdown and JSON; two runs compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastloss.bench import goals, store
from fastloss.bench.plot import plot
from fastloss.bench.ratios import LIMIT

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
RUN_COLUMNS = ("run", "date", "fastloss", "with", "load at its start")
INDEX_COLUMNS = ("machine", "what it is", "cases", "goals reached", "measured")
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
        f"{p['n']}{'!' * bool(p.get('contended'))}",
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
    only = f", {case['only']} alone" if "only" in case else ""
    slower = "; contended" if contended({"cases": [case]}) else ""
    return f"{case['name']}{only} (load {case['load'][0]:.1f}{slower}{gradients})"


def reasons(results: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """(provider, why it did not run) to the cases."""
    out: dict[tuple[str, str], list[str]] = {}
    for case in results["cases"]:
        for p in case["providers"]:
            if "reason" in p:
                out.setdefault((p["name"], p["reason"]), []).append(case["name"])
    return out


def contended(results: dict[str, Any]) -> list[str]:
    """The cases in which a provider never had the machine for itself."""
    return [c["name"] for c in results["cases"] if any(p.get("contended") for p in c["providers"])]


def goal_rows(results: dict[str, Any]) -> Lines:
    return [(o.what, o.case, f"{o.measured:.3g}", o.bound, o.verdict) for o in goals.met(results)]


def markdown(results: dict[str, Any]) -> str:
    out = _head(results)
    if results["quick"]:
        out += ["", "Small shapes (`--quick`): says that everything runs, nothing of speed."]
    elif goal_rows(results):
        out += ["", "## To reach", "", *_table(GOAL_COLUMNS, goal_rows(results))]
    many = len(results["runs"]) > 1
    for case in results["cases"]:
        out += ["", f"## {title(case)}", "", *([f"Run {case['run'] + 1}.", ""] if many else [])]
        out += _table(COLUMNS, rows(case))
    for dtype in goals.LENGTHS:
        if costs := goals.per_token(results, dtype):
            lines: Lines = [(str(n), f"{seconds * 1e6:.2f}") for n, seconds in costs.items()]
            out += [
                "",
                f"## fastloss: cost per token, {dtype}",
                "",
                *_table(("tokens", "µs per token"), lines),
            ]
    if why := reasons(results):
        lines = [(name, reason, str(len(names))) for (name, reason), names in why.items()]
        out += ["", "## Not measured", "", *_table(("provider", "why", "cases"), lines)]
    return "\n".join(out) + "\n"


def _head(results: dict[str, Any]) -> list[str]:
    info = results["machine"]
    caches = ", ".join(f"{name} {size}" for name, size in info["caches"].items())
    return [
        f"# {info['gpu'] or info['cpu']}, {info['threads']} threads",
        "",
        f"{info['cores']} cores ({' '.join(info['flags'])}), caches {caches or 'not known'}. "
        "Made by `fastloss bench`; docs/benchmarks.md says how to read it.",
        "",
        *_table(RUN_COLUMNS, [_run(k, run) for k, run in enumerate(results["runs"])]),
    ]


def _run(index: int, run: dict[str, Any]) -> tuple[str, ...]:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    commit = f"{run['fastloss']} at {run['commit'] or 'no commit'}"
    return str(index + 1), run["date"], commit, f"{versions}; Python {run['python']}", f"{run['load'][0]:.1f}"


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
            both = "over_limit" in p and "over_limit" in was and not p["name"].startswith(LIMIT)
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


INDEX = """# Results

One folder per machine, made by `fastloss bench` ([how to read them](../../docs/benchmarks.md)): `results.md` has every table,
`results.png` shows time over the limit and memory, `results.json` is what both are made from. A case that is measured again
replaces the one before; each says which run it is of.

"""


def index(root: Path) -> str:
    """Markdown: the machines whose results lie in folders of ``root``."""
    lines: Lines = []
    for path in sorted(root.glob(f"*/{store.NAME}")):
        results, name = store.load(path), path.parent.name
        if results["quick"]:
            continue
        info, outcomes = results["machine"], goals.met(results)
        dates = sorted(run["date"][:10] for run in results["runs"])
        reached = f"{sum(o.reached for o in outcomes)} of {len(outcomes)}"
        lines.append(
            (
                f"[{name}]({name}/results.md) ([picture]({name}/results.png))",
                f"{info['gpu'] or info['cpu']}, {info['threads']} threads",
                str(len(results["cases"])),
                reached,
                " … ".join(dict.fromkeys((dates[0], dates[-1]))),
            )
        )
    return INDEX + "\n".join(_table(INDEX_COLUMNS, lines)) + "\n"


def save(results: dict[str, Any], folder: Path) -> None:
    """JSON, Markdown and picture; and the index of the folder above, where there is one."""
    store.write(results, folder)
    results = store.load(folder)  # the tables are of the file's rounded numbers
    (folder / "results.md").write_text(markdown(results))
    plot(results, folder / "results.png")
    if (above := folder.parent / "README.md").is_file():
        above.write_text(index(folder.parent))
