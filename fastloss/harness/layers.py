"""What is done to a model's layers from outside: activations recomputed in the backward, weights in shards (FSDP2)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from . import parallel
from .config import TrainConfig


def prepare(model: Any, config: TrainConfig) -> Any:
    """``model`` as the config wants it held; before anything keeps one of its parameters."""
    if config.checkpoint_activations and any(p.requires_grad for p in model.parameters()):
        recompute(model)
    if shards(config):
        shard(model, config)
    return model


def layers_of(model: Any) -> nn.ModuleList:
    """The body's blocks: its first ModuleList."""
    found = next((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)), None)
    if found is None:
        raise ValueError(f"model: expected a body with a list of layers, got {type(model).__name__}")
    return found


def recompute(model: Any) -> None:
    """Each layer keeps its input alone and runs once more in the backward: the same bits, dropout too.

    transformers' own switch does nothing in a model that is in eval mode, as dpo, grpo and ppo have it.
    """
    for layer in layers_of(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@contextlib.contextmanager
def activations_kept(model: nn.Module) -> Iterator[None]:
    """For a while without :func:`recompute`: a model's FLOPs do not count a layer twice."""
    found = [(m, m.__dict__["forward"]) for m in model.modules() if "forward" in m.__dict__]
    ours = [(m, f) for m, f in found if isinstance(f, partial) and f.func is checkpoint]
    for module, forward in ours:
        module.forward = forward.args[0]  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in ours:
            module.forward = forward  # type: ignore[method-assign]


def build_device(config: TrainConfig) -> str:
    """Where a model is made: one that will be sharded never lies whole on a GPU."""
    return "cpu" if shards(config) else str(parallel.device_of(config.device))


def shards(config: TrainConfig) -> bool:
    return config.parallel == "fsdp" and parallel.world() > 1


def shard(model: Any, config: TrainConfig) -> None:
    """Every parameter in shards over all processes: a layer gathers its own when it runs, the rest of the body likewise.

    The loss reads the vocabulary matrix outside of any forward, through :meth:`Head.gathered`. A tied matrix is the
    embedding's: its two gradients, both summed over the processes, add up in one shard.
    """
    body = model.base_model
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    tied = head is not None and head.weight is body.get_input_embeddings().weight
    if tied and head.bias is not None:
        raise ValueError("parallel: expected a tied head without a bias for fsdp, got one with a bias")
    for layer in layers_of(model):
        shard_module(layer, config)
    shard_module(body, config)
    if tied:
        head.weight = body.get_input_embeddings().weight
    for module in model.modules():
        if any(not parallel.is_sharded(p) for p in module.parameters(recurse=False)):
            shard_module(module, config)


@functools.cache
def mesh_of(device_type: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (parallel.world(),))


def shard_module(module: Any, config: TrainConfig) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(parallel.device_of(config.device).type)
    # a root stays whole after a forward by default, and would be read again after an update or a load
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # each loss is divided by the whole step's count: gradients are summed, not averaged (gloo has no average)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
