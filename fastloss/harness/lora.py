"""LoRA through `peft`: small trained matrices beside the frozen ones; the head stays frozen, its gradient is never made."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig

ADAPTER = "default"  # peft's name for the only one


def add(model: Any, config: TrainConfig, head: nn.Module) -> Any:
    """``model`` with adapters in its own modules, and nothing else to be trained; itself where the rank is 0."""
    if not config.lora_rank:
        return model
    peft = _peft()
    scores = (
        head is not model.get_output_embeddings()
    )  # a head of the stage's own: trained, and no adapter in it
    # linear layers by their class alone, as Llama 4's router: they do not give what a linear layer gives
    own = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    ]  # fmt: skip
    options = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.lora_targets) or "all-linear",
        **({"exclude_modules": own} if own and not config.lora_targets else {}),
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
    )
    torch.manual_seed(config.seed)  # whatever loading the model drew
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="fan_in_fan_out"
        )  # GPT-2's transposed matrices: peft sees to them
        try:
            peft.inject_adapter_in_model(options, model)
        except ValueError as error:
            raise ValueError(f"lora_targets: {error}") from None
    if any(layer.get_base_layer() is head for _, layer in layers(model)):
        raise ValueError("lora_targets: expected modules of the body, got the head")
    # a mixture's experts are one tensor; peft's adapter is then of that parameter, not of a module's `weight`
    odd = [
        name for name, layer in layers(model)
        if name in own or (not hasattr(layer, "parameter_name") and layer.get_base_layer().weight.ndim != 2)
    ]  # fmt: skip
    if odd:
        raise ValueError(f"lora_targets: expected linear layers and embeddings, got {odd[0]}")
    embedding = model.get_input_embeddings()
    if model.config.tie_word_embeddings and any(layer is embedding for _, layer in layers(model)):
        raise ValueError("lora_targets: the embedding is tied to the head: an adapter would part them")
    head.requires_grad_(scores)
    return model


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of each layer with an adapter."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]


class Base:
    """The model as it was before its adapters: what DPO, GRPO and PPO refer to, without a second copy of the weights."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def base_model(self, **inputs: Any) -> Any:
        with _off(self.model):
            return self.model.base_model(**inputs)

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()


@contextlib.contextmanager
def _off(model: nn.Module) -> Iterator[None]:
    adapted = [layer for _, layer in layers(model)]
    for layer in adapted:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)


@torch.no_grad()
def merged(model: Any, state: Mapping[str, Tensor] | None = None) -> Any:
    """A plain model whose matrices are the frozen ones plus the adapters' products; itself where there are none.

    state: the model's whole weights, where its own lie in shards.
    """
    adapted = layers(model)
    if not adapted:
        return model
    state = model.state_dict() if state is None else state
    weights: dict[str, Tensor] = {_plain(name): t for name, t in state.items() if ".lora_" not in name}
    for name, layer in adapted:
        weight = f"{_plain(name)}.{getattr(layer, 'parameter_name', 'weight')}"
        weights[weight] = weights[weight] + _product(name, layer, state)
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain


def _plain(name: str) -> str:
    """Without the adapters around a layer; around a mixture's experts there is one for each of their tensors."""
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name)


def _product(name: str, layer: Any, state: Mapping[str, Tensor]) -> Tensor:
    """What the adapter of a linear layer, of an embedding, or of a mixture's experts, adds to its tensor."""
    if f"{name}.lora_embedding_A.{ADAPTER}" in state:
        a, b = (state[f"{name}.lora_embedding_{part}.{ADAPTER}"] for part in "AB")
    else:
        a, b = (state[f"{name}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
    experts = getattr(layer, "num_experts", 1)
    if experts > 1:  # the rank of all experts lies in one matrix, as peft has it
        a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts)
        turned = getattr(layer, "_did_swap_in_out_features", False)  # [experts, out, in]
        product = torch.einsum("ore,eri->eoi" if turned else "ore,eri->eio", b, a)
        return product * layer.scaling[ADAPTER]
    product = b @ a * layer.scaling[ADAPTER]
    return product.T if _turned(layer) else product


def _turned(layer: Any) -> bool:
    """Matrices that lie as [in, out]: GPT-2's, and an embedding's."""
    return isinstance(layer.get_base_layer(), nn.Embedding) or bool(getattr(layer, "fan_in_fan_out", False))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("lora_rank: needs `peft`: pip install 'fastloss[lora]'") from None
    return peft
