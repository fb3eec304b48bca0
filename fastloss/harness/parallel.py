"""More than one process, as torchrun starts them: who does what, and sums over all.

Every function is called by all processes at the same place. With one process each does what that one needs, mostly nothing.
Numbers and decisions go through gloo on the CPU; gradients through nccl where they lie on a GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
BUCKET = 32 << 20  # bytes of gradients in one all-reduce; not tuned


def start(name: str) -> None:
    """The process group of a torchrun launch with more than one process, on the device of that name; nothing without one."""
    device = device_of(name)
    if launched() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # patient, since the others wait while the first reads the data; when one fails torchrun ends them all
    backend, patience = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(hours=6)
    dist.init_process_group(backend, timeout=patience)
    atexit.register(dist.destroy_process_group)


def launched() -> int:
    """Processes of this torchrun launch."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def expect_one(what: str) -> None:
    if launched() > 1:
        raise ValueError(f"{what}: expected one process, got {launched()}")


def device_of(name: str) -> torch.device:
    """The device of ``--device``, if it is here. On a machine with several GPUs each process takes its own."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        float(torch.zeros((), device=device))  # of the meta device there is no value
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device: expected auto, cpu, cuda, cuda:1 …, one that is here, got {name!r}: {why}"
        ) from None
    return device


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    return rank() == 0


def summed(*numbers: float | Tensor) -> list[float]:
    """Each number, added up over the processes, in float64."""
    values = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(values)
    return values.tolist()


def any_of(flag: bool) -> bool:
    """True where any process says so: a signal reaches them at different steps."""
    return summed(flag)[0] > 0


def from_first(make: Callable[[], R]) -> R:
    """What the first process makes, or the exception it raises, in every process."""
    if world() == 1:
        return make()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block, then the others: they find on disk what it made."""
    if not is_first():
        summed(0)
    try:
        yield
    finally:
        if is_first():
            summed(0)


def spread(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``work`` of each item, in their order, each done by one process: the figures of one process, in a share of its time.

    All call ``work`` equally often, since a model in shards gathers its weights from all; a surplus call is thrown away.
    """
    calls, last = -(-len(items) // world()), len(items) - 1
    done = [work(items[min(call * world() + rank(), last)]) for call in range(calls)]
    if world() == 1:
        return done
    everyone: list[list[R]] = [[] for _ in range(world())]
    dist.all_gather_object(everyone, done)
    return [everyone[k % world()][k // world()] for k in range(len(items))]


def everyones(values: Tensor) -> tuple[Tensor, slice]:
    """The values of all processes after each other, and which are this one's. Their number may differ.  # [n] -> [N]"""
    if world() == 1:
        return values, slice(None)
    parts: list[Tensor] = [values] * world()
    dist.all_gather_object(parts, values.cpu())
    first = sum(map(len, parts[: rank()]))
    return torch.cat(parts).to(values.device), slice(first, first + len(values))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Adds up the gradients over the processes, once a step. Every loss is already divided by the whole step's count.

    Shards are left out: their backward has summed them.
    """
    if world() == 1:
        return
    whole = [p for p in parameters if not is_sharded(p)]
    # a parameter that only some processes' rows reached (an expert, say) has a gradient of 0 in the others
    reached = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32)
    dist.all_reduce(reached)
    grads = []
    for p, count in zip(whole, reached.tolist(), strict=True):
        if count:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(p.grad)
    for bucket in _buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat)
        for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(total.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of one dtype and device each."""
    bucket: list[Tensor] = []
    for grad in grads:
        other = bucket and (grad.dtype, grad.device) != (bucket[0].dtype, bucket[0].device)
        if other or sum(g.nbytes for g in bucket) + grad.nbytes > BUCKET:
            if bucket:
                yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module is slow to import


def gathered(tensor: Any) -> Any:
    """The whole of a tensor that lies in shards, others as they are.

    Each process's gradient of it is a part of a sum over its own rows: the backward adds up and scatters the sum
    (reduce-scatter), in the tensor's dtype.
    """
    if tensor is None or not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial()])
