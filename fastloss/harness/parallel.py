"""More than one process, as torchrun starts them: who does what, and sums over all.

Every function is called by all processes at the same place. With one process each does what that one needs, mostly nothing.
Numbers and decisions go through gloo on the CPU; gradients through nccl where they lie on a GPU.

Processes are counted as torchrun does, the parts of a matrix (tp) innermost: process = (replica · cp + piece) · tp + part. A replica is
all that reads the same rows; those that differ in their tokens, replica or piece, are ``data``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastloss.engine import failures

from .layout import Layout

T = TypeVar("T")
R = TypeVar("R")
BUCKET = 32 << 20  # bytes of gradients in one all-reduce; not tuned
layout = Layout()  # of the run that goes on
_device_type = "cpu"


def start(name: str, how: str = "replicate") -> None:
    """The process group of a torchrun launch with more than one process, on the device of that name; nothing without one.

    ``how`` they divide the work is :class:`Layout`'s.
    """
    global layout, _device_type
    device, wanted = device_of(name), Layout.parse(how)
    wanted.check(launched())
    layout, _device_type = wanted, device.type
    if launched() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # patient, since the others wait while the first reads the data; when one fails torchrun ends them all
    backend, patience = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(hours=6)
    dist.init_process_group(backend, timeout=patience)
    atexit.register(dist.destroy_process_group)
    failures.register()


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
        float(torch.zeros((), dtype=torch.float32, device=device))  # of the meta device there is no value
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


def data_world() -> int:
    """Processes whose tokens differ."""
    return world() // layout.tp


def data_rank() -> int:
    return rank() // layout.tp


def replicas() -> int:
    """Sets of processes whose rows differ."""
    return data_world() // layout.cp


def replica() -> int:
    return data_rank() // layout.cp


def mesh() -> Any:
    """The processes as ``data`` × ``tp``."""
    return _mesh(_device_type, (data_world(), layout.tp), ("data", "tp"))


def axis(name: str) -> Any:
    """The mesh of one dimension of this process and those beside it: ``cp`` has the pieces of its rows, ``replica`` all that read them."""
    if name == "cp":
        return _mesh(_device_type, (replicas(), layout.cp, layout.tp), ("dp", "cp", "in"))["cp"]
    if name == "replica":
        return _mesh(_device_type, (replicas(), layout.cp * layout.tp), ("dp", "replica"))["replica"]
    return mesh()[name]


@functools.cache
def _mesh(device_type: str, shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def _data_group() -> Any:
    """Of the processes that have other tokens and the same part of the matrices; None: all."""
    return axis("data").get_group() if layout.tp > 1 else None


def summed(*numbers: float | Tensor) -> list[float]:
    """Each number, added up over the processes that have other tokens, in float64."""
    return _summed(numbers, _data_group())


def of_all(*numbers: float | Tensor) -> list[float]:
    """Each number, added up over all processes."""
    return _summed(numbers, None)


def _summed(numbers: Sequence[float | Tensor], group: Any) -> list[float]:
    values = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device="cpu")
    if world() > 1:
        dist.all_reduce(values, group=group)
    return values.tolist()


def any_of(flag: bool) -> bool:
    """True where any process says so: a signal reaches them at different steps."""
    return of_all(flag)[0] > 0


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


def from_reader(make: Callable[[], R], *, in_turn: bool = False) -> R:
    """What one process of each replica makes, or the exception it raises, in all of them: data is read once for all that share its rows.

    in_turn: the first process before those of the other replicas, which find on disk what it made.
    """
    box: list[Any] = [None, None]
    with first_alone() if in_turn else contextlib.nullcontext():
        if rank() % (layout.cp * layout.tp) == 0:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
    if layout.cp * layout.tp > 1:
        shared = axis("replica").get_group()
        dist.broadcast_object_list(box, group=shared, group_src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block, then the others: they find on disk what it made."""
    if not is_first():
        of_all(0)
    try:
        yield
    finally:
        if is_first():
            of_all(0)


