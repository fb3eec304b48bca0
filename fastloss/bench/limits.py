"""The physical limit of a case, measured in the same run as everybody."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastloss.bench.case import Case, Data, short
from fastloss.bench.kinds import KINDS
from fastloss.bench.ratios import CLONE, KEPT, LIMIT
from fastloss.bench.steps import LimitStep


def limits(case: Case, data: Data, device: str) -> dict[str, LimitStep]:
    """The traffic alone for what begins at logits or at log-probs; the GEMMs alone, over all rows, for a head. The least
    is the limit. A case that measures overhead has none: its ratio is to torch eager."""
    if case.calls > 1:
        return {}
    if (traffic := KINDS[case.kind].limit) is not None:
        name, make = traffic
        return {LIMIT + name: LimitStep(make(case, data))}
    return _gemm_steps(LIMIT, case, data, device, case.rows)


def references(case: Case, data: Data, device: str) -> dict[str, LimitStep]:
    """Shown beside the limit, never used as one."""
    if case.dim and data.kept < case.rows:
        return _gemm_steps(KEPT, case, data, device, data.kept)
    if case.kind == "row" and not case.inplace and case.calls == 1:
        return {CLONE: LimitStep(data["logits"].detach().clone)}
    return {}


def _gemm_steps(prefix: str, case: Case, data: Data, device: str, rows: int) -> dict[str, LimitStep]:
    """In the case's dtype, and on a CPU in float32 too: where low-precision GEMMs are emulated, float32 ones are the
    faster way to the same result (and the only one that is waited for, if the case is large)."""
    dtypes = dict.fromkeys((case.dtype, torch.float32) if device == "cpu" else (case.dtype,))
    if case.emulated(device):
        del dtypes[case.dtype]
    hidden = data["hidden"].detach().reshape(-1, case.dim)[:rows]
    weight = data["weight"].detach()
    name = f"{prefix}{case.gemms} GEMM{'s' * (case.gemms > 1)}"
    return {
        f"{name} {short(dtype)}": LimitStep(gemms(hidden.to(dtype), weight.to(dtype), case))
        for dtype in dtypes
    }


def gemms(hidden: Tensor, weight: Tensor, case: Case) -> Callable[[], None]:
    """logits (a reference model's have the same shape), then d hidden, then d weight, into memory that is there."""
    z = torch.zeros(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    d_hidden = torch.zeros_like(hidden) if not case.nograd else None
    d_weight = torch.zeros_like(weight) if not (case.nograd or case.frozen) else None

    def run() -> None:
        for _ in range(case.forwards):
            torch.mm(hidden, weight.t(), out=z)
        if d_hidden is not None:
            torch.mm(z, weight, out=d_hidden)
        if d_weight is not None:
            torch.mm(z.t(), hidden, out=d_weight)

    return run
