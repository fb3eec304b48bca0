"""Which chunk, which launch shape, which way to the gradient, which build of the CUDA module is fastest here? Candidates take turns.

    python tools/gpu/sweeps.py [--out FILE] [--seconds 300] [--variants FOLDER] [--device cpu --small]

--variants: a folder of folders, each with a _cuda module built beforehand with other constants; each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if path := os.environ.get("FASTLOSS_CUDA_MODULE"):  # before fastloss is imported
    spec = importlib.util.spec_from_file_location("fastloss._cuda", path)
    assert spec is not None and spec.loader is not None, path
    sys.modules["fastloss._cuda"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fastloss._cuda"])

import torch
from torch import Tensor

import fastloss
from fastloss.bench import gpu, internals
from fastloss.bench.case import Case
from fastloss.bench.cases import data
from fastloss.bench.clock import round_robin, summary
from fastloss.bench.kinds import KINDS
from fastloss.bench.steps import Step, step

REPEATS = 7
CHUNKS = (512, 1024, 2048, 4096, 8192)
# Of the Triton row kernels: threads, and the bytes of logits that each holds.
SHAPES = ((256, 16), (512, 16), (1024, 16), (512, 32), (1024, 32), (512, 8), (1024, 8))
# The others whose block is swept: the key in kernels/shapes.py, and the kind of a case that is mostly its.
KERNELS = {
    "divergence": "distillation-linear", "policy": "policy", "value": "value", "kl": "kl", "scan": "gae", "pair": "preference",
}  # fmt: skip

Found = dict[str, Any]


def available(device: str) -> list[str]:
    states = fastloss.backends()
    names = ("cpu",) if device == "cpu" else ("cuda", "triton")
    return [name for name in names if states[name] == "available"]


def timed(
    case: Case, losses: dict[str, Callable[..., Tensor]], device: str, budget: float = 3.0
) -> list[Found]:
    """Each candidate's median; one that fails says why."""
    inputs, out = data(case, device), []
    steps: dict[str, Step] = {name: step(loss, case, inputs) for name, loss in losses.items()}
    failed: dict[str, str] = {}

    def fail(name: str, error: Exception) -> None:
        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    for name in [*steps]:  # compiles, fills caches
        try:
            inputs.restore()
            steps[name]()
            steps[name].prepare()
        except Exception as error:
            fail(name, error)
            del steps[name]
    times = round_robin(steps, device, REPEATS, budget, inputs.restore, True, fail=fail)
    for name in losses:
        entry: Found = {"case": case.name, "candidate": name}
        out.append(entry | ({"reason": failed[name]} if name in failed else summary(times[name].seconds)))
    return out


def chunks(device: str, small: bool) -> Iterator[Found]:
    for case in gpu.cases(small):
        if case.kind != "linear" or not case.name.endswith("-whole"):
            continue
        sizes = [n for n in ((8, 16) if small else CHUNKS) if n <= case.rows]
        for backend in available(device):

            def head(*tensors: Tensor, size: int | None = None, backend: str = backend) -> Tensor:
                return fastloss.linear_cross_entropy(*tensors, chunk_size=size, backend=backend)

            losses: dict[str, Callable[..., Tensor]] = {f"{backend}, its own choice": head}
            for size in sizes:
                losses[f"{backend}, chunks of {size}"] = lambda *t, size=size, head=head: head(*t, size=size)
            yield from timed(case, losses, device)


