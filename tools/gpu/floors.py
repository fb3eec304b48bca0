"""The tables of docs/gpu.md: what each kernel must move or multiply, and the least time that takes on four GPUs.

python tools/gpu/floors.py        prints them; a test holds the page to them
"""

from __future__ import annotations

# Makers' figures: memory in GB/s, dense bfloat16 in TFLOP/s. What a card reaches of them is measured by `make gpu`'s stage ceilings.
CARDS = {
    "A100 80 GB": (2039, 312),
    "H100 SXM": (3350, 989),
    "H200": (4800, 989),
    "B200": (8000, 2250),
}
ROWS, VOCAB, DIM = 8192, 128256, 4096


def row_kernels() -> list[tuple[str, int]]:
    """Name and bytes: the logits read or written, once each; the numbers per row are left out."""
    table = []
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        once = ROWS * VOCAB * size
        table += [
            (f"statistics of rows, {dtype}", once),
            (f"cross-entropy with its gradient, {dtype}", 2 * once),
            (f"gradient from coefficients, {dtype}", 2 * once),
            (f"scaling by the upstream gradient, {dtype}", 2 * once),
        ]
    tokens = 64 * 4096
    table.append(("policy terms, float32 [64, 4096], four inputs and a gradient", 5 * 4 * tokens))
    return table


def heads() -> list[tuple[str, int]]:
    """Name and floating-point operations of the GEMMs, 2·rows·V·D each."""
    table = []
    for rows in (1024, 2048, 4096, ROWS):
        table.append((f"cross-entropy, {rows} rows, 3 GEMMs", 3 * 2 * rows * VOCAB * DIM))
    one = 2 * ROWS * VOCAB * DIM
    table += [
        (f"weight frozen, {ROWS} rows, 2 GEMMs", 2 * one),
        (f'memory="low", {ROWS} rows, 3.5 GEMMs', 7 * one // 2),
        (f"coefficients that come late, {ROWS} rows, 4 GEMMs", 4 * one),
        (f"log-probs without gradient, {ROWS} rows, 1 GEMM", one),
        (f"the same, batch-invariant, {ROWS} rows, 1 GEMM of ours", one),
    ]
    return table


def markdown() -> str:
    head = " | ".join(CARDS)
    line = "| --- " * (len(CARDS) + 3) + "|"
    lines = [f"| row kernel, [{ROWS}, {VOCAB}] | GB | {head} | measured |", line]
    for name, moved in row_kernels():
        floors = " | ".join(f"{moved / (speed * 1e9) * 1e3:.3g} ms" for speed, _ in CARDS.values())
        lines.append(f"| {name} | {moved / 1e9:.3g} | {floors} | |")
    lines += ["", f"| head, D = {DIM}, V = {VOCAB}, bfloat16 | TFLOP | {head} | measured |", line]
    for name, flops in heads():
        floors = " | ".join(f"{flops / (speed * 1e12) * 1e3:.3g} ms" for _, speed in CARDS.values())
        lines.append(f"| {name} | {flops / 1e12:.3g} | {floors} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
