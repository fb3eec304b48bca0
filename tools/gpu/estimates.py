"""How long a kernel or a head may take on a card, from counts of the machine code and assumptions that are written down here. Not measured.

An estimate is the longest of these times, since the others hide behind it where enough warps are there, and a launch:

- **memory** (m): the bytes that are really moved over BANDWIDTH_SHARE of the maker's bandwidth;
- **instructions** (i): the issue slots of the loops, 4 warps of 32 a clock and multiprocessor; **special functions** (s): 16 a clock; **float32** operations (f): 64 a
  clock on sm_80, 128 after it. The rates are those of the CUDA programming guide; UNIT_SHARE of them;
- **latency** (l): the bytes that loops read from global memory over what is in flight: the threads of a multiprocessor times their loads in flight, every LATENCY.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

COUNTS = json.loads((Path(__file__).resolve().parent / "loop_counts.json").read_text())


class Card(NamedTuple):
    """Makers' figures but for ``matmul_share``: memory in GB/s, dense bfloat16 in TFLOP/s, L2 and shared memory (of a multiprocessor) in bytes."""

    bandwidth: float
    tflops: float
    arch: str
    multiprocessors: int
    clock: float  # GHz: the one that the maker's TFLOP/s are counted at
    l2: int
    shared: int
    # Stas Bekman's "maximum achievable matmul FLOPS" (ml-engineering, 2026-08): bfloat16, over the maker's rate. H200: "the same" as H100.
    matmul_share: float


CARDS = {
    "A100 80 GB": Card(2039, 312, "sm_80", 108, 1.41, 40 << 20, 164 << 10, 0.869),
    "H100 SXM": Card(3350, 989, "sm_90", 132, 1.83, 50 << 20, 228 << 10, 0.803),
    "H200": Card(4800, 989, "sm_90", 132, 1.83, 50 << 20, 228 << 10, 0.803),
    "B200": Card(8000, 2250, "sm_100", 148, 1.86, 126 << 20, 228 << 10, 0.776),
}
# QuACK's softmax on an H100: 3.01 of 3.35 TB/s ("Getting memory-bound kernels to speed-of-light", 2025). Taken for every card.
BANDWIDTH_SHARE = 0.9
UNIT_SHARE = 0.8  # of what the units could do: ours, without a source
# Seconds: twice the 400 ns that QuACK's authors give for an H100's memory; under load it is longer than alone. Taken for every card.
LATENCY = 800e-9
LAUNCH = 3e-6  # seconds: ours, without a source
OWN_MATMUL_SHARE = 0.5  # of the maker's rate, the batch-invariant product: ours, without a source
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor


class Part(NamedTuple):
    """What one loop does with a share of the elements. Bytes are in units of an element's."""

    loops: tuple[str, ...]  # the first that the kernel has
    share: float = 1.0
    memory_read: float = 0.0
    written: float = 0.0


class Kernel(NamedTuple):
    name: str
    of: str  # in loop_counts.json
    size: int  # bytes of an element
    threads: int
    parts: Callable[[Card, int], list[Part]]  # of the card and of how many bytes of rows are at work at once
    shared: bool = False  # a block takes half of the shared memory
    floor: float = 2.0  # what must be read and written, in bytes of an element
    tensors: int = 1  # that a loop reads


class Estimate(NamedTuple):
    seconds: float
    bound: str  # m, i, s, f or l
    moved: float  # bytes
    in_flight: int  # bytes of a multiprocessor


