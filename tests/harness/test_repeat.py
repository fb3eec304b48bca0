"""One seed, one model: every stage gives the same bits twice, sft on two threads too. The report's curves in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastloss.harness import dpo, grpo, ppo, pretrain, report, reward, sft
from fastloss.harness.config import (
    DpoConfig,
    GrpoConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)
from fastloss.harness.run import Result


def low_ids(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(i < 100 for i in ids) / len(ids) for ids in completion_ids]


Make = Callable[..., TrainConfig]
SAMPLES: dict[str, Any] = {
    "numbers": 6,
    "max_new_tokens": 3,
    "evaluate": 4,
    "reward": (f"{__name__}:low_ids",),
}
STAGES: dict[str, tuple[Callable[..., Result], Make]] = {
    "pretrain": (pretrain.run, lambda text, pairs, **o: PretrainConfig(**{**o, "model": ""}, data=(text,),
                 vocab_size=400, hidden=32, layers=2, heads=2, intermediate=64)),
    "sft": (sft.run, lambda text, pairs, **o: SftConfig(**o, task="arithmetic", numbers=9, exact=4)),
    "reward": (reward.run, lambda text, pairs, **o: RewardConfig(**o, data=(pairs,))),
    "dpo": (dpo.run, lambda text, pairs, **o: DpoConfig(**o, data=(pairs,))),
    "grpo": (grpo.run, lambda text, pairs, **o: GrpoConfig(**o, **SAMPLES, group_size=4, beta=0.05)),
    "ppo": (ppo.run, lambda text, pairs, **o: PpoConfig(**o, **SAMPLES)),
}  # fmt: skip


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    "name", [n if n in ("sft", "grpo") else pytest.param(n, marks=pytest.mark.slow) for n in STAGES]
)
def test_one_seed_gives_one_model(
    name: str, base: Path, text_file: Path, pairs_file: Path, quiet: Console, tmp_path: Path
) -> None:
    run, make = STAGES[name]
    config = make(
        str(text_file), str(pairs_file), model=str(base), steps=4, warmup=1, save_every=0, batch_size=4, seq_len=64,
        threads=2 if name == "sft" else 1,
    )  # fmt: skip
    once, twice, other = (
        run(replace(config, seed=seed, out=str(tmp_path / out)), console=quiet)
        for out, seed in (("once", 3), ("twice", 3), ("other", 4))
    )
    assert once.before == twice.before and once.after == twice.after
    differs = False
    for (key, p), q, o in zip(
        once.model.named_parameters(), twice.model.parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), key
        differs |= not torch.equal(p, o)
    assert differs


def test_sparkline() -> None:
    assert report.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert report.sparkline([7.0] * 5 + [float("nan")]) == "▁▁▁▁▁"
    assert report.sparkline([1.0, 3.0, 0.0, 0.0, 2.0, 2.0], width=3) == "█▁█"
    assert report.sparkline([]) == ""
    curve = report.sparkline([float(i) for i in range(1000)])
    assert len(curve) == 16 and list(curve) == sorted(curve) and curve[0] != curve[-1]
