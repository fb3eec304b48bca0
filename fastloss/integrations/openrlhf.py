"""OpenRLHF: log-probabilities, entropy and the policy loss by fastloss; with a model that hands out lazy logits, no logits.

The actor asks for ``logits.to(float32)``, scales them in place and gives them to ``log_probs_from_logits``: with
``fastloss.integrations.transformers.apply(actor.model)`` besides, that float32 copy of the batch's logits is never made.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

import fastloss
from fastloss.integrations.handle import Handle, expect_signature, replace_everywhere
from fastloss.lazy_logits import ask

__all__ = ["apply"]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """``openrlhf.models.utils.log_probs_from_logits``; the logits stay as they are, at any temperature."""
    out: Tensor = ask(fastloss.selective_log_softmax, logits, labels, temperature)
    return out


def compute_entropy(logits: Tensor) -> Tensor:
    """``openrlhf.models.utils.compute_entropy``."""
    out: Tensor = ask(fastloss.entropy_from_logits, logits)
    return out


def policy_forward(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Any:
    """``PolicyLoss.forward`` where its options are PPO without a correction of the sampler; the rest stays OpenRLHF's."""
    if self.policy_loss_type != "ppo" or self.is_correction_level != "off" or action_mask is None:
        return self._fastloss_before(
            log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size, batch_num_tokens,
            global_batch_size,
        )  # fmt: skip
    count = batch_num_tokens if self.token_level_loss else global_batch_size
    out = fastloss.policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        action_mask.bool(),
        loss_type="ppo",
        clip_low=self.clip_eps_low,
        clip_high=self.clip_eps_high,
        dual_clip=self.dual_clip,
        aggregation="token-mean" if self.token_level_loss else "seq-mean-token-mean",
        normalizer=count,
    )
    loss = out.loss if count is None else out.loss * dp_size
    return loss, out.metrics["clip_ratio/region"], out.metrics["approx_kl"], None, None


def apply(*, policy: bool = True) -> Handle:
    """Put fastloss in OpenRLHF's places, for this process.

    Args:
        policy: ``PolicyLoss`` too.

    Raises:
        UnknownVersion: OpenRLHF's functions are not those that were read (0.11).
    """
    utils = importlib.import_module("openrlhf.models.utils")
    losses = importlib.import_module("openrlhf.models.loss")
    if utils.log_probs_from_logits is log_probs_from_logits:
        return Handle([])
    expect_signature(utils.log_probs_from_logits, "logits, labels, temperature", "openrlhf")
    expect_signature(utils.compute_entropy, "logits", "openrlhf")
    steps = [
        replace_everywhere("openrlhf", utils.log_probs_from_logits, log_probs_from_logits),
        replace_everywhere("openrlhf", utils.compute_entropy, compute_entropy),
    ]
    if policy:
        expect_signature(
            losses.PolicyLoss.forward,
            "self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size, batch_num_tokens, "
            "global_batch_size",
            "openrlhf",
        )
        before = losses.PolicyLoss.forward
        losses.PolicyLoss._fastloss_before = before
        losses.PolicyLoss.forward = policy_forward

        def undo() -> None:
            losses.PolicyLoss.forward = before
            del losses.PolicyLoss._fastloss_before

        steps.append(undo)
    return Handle(steps)
