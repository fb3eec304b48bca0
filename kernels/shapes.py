"""Every launch shape: what a sweep on a GPU may overwrite, in place (tools/gpu/sweeps.py). None was tuned on one.

Reads and writes nothing. A launcher looks its shape up at each call, so that another one is taken from the next call on.
"""

from typing import Any

import torch

WARP = 64 if torch.version.hip else 32

# Kernels of one row a program (rows.py, exponentials.py): threads, and the bytes of logits that each has of a block. As many as spilled
# nowhere with everything that a row can be asked for (tools/kernel_report_triton.py); a soft-cap's slope lives beside its z, and a
# vocabulary that 16 does not divide is read entry by entry, through more registers. What is asked for does not choose: a logsumexp
# has the same bits from every function.
ROWS: dict[str, tuple[int, int]] = {"plain": (1024, 16), "odd": (512, 16), "softcap": (512, 8)}

# The batch-invariant product (logits.py), by the operands' bytes.
TILES: dict[int, dict[str, Any]] = {
    2: {"M": 128, "N": 128, "K": 32, "num_warps": 8, "num_stages": 4},
    4: {"M": 64, "N": 64, "K": 16, "num_warps": 4, "num_stages": 4},
}

SHAPES: dict[str, dict[str, Any]] = {
    # Two entries a thread, seven sums of each: with four sm_90 spills in float32.
    "divergence": {"BLOCK": 1024, "num_warps": 1024 // 2 // WARP},
    # 128 threads, one pair or eight tokens each; sums in float64 take two registers a number.
    "pair": {"BLOCK": 128, "num_warps": 4},
    "segment": {"BLOCK": 1024, "num_warps": 4},
    # 128 threads with four tokens each: one 16-byte load per input, and the sums stay in registers (two each spilled 8 bytes on
    # sm_100). Without maxnreg the assemblers of Triton 3.6 and 3.7 spill up to 16 bytes rather than lose a program per multiprocessor.
    "policy": {"BLOCK": 512, "num_warps": 4, "maxnreg": 255},
    "policy_total": {"ROWS": 32, "num_warps": 4},
    "reduce": {"BLOCK": 4096, "num_warps": 16},
    # 16 elements a thread.
    "scale": {"BLOCK": 4096, "num_warps": 8},
    # 128 threads with eight tokens each.
    "scan": {"BLOCK": 1024, "num_warps": 4},
    # Eight tokens a thread: two 16-byte loads per input.
    "value": {"BLOCK": 2048, "num_warps": 8},
    "value_total": {"ROWS": 64, "num_warps": 4},
    "kl": {"BLOCK": 2048, "num_warps": 8},
}
for _shape in SHAPES.values():
    _shape["enable_fp_fusion"] = True  # Triton 3.10 turns it off where nobody asks for it
