"""The options of a run: dataclasses, one field per option, saved beside what the run made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C", bound="TrainConfig")


def option(default: Any, help: str, *, least: float | None = None) -> Any:
    """A field with its help text (the command line shows it) and the least value it takes."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every stage needs; a stage's own config adds to it."""

    out: str = option("runs/train", "folder of the run: logs, checkpoint, report")
    data: tuple[str, ...] = option(
        (), "text or JSONL files (field `text`); none: the corpus in Python itself"
    )
    model: str = option("", "folder with a transformers config.json; none: a Llama of the sizes below")
    loss: str = option("fastloss", "fastloss, torch (whole logits) or torch-linear (torch's own fused head)")
    steps: int = option(200, "optimizer steps", least=1)
    batch_size: int = option(8, "rows in one forward pass", least=1)
    accumulate: int = option(1, "forward passes per optimizer step", least=1)
    seq_len: int = option(256, "tokens in a row", least=1)
    lr: float = option(2e-3, "peak learning rate", least=0)
    warmup: int = option(20, "steps of linear warm-up", least=0)
    min_lr: float = option(0.1, "where the cosine ends, as a share of the peak", least=0)
    weight_decay: float = option(0.1, "AdamW weight decay of matrices", least=0)
    beta1: float = option(0.9, "AdamW beta1", least=0)
    beta2: float = option(0.95, "AdamW beta2", least=0)
    clip: float = option(1.0, "largest gradient norm; 0 does not clip", least=0)
    bf16: bool = option(False, "autocast to bfloat16")
    seed: int = option(0, "weights, order of the data, dropout", least=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …")
    threads: int = option(0, "CPU threads; 0 leaves torch's choice", least=0)
    save_every: int = option(100, "steps between checkpoints; 0 saves only at the end", least=0)
    stop_after: int = option(0, "stop and save after this step of `steps`; 0 goes to the end", least=0)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least")
            if least is not None and not value >= least:
                raise ValueError(f"{f.name}: expected at least {least}, got {value}")
        object.__setattr__(self, "data", tuple(self.data))

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.seq_len


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Pretraining from random weights."""

    out: str = option("runs/pretrain", "folder of the run: logs, checkpoint, report")
    vocab_size: int = option(8192, "tokens of the BPE and rows of the vocabulary matrix", least=257)
    hidden: int = option(256, "width", least=1)
    layers: int = option(4, "layers", least=1)
    heads: int = option(4, "attention heads", least=1)
    intermediate: int = option(688, "width of the MLP", least=1)
    tie: bool = option(False, "one matrix for the embedding and the head")
    val_fraction: float = option(0.05, "share of the corpus held back for validation", least=0)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config) | {"data": list(config.data)}


def save(config: TrainConfig, path: Path) -> None:
    path.write_text(json.dumps(as_dict(config), indent=2) + "\n", encoding="utf-8")


def load(kind: type[C], path: Path) -> C:
    """The config a run saved, or one written by hand; an unknown name is an error."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    known = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(values, dict) or set(values) - known:
        unknown = sorted(set(values) - known) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path}: expected an object with options of {kind.__name__}, got {unknown}")
    return kind(**values)
