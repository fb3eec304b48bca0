"""The right values: each loss in its plainest form, given float64 inputs. Shares nothing with fastloss's own definitions."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """torch's cross-entropy; the mean of a z-loss is over the tokens that are not ignored (arXiv:2204.02311)."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if weight is not None:
        weight = weight.to(logits.dtype)
    how = "sum" if normalizer is not None else reduction
    loss = F.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=how,
        label_smoothing=label_smoothing,
    )
    if z_loss:
        kept = target != ignore_index
        penalty = (z_loss * logits.logsumexp(1).square()).masked_fill(~kept, 0.0)
        loss = loss + (penalty if how == "none" else penalty.sum() / (kept.sum() if how == "mean" else 1))
    return loss if normalizer is None else loss / normalizer


def linear_cross_entropy(
    hidden: Tensor, linear_weight: Tensor, target: Tensor, *, bias: Tensor | None = None, **options: object
) -> Tensor:
    logits = F.linear(hidden, linear_weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return cross_entropy(logits, target, **options)  # type: ignore[arg-type]


def logprobs(logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, target[:, None])[:, 0]


def linear_logprobs(
    hidden: Tensor, linear_weight: Tensor, target: Tensor, *, temperature: float = 1.0
) -> Tensor:
    return logprobs(hidden @ linear_weight.T, target, temperature=temperature)


def entropy(logits: Tensor) -> Tensor:
    """-Σ p log p, where p = 0 adds 0."""
    kept = logits > -torch.inf
    log_p = logits.log_softmax(-1).masked_fill(~kept, 0.0)
    return -(log_p.exp().masked_fill(~kept, 0.0) * log_p).sum(-1)


def dpo(c: Tensor, r: Tensor, rc: Tensor, rr: Tensor, *, beta: float = 0.1) -> Tensor:
    return -F.logsigmoid(beta * ((c - rc) - (r - rr))).mean()


def kto(logps: Tensor, ref: Tensor, desirable: Tensor, *, kl: float = 0.0, beta: float = 0.1) -> Tensor:
    sign = torch.where(desirable, 1.0, -1.0)
    return (1 - torch.sigmoid(sign * beta * (logps - ref - kl))).mean()


def orpo(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *, beta: float = 0.1
) -> Tensor:
    """The likelihood of responses of one length, and the log odds ratio of the mean log-probs."""
    c, r = chosen / chosen_lengths, rejected / rejected_lengths
    odds = (c - (-c.expm1()).log()) - (r - (-r.expm1()).log())
    return (-c - beta * F.logsigmoid(odds)).mean()


def bco(logps: Tensor, ref: Tensor, desirable: Tensor, *, delta: float, beta: float = 0.1) -> Tensor:
    sign = torch.where(desirable, 1.0, -1.0)
    return -F.logsigmoid(sign * (beta * (logps - ref) - delta)).mean()


def policy(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    normalizer: float | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """PPO's clipped surrogate and the k3 estimate of the KL to a reference."""
    zero = logprobs.new_zeros(())
    ratio = torch.where(mask, logprobs - old, zero).exp()
    a = advantages[:, None]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    if dual_clip is not None:
        gain = torch.where(a < 0, torch.maximum(gain, dual_clip * a), gain)
    loss = -gain
    if ref_logprobs is not None:
        d = torch.where(mask, ref_logprobs.to(logprobs.dtype) - logprobs, zero)
        loss = loss + beta * (d.exp() - 1 - d)
    loss = torch.where(mask, loss, zero)
    tokens = mask.sum(1)
    if aggregation == "token-mean":
        return loss.sum() / (tokens.sum() if normalizer is None else normalizer)
    return (loss.sum(1) / tokens.clamp(min=1)).mean()


def packed_policy(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    clip: float = 0.2,
    aggregation: str = "token-mean",
) -> Tensor:
    """Sequence by sequence; a sequence without a token adds nothing, and counts as a sequence."""
    borders = cu_seqlens.tolist()
    losses = []
    for a, (start, stop) in zip(advantages, itertools.pairwise(borders)):
        ratio = (logprobs[start:stop] - old[start:stop]).exp()
        losses.append(-torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a))
    if aggregation == "token-mean":
        return torch.cat(losses).mean()
    return torch.stack([x.sum() / max(1, x.numel()) for x in losses]).mean()


def kl(logprobs: Tensor, ref: Tensor, *, kind: str = "k3") -> Tensor:
    """http://joschu.net/blog/kl-approx.html"""
    d = ref - logprobs
    return {"k1": -d, "k2": d.square() / 2, "k3": d.expm1() - d}[kind]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """arXiv:1506.02438, over the unmasked tokens of each sequence; past the end value and advantage are 0."""
    out = torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        value = advantage = 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[b, t]:
                here = values[b, t].item()
                advantage = rewards[b, t].item() + gamma * value - here + gamma * lam * advantage
                value = here
                out[b, t] = advantage
    return out


def packed_gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """Each sequence alone."""
    borders = cu_seqlens.tolist()
    parts = [
        gae(
            rewards[None, start:stop],
            values[None, start:stop],
            torch.ones(1, stop - start, dtype=torch.bool, device=rewards.device),
            gamma=gamma,
            lam=lam,
        )[0]
        for start, stop in itertools.pairwise(borders)
    ]
    return torch.cat(parts)


def group_advantages(rewards: Tensor, *, group_size: int) -> Tensor:
    """arXiv:2402.03300 with the sample's deviation and TRL's 1e-4; equal rewards have no advantage."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    deviation = groups.std(1, keepdim=True) if group_size > 1 else torch.zeros_like(centred)
    return (centred / (deviation + 1e-4)).reshape(-1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the unmasked; a single value is its own mean."""
    kept = x[mask]
    out = torch.zeros_like(x)
    variance = kept.var() if kept.numel() > 1 else x.new_zeros(())
    out[mask] = (kept - kept.mean()) * torch.rsqrt(variance + 1e-8)
    return out
