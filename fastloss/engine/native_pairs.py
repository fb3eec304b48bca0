"""Sections 4 to 6 of docs/sequences.md over a native module, ``fastloss._cpu`` or ``fastloss._cuda``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss.engine.native_rows import DTYPE_CODES
from fastloss.engine.pair_call import Number, PairCall


def _ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _number(value: Number) -> tuple[float, int]:
    """A number, and the address of one per pair (0 where there is none)."""
    return (0.0, value.data_ptr()) if isinstance(value, Tensor) else (float(value), 0)


class NativePairs:
    """Binds a native module to tensors, all contiguous. ``context`` gives its last argument: threads, or a stream."""

    def __init__(self, module: Any, context: Callable[[Tensor], int]):
        self.module = module
        self.context = context

    def _call(self, name: str, tensor: Tensor, *arguments: Any) -> None:
        getattr(self.module, name)(*arguments, self.context(tensor))

    def segment_sum(
        self, values: Tensor, weights: Tensor | None, offsets: Tensor | None, length: int, count: int
    ) -> Tensor:
        out = values.new_empty(count)
        self._call(
            "segment_sum", values, values.data_ptr(), DTYPE_CODES[values.dtype], _ptr(weights), _ptr(offsets),
            length, count, out.data_ptr(),
        )  # fmt: skip
        return out

    def segment_expand(
        self, upstream: Tensor, weights: Tensor | None, offsets: Tensor | None, length: int, n: int
    ) -> Tensor:
        out = upstream.new_empty(n)
        self._call(
            "segment_expand", upstream, upstream.data_ptr(), DTYPE_CODES[upstream.dtype], _ptr(weights),
            _ptr(offsets), length, upstream.numel(), n, out.data_ptr(),
        )  # fmt: skip
        return out

    def pair_loss(self, c: Tensor, r: Tensor, nll: Tensor | None, call: PairCall) -> dict[str, Any]:
        loss, d_c, d_r = torch.empty_like(c), torch.empty_like(c), torch.empty_like(c)
        d_nll = None if nll is None else torch.empty_like(c)
        chosen, rejected, sums = torch.empty_like(c), torch.empty_like(c), c.new_empty(7)
        self._call(
            "pair_loss", c, c.data_ptr(), r.data_ptr(), DTYPE_CODES[c.dtype], c.numel(), _ptr(call.rc),
            _ptr(call.rr), _ptr(call.lc), _ptr(call.lr), _ptr(nll), call.terms, call.divergence, call.alpha,
            *_number(call.beta), *_number(call.smoothing), *_number(call.margin), _ptr(call.weight),
            *_number(call.delta), call.tau, call.average_rewards, loss.data_ptr(), d_c.data_ptr(), d_r.data_ptr(),
            _ptr(d_nll), chosen.data_ptr(), rejected.data_ptr(), sums.data_ptr(),
        )  # fmt: skip
        return {
            "loss": loss, "d_c": d_c, "d_r": d_r, "d_nll": d_nll,
            "chosen_reward": chosen, "rejected_reward": rejected, "sums": sums,
        }  # fmt: skip

    def unpaired_loss(
        self,
        logps: Tensor,
        *,
        ref: Tensor | None = None,
        desirable: Tensor,
        weight: Tensor | None = None,
        kl: Tensor | None = None,
        code: int = 0,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        loss, d, reward = torch.empty_like(logps), torch.empty_like(logps), torch.empty_like(logps)
        sums = logps.new_empty(7)
        self._call(
            "unpaired_loss", logps, logps.data_ptr(), DTYPE_CODES[logps.dtype], logps.numel(), _ptr(ref),
            desirable.data_ptr(), _ptr(weight), _ptr(kl), code, beta, desirable_weight, undesirable_weight,
            loss.data_ptr(), d.data_ptr(), reward.data_ptr(), sums.data_ptr(),
        )  # fmt: skip
        return {"loss": loss, "d": d, "reward": reward, "sums": sums}
