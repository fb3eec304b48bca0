"""Numbers that change from call to call under torch.compile, and how an operator is given them.

torch.compile makes a number that changed once symbolic. A tensor's arithmetic takes such a number, a ``float`` of an operator's schema
does not: it is compiled again at each value. So an operator takes, beside its numbers, all of them in one float64 tensor on the
CPU, where one changes; in their place it is given NaN. A number that stays is a constant of the graph, as before: a graph with a tensor on
the CPU is no CUDA graph, and PyTorch makes no number symbolic where it makes CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value


def changes(value: Any) -> bool:
    """Whether ``value`` is no constant of the graph that is being traced: symbolic, or a tensor already."""
    if isinstance(value, Tensor):
        return True
    return torch.compiler.is_compiling() and not has_static_value(value)


def is_given(value: Any) -> bool:
    """Whether ``value`` may be another number than 0."""
    return isinstance(value, Tensor) or value != 0


def as_tensor(value: Any) -> Any:
    """A number that changes as a 0-d tensor, float64 on the CPU, which promotes no other tensor's dtype; any other as it is."""
    if isinstance(value, Tensor) or not changes(value):
        return value
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def scalar_like(x: Tensor, value: Any) -> Tensor:
    """``value``, 0-d, in the dtype and on the device of ``x``: what ``clamp`` and ``where`` take where they are not to be compiled again
    at each value of a number that changes."""
    return torch.ones((), dtype=x.dtype, device=x.device) * value


def in_one_tensor(values: Sequence[Any]) -> Tensor | None:
    """``values`` as a float64 tensor on the CPU if one of them changes; else None."""
    if not any(changes(x) for x in values):
        return None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([x if isinstance(x, Tensor) else one * x for x in values])


def constant(value: Any) -> float:
    """What an operator is given in place of ``value``."""
    return math.nan if changes(value) else value
