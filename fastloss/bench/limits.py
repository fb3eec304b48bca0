"""The physical limit of a case, measured in the same run as everybody."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastloss.bench.cases import Case, Data, short
from fastloss.bench.steps import LimitStep

PREFIX = "limit: "
COPY = PREFIX + "copy"
# Not a limit, but what a fresh tensor costs whoever writes one: its page faults.
CLONE = "copy into a new tensor"


def limits(case: Case, data: Data, device: str) -> dict[str, LimitStep]:
    """A copy of the same bytes for rows of logits. For the linear head the GEMMs alone in its dtype, and on a CPU the
    same in float32 too: where low-precision GEMMs are emulated, float32 ones are the faster way to the same result.
    The least of these is the limit. A case that measures overhead has none: its ratio is to torch eager."""
    if case.calls > 1:
        return {}
    if case.kind == "row":
        assert data.logits is not None
        source = data.logits.detach().clone()
        copy = source.clone()
        return {COPY: LimitStep(lambda: copy.copy_(source))}
    assert data.hidden is not None and data.weight is not None
    hidden, weight = data.hidden.detach(), data.weight.detach()
    dtypes = dict.fromkeys((case.dtype, torch.float32) if device == "cpu" else (case.dtype,))
    name = f"{PREFIX}{case.gemms} GEMM{'s' * (case.gemms > 1)}"
    return {
        f"{name} {short(dtype)}": LimitStep(gemms(hidden.to(dtype), weight.to(dtype), case.gemms))
        for dtype in dtypes
    }


def references(case: Case, data: Data) -> dict[str, LimitStep]:
    """Shown beside the limit, never used as one."""
    if case.kind != "row" or case.inplace or case.calls > 1:
        return {}
    assert data.logits is not None
    return {CLONE: LimitStep(data.logits.detach().clone)}


def gemms(hidden: Tensor, weight: Tensor, count: int) -> Callable[[], None]:
    """logits, then d hidden, then d weight, into memory that is already there."""
    z = torch.zeros(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    d_hidden = torch.zeros_like(hidden)
    d_weight = torch.zeros_like(weight) if count == 3 else None

    def run() -> None:
        torch.mm(hidden, weight.t(), out=z)
        if count > 1:
            torch.mm(z, weight, out=d_hidden)
        if d_weight is not None:
            torch.mm(z.t(), hidden, out=d_weight)

    return run
