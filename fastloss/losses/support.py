"""The classes that a sampler kept, as ``support=`` takes them, and how far a trainer's log-probs are from the sampler's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine.checks import ShapeError
from fastloss.engine.sequences import flat_mask
from fastloss.losses.policy_inputs import check_like
from fastloss.tables import ACC_DTYPES, MAX_LOG_RATIO


@torch.no_grad()
def support_from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(token_ids, offsets)`` of ``mask [..., V]``, bool or 0/1: the classes that are 1 at each position.

    Returns:
        int64 ids ``[entries]``, ascending at each position, and int64 bounds ``[N + 1]`` of the N positions. On a GPU the host waits
        for the number of entries.

    Raises:
        TypeError, ValueError: no tensor, or one without dimensions.

    >>> import torch, fastloss
    >>> fastloss.support_from_mask(torch.tensor([[True, False, True], [False, True, False]]))
    (tensor([0, 2, 1]), tensor([0, 2, 3]))
    """
    checks.is_tensor("mask", mask)
    if mask.dim() < 1:
        raise ShapeError("mask: expected shape [..., V], got a 0-d tensor")
    rows = mask.reshape(-1, mask.shape[-1]) != 0
    sizes = rows.sum(1)
    return rows.nonzero()[:, 1], torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


@torch.no_grad()
def sampler_support(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``(token_ids, offsets)`` of what a sampler keeps of ``logits [..., V]``, in vLLM's order: temperature, min-p, top-k, top-p.

    min-p keeps the classes of at least ``min_p`` times the largest probability; top-k the ``top_k`` likeliest and what is as likely as the
    last of them; top-p, of what is left and renormalised, the likeliest whose probability together reaches ``top_p``. At least one
    class is kept. An engine's own sets are better, where it returns them: its logits are not the trainer's to the last bit.

    Raises:
        TypeError, ValueError: an option outside its range: ``top_k`` at least 1, ``top_p`` in (0, 1], ``min_p`` in [0, 1],
            ``temperature`` > 0.

    >>> import torch, fastloss
    >>> fastloss.sampler_support(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), top_k=2)
    (tensor([0, 2]), tensor([0, 2]))
    """
    checks.is_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ShapeError(f"logits: expected shape [..., V], got {list(logits.shape)}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k: expected a positive int or None, got {top_k!r}")
    checks.number("top_p", top_p, low=0.0, high=1.0, open_low=True)
    checks.number("min_p", min_p, low=0.0, high=1.0)
    z = logits.to(ACC_DTYPES[logits.dtype]) / checks.number(
        "temperature", temperature, low=0.0, open_low=True
    )
    kept = z > -torch.inf
    if min_p:
        p = z.softmax(-1)
        kept = kept & (p >= min_p * p.amax(-1, keepdim=True))
    if top_k is not None and top_k < z.shape[-1]:
        least = z.masked_fill(~kept, -torch.inf).topk(top_k, -1).values[..., -1:]
        kept = kept & (z >= least)
    if top_p < 1:
        p, order = z.masked_fill(~kept, -torch.inf).softmax(-1).sort(-1, descending=True)
        before = p.cumsum(-1) - p  # what is likelier
        kept = kept & torch.empty_like(kept).scatter_(-1, order, before < top_p)
    return support_from_mask(kept | torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).bool())


@torch.no_grad()
def sampler_metrics(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor | None = None, *, log_mass: Tensor | None = None
) -> dict[str, Tensor]:
    """How far the trainer's log-probs are from those of the engine that sampled: what :func:`policy_loss` corrects for.

    With ρ = exp(logprobs - sampler_logprobs), clamped to e^±20, over the unmasked tokens: "ratio/mean", "ratio/min", "ratio/max", "ess"
    ((Σ ρ)² / (n Σ ρ²), the effective sample size as a fraction), "kl" (mean of sampler - trainer log-prob: k1 of their KL). Where a
    sampler cut its distribution and the trainer did not, ρ is the mass that was kept, at each token; ``support=`` removes that.

    Args:
        logprobs, sampler_logprobs: ``[...]``. mask: bool or 0/1 likewise; None: all.
        log_mass: :class:`TokenStats`'s "log_mass": also "mass" and "mass/min", what the sampler kept of the trainer's distribution.

    Returns:
        0-d tensors; of no tokens at all the ratios and the mass are 1 and "kl" 0.

    Raises:
        TypeError, ValueError: a shape, dtype or device that does not fit, by name.

    >>> import torch, fastloss
    >>> fastloss.sampler_metrics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]))["ess"]
    tensor(1.)
    """
    checks.is_floating("logprobs", logprobs)
    check_like("sampler_logprobs", sampler_logprobs, logprobs)
    keep = flat_mask(mask, logprobs).bool()
    acc = ACC_DTYPES[logprobs.dtype]
    n = keep.sum().clamp(min=1)
    difference = (logprobs.to(acc) - sampler_logprobs.to(acc)).reshape(-1)
    difference = torch.where(keep, difference, 0.0)
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    total = torch.where(keep, ratio, 0.0).sum()
    squares = torch.where(keep, ratio * ratio, 0.0).sum()
    none = ~keep.any()

    def extreme(x: Tensor, largest: bool) -> Tensor:
        found = torch.where(keep, x, -torch.inf).amax() if largest else torch.where(keep, x, torch.inf).amin()
        return torch.where(none, 1.0, found)

    if not keep.numel():
        ratio, keep = ratio.new_ones(1), keep.new_zeros(1)
        none = ~keep.any()
    out = {
        "ratio/mean": torch.where(none, 1.0, total / n),
        "ratio/min": extreme(ratio, False),
        "ratio/max": extreme(ratio, True),
        "ess": torch.where(none, 1.0, total * total / (n * squares)),
        "kl": -difference.sum() / n,
    }
    if log_mass is not None:
        check_like("log_mass", log_mass, logprobs)
        mass = log_mass.to(acc).reshape(-1).exp()
        mass = mass if mass.numel() else mass.new_ones(1)
        out["mass"] = torch.where(none, 1.0, torch.where(keep, mass, 0.0).sum() / n)
        out["mass/min"] = extreme(mass, False)
    return out
