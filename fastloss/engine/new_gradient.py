"""The memory of a gradient that is about to be written for the first time."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastloss.engine import cpu_rows

# Below this the allocator gives back memory that has its pages already.
LARGE = 32 << 20
# Most of the time of writing a fresh 131 MB tensor is page faults. FASTLOSS_HUGE_PAGES=0 keeps the usual pages.
HUGE_PAGES = os.environ.get("FASTLOSS_HUGE_PAGES", "1") != "0" and hasattr(
    cpu_rows.native, "advise_huge_pages"
)


def new_gradient(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, with large pages asked for where it is large and on a CPU (Linux)."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if HUGE_PAGES and out.nbytes >= LARGE and device.type == "cpu" and type(out) is Tensor:
        cpu_rows.native.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
