"""Everything that is done on a borrowed GPU, in stages, with no network.

    python tools/gpu/run.py                    all stages, in order                make gpu
    python tools/gpu/run.py smoke tests        these alone
    python tools/gpu/run.py --list             what there is, and how long each may take
    python tools/gpu/run.py --total 1800       of all of them together, in seconds

A stage is a process of its own that is ended when its time is up; the next one runs whatever became of it. What each printed (its
end), and stages.json with how each ended, go to benchmarks/results/<the card>/. The Python that runs this needs torch and, for
`tests`, pytest; `build` also setuptools, pybind11 and ninja. tools/gpu/wheels.py brings the peers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LONGEST = 570  # seconds: a command on a borrowed machine may take ten minutes
KEPT = 16_000  # bytes of what a stage printed
GRACE = 5.0  # seconds between asking a stage to end and ending it
# Tests that say nothing of a GPU, by a word of their path.
NOT_ON_A_GPU = (
    "harness",
    "bench",
    "plan",
    "integrations",
    "cpu",
    "emulat",
    "compiles",
    "build",
    "docs",
    "imports",
    "calibration",
    "machine_code",
    "parallel",  # gloo, whose processes interpret Triton's kernels
    "scratch",
    "vector_source",
)


class Stage(NamedTuple):
    about: str
    seconds: int
    command: Callable[[Path, int], list[str]]  # of the results' folder and the seconds that it has
    tool: str = ""  # that must be on PATH


def _script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), *arguments]


def _bench(out: Path, seconds: int, *arguments: str) -> list[str]:
    """Ends by itself before its time: no case begins after two thirds of it."""
    options = ["--device", "cuda", "--out", str(out), "--stop-after", str(seconds * 2 // 3), "--budget", "1"]
    return [sys.executable, "-m", "fastloss", "bench", *options, *arguments]


def _tests(out: Path, seconds: int) -> list[str]:
    files = [str(path.relative_to(ROOT)) for path in gpu_tests()]
    workers = ["-n", "14"] if importlib.util.find_spec("xdist") else []
    each = ["--timeout", "60"] if importlib.util.find_spec("pytest_timeout") else []
    return [sys.executable, "-m", "pytest", "-q", *workers, *each, "-o", "faulthandler_timeout=60", *files]


def gpu_tests() -> list[Path]:
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in found if not any(word in str(path.relative_to(ROOT)) for word in NOT_ON_A_GPU)]


def _build(out: Path, seconds: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-e",
        str(ROOT),
    ]


STAGES = {
    "build": Stage("the native modules, into the Python that is active", LONGEST, _build),
    "smoke": Stage(
        "rows and heads against float64, graphs, streams, FLOPs, autocast, compile: a line each",
        120,
        lambda out, seconds: _script("smoke", "--seconds", str(seconds - 30)),
    ),
    "ceilings": Stage(
        "copy and GEMMs alone, with the kernels that the library takes",
        150,
        lambda out, seconds: _script("ceilings", "--out", str(out / "ceilings.json")),
    ),
    "peers": Stage(
        "heads and rows against the peers that are installed",
        LONGEST,
        lambda out, seconds: _bench(out, seconds, "--cases", "linear-*", "--cases", "row-*", "--skip", "torch.compile"),
    ),
    "sweeps": Stage(
        "chunks, scaled exponentials, launch shapes, variants of the CUDA module",
        400,
        lambda out, seconds: _script("sweeps", "--out", str(out / "sweeps.json"), "--seconds", str(seconds - 60)),
    ),
    "tests": Stage("the tests that a GPU runs", LONGEST, _tests),
    "sanitizer": Stage(
        "memcheck and racecheck over small calls of every kernel",
        400,
        lambda out, seconds: _script("calls", "--under", "compute-sanitizer", "--seconds", str(seconds - 30)),
        tool="compute-sanitizer",
    ),
    "ncu": Stage(
        "what the row kernels wait for",
        200,
        lambda out, seconds: _script("calls", "--under", "ncu", "--seconds", str(seconds - 30)),
        tool="ncu",
    ),
    "final": Stage(
        "every other case of the benchmark",
        LONGEST,
        lambda out, seconds: _bench(out, seconds, "--cases", "[!lr]*", "--cases", "reward*", "--cases", "tiny"),
    ),
}  # fmt: skip


class Ended(NamedTuple):
    how: str  # passed, failed, time was up, left out
    seconds: float
    status: int | None = None
    why: str = ""


def run_stage(command: Sequence[str], seconds: float, log: Path, environment: dict[str, str]) -> Ended:
    """Runs it in a session of its own, prints and keeps what it says, and ends all of it when its time is up."""
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    whole = log.with_suffix(".part")
    with whole.open("wb") as file:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            child.wait(seconds)
            up = False
        except subprocess.TimeoutExpired:
            up = True
        finally:
            _end(child)
    _keep(whole, log)
    took = time.monotonic() - began
    if up:
        return Ended("time was up", took)
    return Ended("passed" if child.returncode == 0 else "failed", took, child.returncode)


def _end(child: subprocess.Popen[bytes]) -> None:
    """The stage and whatever it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, how)
        except ProcessLookupError:
            break
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
        if how == signal.SIGTERM and child.returncode is not None:
            time.sleep(0.1)  # children of its own may still be at work: the second signal ends them
    child.wait()


