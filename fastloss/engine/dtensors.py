"""DTensors at the door of a public function: placements that mean something to it become local tensors and a group."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastloss.engine.shards import Shards

F = TypeVar("F", bound=Callable[..., Any])

# Which argument says how the vocabulary is cut, and along which dimension.
VOCABULARY = {"linear_weight": 0, "logits": -1}
WITH_IT = ("linear_bias", "ref_weight", "ref_bias", "teacher_weight", "teacher_bias", "teacher_logits")


def _class() -> Any:
    """DTensor, or None where nobody has imported it: then no argument is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def takes_dtensors(vocabulary: str) -> Callable[[F], F]:
    """The function with DTensors accepted: ``vocabulary`` (the vocabulary matrix, or the logits) sharded over the classes on one
    dimension of its mesh, or replicated; every other argument replicated on it, or sharded over tokens on that dimension
    (sequence parallelism: gathered here, and its gradient reduced and scattered). Results are replicated DTensors."""

    def wrap(function: F) -> F:
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def of_any(*args: Any, **kwargs: Any) -> Any:
            kind = _class()
            every = (*args, *kwargs.values(), *_adapter_of(kwargs))
            sharded = kind is not None and any(isinstance(x, kind) for x in every)
            if not sharded and (kwargs.get("group") is None or not torch.compiler.is_compiling()):
                return function(*args, **kwargs)
            if not sharded:
                return _eager(function, *args, **kwargs)
            given = dict(zip(names, args, strict=False))
            return _eager(_of_dtensors, function, vocabulary, {**given, **kwargs}, kind)

        return of_any  # type: ignore[return-value]

    return wrap


