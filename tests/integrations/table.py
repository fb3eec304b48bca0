"""The compatibility table: what the tests compared, written down by the tests that ran.

FASTLOSS_COMPATIBILITY=path.json makes each comparison of a run add its row there; ``python tests/integrations/table.py
path.json`` makes the page of it.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HEADER = """# Compatibility

Made by the tests (`make integrations`): every row is a comparison that ran, stock against fastloss, in one process, on a
CPU. "Difference" is the largest one, relative to the largest value of what was compared: of the loss, and of all
gradients (or of all parameters after the steps, where a trainer ran). "interface" says what the test ran: the package
itself, or a small copy of its interface written in the test, where the package does not install beside fastloss. Of
torchtitan, verl, OpenRLHF, SkyRL, Axolotl, LLaMA-Factory, ms-swift and Megatron the loss modules alone were imported, with
stand-ins for packages that a loss does not need (ray, vLLM, flash-attn); their trainers did not run.
Of TRL, "one pass" is a batch of the real trainer: its loss, and the gradients of all parameters.

"""


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def record(trainer: str, model: str, loss: str, loss_difference: float, gradient_difference: float | None,
           interface: str = "package") -> None:  # fmt: skip
    path = os.environ.get("FASTLOSS_COMPATIBILITY")
    if not path:
        return
    row = {
        "trainer": trainer,
        "version": installed(trainer.split()[0]) if interface == "package" else "–",
        "interface": interface,
        "model": model,
        "loss": loss,
        "loss difference": loss_difference,
        "gradient difference": gradient_difference,
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def steps(rows: list[dict]) -> str:
    """The table of benchmarks/trainer_steps.py."""
    if not rows:
        return ""
    about = "; ".join(sorted({f"{r['cpu']}, {r['threads']} threads, torch {r['torch']}" for r in rows}))
    lines = [
        "## Steps",
        "",
        f"`benchmarks/trainer_steps.py`: steps of a trainer, stock and with fastloss in turn, in one run: a tied Llama of about 50M parameters, a vocabulary of 128,256 ({about}).",
        "Medians; memory is a step's peak above what it began with. Load: of the machine when the trainer ended, 2 where nothing else ran.",
        "",
        "| trainer | version | tokens | stock s | fastloss s | time ratio | stock MiB | fastloss MiB | memory ratio | load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in {r["trainer"]: r for r in rows}.values():
        lines.append(
            f"| {r['trainer']} | {r['version']} | {r['tokens']} | {r['stock s']} | {r['fastloss s']} | {r['time ratio']} | "
            f"{r['stock MiB']} | {r['fastloss MiB']} | {r['memory ratio']} | {r['load']} |"
        )
    return "\n" + "\n".join(lines) + "\n"


def suites(rows: list[dict]) -> str:
    """The table of trl_suite/run.py."""
    if not rows:
        return ""
    lines = [
        "## TRL's own tests",
        "",
        "`tests/integrations/trl_suite`: the tests of TRL's repository, as it is and with `fastloss.integrations.trl.apply()` in the whole process. The tiny",
        "models and data sets that they download are made here. Tests of a model that has no stand-in (vision, remote code) fail in both runs, as do",
        "those that ask for a function of another TRL than the one installed.",
        "",
        "| tests | of version | TRL | run | pass as it is | of those, pass with fastloss | fail as it is | skipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in {r["suite"]: r for r in rows}.values():
        lines.append(
            f"| {r['suite']} | {r['tests of']} | {r['version']} | {r['run']} | {r['passed']} | {r['passed with fastloss']} | {r['failed']} | {r['skipped']} |"
        )
    return "\n" + "\n".join(lines) + "\n"


def page(rows: list[dict]) -> str:
    timed = [r for r in rows if "stock s" in r]
    tested = [r for r in rows if "suite" in r]
    rows = [r for r in rows if "stock s" not in r and "suite" not in r]
    last = {
        (r["trainer"], r["model"], r["loss"]): r for r in rows
    }  # a comparison that ran twice: the later one
    rows = [last[k] for k in sorted(last, key=lambda k: (k[0].lower(), k[2], k[1].lower()))]
    grouped: dict[tuple, list[dict]] = {}
    for row in rows:
        grouped.setdefault((row["trainer"], row["version"], row["interface"], row["loss"]), []).append(row)
    lines = [
        "| trainer | version | interface | loss | models | loss difference | gradient difference |",
        "|---|---|---|---|---|---|---|",
    ]
    long = []
    for (trainer, number, interface, loss), group in grouped.items():
        worst = max(r["loss difference"] for r in group)
        gradients = [r["gradient difference"] for r in group if r["gradient difference"] is not None]
        gradient = f"{max(gradients):.1e}" if gradients else "–"
        models = ", ".join(r["model"] for r in group) if len(group) <= 4 else f"{len(group)} classes, below"
        if len(group) > 4:
            long.append((f"{trainer}, {loss}", group))
        lines.append(f"| {trainer} | {number} | {interface} | {loss} | {models} | {worst:.1e} | {gradient} |")
    text = HEADER + "\n".join(lines) + "\n" + suites(tested) + steps(timed)
    for title, group in long:
        text += f"\n## {title}\n\n| model | loss difference | gradient difference |\n|---|---|---|\n"
        for r in group:
            text += f"| {r['model']} | {r['loss difference']:.1e} | {r['gradient difference']:.1e} |\n"
    return text


if __name__ == "__main__":
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    sys.stdout.write(page(rows))
