"""Two processes of a TRL trainer, stock and then with fastloss: launched by torchrun (test_trl_modes.py).

    torchrun --nproc-per-node 2 trl_processes.py <folder> <ddp | fsdp2> <SFT | DPO | KTO | GRPO | RLOO>

Each process writes what it saw to <folder>/<rank>.json. "fsdp2" shards the model by hand, in both runs.
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from torch.distributed.fsdp import fully_shard

from fastloss.integrations import trl_losses
from fastloss.integrations.trl import apply
from integrations.test_trl import byte_tokenizer, logs, trainer


def whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()


def alone() -> None:
    """accelerate shards no model on CPUs and would wrap it in DDP: it is told of one process, and the model is sharded here. Both
    processes then see the same batches."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def run(kind: str, folder: Path, mode: str) -> tuple[list[dict], dict[str, torch.Tensor], list[str]]:
    transformers.set_seed(11)
    if mode == "fsdp2":
        alone()
    made = trainer(kind, byte_tokenizer(), folder)
    if mode == "fsdp2":
        for layer in made.model.model.layers:
            fully_shard(layer)
        fully_shard(made.model)
    made.train()
    model = made.model_wrapped
    kinds = sorted({type(p).__name__ for p in model.parameters()})
    return logs(made), {n.removeprefix("module."): whole(p) for n, p in model.named_parameters()}, kinds


def main(folder: Path, mode: str, kind: str) -> None:
    torch.distributed.init_process_group("gloo")
    log, parameters, kinds = run(kind, folder / "stock", mode)
    taken = []
    inner = trl_losses.OnePass.of_head

    def of_head(self, *arguments):
        out = inner(self, *arguments)
        taken.append(out is not None)
        return out

    trl_losses.OnePass.of_head = of_head
    with apply():
        ours, our_parameters, _ = run(kind, folder / "ours", mode)
    largest = max(p.abs().max().item() for p in parameters.values())
    difference = max((p - our_parameters[n]).abs().max().item() for n, p in parameters.items()) / largest
    rank = torch.distributed.get_rank()
    said = {"world": torch.distributed.get_world_size(), "kinds": kinds, "one pass": taken, "stock": log, "ours": ours,
            "difference": difference}  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
