"""What a mixture of experts adds to its own loss for its routers: a loss from hidden states alone would drop it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import parallel
from .config import LossOptions, TrainConfig
from .data import IGNORE, Batch
from .model import body, hidden_states
from .step import autocast


@dataclass(frozen=True)
class Routers:
    """Coefficients of the load-balancing loss and of the z-loss; ``top_k`` experts see a token."""

    balance: float
    z: float
    top_k: int

    def loss(self, logits: Any, kept: Tensor) -> Tensor:
        """Of the router logits of all layers; ``kept`` bool ``[B, T]``: the tokens that are no padding."""
        import fastloss

        total = torch.zeros((), dtype=torch.float32, device=kept.device)
        if self.balance:
            total = (
                total + self.balance * fastloss.moe_load_balancing_loss(logits, self.top_k, mask=kept).loss
            )
        if self.z:
            total = total + self.z * fastloss.router_z_loss(logits, mask=kept)
        return total


def routers_of(model: Any, config: LossOptions) -> Routers | None:
    """None where nothing is added: a dense model, or one whose own loss adds nothing either."""
    own = model.config.get_text_config()
    balance = config.router_aux
    if balance < 0:
        told = getattr(own, "output_router_logits", False)
        balance = float(getattr(own, "router_aux_loss_coef", 0.0)) if told else 0.0
    if not (balance or config.router_z):
        return None
    top_k = getattr(own, "num_experts_per_tok", None)
    if not top_k or not hasattr(own, "output_router_logits"):
        raise ValueError(
            f"router_aux: expected a mixture of experts that gives its router logits, got {type(model).__name__}"
        )
    return Routers(balance, config.router_z, int(top_k))


def with_routers(
    model: Any, batch: Batch, config: TrainConfig, routers: Routers | None, passes: int
) -> tuple[Tensor, Tensor | None]:
    """Hidden states ``[B, T, D]``, and this pass's share of the routers' loss, whose mean is over the ``passes`` of all processes."""
    with autocast(config, batch.inputs.device):
        if routers is None:
            return hidden_states(model, batch.inputs, batch.positions, batch.mask), None
        options = {"position_ids": batch.positions, "attention_mask": batch.mask}
        given = {name: x for name, x in options.items() if x is not None}
        out = body(model)(input_ids=batch.inputs, use_cache=False, output_router_logits=True, **given)
        # A row's padding lies behind its last token to learn.
        kept = (batch.targets != IGNORE).flip(1).cumsum(1).flip(1) > 0
        loss = routers.loss(out.router_logits, kept) / (passes * parallel.data_world())
    return out.last_hidden_state, loss