@torch.compiler.disable
def _eager(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Collectives between the kernels: torch.compile breaks its graph here."""
    return function(*args, **kwargs)


def _of_dtensors(function: Any, vocabulary: str, given: dict[str, Any], kind: Any) -> Any:
    from torch.distributed.tensor import Replicate

    first = next(x for x in (*given.values(), *_adapter_of(given)) if isinstance(x, kind))
    cut = given.get(vocabulary)
    mesh, dim = first.device_mesh, None
    if isinstance(cut, kind):
        mesh, dim = cut.device_mesh, _cut_dimension(vocabulary, cut)
    if dim is not None and given.get("group") is not None:
        raise ValueError(f"group: expected None beside a {vocabulary} that is a sharded DTensor, got a group")
    shards = None
    if dim is not None:
        shards = Shards(
            _sizes(cut, dim, VOCABULARY[vocabulary]), mesh.get_local_rank(dim), mesh.get_group(dim)
        )
        given = {**given, "group": shards}
    local, partial = {}, False
    for name, x in given.items():
        if not isinstance(x, kind):
            local[name] = x
        elif name == vocabulary or (name in WITH_IT and cut is not None and x.placements == cut.placements):
            _is_cut_alike(name, x, vocabulary, cut)
            local[name] = x.to_local()
        elif name == "target" and shards is not None and x.is_floating_point():
            local[name] = _probabilities(x, dim, shards)
        else:
            local[name], summed_outside = _local(name, x, mesh, dim)
            partial = partial or (name == "input" and summed_outside)
    if given.get("lora") is not None:
        if partial:
            raise ValueError(
                "lora: expected None beside an input that is sharded over tokens; use .redistribute() on the input"
            )
        local["lora"] = _adapter(given["lora"], vocabulary, cut, mesh, dim, kind)
    if partial:
        assert shards is not None
        local["group"] = Shards(shards.sizes, shards.rank, shards.group, reduce_hidden=False)
    out = function(**local)
    everywhere = [Replicate()] * mesh.ndim
    return _wrapped(out, lambda x: kind.from_local(x, mesh, everywhere, run_check=False))


def _adapter_of(given: dict[str, Any]) -> tuple[Any, ...]:
    lora = given.get("lora")
    return tuple(lora) if isinstance(lora, (tuple, list)) else ()


def _adapter(lora: Any, vocabulary: str, cut: Any, mesh: Any, dim: int | None, kind: Any) -> tuple[Any, ...]:
    """A LoRA's B is cut as the vocabulary is; the rest is whole on every process."""
    local = []
    for place, x in enumerate(lora):
        if not isinstance(x, kind):
            local.append(x)
        elif place == 1 and cut is not None and x.placements == cut.placements:
            _is_cut_alike("lora's B", x, vocabulary, cut)
            local.append(x.to_local())
        elif place == 1 and dim is not None:
            raise ValueError(
                f"lora's B: expected the placements of {vocabulary}, {cut.placements}, got {x.placements}"
            )
        else:
            whole, sharded = _local("lora", x, mesh, dim)
            if sharded:
                raise ValueError(f"lora: expected Replicate() for what has no classes, got {x.placements}")
            local.append(whole)
    return tuple(local)


def _cut_dimension(name: str, x: Any) -> int | None:
    """The dimension of the mesh over which the vocabulary is cut; None: over none."""
    over = VOCABULARY[name] % x.dim()
    cut = [i for i, place in enumerate(x.placements) if place.is_shard(over)]
    if len(cut) > 1 or any(not (place.is_replicate() or i in cut) for i, place in enumerate(x.placements)):
        raise ValueError(
            f"{name}: expected placements Shard({over}) on at most one dimension of the mesh and Replicate() on the others, got "
            f"{x.placements}; use .redistribute()"
        )
    return cut[0] if cut else None


def _is_cut_alike(name: str, x: Any, vocabulary: str, cut: Any) -> None:
    """Every process finds it the same: of another number of classes the cuts lie elsewhere."""
    over = VOCABULARY[vocabulary]
    if cut is not None and x.shape[over % x.dim()] != cut.shape[over % cut.dim()]:
        raise ValueError(
            f"{name}: expected {cut.shape[over]} classes as {vocabulary} where both are sharded DTensors, got {x.shape[over]}"
        )


def _probabilities(x: Any, dim: int | None, shards: Shards) -> Tensor:
    """This process's columns of class probabilities, which are sharded over the classes or replicated."""
    wrong = [
        place
        for i, place in enumerate(x.placements)
        if not (place.is_replicate() or (i == dim and place.is_shard(x.dim() - 1)))
    ]
    if wrong:
        raise ValueError(
            f"target: expected class probabilities with Shard({x.dim() - 1}) or Replicate(), got {x.placements}"
        )
    own: Tensor = x.to_local()
    if dim is None or not x.placements[dim].is_replicate():
        return own
    return own[..., shards.first : shards.first + shards.own]


def _sizes(x: Any, dim: int, over: int) -> tuple[int, ...]:
    """The classes of each process, as torch.distributed.tensor cuts a dimension: chunks of ceil(V / processes)."""
    total, world = x.shape[over], x.device_mesh.size(dim)
    chunk = -(-total // world) if total else 0
    return tuple(max(0, min(chunk, total - chunk * rank)) for rank in range(world))


def _local(name: str, x: Any, mesh: Any, dim: int | None) -> tuple[Tensor, bool]:
    """(an argument as every process has it whole, whether its gradient is summed over the group by DTensor)."""
    from torch.distributed.tensor import Partial, Replicate

    if x.device_mesh != mesh:
        raise ValueError(f"{name}: expected a DTensor on the mesh of the vocabulary, got another mesh")
    wrong = [place for i, place in enumerate(x.placements) if not place.is_replicate() and i != dim]
    if wrong:
        raise ValueError(
            f"{name}: expected Replicate() on every dimension of the mesh over which the vocabulary is not cut, got "
            f"{x.placements}; give each process its own tokens (.to_local()) and the mean's normalizer"
        )
    everywhere = [Replicate()] * mesh.ndim
    if all(place.is_replicate() for place in x.placements):
        return x.to_local(grad_placements=everywhere), False
    gradients = [Partial() if i == dim else Replicate() for i in range(mesh.ndim)]
    return x.redistribute(mesh, everywhere).to_local(grad_placements=gradients), True


def _wrapped(out: Any, wrap: Callable[[Tensor], Any]) -> Any:
    if isinstance(out, torch.Tensor):
        return wrap(out)
    if isinstance(out, tuple):
        values = [_wrapped(x, wrap) for x in out]
        return type(out)(*values) if hasattr(out, "_fields") else tuple(values)
    if isinstance(out, dict):
        return {name: _wrapped(x, wrap) for name, x in out.items()}
    return out
