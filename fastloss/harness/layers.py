"""What is done to a model's layers from outside: activations recomputed in the backward, matrices in parts (tensor parallel), weights in
shards (FSDP2)."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import parallel
from .config import TrainConfig


def prepare(model: Any, config: TrainConfig) -> Any:
    """``model`` as the config wants it held; before anything keeps one of its parameters."""
    if config.checkpoint_activations and any(p.requires_grad for p in model.parameters()):
        recompute(model)
    if parallel.layout.tp > 1:
        part(model)
        if not shards(config):
            model.to(parallel.device_of(config.device))  # what is not in parts
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
    """Where a model is made: one that will be cut never lies whole on a GPU."""
    cut = shards(config) or parallel.layout.tp > 1
    return "cpu" if cut else str(parallel.device_of(config.device))


def shards(config: TrainConfig) -> bool:
    return parallel.layout.fsdp and parallel.data_world() > 1


def part(model: Any) -> None:
    """Each matrix in parts over the processes of tp, by the plan that transformers has for the model: attention by heads, the MLP by its
    width, the vocabulary by rows, in the embedding and in the head. Norms are whole in each, and have the same gradients; of those of
    each head (Qwen3, Gemma 3), which see a process's heads alone, the gradients are summed.

    Whatever is sharded over data (:func:`shard`) comes after it.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    body, tp, shape = model.base_model, parallel.layout.tp, model.config.get_text_config()
    known: Any = getattr(body, "_tp_plan", None) or getattr(shape, "base_model_tp_plan", None) or {}
    known = {name: how for name, how in known.items() if "layers" in name}
    of_heads = [name for name, how in known.items() if how == "replicated_with_grad_allreduce"]
    known = {name: how for name, how in known.items() if name not in of_heads}
    if not known or set(known.values()) - {"colwise", "rowwise"}:
        raise ValueError(
            f"parallel: expected a model with a plan of colwise and rowwise layers for tp={tp}, got {type(model).__name__} with "
            f"{', '.join(sorted(set(known.values()))) or 'none'}"
        )
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if getattr(shape, heads, tp) % tp:
            raise ValueError(
                f"parallel: expected {heads} in a multiple of tp={tp}, got {getattr(shape, heads)}"
            )
    words: Any = body.get_input_embeddings()
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    tied = head is not None and head.weight is words.weight
    if tied and head.bias is not None:
        raise ValueError(f"parallel: expected a tied head without a bias for tp={tp}, got one with a bias")
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan: dict[str, Any] = {name: styles[how]() for name, how in known.items()}
    plan[next(name for name, m in body.named_modules() if m is words)] = RowwiseParallel(
        input_layouts=Replicate()
    )
    mesh = parallel.axis("tp")
    parallelize_module(body, mesh, plan, src_data_rank=None)
    for name, module in body.named_modules():
        if any(fnmatch.fnmatch(name, pattern) for pattern in of_heads):
            sum_gradients(module, mesh.get_group())
    if tied:
        head.weight = words.weight
    elif head is not None:
        parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()), src_data_rank=None)


class _Summed(torch.autograd.Function):
    """A parameter, whose gradient is the sum of the group's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        total = upstream.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradients(module: nn.Module, group: Any) -> None:
    """Each process has other inputs of ``module``: its parameters' gradients are summed over the group as they are made, so that what
    shards them, or adds up passes, finds them whole."""
    forward = module.forward

    def of_summed(*args: Any, **kwargs: Any) -> Any:
        own: dict[str, Any] = dict(module._parameters)  # FSDP2 sets others in the meantime
        module._parameters.update(
            {name: p if p is None else _Summed.apply(p, group) for name, p in own.items()}
        )
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(own)

    module.forward = of_summed  # type: ignore[method-assign]


def shard(model: Any, config: TrainConfig) -> None:
    """Every parameter in shards over all processes that have other tokens: a layer gathers its own when it runs, the rest of the body likewise.

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
        if any(not parallel.is_over_data(p) for p in module.parameters(recurse=False)):
            shard_module(module, config)


def shard_module(module: Any, config: TrainConfig) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = parallel.axis("data")
    # a root stays whole after a forward by default, and would be read again after an update or a load
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # each loss is divided by the whole step's count: gradients are summed, not averaged (gloo has no average)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
