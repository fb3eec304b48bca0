"""Starts a script of this folder in several processes that find each other by a file, and waits for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(
    script: str, world: int, store: Path, *arguments: str, timeout: float = 1000
) -> list[tuple[int, str]]:
    """(exit status, what it printed) of each process. ``{rank}`` in an argument is its number."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / script),
                str(store),
                str(rank),
                str(world),
                *(a.format(rank=rank) for a in arguments),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]
