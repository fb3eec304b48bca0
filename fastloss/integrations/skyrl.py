"""SkyRL: ``policy_loss_type="fastloss"`` is its PPO loss in one pass over the tokens."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.integrations.handle import Handle

__all__ = ["policy_loss", "register"]


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """SkyRL's ``ppo_policy_loss``: advantages carry the normalisation, the loss is the sum over the mask.

    ``config.clip_ratio_c`` bounds the loss where the advantage is negative if ``config.dual_clip`` says so. The correction
    of the sampler (``config.off_policy_correction``) is SkyRL's own and enters as weights and mask.
    """
    mask = torch.ones_like(log_probs, dtype=torch.bool) if loss_mask is None else loss_mask
    weights, metrics = None, {}
    if rollout_logprobs is not None:
        correction = importlib.import_module(
            "skyrl.backends.skyrl_train.utils.off_policy_correction_utils"
        ).apply_off_policy_correction
        weights, mask, metrics = correction(
            torch.ones_like(log_probs), old_log_probs, rollout_logprobs, mask, config.off_policy_correction
        )
    out = fastloss.policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask.bool(),
        loss_type="ppo",
        clip_low=config.eps_clip_low,
        clip_high=config.eps_clip_high,
        dual_clip=config.clip_ratio_c if getattr(config, "dual_clip", False) else None,
        aggregation="seq-mean-token-sum",
        normalizer=1,
        weights=weights,
    )
    return out.loss, {"clip_ratio": out.metrics["clip_ratio/region"].item(), **metrics}


def register(name: str = "fastloss") -> Handle:
    """Register :func:`policy_loss` under ``name``; in an entry point of your own, before the trainer starts."""
    utils = importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
    registry = utils.PolicyLossRegistry
    if name in registry.list_available():
        return Handle([])
    utils.register_policy_loss(name)(policy_loss)
    return Handle([lambda: registry.unregister(name)])
