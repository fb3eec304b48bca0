"""Heads whose vocabulary is cut over processes: fastloss beside the GEMMs alone, torch's loss_parallel, Megatron's and torchtitan's losses.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --tokens 1024 --hidden 512 --vocab 128256

Forward and backward from hidden states, with d hidden summed over the processes, in turns of one run. Time is that of the slowest
process, the median of the turns; memory is the highest resident size inside a step above the one that it began with. Peers
that are not installed are left out by name (megatron-core and torchtitan: ``pip install --no-deps``). Prints a table.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import fastloss
from fastloss.parallel import vocab_parallel_cross_entropy, vocab_shards

Step = Callable[[], Tensor]


def status(name: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))


class _SumOfGradients(torch.autograd.Function):
    """What a column-parallel layer does: its input is given to all, and the gradients of all are summed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        total = upstream.contiguous()
        dist.all_reduce(total)
        return total


class Sides:
    """The same loss by each library, on this process's shard."""

    def __init__(self, tokens: int, hidden: int, vocab: int, dtype: torch.dtype):
        world, rank = dist.get_world_size(), dist.get_rank()
        g = torch.Generator().manual_seed(0)
        self.vocab, size = vocab, vocab // world
        self.hidden = (
            torch.randn(tokens, hidden, generator=g, dtype=torch.float32, device="cpu")
            .to(dtype)
            .requires_grad_()
        )
        whole = torch.randn(vocab, hidden, generator=g, dtype=torch.float32, device="cpu") * hidden**-0.5
        self.weight = whole[rank * size : (rank + 1) * size].to(dtype).contiguous().requires_grad_()
        self.target = torch.randint(0, vocab, (tokens,), generator=g, dtype=torch.int64, device="cpu")
        self.shards = vocab_shards(self.weight, dist.group.WORLD)

    def logits(self) -> Tensor:
        return _SumOfGradients.apply(self.hidden) @ self.weight.t()

    def gemms(self) -> Tensor:
        """The three products and the sum of d hidden, no loss."""
        logits = self.logits()
        logits.backward(logits.detach())
        return logits.new_zeros(())

    def head(self, memory: str) -> Tensor:
        loss = fastloss.linear_cross_entropy(
            self.hidden, self.weight, self.target, group=self.shards, memory=memory, loss_dtype=torch.float32
        )
        loss.backward()
        return loss.detach()

    def from_logits(self) -> Tensor:
        loss = vocab_parallel_cross_entropy(self.logits(), self.target, self.shards, inplace=True)
        loss.backward()
        return loss.detach().float()

    def torch(self) -> Tensor:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard
        from torch.distributed.tensor.parallel import loss_parallel

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        columns = DTensor.from_local(self.logits(), mesh, [Shard(1)], run_check=False)
        with loss_parallel():
            loss = torch.nn.functional.cross_entropy(columns.float(), self.target)
            loss.backward()
        return loss.full_tensor().detach()

    def megatron(self) -> Tensor:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as theirs

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(dist.get_world_size(), create_gloo_process_groups=False)
        loss = theirs(self.logits().float().unsqueeze(1), self.target.unsqueeze(1)).mean()
        loss.backward()
        return loss.detach()

    def torchtitan(self) -> Tensor:
        from torchtitan.components.loss import _LossParallelCrossEntropy

        sum_ = _LossParallelCrossEntropy.apply(
            self.logits().float(), self.target, dist.group.WORLD, self.vocab, "sum"
        )
        loss = sum_ / self.target.numel()
        loss.backward()
        return loss.detach()


def measured(side: Sides, step: Step) -> tuple[float, float, float]:
    """(loss, seconds, MiB) of one step: those of the slowest, the largest process."""
    side.hidden.grad = side.weight.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier step freed is no memory of this one
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    dist.barrier()
    before, start = status("VmRSS"), time.perf_counter()
    loss = step()
    worst = torch.tensor([time.perf_counter() - start, status("VmHWM") - before], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(loss), float(worst[0]), float(worst[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    side = Sides(given.tokens, given.hidden, given.vocab, getattr(torch, given.dtype))
    steps: dict[str, Step] = {
        "GEMMs alone": side.gemms,
        "fastloss, head": lambda: side.head("auto"),
        "fastloss, head, low": lambda: side.head("low"),
        "fastloss, logits": side.from_logits,
        "torch loss_parallel": side.torch,
        "megatron-core": side.megatron,
        "torchtitan": side.torchtitan,
    }
    taken: dict[str, list[tuple[float, float, float]]] = {}
    for turn in range(given.turns + 1):  # the first is left out
        for name, step in list(steps.items()):
            try:
                row = measured(side, step)
            except ImportError as error:  # the same in every process
                del steps[name]
                if dist.get_rank() == 0:
                    print(f"{name}: left out, {error}")
                continue
            if turn:
                taken.setdefault(name, []).append(row)
    if dist.get_rank() == 0:
        versions = {
            n: importlib.metadata.version(n) for n in ("torch", "megatron-core", "torchtitan") if _has(n)
        }
        print(f"{dist.get_world_size()} processes, one thread each, {vars(given)}, {versions}")
        base = statistics.median(row[1] for row in taken["GEMMs alone"])
        print("| | loss | ms | over the GEMMs | MiB |\n| --- | --- | --- | --- | --- |")
        for name, rows in taken.items():
            seconds = statistics.median(row[1] for row in rows)
            loss = "" if name == "GEMMs alone" else f"{rows[-1][0]:.5f}"
            print(
                f"| {name} | {loss} | {seconds * 1e3:.0f} | {seconds / base:.2f} | {statistics.median(r[2] for r in rows):.0f} |"
            )
    dist.destroy_process_group()


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
