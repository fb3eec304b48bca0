"""Cross-entropy of a bfloat16 head from scaled exponentials: one read, one exponential and one write a logit, on a GPU.

A chunk of rows (engine/head_rows.py) makes its gradient from two passes over a row: the sum first, then p. bfloat16 has float32's
range, so exponentials need no maximum: E_v = 2^((z_v - z_t) log2 e), relative to the target's logit, overwrites the logits at the
first reading, the row's sum S comes from the same pass, and 1 / S is a factor of the row that the products take::

    d hidden = m ⊙ (E W)        in float32, rounded once
    d weight = Eᵀ (m ⊙ X)       m = (d loss / d log S) / S · scale

At the target E holds -Σ_{v ≠ t} E_v, made in float32: p_t - 1 in these units, with no difference of near numbers. Where it is exact
enough is in docs/engine.md. A row whose sum is beyond 2^80 (a loss of 55), or whose target's logit is not finite, is marked by the
kernel, left out of the products, and redone as in any chunk: its logits are made again. The host reads the marks once a chunk, after
all of the chunk's products are queued.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastloss.engine import devices
from fastloss.engine.contract import Factor
from fastloss.engine.head_rows import Chunk, RowChunks
from fastloss.engine.head_types import Head, Needs
from fastloss.tables import LSE_PARTS, CrossEntropyOptions

# FASTLOSS_SCALED_EXPONENTIALS=1. Off until a GPU has measured it.
ENABLED = os.environ.get("FASTLOSS_SCALED_EXPONENTIALS", "0") not in ("", "0")
# Rows of exponentials that are converted to float32 at a time where the library has no product with a float32 result.
CONVERT_ROWS = 256


@contextlib.contextmanager
def enabled(on: bool = True) -> Iterator[None]:
    """What a measurement or a test switches, of the whole process."""
    global ENABLED
    before, ENABLED = ENABLED, on
    try:
        yield
    finally:
        ENABLED = before


def why_not(head: Head, needs: Needs, smooth: bool, float_logits: bool, want: Sequence[str]) -> str:
    """Why a pass in chunks of rows makes its gradients as ever. ``needs``: of the pass itself; ``smooth``: every token is a
    target."""
    device = head.weight.device
    if not ENABLED:
        return "only FASTLOSS_SCALED_EXPONENTIALS=1 asks for it"
    if not devices.is_gpu(device) or head.backend.differentiable:
        return "it is a GPU's kernel"
    if not needs:
        return "no gradient is made with the statistics"
    if head.dtype != torch.bfloat16 or float_logits:
        return "logits of another dtype are as large as their gradient and no larger, or have not the range"
    if head.wide:
        return "a LoRA has more digits than the GEMMs"
    if smooth:
        return "a probability would be rounded before a class's share of the target is taken off it"
    if want:
        return "it makes the loss alone"
    if head.shards is not None:
        return "the vocabulary is cut"
    return "" if devices.may_wait(device) else "the host may not ask which rows to redo"


def scratch_bytes(head: Head, rows: int, needs: Needs) -> int:
    """Beside the logits of ``rows`` rows: d hidden in float32, then the multiplied hidden states."""
    width = head.hidden.shape[1]
    return rows * width * max(4 * needs.hidden, head.dtype.itemsize)


class ExponentialChunks(RowChunks):
    """One pass over the rows, a chunk at a time."""

    def parts(self) -> Iterator[Chunk]:
        for start, stop in self.bounds:
            yield ExponentialChunk(self, start, stop)


class ExponentialChunk(Chunk):
    """Some rows, whose logits become exponentials in place."""

    def cross_entropy(
        self,
        target: Tensor | None,
        options: CrossEntropyOptions,
        *,
        w: Tensor | None,
        factor: Factor,
        want: Sequence[str],
        row_factors: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if self.start == self.stop:
            return super().cross_entropy(
                target, options, w=w, factor=factor, want=want, row_factors=row_factors
            )
        assert target is not None and not want
        head = self.run.head
        made = head.backend.row_exponentials(
            self.logits, target, self.own(options), factor=factor, bias=head.bias, w=w
        )
        loss, multiplier = made.loss, made.multiplier
        if row_factors is not None:
            loss, multiplier = loss * row_factors, multiplier * row_factors
        self._multiply(self.logits, multiplier, target, made.residue)
        out = {"loss": loss, LSE_PARTS: made.lse_parts}
        rough = made.rough.nonzero().view(-1)  # the host waits
        if rough.numel():
            again = self._redo(rough, target, options, w, factor, row_factors)
            for name, values in out.items():
                values.index_copy_(0, rough, again[name])
        return out

    def _multiply(self, e: Tensor, multiplier: Tensor, target: Tensor, residue: Tensor) -> None:
        """Adds to the head's gradients what the exponentials give."""
        gemms, column = self.run.gemms, multiplier.unsqueeze(1)
        hidden = gemms.rows(self.start, self.stop)
        if gemms.d_hidden is not None:
            wide = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
            _multiply_wide(wide[:, : gemms.dim], e, gemms.weight)
            if gemms.low_rank is not None:
                _multiply_wide(wide[:, gemms.dim :], e, gemms.low_rank)
            # What rounding took off the target's entry: without it the largest part of d hidden has no rounding.
            classes, more = target.clamp(0, e.shape[1] - 1), residue.unsqueeze(1)
            wide[:, : gemms.dim].addcmul_(gemms.weight.index_select(0, classes), more)
            if gemms.low_rank is not None:
                wide[:, gemms.dim :].addcmul_(gemms.low_rank.index_select(0, classes), more)
            if gemms.keep is None:
                torch.mul(wide, column, out=gemms.d_hidden[self.start : self.stop])
            else:
                own = torch.mul(wide, column, out=torch.empty_like(hidden))
                gemms.d_hidden.index_copy_(0, gemms.keep[self.start : self.stop], own)
            del wide
        if gemms.d_weight is not None or gemms.d_low_rank is not None:
            gemms.add_weights(e, torch.mul(hidden, column, out=torch.empty_like(hidden)))
        if gemms.d_bias is not None:
            # Two bfloat16 hold a multiplier within 2^-17.
            high = multiplier.to(e.dtype)
            two = torch.stack((high, (multiplier - high).to(e.dtype)), 1)
            sums = torch.empty((e.shape[1], 2), dtype=gemms.d_bias.dtype, device=e.device)
            devices.add_transposed(sums, e, two, accumulate=False)
            gemms.d_bias += sums.sum(1)

    def _redo(
        self,
        rough: Tensor,
        target: Tensor,
        options: CrossEntropyOptions,
        w: Tensor | None,
        factor: Factor,
        row_factors: Tensor | None,
    ) -> dict[str, Tensor]:
        """Losses of some of the rows, and their gradients into the head's, as any chunk makes them: over the same memory."""
        run, gemms = copy.copy(self.run), copy.copy(self.run.gemms)
        keep = self.run.keep
        run.keep = gemms.keep = rough + self.start if keep is None else keep[self.start : self.stop][rough]
        gemms.forget_rows()
        run.gemms = gemms
        return Chunk(run, 0, rough.numel()).cross_entropy(
            target.index_select(0, rough),
            options,
            w=w,
            factor=factor,
            want=(),
            row_factors=None if row_factors is None else row_factors.index_select(0, rough),
        )


def _multiply_wide(out: Tensor, e: Tensor, weight: Tensor) -> None:
    """``out`` (float32) = e weight."""
    step = e.shape[0] if devices.multiplies_wide(e.device, e.dtype) else CONVERT_ROWS
    for start in range(0, e.shape[0], step):
        devices.multiply_wide(out[start : start + step], e[start : start + step], weight)
