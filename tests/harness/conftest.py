from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
from rich.console import Console
from stage_runs import SHAPE

from fastloss.harness import builtin, chat, measure, plots, run, tokenizer
from fastloss.harness.config import PretrainConfig
from fastloss.harness.cost import Cost
from fastloss.harness.export import export
from fastloss.harness.model import build_model, model_config


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matmul_rate", partial(measure.matmul_rate, seconds=0.01))
    monkeypatch.setattr(run, "measure_costs", partial(run.measure_costs, rounds=1))


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without their measurements and pictures, which other tests look at."""
    none = Cost("not measured", 1, None, measure.Peak(0, "not measured"), 1.0, 1.0)
    monkeypatch.setattr(run, "measure_costs", lambda stage, names: dict.fromkeys(names, none))
    monkeypatch.setattr(measure, "count_flops", lambda step: 1)
    monkeypatch.setattr(plots, "curves", lambda *args: None)


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred rows of real English from the standard library's reference."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("data") / "topics.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for name in sorted(topics)[:40]:
            file.write(json.dumps({"text": topics[name][:3000]}) + "\n")
    return path


@pytest.fixture
def tiny(tmp_path: Path, text_file: Path) -> PretrainConfig:
    return PretrainConfig(
        out=str(tmp_path / "run"),
        data=(str(text_file),),
        loss="torch",
        vocab_size=512,
        seq_len=32,
        batch_size=2,
        steps=6,
        warmup=2,
        save_every=0,
        **SHAPE,
    )


def random_model(folder: Path, text_file: Path, *, tie: bool = False) -> Path:
    """A model folder as pretraining leaves it, with random weights: what the later stages start from."""
    texts = [json.loads(line)["text"] for line in text_file.read_text(encoding="utf-8").splitlines()]
    bpe = tokenizer.train_bpe(texts, 400)
    config = PretrainConfig(vocab_size=bpe.get_vocab_size(), seq_len=128, tie=tie, **SHAPE)
    export(build_model(model_config(config), 0, "cpu"), chat.wrap(bpe), folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    return random_model(tmp_path_factory.mktemp("base") / "model", text_file)


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    return random_model(tmp_path_factory.mktemp("tied_base") / "model", text_file, tie=True)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preference pairs that a tiny model can tell apart: the right answer to a sum, and a wrong one."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in builtin.arithmetic(8):
            wrong = [{"role": "assistant", "content": f"{row['answer']} or so"}]
            pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong}
            file.write(json.dumps(pair) + "\n")
    return path


@pytest.fixture(scope="session")
def stages(base: Path, tied_base: Path, text_file: Path, pairs_file: Path) -> dict[str, dict[str, Any]]:
    """Options for stage_runs.py: four steps of two passes whose masks differ; grpo and ppo update twice on a sample."""
    common: dict[str, Any] = {
        "steps": 4, "warmup": 1, "save_every": 0, "batch_size": 2, "accumulate": 2, "clip": 0.5
    }  # fmt: skip
    rollouts = {
        "reward": ["stage_runs:low_ids"], "numbers": 6, "max_new_tokens": 4, "evaluate": 8, "updates": 2
    }  # fmt: skip
    text = {
        "stage": "pretrain",
        "data": [str(text_file)],
        "vocab_size": 411,
        "seq_len": 48,
        **SHAPE,
        **common,
    }
    sums = {"stage": "sft", "seq_len": 64, "task": "arithmetic", "numbers": 8, "exact": 8, "max_new_tokens": 4,
            "packing": False, **common}  # fmt: skip
    pairs = {"model": str(base), "data": [str(pairs_file)], **common}
    return {
        "pretrain": text,
        "pretrain-tied": text | {"tie": True},
        "sft": sums | {"model": str(base)},
        "sft-tied": sums | {"model": str(tied_base)},
        "distill": sums | {
            "stage": "distill", "model": str(base), "teacher": str(tied_base), "on_policy": 0.5, "packing": True, "hard": 0.1
        },
        "reward": {"stage": "reward", **pairs},
        "dpo": {"stage": "dpo", **pairs},
        "grpo": {"stage": "grpo", "model": str(base), "group_size": 4, "beta": 0.05, "scale": "batch", **rollouts, **common},
        "ppo": {"stage": "ppo", "model": str(base), **rollouts, **common},
    }  # fmt: skip
