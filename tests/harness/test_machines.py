"""A run of two machines: one torchrun on each of two loopback addresses, which meet at a rendezvous, is one process with the whole batch."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import apart, case, written
from test_distributed import WORKER, environment, lr_of, of_one, same_run

MACHINES = ("127.0.0.2", "127.0.0.3")
RUNS = (("sft", "fsdp"), ("pretrain", "tp=2"))


def launcher(machine: int, port: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{MACHINES[0]}:{port}", "--rdzv-id", "machines", "--rdzv-conf", f"is_host={1 - machine}",
        "--local-addr", MACHINES[machine],
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind((MACHINES[0], 0))
        port: int = s.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_two_machines_are_one_process(stages: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    options = {name: stages[name] | ({"heads": 4} if name == "pretrain" else {}) for name, _ in RUNS}
    cases = [
        case(f"{name}-{how}", options[name], tmp_path / f"{name}-{how}", parallel=how) for name, how in RUNS
    ]
    port, arguments = free_port(), (str(WORKER), written(tmp_path, cases))
    started = [
        subprocess.Popen(
            [*launcher(machine, port), *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for machine in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=1000)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(text[-4000:] for text in said)
    for name, how in RUNS:
        got = [torch.load(tmp_path / f"{name}-{how}-{rank}.pt", weights_only=False) for rank in range(2)]
        ways = 2 if how == "fsdp" else 1
        one = of_one(
            options[name] | {"batch_size": ways * options[name]["batch_size"] // 2}, tmp_path / f"{name}-one"
        )
        same_run(got[0], one)
        assert apart(got[0], one) < 0.02 * lr_of(options[name])
        assert got[1]["rows"] == got[0]["rows"] and apart(got[1], got[0]) == 0
