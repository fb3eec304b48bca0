"""verl: its fused head and its PPO loss by fastloss.

``register()`` in a file that verl imports (``actor_rollout_ref.model.external_lib``): the fused head
(``use_fused_kernels``, either backend) is fastloss's, and ``policy_loss.loss_mode=fastloss`` is its clipped loss.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.integrations.handle import Handle, expect_signature, replace_everywhere

__all__ = ["FusedLinearForPPO", "linear_cross_entropy", "policy_loss", "register"]

NO_TOKEN = -(2**63)
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """``verl.utils.kernel.linear_cross_entropy``: log-probabilities and entropies of ``labels``' shape, float32."""
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        raise ValueError(
            "dist_process_group: expected one rank, got a vocabulary that is sharded over "
            f"{torch.distributed.get_world_size(dist_process_group)}"
        )
    if reduction not in (None, "none"):
        raise ValueError(f"reduction: expected 'none', got {reduction!r}")
    stats = fastloss.linear_token_stats(
        hidden.reshape(*labels.shape, hidden.shape[-1]),
        weight,
        labels.long(),
        temperature=1.0 if temperature is None else temperature,
        ignore_index=NO_TOKEN,
        outputs=("logprobs", "entropy"),
    )
    assert stats.logprobs is not None and stats.entropy is not None
    return stats.logprobs, stats.entropy


class FusedLinearForPPO(torch.nn.Module):
    """``verl.utils.experimental.torch_functional.FusedLinearForPPO``."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's "vanilla" loss (PPO with dual clip) in one pass over the tokens; its metrics under verl's names."""
    if loss_agg_mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode: expected one of {AGGREGATIONS}, got {loss_agg_mode!r}")
    batch = dict(config.global_batch_info)
    count = batch.get("batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size")
    shards = batch.get("dp_size", 1)
    low, high = (
        config.clip_ratio if bound is None else bound
        for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    out = fastloss.policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask.bool(),
        loss_type="ppo",
        clip_low=low,
        clip_high=high,
        dual_clip=config.get("clip_ratio_c", 3.0),
        aggregation=loss_agg_mode,
        max_length=batch.get("loss_scale_factor"),
        normalizer=count,
        weights=rollout_is_weights,
    )
    names = {
        "actor/pg_clipfrac": "clip_ratio/region",
        "actor/ppo_kl": "approx_kl",
        "actor/pg_clipfrac_lower": "clip_ratio/dual",
    }
    return out.loss * shards, {ours: out.metrics[theirs].item() for ours, theirs in names.items()}


def register(name: str = "fastloss") -> Handle:
    """Put fastloss in verl's places: the fused head of both backends, and the policy loss ``name``.

    Raises:
        UnknownVersion: verl's functions are not those that were read (0.9).
    """
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    heads = importlib.import_module("verl.utils.experimental.torch_functional")
    steps = []
    if heads.FusedLinearForPPO is not FusedLinearForPPO:
        expect_signature(
            heads.FusedLinearForPPO.forward,
            "self, hidden_states, vocab_weights, input_ids, temperature",
            "verl",
        )
        steps.append(replace_everywhere("verl", heads.FusedLinearForPPO, FusedLinearForPPO))
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    if kernel.linear_cross_entropy is not linear_cross_entropy:
        expect_signature(
            kernel.LinearCrossEntropy.forward,
            "ctx, hidden, weight, labels, temperature, reduction, dist_process_group",
            "verl",
        )
        before = kernel.linear_cross_entropy

        def sharded_or_ours(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any, **named: Any) -> Any:
            group = named.get("dist_process_group", rest[2] if len(rest) > 2 else None)
            if group is not None and torch.distributed.get_world_size(group) > 1:
                return before(hidden, weight, labels, *rest, **named)
            return linear_cross_entropy(hidden, weight, labels, *rest, **named)

        steps.append(replace_everywhere("verl", before, sharded_or_ours))
    if name not in core.POLICY_LOSS_REGISTRY:
        core.register_policy_loss(name)(policy_loss)
        steps.append(lambda: core.POLICY_LOSS_REGISTRY.pop(name, None))
    return Handle(steps)
