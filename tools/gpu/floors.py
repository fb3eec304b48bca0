"""The tables of docs/gpu.md: what each kernel must move or multiply, the least time that takes on four GPUs, and an estimate beside it.

python tools/gpu/floors.py [--write]     prints them, or puts them into the page; a test holds the page to them

estimates.py has the assumptions, loop_counts.json (count_loops.py) the counts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import estimates
from estimates import CARDS, COUNTS, Card

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
ROWS, VOCAB, DIM = 8192, 128256, 4096
BACKENDS = {"cuda": COUNTS["cuda"], "triton": COUNTS["triton kernels"]}
CUDA = {kernel.name: kernel for kernel in estimates.row_kernels("cuda", VOCAB)}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def row_table(backend: str) -> list[str]:
    """Each cell: the floor, and the estimate with what bounds it."""
    title = {"cuda": "CUDA", "triton": "Triton"}[backend]
    lines = _head(f"row kernel in {title}, [{ROWS}, {VOCAB}]", "GB")
    for kernel in estimates.row_kernels(backend, VOCAB):
        least = ROWS * VOCAB * kernel.size * kernel.floor  # the numbers per row are left out
        cells = []
        for card in CARDS.values():
            if kernel.of not in BACKENDS[backend][card.arch]:
                cells.append("not there")
                continue
            found = estimates.estimate(kernel, card, BACKENDS[backend], ROWS, VOCAB)
            cells.append(f"{_ms(least / (card.bandwidth * 1e9))} → {_ms(found.seconds)} {found.bound}")
        lines.append(f"| {kernel.name} | {least / 1e9:.3g} | {' | '.join(cells)} | |")
    if backend == "cuda":
        tokens = 5 * 4 * 64 * 4096
        cells = [
            f"{_ms(tokens / (c.bandwidth * 1e9))} → {_ms(tokens / (c.bandwidth * 1e9 * estimates.BANDWIDTH_SHARE) + estimates.LAUNCH)}"
            for c in CARDS.values()
        ]
        name = "policy terms, float32 [64, 4096], four inputs and a gradient"
        lines.append(f"| {name} | {tokens / 1e9:.3g} | {' | '.join(cells)} | |")
    return lines


def count_table() -> list[str]:
    """What the estimates of the CUDA and Triton kernels are made of: a row a kernel, a cell an architecture."""
    arches = dict.fromkeys(card.arch for card in CARDS.values())
    lines = [f"| slots (special functions) an element; kB in flight | {' | '.join(arches)} |", "| --- " * (len(arches) + 1) + "|"]  # fmt: skip
    for backend, title in (("cuda", "CUDA"), ("triton", "Triton")):
        for kernel in estimates.row_kernels(backend, VOCAB):
            if kernel.name.startswith("scaling"):
                continue
            cells = []
            for arch in arches:
                counted = BACKENDS[backend][arch].get(kernel.of)
                if counted is None:
                    cells.append("")
                    continue
                loops = counted["loops"]
                passes = [loops[m] for m in ("global>shared", "global", "shared") if m in loops][:1]
                passes += [loops[m] for m in ("global>global", "shared>global") if m in loops][:1]
                slots = " + ".join(f"{p['slots']:.1f} ({p['mufu']:.1f})" for p in passes)
                flight = estimates.blocks(kernel, counted["registers"]) * kernel.threads
                flight *= max(p["bytes_in_flight"] for p in passes)
                cells.append(f"{slots}; {flight / 1e3:.0f}" if flight else slots)
            lines.append(f"| {title}, {kernel.name} | {' | '.join(cells)} |")
    return lines


class HeadWay(NamedTuple):
    name: str
    rows: int
    gemms: float  # of 2·rows·V·D operations
    between: tuple[str, ...]  # row kernels that all logits go through
    dtype: str = "bfloat16"  # of the logits
    own: bool = False  # the GEMM is ours
    chunks: int = 1  # more: d weight is added up in float32


CE, STATS, GRAD = "cross-entropy with its gradient", "statistics of rows", "gradient from coefficients"


def head_ways() -> list[HeadWay]:
    found = [
        HeadWay(f"cross-entropy, {rows} rows, 3 GEMMs", rows, 3, (CE,)) for rows in (1024, 2048, 4096, ROWS)
    ]
    return [
        *found,
        HeadWay(f"cross-entropy, {2 * ROWS} rows in two chunks, 3 GEMMs", 2 * ROWS, 3, (CE,), chunks=2),
        HeadWay(f"scaled exponentials, {ROWS} rows, 3 GEMMs", ROWS, 3, ("scaled exponentials",)),
        HeadWay(f"weight frozen, {ROWS} rows, 2 GEMMs", ROWS, 2, (CE,)),
        HeadWay(f'memory="low", {ROWS} rows, 3.5 GEMMs', ROWS, 3.5, (STATS, GRAD)),
        HeadWay(f"coefficients that come late, {ROWS} rows, 4 GEMMs", ROWS, 4, (STATS, GRAD)),
        HeadWay(f"log-probs without gradient, {ROWS} rows, 1 GEMM", ROWS, 1, (STATS,)),
        HeadWay(f"the same, batch-invariant, {ROWS} rows, 1 GEMM of ours", ROWS, 1, (STATS,), "float32", True),
    ]  # fmt: skip


def head_seconds(way: HeadWay, card: Card) -> tuple[float, float]:
    """The floor, of the GEMMs alone, and the estimate."""
    flops = way.gemms * 2 * way.rows * VOCAB * DIM
    share = estimates.OWN_MATMUL_SHARE if way.own else card.matmul_share
    seconds = flops / (card.tflops * 1e12 * share) + HEAD_LAUNCHES * estimates.LAUNCH
    for name in way.between:
        kernel = CUDA[f"{name}, {way.dtype}"]
        seconds += estimates.estimate(kernel, card, BACKENDS["cuda"], way.rows, VOCAB).seconds
    if way.chunks > 1:
        # A float32 d weight: each chunk but the first reads it, each writes it, and the cast reads it and writes half of it.
        moved = VOCAB * DIM * 4 * (2 * way.chunks + 0.5)
        seconds += moved / (card.bandwidth * 1e9 * estimates.BANDWIDTH_SHARE)
    return flops / (card.tflops * 1e12), seconds


HEAD_LAUNCHES = (
    10  # 7 + 2 of float32 and one for the upstream gradient's dtype: tests/engine/test_gpu_launches.py
)


def head_table() -> list[str]:
    lines = _head(f"head, D = {DIM}, V = {VOCAB}, bfloat16", "TFLOP")
    for way in head_ways():
        cells = []
        for card in CARDS.values():
            least, likely = head_seconds(way, card)
            cells.append(f"{_ms(least)} → {_ms(likely)}")
        flops = way.gemms * 2 * way.rows * VOCAB * DIM
        lines.append(f"| {way.name} | {flops / 1e12:.3g} | {' | '.join(cells)} | |")
    return lines


def _head(what: str, unit: str) -> list[str]:
    return [f"| {what} | {unit} | {' | '.join(CARDS)} | measured |", "| --- " * (len(CARDS) + 3) + "|"]


def markdown() -> str:
    tables = [row_table("cuda"), row_table("triton"), head_table(), count_table()]
    return "\n\n".join("\n".join(table) for table in tables)


def write() -> None:
    """Puts the tables where the page has them now, one after the other; what was entered as measured stays with its row."""
    page = PAGE.read_text(encoding="utf-8")
    found = re.search(r"(?:^\|.*\n)+(?:\n(?:^\|.*\n)+)*", page, re.M)
    assert found is not None
    measured = dict(_measured(found.group()))
    tables = []
    for table in markdown().split("\n\n"):
        header, *lines = table.split("\n")
        for at, line in enumerate(lines):
            if line.endswith("| |") and (kept := measured.get((header, line.split("|")[1]))):
                lines[at] = f"{line.removesuffix(' |')} {kept} |"
        tables.append("\n".join([header, *lines]))
    PAGE.write_text(
        page[: found.start()] + "\n\n".join(tables) + "\n" + page[found.end() :], encoding="utf-8"
    )


def _measured(tables: str) -> Iterator[tuple[tuple[str, str], str]]:
    """The last cells that are filled, by their table's header and their row's first cell."""
    for table in tables.strip().split("\n\n"):
        header, *lines = table.split("\n")
        if header.endswith("| measured |"):
            for line in lines:
                cells = line.split("|")
                if cells[-2].strip():
                    yield (header, cells[1]), cells[-2].strip()


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        print(markdown())
