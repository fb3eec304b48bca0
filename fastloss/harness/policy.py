"""Log-probs and the clipped policy loss of a linear head, by fastloss and by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import RolloutConfig
from .losses import example, explained
from .model import Head


class Tokens(NamedTuple):
    """What a policy loss reads beside hidden states: the sampled tokens, sequence after sequence."""

    target: Tensor  # [N]
    offsets: Tensor  # [B + 1]
    old: Tensor  # [N] log-probs when they were sampled
    ref: Tensor | None  # [N] log-probs of the reference
    advantages: Tensor  # [B] or [N]
    kept: Tensor | None = None  # [N, K] tokens that the sampler kept, padded with -1; None: all


class Objective(NamedTuple):
    """The options of the loss."""

    loss_type: str
    clip_low: float
    clip_high: float
    beta: float
    temperature: float
    max_length: int
    normalizer: float  # tokens of the step; sequences, for a loss_type that averages over these


class Out(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]  # means over the tokens


LogProbs = Callable[
    [Tensor, Head, Tensor, float, Tensor | None], Tensor
]  # hidden [N, D], head, target [N], temperature, kept [N, K] -> [N]
PolicyLoss = Callable[[Tensor, Head, Tokens, Objective], Out]


def fastloss_logprobs(
    hidden: Tensor, head: Head, target: Tensor, temperature: float, kept: Tensor | None = None
) -> Tensor:
    import fastloss

    out = fastloss.linear_token_stats(
        hidden, head.weight, target, linear_bias=head.bias, temperature=temperature,
        logit_scale=head.scale, softcap=head.softcap, group=head.group, support=kept,
    ).logprobs  # fmt: skip
    assert out is not None
    return out


def fastloss_policy(hidden: Tensor, head: Head, tokens: Tokens, o: Objective) -> Out:
    import fastloss

    out = fastloss.linear_policy_loss(hidden, head.weight, **arguments(head, tokens, o))
    keep = ("approx_kl_k3", "clip_ratio/region", *(("kl",) if tokens.ref is not None else ()))
    return Out(out.loss, {key: out.metrics[key] for key in keep})


def arguments(head: Head, tokens: Tokens, o: Objective) -> dict[str, Any]:
    return {
        "target": tokens.target, "old_logprobs": tokens.old, "advantages": tokens.advantages, "mask": None,
        "linear_bias": head.bias, "temperature": o.temperature, "logit_scale": head.scale,
        "softcap": head.softcap, "ref_logprobs": tokens.ref, "normalizer": o.normalizer,
        "cu_seqlens": tokens.offsets, "loss_type": o.loss_type, "clip_low": o.clip_low,
        "clip_high": o.clip_high, "beta": o.beta, "max_length": float(o.max_length), "group": head.group,
        "support": tokens.kept,
    }  # fmt: skip


def torch_logprobs(
    hidden: Tensor, head: Head, target: Tensor, temperature: float, kept: Tensor | None = None
) -> Tensor:
    logits = head.logits(hidden) / temperature
    if kept is not None:
        padding = torch.where(kept < 0, logits.shape[1], kept).long()
        own = torch.ones(len(kept), logits.shape[1] + 1, dtype=torch.bool, device=kept.device)
        logits = logits.masked_fill(own.scatter(1, padding, False)[:, :-1], -torch.inf)
    return torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]


def torch_policy(hidden: Tensor, head: Head, tokens: Tokens, o: Objective) -> Out:
    """What most training loops do: all logits. The clipped ratio, averaged over tokens (dapo, ppo)."""
    logprobs = torch_logprobs(hidden, head, tokens.target, o.temperature, tokens.kept)
    advantages = tokens.advantages
    if len(advantages) != len(logprobs):
        advantages = torch.repeat_interleave(advantages, tokens.offsets.diff())
    log_ratio = logprobs - tokens.old
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    down, up = ratio < 1 - o.clip_low, ratio > 1 + o.clip_high
    tokens_here = max(1, len(logprobs))  # none, where nothing in a pass was scored
    region = ((down & (advantages < 0)) | (up & (advantages > 0))).float().sum() / tokens_here
    metrics = {"approx_kl_k3": (ratio - 1 - log_ratio).sum() / tokens_here, "clip_ratio/region": region}
    if tokens.ref is not None:
        toward = tokens.ref - logprobs
        kl = toward.exp() - toward - 1
        loss, metrics["kl"] = loss + o.beta * kl, kl.sum() / tokens_here
    return Out(loss.sum() / o.normalizer, {key: value.detach() for key, value in metrics.items()})


LOGPROBS: dict[str, LogProbs] = {"fastloss": fastloss_logprobs, "torch": torch_logprobs}
POLICIES: dict[str, PolicyLoss] = {"fastloss": fastloss_policy, "torch": torch_policy}
TORCH_KNOWS = ("dapo", "ppo", "bnpo")  # clipped, averaged over tokens


def averages_tokens(loss_type: str) -> bool:
    """Over tokens, else over sequences: what the normalizer counts."""
    from fastloss.losses.policy_options import VARIANTS

    if loss_type not in VARIANTS:
        raise ValueError(f"loss_type: expected one of {', '.join(map(repr, VARIANTS))}, got {loss_type!r}")
    return VARIANTS[loss_type].aggregation == "token-mean"


def described(name: str, head: Head, tokens: int, loss_type: str, config: RolloutConfig) -> str:
    """Who computes the loss of so many tokens here."""
    import fastloss

    head = head.gathered()
    hidden, weight = example(head, tokens, torch.bfloat16 if config.bf16 else torch.float32)
    device, zeros = hidden.device, torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
    one = Tokens(
        zeros.long(), torch.tensor([0, tokens], dtype=torch.int64, device=device), zeros, None, zeros
    )
    o = Objective(loss_type, config.clip_low, config.clip_high, 0.0, config.temperature, tokens, tokens)
    return explained(name, fastloss.linear_policy_loss, hidden, weight, **arguments(head, one, o))