def spread(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``work`` of each item, in their order, each done by one process: the figures of one process, in a share of its time.

    All call ``work`` equally often, since a model in shards gathers its weights from all; a surplus call is thrown away. The parts of
    one model (tp) do an item together.
    """
    others = data_world()
    calls, last = -(-len(items) // others), len(items) - 1
    done = [work(items[min(call * others + data_rank(), last)]) for call in range(calls)]
    if others == 1:
        return done
    everyone: list[list[R]] = [[] for _ in range(others)]
    dist.all_gather_object(everyone, done, group=_data_group())
    return [everyone[k % others][k // others] for k in range(len(items))]


def everyones(values: Tensor) -> tuple[Tensor, slice]:
    """The values of all processes after each other, and which are this one's. Their number may differ.  # [n] -> [N]"""
    if data_world() == 1:
        return values, slice(None)
    parts: list[Tensor] = [values] * data_world()
    dist.all_gather_object(parts, values.cpu(), group=_data_group())
    first = sum(map(len, parts[: data_rank()]))
    return torch.cat(parts).to(values.device), slice(first, first + len(values))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Adds up the gradients over the processes, once a step. Every loss is already divided by the whole step's count.

    Shards are left out: their backward has summed them. Of a part of a matrix (tp) the same part is added up.
    """
    if data_world() == 1:
        return
    whole, group = [p for p in parameters if not is_over_data(p)], _data_group()
    # a parameter that only some processes' rows reached (an expert, say) has a gradient of 0 in the others
    reached = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32, device="cpu")
    dist.all_reduce(reached, group=group)
    grads = []
    for p, count in zip(whole, reached.tolist(), strict=True):
        if count:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(local(p.grad))
    for bucket in _buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=group)
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


def is_over_data(tensor: Any) -> bool:
    """In shards over the processes that have other tokens (fsdp)."""
    return is_sharded(tensor) and "data" in (tensor.device_mesh.mesh_dim_names or ())


def alike(tensors: Iterable[T]) -> list[list[T]]:
    """Those that lie on the same processes together: torch takes no list of whole tensors and parts."""
    found: dict[Any, list[T]] = {}
    for tensor in tensors:
        found.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(found.values())


def local(tensor: Any) -> Tensor:
    """The memory of this process's part; no gradient passes."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(tensor: Any) -> Any:
    """The whole of a tensor that lies in shards, others as they are; of one that tp cuts by rows, this process's rows.

    Each process's gradient of it is a part of a sum over its own rows: the backward adds up and scatters the sum
    (reduce-scatter), in the tensor's dtype.
    """
    if tensor is None or not is_sharded(tensor):
        return tensor
    if not is_over_data(tensor):
        return tensor.to_local()
    from torch.distributed.tensor import DTensor, Partial, Shard

    if layout.tp > 1 and tensor.device_mesh.ndim > 1:
        chunk = -(-tensor.shape[0] // layout.tp)
        rows = max(0, min(chunk, tensor.shape[0] - chunk * (rank() % layout.tp)))
        shape = torch.Size([rows, *tensor.shape[1:]])
        tensor = DTensor.from_local(
            tensor.to_local(), axis("data"), [Shard(0)], run_check=False, shape=shape,
            stride=_dense_stride(shape),
        )  # fmt: skip
    return tensor.full_tensor(grad_placements=[Partial()])


def _dense_stride(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, dtype=torch.float32, device="meta").stride()


def logits_of_parts(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int) -> Tensor:
    """All logits in every process, from this one's rows of the matrix (tp): PyTorch's losses and the sampler read them.  # [..., V]"""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    parts = axis("tp")

    def cut(rows: Tensor) -> Any:
        shape = torch.Size([vocab, *rows.shape[1:]])
        return DTensor.from_local(
            rows, parts, [Shard(0)], run_check=False, shape=shape, stride=_dense_stride(shape)
        )

    everywhere = DTensor.from_local(hidden, parts, [Replicate()], run_check=False)
    z: Any = torch.nn.functional.linear(everywhere, cut(weight), None if bias is None else cut(bias))
    return z.full_tensor(grad_placements=[Replicate()])
