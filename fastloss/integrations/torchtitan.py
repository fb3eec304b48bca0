"""torchtitan: cross-entropy from the hidden states, in one call, in place of its chunked loss.

In a configuration, ``loss=LinearCrossEntropyLoss.Config()`` where ``ChunkedLossWrapper.Config()`` stood. The trainer
gives hidden states and the ``lm_head`` to subclasses of ``ChunkedLossWrapper`` alone, hence the base class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper  # type: ignore[import-not-found]

from fastloss.integrations.heads import lazy_heads

__all__ = ["LinearCrossEntropyLoss"]


class LinearCrossEntropyLoss(ChunkedLossWrapper):
    """torchtitan's own loss of lazy logits: what ``loss_fn`` does up to ``F.cross_entropy``, it does to those.

    The gradient of the head's weight is accumulated in float32 and rounded once, and no chunk of logits is kept; one
    backward for the whole model, so gradients of the loss may be scaled. ``num_chunks`` has no effect. A vocabulary that
    is sharded over a tensor-parallel mesh keeps torchtitan's logits.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        pass

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.lm_head is None:
            raise ValueError("lm_head: expected a module (set_lm_head), got None")
        with lazy_heads(self.lm_head):
            logits = self.lm_head(pred)
        result: tuple[Tensor, dict[str, Tensor]] = self.loss_fn(
            logits, labels, global_valid_tokens, **loss_inputs
        )
        return result
