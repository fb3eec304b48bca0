"""A mixture of experts gets the gradients of transformers' own loss, which adds its routers' term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from fastloss.harness import pretrain, sft
from fastloss.harness.config import PretrainConfig, SftConfig
from fastloss.harness.data import IGNORE, Batch
from fastloss.harness.losses import loss_named
from fastloss.harness.model import build_model, head_of
from fastloss.harness.routers import routers_of, with_routers

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}


class OneBatch:
    """A step's rows, whatever is asked for."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, *_: Any) -> Batch:
        return self._batch


def mixtral(told: bool) -> MixtralForCausalLM:
    config = MixtralConfig(**SMALL, **EXPERTS, output_router_logits=told)
    return build_model(config, 0, "cpu")  # type: ignore[return-value]


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_gradients_are_those_of_the_models_own_loss(stage: str) -> None:
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if stage == "sft":
        labels[:, :3] = IGNORE
    model = mixtral(told=True)
    own = mixtral(told=True)
    # Its last token predicts nothing, and is no input of ours: transformers' mask leaves it out of the routers' term.
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    own(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    batch = Batch(ids[:, :-1], labels[:, 1:])
    module, config = (pretrain, PretrainConfig()) if stage == "pretrain" else (sft, SftConfig())
    head, rows = head_of(model), OneBatch(batch)
    step = module.make_step(model, head, loss_named("fastloss"), rows, config)  # type: ignore[arg-type]
    metrics = step(0)
    expected = {name: p.grad for name, p in own.named_parameters()}
    for name, p in model.named_parameters():
        assert p.grad is not None and expected[name] is not None
        torch.testing.assert_close(
            p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    gate = next(p for n, p in model.named_parameters() if "gate.weight" in n)
    assert gate.grad is not None and gate.grad.abs().max() > 0
    assert metrics["tokens"] == int((batch.targets != IGNORE).sum())


def test_what_is_added() -> None:
    quiet = mixtral(told=False)
    assert routers_of(quiet, PretrainConfig()) is None
    assert routers_of(mixtral(told=True), PretrainConfig(router_aux=0.0)) is None
    asked = routers_of(quiet, PretrainConfig(router_aux=0.1, router_z=0.01))
    assert asked is not None and (asked.balance, asked.z, asked.top_k) == (0.1, 0.01, 2)
    dense = build_model(LlamaConfig(**SMALL), 0, "cpu")
    assert routers_of(dense, PretrainConfig()) is None
    with pytest.raises(ValueError, match="router_aux: expected a mixture of experts"):
        routers_of(dense, PretrainConfig(router_aux=0.1))


def test_padding_is_left_out() -> None:
    """Behind a row's last target anything may stand."""
    model, routers = mixtral(told=True), routers_of(mixtral(told=True), PretrainConfig(router_z=0.1))
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[0, 5:], targets[1, :2] = IGNORE, IGNORE
    other = ids.clone()
    other[0, 5:] = 7
    losses = [with_routers(model, Batch(x, targets), PretrainConfig(), routers, 2)[1] for x in (ids, other)]
    assert losses[0] is not None and losses[1] is not None
    torch.testing.assert_close(losses[0], losses[1])
    shorter = with_routers(model, Batch(ids[:1, :5], targets[:1, :5]), PretrainConfig(), routers, 1)[1]
    assert shorter is not None and not torch.isclose(shorter, 2 * losses[0])
