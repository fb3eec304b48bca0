"""``row_exponentials`` of engine/contract.py in plain PyTorch: the formula, and what a backend without the kernel does."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.engine.contract import ExponentialRows, Factor
from fastloss.tables import CrossEntropyOptions

# Of a row's sum of exponentials relative to its target's: a loss of 55. Far below float32's and bfloat16's 2^127, so that no
# product of exponentials and weights overflows, nor does a hidden state times one over such a sum vanish.
MOST = 2.0**80
# How much smaller than the target's coefficient that of the probabilities may be, by which the target's entry is divided.
CANCELLED = 16.0


def plainly(
    logits: Tensor,
    target: Tensor,
    options: CrossEntropyOptions,
    factor: Factor,
    bias: Tensor | None,
    w: Tensor | None,
) -> ExponentialRows:
    """Overwrites ``logits``."""
    vocab = logits.shape[1]
    ignored = target == options.ignore_index
    there = (target >= 0) & (target < vocab) & ~ignored
    t = torch.where(there, target, 0).unsqueeze(1)
    scale = options.scale if options.row_scale is None else (options.row_scale * options.scale).unsqueeze(1)
    u = logits.float() if bias is None else logits.float() + bias
    slope = torch.ones_like(u)
    if options.softcap > 0:
        capped = torch.tanh(u / options.softcap)
        slope, u = 1 - capped * capped, options.softcap * capped
    z = scale * u
    z_t = z.gather(1, t)
    e = torch.exp(z - z_t).scatter(1, t, 0.0)
    others = e.sum(-1)
    log_sum, base = torch.log1p(others), z_t.squeeze(1)
    lse = base + log_sum
    hit = torch.ones_like(lse) if w is None else w[t.squeeze(1)]
    b = hit + 2 * options.z_loss * lse
    solvable = torch.where(b == 0, hit == 0, CANCELLED * b.abs() >= hit.abs())
    fits = there & (others <= MOST) & base.isfinite() & solvable
    at_target = torch.where(b == 0, 0.0, (b - hit - hit * others) / b)
    e = (e.scatter(1, t, at_target.unsqueeze(1)) * slope).masked_fill(~fits.unsqueeze(1), 0.0)
    logits.copy_(e)
    residue = (e.gather(1, t) - logits.gather(1, t)).squeeze(1)
    loss = hit * log_sum + options.z_loss * lse * lse
    multiplier = b / (1 + others) * (scale.squeeze(1) if isinstance(scale, Tensor) else scale) * factor.value
    if factor.tensor is not None:
        multiplier = multiplier * factor.tensor
    parts = torch.stack((base, log_sum), 1).masked_fill(~fits.unsqueeze(1), 0.0)
    rough = (~fits & ~ignored).to(torch.uint8)
    loss, multiplier = (x.masked_fill(~fits, 0.0) for x in (loss, multiplier))
    return ExponentialRows(loss, parts, multiplier, residue, rough)
