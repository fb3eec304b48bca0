from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
from rich.console import Console

from fastloss.harness import measure
from fastloss.harness.config import PretrainConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_matmul_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matmul_rate", partial(measure.matmul_rate, seconds=0.01))


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
        hidden=32,
        layers=2,
        heads=2,
        intermediate=64,
        seq_len=32,
        batch_size=2,
        steps=6,
        warmup=2,
        save_every=0,
    )
