"""Definition of the policy-gradient losses: one small function per surrogate; everything else is shared.

Flat tensors ``[N]``; sequence ``s`` is ``[offsets[s], offsets[s+1])``, or ``[s·length, (s+1)·length)`` without offsets
(docs/sequences.md, "Policy losses", and docs/policy_gradient.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss.reference.codes import name_of
from fastloss.reference.numbers import scalar
from fastloss.tables import AGGREGATIONS, CORRECTIONS, KL_KINDS, LEVELS, SURROGATES, PolicyOptions

MAX_LOG_RATIO = 20.0  # e^20 is finite in float32, and so are its square and the sum of 2^64 of them
LOG_SMALL = math.log(1e-8)


class Sequences:
    """Sums over sequences and back."""

    def __init__(self, offsets: Tensor | None, length: int, count: int, n: int, device: torch.device):
        self.offsets, self.length, self.count, self.n = offsets, length, count, n
        if offsets is not None:
            self.ids = torch.searchsorted(
                offsets[1:].contiguous(), torch.arange(n, dtype=torch.int64, device=device), right=True
            )

    def sum(self, x: Tensor) -> Tensor:
        if self.offsets is None:
            return x.reshape(self.count, self.length).sum(-1)
        return torch.zeros(self.count, dtype=x.dtype, device=x.device).index_add(0, self.ids, x)

    def expand(self, s: Tensor) -> Tensor:
        if self.offsets is None:
            return s.unsqueeze(-1).expand(self.count, self.length).reshape(-1)
        return s[self.ids]

    def first(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` at each sequence's first unmasked position; 0 where there is none."""
        position = torch.arange(self.n, dtype=torch.int64, device=x.device)
        position = torch.where(mask, position, self.n)
        if self.offsets is None:
            first = position.reshape(self.count, self.length)
            first = first.amin(-1) if self.length else torch.full_like(first.sum(-1), self.n)
        else:
            first = torch.full((self.count,), self.n, dtype=torch.int64, device=x.device).scatter_reduce(
                0, self.ids, position, "amin"
            )
        return torch.cat([x, x.new_zeros(1)])[first]


# --- surrogates: (ratio, advantage, log-prob, vespo's φ, options) -> the token's loss ----------------------------


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """``clamp`` with a derivative of 1 at its bounds, which torch 2.15 made 0: on the policy, a clip of 0 stands there."""
    return torch.where((x < low) | (x > high), x.detach().clamp(scalar(x, low), scalar(x, high)), x)


def clip(rho: Tensor, adv: Tensor, logprobs: Tensor, phi: Tensor | None, o: PolicyOptions) -> Tensor:
    """PPO (arXiv:1707.06347), two-sided with ``delta`` (arXiv:2505.07291), dual clip (arXiv:1912.09729)."""
    loss = -torch.minimum(
        bounded(rho, -torch.inf, o.delta) * adv, bounded(rho, 1 - o.clip_low, 1 + o.clip_high) * adv
    )
    if o.dual_clip == math.inf:
        return loss
    return torch.where(adv < 0, torch.minimum(loss, -o.dual_clip * adv), loss)


def logprob(rho: Tensor, adv: Tensor, logprobs: Tensor, phi: Tensor | None, o: PolicyOptions) -> Tensor:
    """REINFORCE: no ratio."""
    return -adv * logprobs


def cispo(rho: Tensor, adv: Tensor, logprobs: Tensor, phi: Tensor | None, o: PolicyOptions) -> Tensor:
    """The clipped ratio is a constant weight (arXiv:2506.13585)."""
    return -rho.detach().clamp(scalar(rho, o.cispo_low), scalar(rho, o.cispo_high)) * adv * logprobs


def sapo(rho: Tensor, adv: Tensor, logprobs: Tensor, phi: Tensor | None, o: PolicyOptions) -> Tensor:
    """A soft gate in place of the clip (arXiv:2511.20347)."""
    tau = torch.where(adv > 0, scalar(adv, o.sapo_pos), scalar(adv, o.sapo_neg))
    return -adv * torch.sigmoid(tau * (rho - 1)) * (4 / tau)


