"""Cross-entropy of a vocabulary that is cut over 2 processes, beside the functions that training frameworks have for it.

``PYTHONPATH=<folder with megatron-core and torchtitan> python tests/peers/vocabulary_parallel.py`` prints a table of docs/parallel.md: in one
run, in turns, the median time of forward and backward, the highest level of PyTorch's allocator over what was there before, the bytes a
token that a process hands to collectives (as a ring sends them), and the largest difference from the whole vocabulary in float64. What
is not installed is left out and named. Nothing is overwritten in place: what a function destroys, it gets a copy of.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fastloss
from fastloss.bench.memory import peak
from fastloss.parallel import vocab_parallel_cross_entropy, vocab_shards

WORLD, TOKENS, DIM, VOCAB, ROUNDS = 2, 512, 512, 32768, 5
Loss = Callable[[Tensor, Tensor], Tensor]  # (own columns of the logits, targets) -> mean


class Sent(TorchDispatchMode):
    """Bytes that a process sends, of all collectives: a ring sends twice a tensor less its share to sum it, and its own to each other
    process to gather it."""

    def __init__(self) -> None:
        from torch.distributed.tensor import DTensor

        super().__init__()
        self.dtensor, self.bytes = DTensor, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is self.dtensor for kind in types):
            return NotImplemented  # what it sends is seen below
        name = function.__name__
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in name:
            gathers = "gather" in name
            given = args[1] if gathers and function.namespace == "c10d" else args[0]
            tensors = given if isinstance(given, (list, tuple)) else [given]
            size = sum(x.numel() * x.element_size() for x in tensors)
            self.bytes += (WORLD - 1) * size if gathers else 2 * (WORLD - 1) / WORLD * size
        return function(*args, **(kwargs or {}))


class Peer(NamedTuple):
    loss: Loss
    backward_in: Callable[[], Any] = contextlib.nullcontext


def of_logits() -> tuple[dict[str, Peer], dict[str, str]]:
    """(each framework's function, why one is not there)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.nn.functional import all_gather
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    group, mesh = dist.group.WORLD, init_device_mesh("cpu", (WORLD,))
    shards = vocab_shards(torch.zeros(VOCAB // WORLD, 1, dtype=torch.float32), group)

    def torchs(z: Tensor, target: Tensor) -> Tensor:
        whole = DTensor.from_local(z, mesh, [Shard(1)], run_check=False)
        labels = DTensor.from_local(target, mesh, [Replicate()], run_check=False)
        with loss_parallel():
            return torch.nn.functional.cross_entropy(whole.float(), labels)

    def gathered(z: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.cat(all_gather(z), 1).float(), target) / WORLD

    out = {
        "fastloss": Peer(lambda z, t: vocab_parallel_cross_entropy(z, t, shards)),
        "torch, loss_parallel": Peer(torchs, loss_parallel),
        "the logits gathered": Peer(gathered),
    }
    missing: dict[str, str] = {}
    try:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        def megatron(z: Tensor, target: Tensor) -> Tensor:
            z = (
                z + 0 if z.dtype == torch.float32 else z
            )  # it subtracts in place where they are float32 already
            return fused_vocab_parallel_cross_entropy(z[:, None], target[:, None], group).mean()

        out["Megatron, fused"] = Peer(megatron)
    except ImportError as error:
        missing["Megatron"] = str(error)
    try:
        from torchtitan.components.loss import _LossParallelCrossEntropy as titan

        out["torchtitan"] = Peer(lambda z, t: titan.apply(z.float(), t, group, VOCAB, "sum") / TOKENS)
    except ImportError as error:
        missing["torchtitan"] = str(error)
    return out, missing


def steps(
    dtype: torch.dtype, from_hidden: bool
) -> tuple[dict[str, Callable[[], list[Tensor]]], list[Tensor]]:
    """(of each peer a step: loss and gradients; the right ones in float64)."""
    rank = dist.get_rank()
    g = torch.Generator().manual_seed(1)
    hidden = (torch.randn(TOKENS, DIM, generator=g, dtype=torch.float32) * 0.3).to(dtype)
    weight = (torch.randn(VOCAB, DIM, generator=g, dtype=torch.float32) * 0.3).to(dtype)
    target = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    own = slice(rank * VOCAB // WORLD, (rank + 1) * VOCAB // WORLD)
    h, w = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()
    z = (h @ w.t()).detach().requires_grad_()
    wide = [x.double().requires_grad_() for x in ((hidden, weight) if from_hidden else (gather(z.detach()),))]
    logits = wide[0] @ wide[1].t() if from_hidden else wide[0]
    value = torch.nn.functional.cross_entropy(logits, target)
    gradients = torch.autograd.grad(value, wide)
    right = [value.detach(), *([gradients[0], gradients[1][own]] if from_hidden else [gradients[0][:, own]])]
    peers, _ = of_logits()
    leaves = [h, w] if from_hidden else [z]

    def step_of(peer: Peer) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            loss = peer.loss(h @ w.t() if from_hidden else z, target)
            with peer.backward_in():
                loss.backward()
            made = [x.grad for x in leaves]
            for x in leaves:
                x.grad = None
            if from_hidden:
                dist.all_reduce(made[0])
            plain = loss.to_local() if hasattr(loss, "to_local") else loss
            return [plain.detach(), *made]  # type: ignore[list-item]

        return step

    out = {name: step_of(peer) for name, peer in peers.items()}
    if from_hidden:
        shards = vocab_shards(w.detach(), dist.group.WORLD)

        def ours() -> list[Tensor]:
            loss = fastloss.linear_cross_entropy(h, w, target, group=shards, loss_dtype=torch.float32)
            return [loss.detach(), *torch.autograd.grad(loss, [h, w])]

        # Its pass is hidden from dispatch modes; that explain tells what is handed to the collectives is tested (tests/parallel).
        told = fastloss.explain(fastloss.linear_cross_entropy, h, w, target, group=shards)
        ours.sent = told["gathered_bytes"] + told["reduced_bytes"]  # type: ignore[attr-defined]

        out = {"fastloss, from hidden states": ours, **out}
    return out, right


def gather(z: Tensor) -> Tensor:
    pieces = [torch.empty_like(z) for _ in range(WORLD)]
    dist.all_gather(pieces, z)
    return torch.cat(pieces, 1)


def measure(dtype: torch.dtype, from_hidden: bool) -> dict[str, list[float]]:
    """Of each peer [ms, MiB, bytes a token, loss off, gradient off]."""
    every, right = steps(dtype, from_hidden)
    times: dict[str, list[float]] = {name: [] for name in every}
    out = {}
    for name, step in every.items():
        with Sent() as sent:
            made = step()
        if (
            name == "the logits gathered"
        ):  # each process's loss is its share of the sum that the gather's backward makes
            made[0] = made[0] * WORLD
        off = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(made, right, strict=True)]
        dist.barrier()
        size = getattr(step, "sent", sent.bytes)
        out[name] = [0.0, peak(step, "cpu").allocated / 2**20, size / TOKENS, off[0], max(off[1:])]
    for _ in range(ROUNDS):
        for name, step in every.items():
            dist.barrier()
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    for name, seconds in times.items():
        out[name][0] = statistics.median(seconds) * 1e3
    return out


def process(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {"missing": of_logits()[1], "rows": []}
    for dtype in (torch.float32, torch.bfloat16):
        for from_hidden in (False, True):
            for name, numbers in measure(dtype, from_hidden).items():
                found["rows"].append(
                    ["hidden states" if from_hidden else "logits", str(dtype)[6:], name, *numbers]
                )
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        started = [
            subprocess.Popen([sys.executable, __file__, str(rank), str(Path(folder) / "store"), str(out)])
            for rank in range(WORLD)
        ]
        statuses = [p.wait() for p in started]
        if any(statuses):
            raise SystemExit("a process failed")
        found = json.loads(out.read_text(encoding="utf-8"))
    load = os.getloadavg()[0]
    print(
        f"{TOKENS} tokens, D = {DIM}, V = {VOCAB}, {WORLD} processes of a thread each, {ROUNDS} rounds; load {load:.0f}\n"
    )
    print(
        "| from | dtype | function | ms | MiB | bytes a token | loss off | gradients off |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for begin, dtype, name, ms, mib, sent, loss, gradient in found["rows"]:
        print(
            f"| {begin} | {dtype} | {name} | {ms:.0f} | {mib:.0f} | {sent:.0f} | {loss:.0e} | {gradient:.0e} |"
        )
    for name, why in found["missing"].items():
        print(f"\nNot there: {name} ({why}).")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        process(int(sys.argv[1]), *sys.argv[2:])
    else:
        main()
