"""PyTorch's own engines around a fastloss head: FSDP2 and pipeline stages. ``python engine_cases.py STORE RANK WORLD OUT``."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.debug import CommDebugMode

import fastloss
from fastloss.parallel import sequence_shard

VOCAB, DIM, ROWS = 53, 16, 12
C10D = torch.ops.c10d


class Model(nn.Module):
    """An embedding, a layer, and a head that makes the loss in its own forward."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.layer = nn.Linear(DIM, DIM)
        self.head = fastloss.nn.LinearHead(DIM, VOCAB)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, target: Tensor, **options: Any) -> Tensor:
        hidden: Tensor = self.layer(self.embedding(tokens)).tanh()
        return self.head(hidden, target, **options)


# torch 2.8's GPipe takes no fewer microbatches than stages.
MICRO_BATCHES = (1, 2, 3, 4) if hasattr(torch.nn.functional, "linear_cross_entropy") else (2, 3, 4)


def model(tied: bool, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model(tied).to(dtype)


def rows(rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(10 + rank)
    tokens = torch.randint(0, VOCAB, (ROWS,), generator=g)
    target = torch.randint(0, VOCAB, (ROWS,), generator=g)
    target[: 2 + 3 * rank] = -100  # another number of targets in each process
    return tokens, target


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def sharded(tied: bool, own_group: bool, mixed: bool) -> dict[str, Any]:
    """The gradients of FSDP2's shards against those of one process with the rows of all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dtype = torch.float32 if mixed else torch.float64
    whole = model(tied, dtype)
    everyone = [rows(r) for r in range(world)]
    right = whole(torch.cat([x for x, _ in everyone]), torch.cat([y for _, y in everyone]))
    right.backward()
    right_gradients = {name: p.grad for name, p in whole.named_parameters()}
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if mixed
        else MixedPrecisionPolicy()
    )
    own = model(tied, dtype)
    mesh = init_device_mesh("cpu", (world,))
    if own_group:
        fully_shard(own.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(own, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    tokens, target = rows(rank)
    # The mean over the targets of all processes; FSDP divides the sum of gradients by their number.
    shard = sequence_shard(target[None], dist.group.WORLD, shift=False)
    counts = CommDebugMode()
    with counts:
        loss = own(
            tokens,
            target,
            reduction="sum",
            normalizer=shard.normalizer,
            loss_dtype=torch.float32 if mixed else None,
        )
        (loss * world).backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    made = {str(op): number for op, number in counts.get_comm_counts().items()}
    return {
        "loss": distance(total, right.detach()),
        "gradients": {
            name: distance(p.grad.full_tensor(), right_gradients[name]) for name, p in own.named_parameters()
        },  # type: ignore[union-attr]
        "gathers": sum(n for op, n in made.items() if "allgather" in op or "all_gather" in op),
        "scatters": sum(n for op, n in made.items() if "reduce_scatter" in op),
    }


def pipeline(micro_batches: int) -> dict[str, Any]:
    """Two stages, the loss of the last over micro-batches with other numbers of targets, against the whole batch at once."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    first = nn.Sequential(nn.Embedding(VOCAB, DIM), nn.Linear(DIM, DIM), nn.Tanh()).double()
    head = fastloss.nn.LinearHead(DIM, VOCAB).double()
    body = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()).double()
    tokens, target = rows(1)
    right = head(body(first(tokens)), target)
    right.backward()
    expected = [
        p.grad.clone()
        for p in (first if rank == 0 else nn.ModuleList([body, head])).parameters()
        if p.grad is not None
    ]
    for module in (first, body, head):
        module.zero_grad()
    normalizer = (target != -100).sum()

    def loss_of(hidden: Tensor, own: Tensor) -> Tensor:
        return head(hidden, own, reduction="sum", normalizer=normalizer)

    stage = PipelineStage(first if rank == 0 else body, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, micro_batches, loss_fn=loss_of, scale_grads=False)
    losses: list[Tensor] = []
    if rank == 0:
        schedule.step(tokens)
    else:
        schedule.step(target=target, losses=losses)
    mine = [
        p.grad
        for p in (first if rank == 0 else nn.ModuleList([body, head])).parameters()
        if p.grad is not None
    ]
    return {
        "loss": 0.0 if rank == 0 else distance(torch.stack(losses).sum(), right.detach()),
        "gradients": [distance(a, b) for a, b in zip(mine, expected, strict=True)],
    }


def main(store: str, rank: int, world: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found: dict[str, Any] = {}
    for tied in (False, True):
        for own_group in (False, True):
            if tied and own_group:
                continue  # one weight cannot be in two groups
            for mixed in (False, True):
                name = f"{'tied' if tied else 'own weight'}, {'head alone' if own_group else 'one group'}, {'mixed' if mixed else 'float64'}"
                found[name] = sharded(tied, own_group, mixed)
    for micro_batches in MICRO_BATCHES:
        found[f"pipeline of {micro_batches}"] = pipeline(micro_batches)
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
