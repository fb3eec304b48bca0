"""Sections 7 and 8 of docs/sequences.md over a native module, ``fastloss._cpu`` or ``fastloss._cuda``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine.native_rows import DTYPE_CODES
from fastloss.losses.policy_options import PolicyOptions, is_token_level

SUMS = 16
RUN = 4096  # tokens in a run, where sequences mean nothing


class Runs(NamedTuple):
    """What the kernels take for sequences."""

    offsets: Tensor | None
    length: int
    number: int
    advantage_of_sequence: bool


def runs_of(
    advantages: Tensor,
    agg: Tensor | None,
    offsets: Tensor | None,
    n: int,
    length: int,
    count: int,
    options: PolicyOptions,
) -> Runs:
    """The sequences; or, where a token's share is given and nothing else asks for its sequence, runs of equal size."""
    of_sequence = advantages.numel() != n
    if agg is not None and not of_sequence and is_token_level(options):
        return Runs(None, RUN, math.ceil(n / RUN), False)
    return Runs(offsets, length, count, of_sequence)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def empty_gradient(like: Tensor, offsets: Tensor | None) -> Tensor:
    """What no packed sequence covers is 0; padded sequences cover everything."""
    return torch.empty_like(like) if offsets is None else torch.zeros_like(like)


def _ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativePolicy:
    """Binds a native module to tensors, all contiguous. ``context`` gives its last argument: threads, or a stream;
    ``ticket`` an integer on the device that is 0 between launches (its address; 0 where there are no blocks to count)."""

    def __init__(
        self,
        module: Any,
        context: Callable[[Tensor], int],
        ticket: Callable[[Tensor], Tensor | None] = lambda _: None,
    ):
        self.module = module
        self.context = context
        self.ticket = ticket

    def policy_loss(
        self,
        logprobs: Tensor,
        *,
        old: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        ref: Tensor | None = None,
        entropy: Tensor | None = None,
        sampler: Tensor | None = None,
        token_weight: Tensor | None = None,
        select: Tensor | None = None,
        agg: Tensor | None = None,
        offsets: Tensor | None = None,
        length: int,
        count: int,
        options: PolicyOptions,
        normalizer: float | Tensor | None = None,
    ) -> dict[str, Any]:
        n = logprobs.numel()
        runs = runs_of(advantages, agg, offsets, n, length, count, options)
        grad = empty_gradient(logprobs, runs.offsets)
        grad_entropy = (
            None if entropy is None or options.entropy_coef == 0 else empty_gradient(logprobs, runs.offsets)
        )
        out = logprobs.new_empty(SUMS)
        sums = torch.empty(runs.number * SUMS, dtype=torch.float64, device=logprobs.device)
        number, in_memory = (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
        ticket = self.ticket(logprobs)
        self.module.policy_loss(
            DTYPE_CODES[logprobs.dtype], logprobs.data_ptr(), _ptr(old), advantages.data_ptr(),
            runs.advantage_of_sequence, _ptr(as_bytes(mask)), _ptr(ref), _ptr(entropy), _ptr(sampler), _ptr(token_weight),
            _ptr(as_bytes(select)), _ptr(agg), _ptr(runs.offsets), n, runs.length, runs.number, options,
            number, _ptr(in_memory), grad.data_ptr(),
            _ptr(grad_entropy), out.data_ptr(), sums.data_ptr(), _ptr(ticket), self.context(logprobs),
        )  # fmt: skip
        return {"grad": grad, "grad_entropy": grad_entropy, "out": out}

    def _scan(
        self,
        rewards: Tensor,
        values: Tensor | None,
        mask: Tensor,
        offsets: Tensor | None,
        length: int,
        count: int,
        gamma: float,
        lam: float,
    ) -> tuple[Tensor | None, Tensor]:
        advantages = None if values is None else empty_gradient(rewards, offsets)
        returns = empty_gradient(rewards, offsets)
        if rewards.numel():
            self.module.scan(
                DTYPE_CODES[rewards.dtype], rewards.data_ptr(), _ptr(values), _ptr(as_bytes(mask)), _ptr(offsets),
                rewards.numel(), length, count, gamma, lam, _ptr(advantages), returns.data_ptr(), self.context(rewards),
            )  # fmt: skip
        return advantages, returns

    def gae(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        offsets: Tensor | None,
        length: int,
        count: int,
        gamma: float,
        lam: float,
    ) -> tuple[Tensor, Tensor]:
        advantages, returns = self._scan(rewards, values, mask, offsets, length, count, gamma, lam)
        assert advantages is not None
        return advantages, returns

    def discounted_returns(
        self, rewards: Tensor, mask: Tensor, offsets: Tensor | None, length: int, count: int, gamma: float
    ) -> Tensor:
        return self._scan(rewards, None, mask, offsets, length, count, gamma, 0.0)[1]
