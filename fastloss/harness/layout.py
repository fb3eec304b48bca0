"""How the processes of a run divide its work: ``--parallel``, read and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass

EXPECTED = "parts of replicate, fsdp, tp=N and cp=N with commas between them"


@dataclass(frozen=True)
class Layout:
    """N processes are N / (tp · cp) replicas of rows of their own; each holds the model whole, or (fsdp) a shard of it."""

    tp: int = 1  # parts of each matrix, the vocabulary's too
    cp: int = 1  # pieces of each row of tokens
    fsdp: bool = False

    @classmethod
    def parse(cls, text: str) -> Layout:
        found: dict[str, int] = {}
        for part in text.split(","):
            match = re.fullmatch(r"(replicate|fsdp)|(tp|cp)=([1-9]\d*)", part.strip())
            if not match:
                raise ValueError(f"parallel: expected {EXPECTED}, got {text!r}")
            name = match[1] or match[2]
            if name in found:
                raise ValueError(f"parallel: expected {name} once, got {text!r}")
            found[name] = int(match[3] or 1)
        if {"replicate", "fsdp"} <= set(found):
            raise ValueError(f"parallel: expected replicate or fsdp, got both in {text!r}")
        return cls(found.get("tp", 1), found.get("cp", 1), "fsdp" in found)

    def check(self, processes: int) -> None:
        if processes % (self.tp * self.cp):
            raise ValueError(
                f"parallel: expected a multiple of {self.tp * self.cp} processes for tp={self.tp} and cp={self.cp}, got {processes}; "
                "torchrun --nproc-per-node starts them"
            )
