"""prime-rl: ``[trainer.loss] type = "custom", import_path = "fastloss.integrations.prime_rl.policy_loss"``."""

from __future__ import annotations

import importlib
from typing import Any

import fastloss

__all__ = ["policy_loss"]


def policy_loss(inputs: Any, **options: Any) -> Any:
    """The loss of one sequence, summed over its tokens: prime-rl adds the sequences up and divides.

    Args:
        inputs: prime-rl's ``LossInputs``: ``trainer_logprobs``, ``inference_logprobs``, ``ref_logprobs``,
            ``advantages``, ``loss_mask``, ``loss_weights``, each ``[seq]``.
        options: ``[trainer.loss.kwargs]``: those of :func:`fastloss.policy_loss` (loss_type, clip_high, beta …).

    Returns:
        prime-rl's ``LossOutputs``.
    """
    row: Any = lambda value: None if value is None else value.unsqueeze(0)
    out = fastloss.policy_loss(
        row(inputs.trainer_logprobs),
        row(inputs.inference_logprobs),
        row(inputs.advantages),
        row(inputs.loss_mask),
        **{"loss_type": "ppo", **options},
        ref_logprobs=row(inputs.ref_logprobs),
        weights=row(getattr(inputs, "loss_weights", None)),
        aggregation="seq-mean-token-sum",
        normalizer=1,
    )
    outputs = importlib.import_module("prime_rl.trainer.rl.loss").LossOutputs
    return outputs(loss=out.loss, metrics=out.metrics)
