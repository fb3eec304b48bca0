"""Whether every token's logits must have the same bits in any batch (:func:`batch_invariant`), and who multiplies them then.

Blocks of the vocabulary on the CPU have that property as they are. On a GPU the library chooses tiles, and how to split a sum, by
the number of rows: the logits are then made by a Triton kernel of fixed tiles, in float32. Gradients are the library's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator

from torch import Tensor

from fastloss.engine import devices, gate
from fastloss.engine.head_types import Head
from fastloss.engine.triton import DTYPES, TritonBackend

ALIGNMENT = 16  # elements from row to row that Triton takes for aligned

_wanted = os.environ.get("FASTLOSS_BATCH_INVARIANT", "0") not in ("", "0")


def batch_invariant(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Ask for a token's log-probability from a linear head to have the same bits alone, in any batch, order, padding or packing, and
    with any ``chunk_size``, on a GPU too: as a call, for the process, or as a context manager.

    In reinforcement learning the first ratio of new to old policy is then exactly 1. On a GPU the logits of every head are made in
    float32 by one Triton kernel of fixed tiles and a fixed order over D, slower than the library's product (``make gpu`` measures by
    how much); gradients are the library's, and promise nothing. On a CPU blocks of the vocabulary need nothing more. The environment
    variable ``FASTLOSS_BATCH_INVARIANT=1`` is the same from the start.

    Args:
        enabled: False goes back to the library's products.

    Raises:
        RuntimeError: not here, but in every later call of a head that cannot keep the promise, with the reason: chunks of rows on a
            CPU, float64, ``group=``, ``lora=``, the definition, no Triton.

    >>> import torch, fastloss
    >>> hidden, weight, target = torch.randn(8, 16), torch.randn(32, 16), torch.arange(8)
    >>> with fastloss.batch_invariant():
    ...     together = fastloss.linear_token_stats(hidden, weight, target).logprobs
    ...     alone = fastloss.linear_token_stats(hidden[3:4], weight, target[3:4]).logprobs
    >>> torch.equal(together[3:4], alone)
    True
    """
    global _wanted
    previous, _wanted = _wanted, bool(enabled)

    @contextlib.contextmanager
    def restore() -> Iterator[None]:
        global _wanted
        try:
            yield
        finally:
            _wanted = previous

    return restore()


def wanted() -> bool:
    """Whether the caller asked for it."""
    return _wanted


def refuse(reason: str) -> None:
    """RuntimeError where it is asked for and ``reason`` says why a call cannot do it."""
    if _wanted and reason:
        raise RuntimeError(
            f"batch_invariant: this call cannot promise the same bits in every batch: {reason}"
        )


def why_not(head: Head) -> str:
    """Why chunks of rows cannot; empty if they can."""
    if head.rank:
        return "a LoRA's product is the library's"
    if not devices.is_gpu(head.weight.device):
        return "chunks of rows on a CPU multiply with its library"
    if head.dtype not in DTYPES:
        return f"there is no such product of {head.dtype}"
    if head.backend.differentiable:
        return "the definition multiplies with PyTorch"
    return TritonBackend().why_not()


def multiply(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """``out [rows, V]`` (float32) = ``hidden [rows, D]`` · ``weight [V, D]``ᵀ."""
    kernels = importlib.import_module("fastloss.kernels.logits")
    kernels.invariant_logits(aligned(hidden, kernels.FARTHEST), aligned(weight, kernels.FARTHEST), out)


def aligned(x: Tensor, farthest: int) -> Tensor:
    """``x [rows, D]``, or a copy whose rows begin at multiples of 16 elements: Triton compiles another program for rows that do not,
    and a row that begins elsewhere in another batch must meet the same one."""
    if (
        x.stride(1) == 1
        and x.stride(0) % ALIGNMENT == 0
        and x.stride(0) < farthest
        and gate.address(x) % 16 == 0
    ):
        return x
    rows, dim = x.shape
    copy = x.new_empty((rows, -(-dim // ALIGNMENT) * ALIGNMENT))[:, :dim]
    return copy.copy_(x)
