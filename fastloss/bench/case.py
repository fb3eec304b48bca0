"""A case: shapes, dtype, the state of the caches; and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastloss.bench import internals

IGNORE = -100
# rows × dim × vocab above which a low-precision GEMM that the CPU only emulates takes minutes.
EMULATED_WORK = 1 << 35

Loss = Callable[..., Tensor]  # of a case's tensors, in their order
Call = Mapping[str, Any]  # keyword arguments of fastloss's function: its backend, the memory of a head


@dataclass(frozen=True)
class Case:
    """One line-up: every provider runs it on the same tensors."""

    name: str
    kind: str  # a key of kinds.KINDS
    rows: int  # tokens (preference: pairs)
    dim: int  # 0 where there are no hidden states
    vocab: int  # 0 where there are neither logits nor a vocabulary matrix
    dtype: torch.dtype
    inplace: bool = False  # row: the gradient may overwrite the logits
    cold: bool = False  # caches flushed before each call
    peaked: bool = False  # most of the probability on the target, as late in training
    trained: bool = False  # linear: most of the probability on the same few classes, and peaks, as in a model
    ignored: float = 0.125  # fraction of tokens without a loss
    frozen: bool = False  # the weight needs no gradient
    nograd: bool = False  # the forward alone
    forwards: int = (
        1  # times that logits are made from hidden states: for the reference model too, or made again
    )
    length: int = 0  # tokens of a sequence; 0 where there are none
    calls: int = 1  # calls per timing; more than one where a call is too short for the clock
    only: tuple[str, ...] = ("*",)  # patterns of the providers' names
    options: tuple[tuple[str, Any], ...] = ()  # of the loss

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def gemms(self) -> int:
        return self.forwards + (0 if self.nograd else 1 if self.frozen else 2)

    @property
    def inputs(self) -> tuple[object, ...]:
        """Cases with equal ``inputs`` have equal numbers in their tensors, and the same loss."""
        shape = (self.rows, self.dim, self.vocab, self.length)
        return self.kind, shape, self.dtype, self.peaked, self.trained, self.ignored, self.options

    def emulated(self, device: str) -> bool:
        """True where GEMMs in the case's dtype are so slow on this device that a call takes minutes."""
        work = self.rows * self.dim * self.vocab
        return work >= EMULATED_WORK and internals.upcasts(torch.device(device), self.dtype)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


@dataclass
class Data:
    """A case's tensors by name, in the order of the loss's arguments. ``pristine`` is what in-place losses are given
    back before each call; ``kept`` counts the rows with a loss."""

    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]  # that get a gradient
    kept: int
    pristine: Tensor | None = field(default=None, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def device(self) -> str:
        return next(iter(self.tensors.values())).device.type

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients that a step leaves behind in memory of their own."""
        if self.pristine is not None:
            return 0
        return sum(self[name].numel() * self[name].itemsize for name in self.leaves)

    def restore(self) -> None:
        if self.pristine is not None:
            self["logits"].copy_(self.pristine)
