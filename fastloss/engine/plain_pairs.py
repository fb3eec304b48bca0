"""The commonest contrasts of pairs, with the fewest Python calls around the kernel: one number a response, float32 or
float64 on the CPU, options that are the same for all pairs. On 64 pairs those calls are the whole cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.engine import cpu_rows, plain
from fastloss.engine.plain import address

_native: Any = cpu_rows.native if hasattr(cpu_rows.native, "PlainPairs") else None
_NUMBERS = (float, int)
MEANS, EXTREMES = 6, 2


def is_plain(c: Any, r: Any, rc: Any, rr: Any, numbers: tuple[Any, Any, Any], backend: str) -> bool:
    """Whether :func:`plain_pair_loss` takes the call; if not, the long way checks it and says what is wrong."""
    return (
        not plain.is_compiling()
        and _native is not None
        and type(c) in plain.LEAVES
        and c.is_cpu
        and c.dtype in plain.CODES
        and len(size := c.shape) == 1
        and size[0] > 0
        and r is not None
        and plain.are_like(c, c, r, rc, rr)
        and type(numbers[0]) in _NUMBERS
        and type(numbers[1]) in _NUMBERS
        and type(numbers[2]) in _NUMBERS
        and plain.is_eager(backend)
    )


def options(
    terms: list[tuple[int, float]],
    beta: float,
    smoothing: float,
    margin: float,
    divergence: int = 0,
    alpha: float = 0.5,
    delta: float = 0.0,
    tau: float = 0.05,
) -> Any:
    """The native module's, to be remembered."""
    return _native.PlainPairs(terms, divergence, alpha, beta, smoothing, margin, delta, tau)


def plain_pair_loss(
    options: Any,
    c: Tensor,
    r: Tensor,
    rc: Tensor | None = None,
    rr: Tensor | None = None,
    *,
    per_pair: bool = False,
    extremes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """(loss or its sum, chosen rewards, rejected rewards, metrics) of a call that :func:`is_plain`."""
    metrics = c.new_empty(MEANS + EXTREMES if extremes else MEANS)
    won, lost = torch.empty_like(c), torch.empty_like(c)
    given = options, per_pair, extremes, won, lost, metrics
    if (c.requires_grad or r.requires_grad) and torch.is_grad_enabled():
        loss = plain.made_in_forward(c, r, _run, given, (rc, rr))
    else:
        loss, _ = _run(given, c, r, rc, rr)
    return loss, won, lost, metrics.unbind()


def _run(
    given: tuple[Any, bool, bool, Tensor, Tensor, Tensor],
    c: Tensor,
    r: Tensor,
    rc: Tensor | None,
    rr: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    options, per_pair, extremes, won, lost, metrics = given
    d_c, d_r = torch.empty_like(c), torch.empty_like(c)
    loss = torch.empty_like(c) if per_pair else c.new_empty(())
    options.run(
        plain.CODES[c.dtype], c.numel(), c.data_ptr(), r.data_ptr(), address(rc), address(rr), per_pair, loss.data_ptr(),
        d_c.data_ptr(), d_r.data_ptr(), won.data_ptr(), lost.data_ptr(), metrics.data_ptr(), extremes,
    )  # fmt: skip
    return loss, (d_c, d_r)
