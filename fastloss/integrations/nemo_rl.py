"""NeMo-RL: a loss function of its protocol (``LossFunction``, input "logprob") that is fastloss.policy_loss."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

import fastloss

__all__ = ["PolicyLoss"]


class PolicyLoss:
    """``PolicyLoss(loss_type="ppo", clip_low=0.2, …)`` where NeMo-RL's ``ClippedPGLossFn`` stood.

    Reads ``prev_logprobs``, ``advantages``, ``token_mask``, ``sample_mask`` and, with ``beta``,
    ``reference_policy_logprobs`` of the batch, all ``[B, T]`` over tokens of which the first has no prediction, and divides
    by the global count of tokens (``aggregation="token-mean"``) or of sequences (the other aggregations).

    Args:
        options: those of :func:`fastloss.policy_loss`.
    """

    def __init__(self, **options: Any) -> None:
        interfaces = importlib.import_module("nemo_rl.algorithms.loss.interfaces")
        self.options = {"loss_type": "ppo", "aggregation": "token-mean", **options}
        per_token = self.options["aggregation"] == "token-mean"
        self.loss_type = interfaces.LossType.TOKEN_LEVEL if per_token else interfaces.LossType.SEQUENCE_LEVEL
        self.input_type = interfaces.LossInputType.LOGPROB

    def __call__(
        self,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        *,
        next_token_logprobs: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        per_token = self.options["aggregation"] == "token-mean"
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        reference = data["reference_policy_logprobs"][:, 1:] if self.options.get("beta") else None
        out = fastloss.policy_loss(
            next_token_logprobs,
            data["prev_logprobs"][:, 1:],
            data["advantages"][:, 1:],
            mask.bool(),
            ref_logprobs=reference,
            normalizer=global_valid_toks if per_token else global_valid_seqs,
            **self.options,
        )
        metrics = {name: value.item() for name, value in out.metrics.items()}
        return out.loss, {
            "loss": out.loss.item(),
            **metrics,
            "num_valid_samples": data["sample_mask"].sum().item(),
        }