def blocks(kernel: Kernel, registers: int) -> int:
    """Blocks of a multiprocessor at once, by registers (in steps of 8) and threads."""
    by_registers = REGISTERS // (math.ceil(registers / 8) * 8 * kernel.threads)
    return max(1, min(by_registers, THREADS // kernel.threads, 2 if kernel.shared else 32))


def estimate(kernel: Kernel, card: Card, counts: dict[str, Any], rows: int, vocab: int) -> Estimate:
    counted = counts[card.arch][kernel.of]
    at_once = blocks(kernel, counted["registers"])
    row = vocab * kernel.size
    elements, moved, in_flight = rows * vocab, 0.0, 0
    clocks = {"i": 0.0, "s": 0.0, "f": 0.0}  # of a multiprocessor, for one element
    waiting = 0.0
    for part in kernel.parts(card, card.multiprocessors * at_once * row):
        name = next(name for name in part.loops if name in counted["loops"])
        loop = counted["loops"][name]
        moved += elements * kernel.size * (part.memory_read + part.written)
        clocks["i"] += part.share * loop["slots"] / 128
        clocks["s"] += part.share * loop["mufu"] / 16
        clocks["f"] += part.share * loop["fp32"] / (64 if card.arch == "sm_80" else 128)
        if name.startswith("global"):
            here = at_once * kernel.threads * loop["bytes_in_flight"]
            in_flight = max(in_flight, here)
            read = elements * part.share * kernel.size * kernel.tensors
            waiting += read * LATENCY / (card.multiprocessors * here)
    rate = card.multiprocessors * card.clock * 1e9 * UNIT_SHARE
    times = {name: elements * each / rate for name, each in clocks.items()}
    times |= {"m": moved / (card.bandwidth * 1e9 * BANDWIDTH_SHARE), "l": waiting}
    bound = max(times, key=times.__getitem__)
    return Estimate(times[bound] + LAUNCH, bound, moved, in_flight)


def _rest(card: Card, at_work: float, kept: float) -> float:
    """What of a row is read from memory a second time: nothing of what fits half of L2 for all rows at work, else all that is not kept."""
    return 0.0 if at_work * (1 - kept) <= card.l2 / 2 else 1 - kept


def two_passes(vocab: int, size: int, keeps: bool) -> Callable[[Card, int], list[Part]]:
    """Statistics, then the gradient; a share of the row waits in shared memory (csrc/cuda/rows.cu)."""

    def parts(card: Card, at_work: int) -> list[Part]:
        kept = min(1.0, (card.shared // 2 - 2048) / (vocab * size)) if keeps else 0.0
        again = _rest(card, at_work, kept)
        return [
            Part(("global>shared", "global"), kept, kept),
            Part(("global", "global>shared"), 1 - kept, 1 - kept),
            Part(("shared>global", "global>global"), kept, 0.0, kept),
            Part(("global>global",), 1 - kept, again, 1 - kept),
        ]

    return parts


def _reads(card: Card, at_work: int) -> list[Part]:
    return [Part(("global",), 1.0, 1.0)]


def _updates(card: Card, at_work: int) -> list[Part]:
    return [Part(("global>global",), 1.0, 1.0, 1.0)]


def _both_twice(card: Card, at_work: int) -> list[Part]:
    return [Part(("global",), 1.0, 2.0), Part(("global>global",), 1.0, 2.0, 1.0)]


def _cluster(card: Card, at_work: int) -> list[Part]:
    return [Part(("shared",), 1.0, 1.0), Part(("shared>global",), 1.0, 0.0, 1.0)]


def row_kernels(backend: str, vocab: int) -> list[Kernel]:
    """The plain kernels of csrc/cuda or kernels/, with their launches for a long vocabulary."""
    cuda = backend == "cuda"
    found = []
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        forward = f"row_forward_kernel<{dtype}, 0, 0, {{}}>" if cuda else f"row_{{}}_kernel<{dtype}>"
        names = ("0", "1") if cuda else ("stats", "cross_entropy")
        threads = 448 if cuda else 1024
        found += [
            Kernel(f"statistics of rows, {dtype}", forward.format(names[0]), size, threads, _reads, floor=1.0),
            Kernel(
                f"cross-entropy with its gradient, {dtype}", forward.format(names[1]), size, threads,
                two_passes(vocab, size, cuda), cuda,
            ),
        ]  # fmt: skip
        if cuda:
            cluster = f"cluster_rows_kernel<{dtype}>"
            found.append(
                Kernel(f"the same, one read by clusters, {dtype}", cluster, size, 896, _cluster, True)
            )
        if size == 2:
            exponentials = f"exponentials_kernel<{dtype}, 0>" if cuda else f"exponentials_kernel<{dtype}>"
            found.append(Kernel(f"scaled exponentials, {dtype}", exponentials, size, threads, _updates))
        grad = f"row_grad_kernel<{dtype}, 0, 0>" if cuda else f"row_grad_kernel<{dtype}>"
        found += [
            Kernel(f"gradient from coefficients, {dtype}", grad, size, 256 if cuda else 1024, _updates),
            Kernel(f"scaling by the upstream gradient, {dtype}", f"scale_kernel<{dtype}>", size, 256, _updates),
        ]  # fmt: skip
        for code, name in ((0, "forward KL"), (2, "Jensen-Shannon")) if cuda else ():
            of = f"divergence_kernel<{dtype}, {code}>"
            name = f"distillation by {name} with its gradient, {dtype}"
            found.append(Kernel(name, of, size, 256, _both_twice, floor=3.0, tensors=2))
    return found