def _keep(whole: Path, log: Path) -> None:
    said = whole.read_bytes()
    whole.unlink()
    cut = b"" if len(said) <= KEPT else b"[the beginning is left out]\n"
    log.write_bytes(cut + said[-KEPT:])
    sys.stdout.write((cut + said[-KEPT:]).decode(errors="replace"))
    sys.stdout.flush()


def run(
    names: Sequence[str], out: Path, total: float, stages: dict[str, Stage] | None = None
) -> dict[str, Any]:
    """Every stage in turn; stages.json is whole after each."""
    stages = STAGES if stages is None else stages
    environment = {**os.environ, "FASTLOSS_TEST_DEVICE": "cuda", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    ended: dict[str, Any] = {}
    until = time.monotonic() + total
    for name in names:
        stage, left = stages[name], until - time.monotonic()
        seconds = int(min(stage.seconds, left))
        print(f"== {name}: {stage.about} ({seconds} s)", flush=True)
        if stage.tool and shutil.which(stage.tool) is None:
            found = Ended("left out", 0.0, why=f"no {stage.tool} on PATH")
        elif seconds < min(60, stage.seconds):
            found = Ended("left out", 0.0, why="no time is left")
        else:
            found = run_stage(stage.command(out, seconds), seconds, out / f"{name}.txt", environment)
        print(f"== {name}: {found.how}{': ' * bool(found.why)}{found.why}, {found.seconds:.0f} s", flush=True)
        ended[name] = {key: value for key, value in found._asdict().items() if value not in (None, "")}
        ended[name]["seconds"] = round(found.seconds, 1)
        out.mkdir(parents=True, exist_ok=True)
        (out / "stages.json").write_text(json.dumps(ended, indent=1) + "\n")
    return ended


CHECK = """
import importlib.util, sys
missing = [name for name in ("torch", "pytest") if importlib.util.find_spec(name) is None]
if missing: sys.exit(f"{sys.executable} has no {', '.join(missing)}")
import torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device: nothing was built, tested or measured")
print(torch.cuda.get_device_name())
"""


def card() -> str:
    """The folder of this machine's results.

    Raises:
        SystemExit: no GPU is here, or this Python cannot use it.
    """
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"gpu: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return re.sub(r"[^a-z0-9]+", "-", done.stdout.strip().lower()).strip("-")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="stage", help="of --list; none: all")
    parser.add_argument("--list", action="store_true", help="print the stages")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<the card>")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds of all stages together")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{name:<10} {stage.seconds:>4} s  {stage.about}" for name, stage in STAGES.items()))
        return 0
    for name in given.stages:
        if name not in STAGES:
            parser.error(f"stage: expected one of {', '.join(STAGES)}, got {name!r}")
    folder = given.out or ROOT / "benchmarks" / "results" / card()
    ended = run(given.stages or list(STAGES), folder.resolve(), given.total)
    bad = [name for name, how in ended.items() if how["how"] in ("failed", "time was up")]
    print(
        f"gpu: {', '.join(bad)} did not pass; see {folder}"
        if bad
        else f"gpu: everything passed; see {folder}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
