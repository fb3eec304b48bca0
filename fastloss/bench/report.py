"""Results as JSON, Markdown, a terminal table and a plot."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastloss


def machine(device: str) -> dict[str, Any]:
    model, flags = platform.processor(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        found = re.search(r"model name\s*:\s*(.*)", text)
        model = found.group(1) if found else model
        found = re.search(r"flags\s*:\s*(.*)", text)
        flags = " ".join(
            f for f in (found.group(1).split() if found else []) if f.startswith(("avx", "amx", "fma"))
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "flags": flags,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "fastloss": fastloss.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def slug(info: dict[str, Any]) -> str:
    name = (
        info["gpu"]
        or f"{info['cpu']}-{info['threads']}t-{'avx512' if 'avx512f' in info['flags'] else 'avx2' if 'avx2' in info['flags'] else 'cpu'}"
    )
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


COLUMNS = (
    "case",
    "provider",
    "median ms",
    "iqr ms",
    "n",
    "× limit",
    "fastloss is",
    "peak extra MiB",
    "% of logits",
    "loss error",
)


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    out = []
    for case in results["cases"]:
        for p in case["providers"]:
            if "reason" in p:
                out.append((case["name"], p["name"], p["reason"], *[""] * 7))
                continue
            extra = p.get("extra_bytes")
            out.append(
                (
                    case["name"],
                    p["name"],
                    f"{p['median'] * 1e3:.2f}",
                    f"{p['iqr'] * 1e3:.2f}",
                    str(p["n"]),
                    f"{p['over_limit']:.2f}",
                    f"{p['fastloss_speedup']:.2f}× faster" if p.get("fastloss_speedup") else "",
                    "" if extra is None else f"{extra / 2**20:.1f}",
                    "" if extra is None else f"{100 * extra / case['logits_bytes']:.1f}%",
                    "" if p.get("error") is None else f"{p['error']:.1e}",
                )
            )
    return out


def markdown(results: dict[str, Any]) -> str:
    info = results["machine"]
    lines = [
        f"# {info['gpu'] or info['cpu']}, {info['threads']} threads",
        "",
        f"fastloss {info['fastloss']} ({info['commit']}), torch {info['torch']}, {info['date']}. Flags: {info['flags']}.",
        "Made by `fastloss bench`; docs/benchmarks.md says how to read it.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [c for c in results["cases"] if c["name"] != "tiny"]
    names = list(
        dict.fromkeys(
            p["name"]
            for c in shown
            for p in c["providers"]
            if "reason" not in p and not p["name"].startswith("limit")
        )
    )
    figure, axis = plt.subplots(figsize=(11, 0.5 * len(shown) + 2))
    height = 0.8 / max(1, len(names))
    for k, name in enumerate(names):
        at = [
            (i + k * height, p["over_limit"])
            for i, c in enumerate(shown)
            for p in c["providers"]
            if p["name"] == name and "reason" not in p
        ]
        axis.barh([y for y, _ in at], [x for _, x in at], height=height, label=name)
    axis.set_yticks([i + 0.4 for i in range(len(shown))], [c["name"] for c in shown], fontsize=7)
    axis.set_xscale("log")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlabel("time over the limit measured in the same run (1 = the hardware's own)")
    axis.invert_yaxis()
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(case, provider, new time over old), both taken relative to their own run's limit."""
    before = {
        (c["name"], p["name"]): p["over_limit"]
        for c in old["cases"]
        for p in c["providers"]
        if "reason" not in p
    }
    return [
        (c["name"], p["name"], p["over_limit"] / before[c["name"], p["name"]])
        for c in new["cases"]
        for p in c["providers"]
        if "reason" not in p and (c["name"], p["name"]) in before and not p["name"].startswith("limit")
    ]


def save(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(results))
    plot(results, folder / "results.png")
