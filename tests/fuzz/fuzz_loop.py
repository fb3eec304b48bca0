"""Runs cases one after the other, by hand (tests/fuzz/run.py).

Case ``n`` of a seed is the same on every machine and in every order. Each failure is a line with what repeats it; the exit status
is 1 where there was one.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import os
import time
import traceback
from pathlib import Path

import torch
from backends_under_test import need
from fuzz_functions import FUNCTIONS
from fuzz_judge import describe, draw_case, judge

LAST = Path(os.environ.get("FUZZ_LAST", "build/fuzz_last"))  # a crash leaves its case here

# auto is what people use; the interpreter is slow.
USUAL = ("auto",) * 12 + ("cpu",) * 4 + ("reference",) * 2 + ("triton",)


def command(seed: int, number: int, backends: tuple[str, ...], functions: tuple[str, ...]) -> str:
    more = "" if backends == USUAL else " --backends " + ",".join(backends)
    more += " --functions " + ",".join(functions) if functions else ""
    return f"python tests/fuzz/run.py --seed {seed} --case {number}{more}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one, with its traceback")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--functions", action="append", help="these alone, with commas; again for more")
    parser.add_argument("--backends", action="append", help="these alone, with commas; again for more")
    o = parser.parse_args()
    o.functions = tuple(",".join(o.functions).split(",")) if o.functions else ()
    o.backends = tuple(",".join(o.backends).split(",")) if o.backends else USUAL
    unknown = set(o.functions) - set(FUNCTIONS)
    if unknown:
        parser.error(
            f"--functions: expected some of {', '.join(FUNCTIONS)}, got {', '.join(sorted(unknown))}"
        )
    for backend in set(o.backends) - {"auto", "reference"}:
        need(backend)
    if o.case is not None:
        case, how = draw_case(o.seed, o.case, o.backends, o.functions)
        print(describe(case, how))
        verdict = judge(case, how)
        print(verdict.state, verdict.detail)
        return verdict.state == "wrong"
    began, number = time.monotonic(), o.first
    states: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[str] = collections.Counter()
    refusals: collections.Counter[str] = collections.Counter()
    while time.monotonic() - began < o.seconds and (o.count is None or number < o.first + o.count):
        faulthandler.dump_traceback_later(120, exit=True)  # a hang is a fault
        try:
            case, how = draw_case(o.seed, number, o.backends, o.functions)
        except Exception:
            print(command(o.seed, number, o.backends, o.functions), flush=True)
            raise
        LAST.write_text(command(o.seed, number, o.backends, o.functions))
        try:
            verdict = judge(case, how)
            state, detail = verdict.state, verdict.detail
        except Exception:
            state, detail = "wrong", "the judge failed: " + traceback.format_exc(limit=-3)
        states[state] += 1
        seen[case.function] += 1
        if state in ("error", "refused"):
            refusals[f"{case.function} {state}: {detail[:90]}"] += 1
        if state == "wrong":
            print(
                f"WRONG {describe(case, how)}\n  {detail}\n  {command(o.seed, number, o.backends, o.functions)}",
                flush=True,
            )
        number += 1
    faulthandler.cancel_dump_traceback_later()
    for text, times in refusals.most_common(25):
        print(f"{times:5d} {text}")
    print(
        f"{number - o.first} cases in {time.monotonic() - began:.0f} s, torch {torch.__version__}: {dict(states)}"
    )
    print(", ".join(f"{name} {times}" for name, times in seen.most_common()))
    return states["wrong"] > 0