def vespo(rho: Tensor, adv: Tensor, logprobs: Tensor, phi: Tensor | None, o: PolicyOptions) -> Tensor:
    """A Gamma-shaped weight of the whole sequence's ratio, constant (arXiv:2602.10693)."""
    assert phi is not None
    return -phi * adv * logprobs


def ratio(rho: Tensor, adv: Tensor, logprobs: Tensor, phi: Tensor | None, o: PolicyOptions) -> Tensor:
    """Plain importance sampling: gmpo clips inside the geometric mean (arXiv:2507.20673), kl_cov adds a penalty."""
    return -rho * adv


SURROGATE = {"clip": clip, "logprob": logprob, "cispo": cispo, "sapo": sapo, "vespo": vespo, "ratio": ratio}


# --- shared parts ------------------------------------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, ref: Tensor, kind: str) -> Tensor:
    """An estimate of KL(policy, reference) per token (joschu.net/blog/kl-approx.html)."""
    t = (ref - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -t
    if kind == "k2":
        return t.square() / 2
    if kind == "abs":
        return t.abs()
    k3 = torch.expm1(t) - t
    if kind == "k3":
        return k3
    if kind == "low_var_kl":
        return k3.clamp(-10, 10)
    raise ValueError(f"kind: expected one of {', '.join(map(repr, KL_KINDS))}, got {kind!r}")


def log_weight(lr: Tensor, adv: Tensor, mask: Tensor, n: Tensor, seq: Sequences, o: PolicyOptions) -> Tensor:
    """Log importance weight of each token at the level of ``o``."""
    level = name_of("level", o.level, LEVELS)
    if level == "token":
        return lr
    if level == "sequence_sum":
        return seq.expand(seq.sum(lr).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    if level == "geometric":
        bounded_lr = bounded(lr, -o.clip_low, o.clip_high)
        lr = torch.where(adv > 0, torch.minimum(lr, bounded_lr), torch.maximum(lr, bounded_lr)) * mask
    return seq.expand(seq.sum(lr) / n)


def correction(
    old: Tensor, sampler: Tensor | None, mask: Tensor, seq: Sequences, o: PolicyOptions
) -> tuple[Tensor | None, Tensor]:
    """The weight for the sampler's mismatch, per token, and which tokens it cuts."""
    how = name_of("correction", o.correction, CORRECTIONS)
    if how == "none" or sampler is None:
        return None, torch.zeros_like(mask)
    d = torch.where(mask, torch.nan_to_num(old - sampler, nan=0.0, posinf=math.inf, neginf=-math.inf), 0)
    weight = (seq.expand(seq.sum(d)) if how.startswith("sequence") else d).exp()
    outside = (weight < o.floor) | (weight > o.cap)
    if how.endswith("truncate"):
        return weight.clamp(scalar(weight, o.floor), scalar(weight, o.cap)), outside
    return torch.where(outside, 0, weight), outside


def gamma_weight(lr: Tensor, adv: Tensor, c: Tensor | None, seq: Sequences, o: PolicyOptions) -> Tensor:
    """VESPO's φ(W) = e^λ W^k e^(-λW), W the ratio of the whole sequence."""
    total = seq.sum(lr)
    if c is not None:
        log_c = c.log().clamp(LOG_SMALL, MAX_LOG_RATIO)
        if CORRECTIONS[o.correction].startswith("sequence"):  # one weight for the sequence
            total = total + seq.first(log_c, torch.ones_like(log_c, dtype=torch.bool))
        else:
            total = total + seq.sum(log_c)
    log_w = seq.expand(total.clamp(LOG_SMALL, MAX_LOG_RATIO))
    k = torch.where(adv >= 0, scalar(adv, o.vespo_k_pos), scalar(adv, o.vespo_k_neg))
    lam = torch.where(adv >= 0, scalar(adv, o.vespo_lambda_pos), scalar(adv, o.vespo_lambda_neg))
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return torch.nan_to_num(phi, nan=0.0, posinf=0.0, neginf=0.0)


def shares(
    mask: Tensor,
    n: Tensor,
    seq: Sequences,
    aggregation: int,
    max_length: float,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Each token's share of the aggregate, and the scale of their sum. ``n``: tokens per sequence, at least 1."""
    how = name_of("aggregation", aggregation, AGGREGATIONS)
    share = mask.to(n.dtype)
    if how == "seq-mean-token-mean":
        share = share / seq.expand(n)
    if normalizer is not None:
        given = normalizer.reshape(()).to(n) if isinstance(normalizer, Tensor) else normalizer
        total = scalar(n, given)
    elif how == "token-mean":
        total = mask.sum().to(n.dtype).clamp(min=1)
    else:
        total = n.new_full((), max(seq.count, 1))
    return share, 1 / (total * max_length if how == "seq-mean-token-sum-norm" else total)


def policy_loss(
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
    share: Tensor | None = None,
    offsets: Tensor | None = None,
    length: int,
    count: int,
    options: PolicyOptions,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and the statistics ``out [16]`` of flat log-probs ``[N]``; advantages ``[N]`` or ``[count]``."""
    o, mask = options, mask.bool()
    seq = Sequences(offsets, length, count, logprobs.numel(), logprobs.device)
    adv = advantages if advantages.numel() == seq.n else seq.expand(advantages)

    def clean(x: Tensor | None) -> Tensor:  # a masked token touches nothing, whatever it holds
        return torch.where(mask, x, 0) if x is not None else torch.zeros_like(logprobs)

    logprobs, adv, h = clean(logprobs), clean(adv).detach(), clean(entropy)
    old = logprobs.detach() if old is None else clean(old).detach()
    n = seq.sum(mask.to(logprobs.dtype)).clamp(min=1)
    lr = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho = log_weight(lr, adv, mask, n, seq, o).exp()

    sampler = None if sampler is None else clean(sampler).detach()
    c, cut = correction(old, sampler, mask, seq, o)
    surrogate = name_of("surrogate", o.surrogate, SURROGATES)
    phi = gamma_weight(lr.detach(), adv, c, seq, o) if surrogate == "vespo" else None
    policy = SURROGATE[surrogate](rho, adv, logprobs, phi, o)
    if o.kl_cov_coef and select is not None:
        policy = policy + o.kl_cov_coef * lr.abs() * select.bool()
    if token_weight is not None:
        policy = policy * clean(token_weight).detach()
    if c is not None and phi is None:
        policy = policy * c
    if o.off_policy_threshold != math.inf:
        drift = torch.nan_to_num((old if sampler is None else sampler) - logprobs.detach(), nan=0.0)
        stale = (seq.first(adv, mask) < 0) & (seq.sum(drift) / n > o.off_policy_threshold)
        policy = policy * ~seq.expand(stale)

    loss = policy
    kl = torch.zeros_like(logprobs)
    kl_kind = name_of("kl_kind", o.kl_kind, KL_KINDS)
    if ref is not None:
        kl = kl_estimate(logprobs, clean(ref).detach(), kl_kind)
        if o.beta:
            loss = loss + o.beta * (kl * rho if o.kl_unbiased else kl)
    if o.entropy_coef:
        loss = loss - o.entropy_coef * h

    if share is None:
        share, scale = shares(mask, n, seq, o.aggregation, o.max_length, normalizer)
    else:
        _, scale = shares(mask, n, seq, 0, 1.0, normalizer)
    loss = scale * (share * torch.where(mask, loss, 0)).sum()
    with torch.no_grad():
        out = statistics(
            loss, scale, policy * share, rho.detach(), lr.detach(), kl.detach(), h.detach(), adv, mask, cut, o
        )
    return loss, out


def statistics(
    loss: Tensor,
    scale: Tensor,
    policy: Tensor,
    rho: Tensor,
    lr: Tensor,
    kl: Tensor,
    entropy: Tensor,
    adv: Tensor,
    mask: Tensor,
    cut: Tensor,
    o: PolicyOptions,
) -> Tensor:
    """``out [16]``: sums over unmasked tokens (docs/sequences.md)."""
    high = o.cispo_high if SURROGATES[o.surrogate] == "cispo" else 1 + o.clip_high
    below, above = (rho < 1 - o.clip_low), (rho > high)
    if LEVELS[o.level] == "geometric":
        below, above = (lr < -o.clip_low), (lr > o.clip_high)
    dual = torch.zeros_like(mask)
    if SURROGATES[o.surrogate] == "clip" and o.dual_clip != math.inf:
        dual = (adv < 0) & (
            -torch.minimum(
                bounded(rho, -torch.inf, o.delta) * adv, bounded(rho, 1 - o.clip_low, 1 + o.clip_high) * adv
            )
            > -o.dual_clip * adv
        )

    def total(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum().to(rho.dtype)

    rho = rho * mask
    one = rho.new_ones(1)
    low_rho = torch.where(mask, rho, math.inf)
    lowest = torch.cat([low_rho, one * math.inf]).amin()
    highest = torch.cat([rho, one * 0]).amax()
    any_token = mask.any()
    return torch.stack(
        [
            loss.detach(),
            scale,
            total(mask),
            total(below & (adv < 0)),
            total(above & (adv > 0)),
            total(dual),
            total(-lr),
            total(torch.expm1(lr) - lr),
            total(kl),
            total(entropy),
            torch.where(any_token, lowest, 1),
            torch.where(any_token, highest, 1),
            total(rho),
            total(rho.square()),
            total(cut),
            total(policy),
        ]
    )


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None = None,
    aggregation: int = 0,
    max_length: float = 1.0,
    normalizer: float | Tensor | None = None,
    offsets: Tensor | None = None,
    length: int,
    count: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`value_terms`, aggregated as a policy loss."""
    mask = mask.bool()
    seq = Sequences(offsets, length, count, values.numel(), values.device)
    n = seq.sum(mask.to(values.dtype)).clamp(min=1)
    share, scale = shares(mask, n, seq, aggregation, max_length, normalizer)
    return value_terms(values, old_values, returns, mask, share, scale, clip_range)


def value_terms(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    share: Tensor | float,
    scale: Tensor | None,
    clip_range: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``scale · Σ share · ½ max((V - R)², (clip(V, V_old ± ε) - R)²)`` of flat values ``[N]``, and its metrics. No ``scale`` is
    one over the tokens."""
    values, returns = torch.where(mask, values, 0), torch.where(mask, returns, 0).detach()
    missed = values - returns
    clipped = torch.zeros_like(mask)
    if clip_range is not None and old_values is not None:
        old = torch.where(mask, old_values, 0).detach()
        moved = values - old
        inside = (moved >= -clip_range) & (moved <= clip_range)  # as it is, without a rounding of its own
        further = torch.where(inside, values, old + bounded(moved, -clip_range, clip_range)) - returns
        stays = further**2 <= missed**2  # a NaN does not
        clipped = mask & (further**2 > missed**2)
        missed = torch.where(
            stays, missed, further
        )  # before the square: what is not taken has no derivative, inf or not
    error = missed**2
    tokens = mask.sum().to(values.dtype).clamp(min=1)
    loss = torch.where(mask, share * error / 2, 0).sum() * (1 / tokens if scale is None else scale)
    with torch.no_grad():

        def variance(x: Tensor) -> Tensor:
            # From one of the numbers, so that numbers that are all the same have none.
            x = x - torch.where(mask, x, -torch.inf).amax() if x.numel() else x
            x = torch.where(mask, x, 0)
            mean = x.sum() / tokens
            return ((x - mean) ** 2 * mask).sum() / tokens

        spread = variance(returns)
        explained = 1 - variance(returns - values) / torch.where(spread <= 0, 1, spread)
        metrics = {
            "value/clip_ratio": clipped.sum() / tokens,
            "value/explained_variance": torch.where(spread <= 0, 0, explained),
            "value/mean": (values * mask).sum() / tokens,
        }
    return loss, metrics
