"""What this GPU can do: a copy, and the GEMMs of a head alone, with the kernels that PyTorch's library takes for them.

    python tools/gpu/ceilings.py [--out FILE] [--device cpu --small]

A line each, and as JSON. What fastloss takes is seen against these (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastloss.bench.clock import once, summary
from fastloss.bench.steps import LimitStep
from fastloss.engine import invariance

REPEATS = 10
ROWS = (1024, 2048, 4096, 8192, 16384)
DIM, VOCAB = 4096, 128256


def seconds(run: Callable[[], object], device: str) -> float:
    step = LimitStep(run)
    return summary([once(step, device, lambda: None) for _ in range(REPEATS + 1)][1:])["median"]


def kernels(run: Callable[[], object], device: str) -> list[str]:
    """The names of what was launched, the longest first."""
    if device != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.device_time_total)
    return [event.key for event in events if event.device_time_total > 0]


def copies(device: str, small: bool) -> Iterator[dict[str, Any]]:
    for size in (1 << 20,) if small else (1 << 28, 1 << 30, 1 << 31):
        source = torch.ones(size // 4, device=device)
        into = torch.empty_like(source)
        took = seconds(lambda into=into, source=source: into.copy_(source), device)  # type: ignore[misc]
        yield {"what": "copy", "bytes": size, "seconds": took, "rate": 2 * size / took, "unit": "bytes/s"}


def fixed(hidden: Tensor, weight: Tensor) -> Tensor:
    """The product of fastloss.batch_invariant, with a float32 result: its price is seen against "logits"."""
    if hidden.device.type == "cpu":
        raise RuntimeError("Triton's kernels want a GPU")
    out = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device)
    invariance.multiply(out, hidden, weight)
    return out


def gemms(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """bfloat16: logits, d hidden, d weight; d weight also with a float32 result, where this torch can."""
    dim, vocab = (32, 512) if small else (DIM, VOCAB)
    weight = torch.randn(vocab, dim, device=device, dtype=torch.bfloat16)
    for rows in (16, 32) if small else ROWS:
        hidden = torch.randn(rows, dim, device=device, dtype=torch.bfloat16)
        logits = torch.empty(rows, vocab, device=device, dtype=torch.bfloat16)
        runs: dict[str, Callable[[], Tensor]] = {
            "logits": lambda h=hidden, z=logits: torch.mm(h, weight.t(), out=z),  # type: ignore[misc]
            "logits, batch-invariant": lambda h=hidden: fixed(h, weight),  # type: ignore[misc]
            "d hidden": lambda z=logits: torch.mm(z, weight),  # type: ignore[misc]
            "d weight": lambda h=hidden, z=logits: torch.mm(z.t(), h),  # type: ignore[misc]
            "d weight, float32": lambda h=hidden, z=logits: torch.mm(z.t(), h, out_dtype=torch.float32),  # type: ignore[misc, call-overload]
        }
        for name, run in runs.items():
            what = {"what": name, "rows": rows, "dim": dim, "vocab": vocab}
            try:
                took = seconds(run, device)
            except (ImportError, RuntimeError, TypeError) as error:
                yield {**what, "reason": str(error).splitlines()[0][:100]}
                continue
            rate = 2.0 * rows * dim * vocab / took
            yield {
                **what,
                "seconds": took,
                "rate": rate,
                "unit": "FLOP/s",
                "kernels": kernels(run, device)[:2],
            }


def line(found: dict[str, Any]) -> str:
    size = f"{found['bytes'] >> 20} MiB" if "bytes" in found else f"{found['rows']} rows"
    if "reason" in found:
        return f"{found['what']:<24} {size:>10}  not measured: {found['reason']}"
    name = (found.get("kernels") or [""])[0]
    rate = f"{found['rate'] / 1e12:.3f} T{found['unit']}"
    return f"{found['what']:<24} {size:>10}  {found['seconds'] * 1e3:9.3f} ms  {rate}  {name[:80]}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    found = []
    for part in (copies, gemms):
        for measured in part(given.device, given.small):
            found.append(measured)
            print(line(measured), flush=True)
            if given.out:  # whole after each, should the time be up
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    return 0 if any("rate" in one for one in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
