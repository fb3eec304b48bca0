"""The commonest call, with the fewest Python calls around the kernel: mean or sum over int64 targets, on the CPU, no option.

On a tensor of a few hundred logits those calls are the whole cost. The numbers are those of engine/cross_entropy.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.engine import cpu_rows, plain
from fastloss.engine.checks import bad_target
from fastloss.engine.new_gradient import LARGE, new_gradient

_native: Any = cpu_rows.native if hasattr(cpu_rows.native, "reduced_cross_entropy") else None
# float16 is not here: its gradient is kept unscaled until the upstream gradient is known.
_CODES = {**plain.CODES, torch.bfloat16: 1}
_CPU = torch.device("cpu")
_INT64 = torch.int64
_autocast = torch.is_autocast_enabled


def is_plain(logits: Any, target: Any, backend: str) -> bool:
    """Whether :func:`plain_cross_entropy` takes the call; if not, the long way checks it and says what is wrong."""
    return (
        _native is not None
        and not plain.is_compiling()
        and type(logits) in plain.LEAVES
        and type(target) is Tensor
        and logits.is_cpu
        and target.is_cpu
        and logits.dtype in _CODES
        and target.dtype is _INT64
        and len(size := logits.shape) == 2
        and target.shape == size[:1]
        and 0 not in size
        and logits.is_contiguous()
        and target.is_contiguous()
        and not _autocast("cpu")
        and plain.is_eager(backend)
    )


def plain_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
    """Of a call that :func:`is_plain`."""
    if logits.requires_grad and torch.is_grad_enabled():
        return plain.made_in_forward(logits, None, _run_with_gradient, (ignore_index, mean), (target,))
    return _run(logits, target, ignore_index, mean, None)


def _run(logits: Tensor, target: Tensor, ignore_index: int, mean: bool, grad: Tensor | None) -> Tensor:
    dtype = logits.dtype
    loss = torch.empty((), dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    bad = _native.reduced_cross_entropy(
        logits.data_ptr(), _CODES[dtype], logits.size(0), logits.size(1), logits.stride(0), target.data_ptr(),
        ignore_index, mean, 0 if grad is None else grad.data_ptr(), loss.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise bad_target(target, bad, logits.size(1))
    return loss.to(dtype) if dtype is torch.bfloat16 else loss


def _run_with_gradient(
    given: tuple[int, bool], logits: Tensor, _: None, target: Tensor
) -> tuple[Tensor, tuple[Tensor, None]]:
    if logits.nbytes >= LARGE:
        grad = new_gradient(logits.shape, logits.dtype, _CPU)
    else:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return _run(logits, target, *given, grad), (grad, None)