def launch_shapes(device: str, small: bool) -> Iterator[Found]:
    """Overwrites the table of the Triton kernels (kernels/shapes.py), shape by shape."""
    if "triton" not in available(device):
        yield {"case": "launch shapes", "reason": "no Triton backend is here"}
        return
    shapes = importlib.import_module("fastloss.kernels.shapes")
    for case in gpu.cases(small):
        if case.kind == "row" and case.calls == 1 and case.name.endswith("-inplace-warm"):
            yield from _sweep(
                case, shapes.ROWS, {f"threads {n}, bytes {b}": (n, b) for n, b in SHAPES}, device
            )
    for name, kind in KERNELS.items():
        found = next((case for case in gpu.cases(small) if case.kind == kind), None)
        if found is not None:
            plain = shapes.SHAPES[name]
            others = {
                f"{name}: block {block}, warps {warps}": {**plain, "BLOCK": block, "num_warps": warps}
                for block in (plain["BLOCK"] // 2, plain["BLOCK"], plain["BLOCK"] * 2)
                for warps in (plain["num_warps"] // 2, plain["num_warps"], plain["num_warps"] * 2)
                if warps
            }
            yield from _sweep(found, shapes.SHAPES, others, device, name)


def _sweep(
    case: Case, table: dict[str, Any], candidates: dict[str, Any], device: str, name: str = ""
) -> Iterator[Found]:
    """Times each candidate in the place ``name`` of the table (empty: in all), and puts back what was there."""
    usual = KINDS[case.kind].ours(case, {"backend": "triton"})

    def candidate(shape: Any) -> Callable[..., Tensor]:
        def loss(*tensors: Tensor) -> Tensor:
            table.update(dict.fromkeys([name] if name else table, shape))
            return usual(*tensors)

        return loss

    before = dict(table)
    try:
        yield from timed(case, {what: candidate(shape) for what, shape in candidates.items()}, device)
    finally:
        table.update(before)


def exponentials(device: str, small: bool) -> Iterator[Found]:
    """Cross-entropy from the head: two passes over a row of logits, or scaled exponentials in one."""
    for case in gpu.cases(small):
        if case.kind != "linear" or case.nograd:
            continue

        def candidate(backend: str, on: bool) -> Callable[..., Tensor]:
            def loss(*tensors: Tensor) -> Tensor:
                with internals.scaled_exponentials(on):
                    return fastloss.linear_cross_entropy(*tensors, backend=backend)

            return loss

        ways = {"two passes": False, "scaled exponentials": True}
        losses = {f"{b}, {way}": candidate(b, on) for b in available(device) for way, on in ways.items()}
        yield from timed(case, losses, device)


def rows(device: str, small: bool) -> Iterator[Found]:
    """Every backend over rows: what a variant of the module is seen by."""
    for case in gpu.cases(small):
        if case.kind == "row" and case.calls == 1 and case.name.endswith("-inplace-warm"):
            losses = {
                name: lambda z, t, name=name: fastloss.cross_entropy(z, t, inplace=True, backend=name)
                for name in available(device)
            }
            yield from timed(replace(case, only=("*",)), losses, device)


def clusters(device: str, small: bool) -> Iterator[Found]:
    """CUDA's row cross-entropy: the kernel of one block a row, or of a cluster, which reads a row once."""
    if "cuda" not in available(device):
        yield {"case": "clusters", "reason": "no CUDA backend is here"}
        return
    for case in gpu.cases(small):
        if case.kind == "row" and case.calls == 1 and case.name.endswith("-inplace-warm"):

            def candidate(on: bool) -> Callable[..., Tensor]:
                def loss(logits: Tensor, target: Tensor) -> Tensor:
                    with internals.cluster_rows(on):
                        return fastloss.cross_entropy(logits, target, inplace=True, backend="cuda")

                return loss

            yield from timed(
                case, {"a block a row": candidate(False), "a cluster a row": candidate(True)}, device
            )


def variants(folder: Path, device: str, small: bool, seconds: float) -> Iterator[Found]:
    for module in sorted(folder.glob("*/_cuda*.so")):
        options = ["--device", device, "--only", "rows", "--seconds", str(seconds), *["--small"] * small]
        done = subprocess.run(
            [sys.executable, __file__, *options, "--json"],
            env={**os.environ, "FASTLOSS_CUDA_MODULE": str(module)},
            capture_output=True,
            text=True,
        )
        name = module.parent.name
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            yield {"case": f"variant {name}", "reason": said[-1]}
        for line in lines:
            yield {**json.loads(line), "variant": name}


def line(found: Found) -> str:
    name = f"{found.get('variant', '')} {found['case']}: {found.get('candidate', '')}".strip()
    return f"{name}: {found['reason']}" if "reason" in found else f"{name}: {found['median'] * 1e3:.3f} ms"


PARTS = {
    "chunks": chunks,
    "exponentials": exponentials,
    "shapes": launch_shapes,
    "clusters": clusters,
    "rows": rows,
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", choices=[*PARTS], action="append", help="this part; again for more")
    parser.add_argument("--variants", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="begin nothing after that")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    given = parser.parse_args(arguments)
    until, found = time.monotonic() + given.seconds, []

    def everything() -> Iterator[Found]:
        for name, part in PARTS.items():
            if name in (given.only or PARTS):
                yield from part(given.device, given.small)
        if given.variants:
            left = max(1.0, until - time.monotonic())
            yield from variants(given.variants, given.device, given.small, left)

    for one in everything():
        found.append(one)
        print(json.dumps(one) if given.json else line(one), flush=True)
        if given.out:  # whole after each
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
        if time.monotonic() > until:
            print("time is up", file=sys.stderr)
            break
    return 0 if any("median" in one for one in found) else 1


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main(sys.argv[1:]))
