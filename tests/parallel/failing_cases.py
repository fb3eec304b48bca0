"""A process that ends in the middle of its calls. ``python failing_cases.py STORE RANK WORLD HOW``: the others must end too."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import fastloss


def main(store: str, rank: int, world: int, how: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    target = torch.arange(6)
    for step in range(20):
        if step == 3 and rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise KeyError("an error of its own")
            if how == "bad label":
                target[2] = 5 * world
            if how == "other tokens":
                hidden, target = hidden[:-1], target[:-1]
        fastloss.linear_cross_entropy(hidden, weight, target, group=dist.group.WORLD).backward()
    print("it ended as if nothing were wrong")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
