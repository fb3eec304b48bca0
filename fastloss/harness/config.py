"""The options of a run: dataclasses, one field per option, saved beside what the run made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C", bound="TrainConfig")


def option(default: Any, help: str, *, least: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field with its help text (the command line shows it), the least value it takes or its choices."""
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every stage needs; a stage's own config adds to it."""

    out: str = option("runs/train", "folder of the run: logs, checkpoint, report")
    data: tuple[str, ...] = option(
        (), "your files, folders, globs, hf:NAME[:config][:split]; none: what Python itself carries"
    )
    column: tuple[str, ...] = option((), "completion=answer: the data's column `answer` is our `completion`")
    skip_bad_rows: bool = option(False, "count and skip rows of --data that do not fit, instead of an error")
    model: str = option("", "transformers folder to start from; none: a random Llama of the sizes below")
    lora_rank: int = option(
        0, "train LoRA adapters of this rank in a frozen model; 0: the whole model", least=0
    )
    lora_alpha: float = option(16.0, "LoRA: the adapters' product counts this / rank", least=0)
    lora_targets: tuple[str, ...] = option(
        (), "LoRA: names of modules; none: every linear layer but the head"
    )
    loss: str = option("fastloss", "fastloss, or torch (whole logits)")
    compare: bool = option(False, "measure PyTorch's loss beside this one after the run (whole logits)")
    steps: int = option(200, "optimizer steps", least=1)
    batch_size: int = option(8, "rows in one forward pass", least=1)
    accumulate: int = option(1, "forward passes per optimizer step", least=1)
    seq_len: int = option(256, "tokens in a row, at most", least=2)
    lr: float = option(2e-3, "peak learning rate", least=0)
    warmup: int = option(20, "steps of linear warm-up", least=0)
    min_lr: float = option(0.1, "where the cosine ends, as a share of the peak", least=0)
    weight_decay: float = option(0.1, "AdamW weight decay of matrices", least=0)
    beta1: float = option(0.9, "AdamW beta1", least=0)
    beta2: float = option(0.95, "AdamW beta2", least=0)
    clip: float = option(1.0, "largest gradient norm; 0 does not clip", least=0)
    bf16: bool = option(False, "autocast to bfloat16")
    seed: int = option(0, "weights, order of the data, sampling, dropout", least=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …")
    threads: int = option(0, "CPU threads; 0 leaves torch's choice", least=0)
    save_every: int = option(100, "steps between checkpoints; 0 saves only at the end", least=0)
    stop_after: int = option(0, "stop and save after this step of `steps`; 0 goes to the end", least=0)
    val_fraction: float = option(0.05, "share of the data held back", least=0)
    vocab_size: int = option(8192, "tokens of the BPE and rows of the vocabulary matrix", least=260)
    hidden: int = option(256, "width", least=1)
    layers: int = option(4, "layers", least=1)
    heads: int = option(4, "attention heads", least=1)
    intermediate: int = option(688, "width of the MLP", least=1)
    tie: bool = option(False, "one matrix for the embedding and the head")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, least, choices = getattr(self, f.name), f.metadata["least"], f.metadata["choices"]
            if least is not None and not value >= least:
                raise ValueError(f"{f.name}: expected at least {least}, got {value}")
            if choices and value not in choices:
                raise ValueError(f"{f.name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
            if f.type == "tuple[str, ...]":
                object.__setattr__(self, f.name, tuple(value))
        if not self.val_fraction < 1:
            raise ValueError(f"val_fraction: expected less than 1, got {self.val_fraction}")

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulate


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Next-token prediction on text, from random weights or (keep_weights) a model's."""

    out: str = option("runs/pretrain", "folder of the run: logs, checkpoint, report")
    model: str = option("", "folder with a transformers config.json; none: a Llama of the sizes below")
    keep_weights: bool = option(False, "start from the weights of --model too: continued pretraining")
    loss: str = option("fastloss", "fastloss, torch (whole logits) or torch-linear (torch's own fused head)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_weights and not self.model:
            raise ValueError("keep_weights: expected --model, whose weights they are, got none")
        if self.lora_rank and not self.keep_weights:
            raise ValueError("lora_rank: expected --keep-weights: random weights are nothing to adapt")


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainConfig):
    """Instruction tuning: cross-entropy on the answers alone."""

    out: str = option("runs/sft", "folder of the run: logs, checkpoint, report")
    loss: str = option("fastloss", "fastloss, torch (whole logits) or torch-linear (torch's own fused head)")
    lr: float = option(1e-3, "peak learning rate", least=0)
    task: str = option("both", "built-in instructions: describe, arithmetic or both",
                       choices=("both", "describe", "arithmetic"))  # fmt: skip
    numbers: int = option(20, "arithmetic: both operands are below this", least=2)
    repeat: int = option(1, "arithmetic: times each problem is in an epoch", least=1)
    wrong: float = option(0.0, "arithmetic: share of the shown answers that is another number", least=0)
    packing: bool = option(True, "several examples in a row, blind to each other")
    exact: int = option(200, "held-back examples answered for the exact match; 0: none", least=0)
    max_new_tokens: int = option(32, "longest answer in the exact match", least=1)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """A reward model: one score per answer, the better answer's above the worse one's."""

    out: str = option("runs/reward", "folder of the run: logs, checkpoint, report")
    loss: str = option("fastloss", "fastloss or torch")
    lr: float = option(3e-4, "peak learning rate", least=0)
    batch_size: int = option(16, "pairs in one forward pass", least=1)
    center: float = option(0.0, "coefficient of the squared sum of a pair's scores", least=0)


@dataclass(frozen=True, kw_only=True)
class DpoConfig(TrainConfig):
    """Direct preference optimisation against the model it starts from."""

    out: str = option("runs/dpo", "folder of the run: logs, checkpoint, report")
    lr: float = option(1e-4, "peak learning rate", least=0)
    batch_size: int = option(16, "pairs in one forward pass", least=1)
    loss_type: str = option("sigmoid", "of fastloss.preference_loss; --loss torch knows sigmoid")
    beta: float = option(0.1, "how strongly the log-ratio counts", least=0)
    label_smoothing: float = option(0.0, "share of pairs labelled wrong", least=0)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(TrainConfig):
    """What GRPO and PPO share: sampling and rewards."""

    lr: float = option(2e-4, "peak learning rate", least=0)
    reward: tuple[str, ...] = option(
        (),
        "package.module:function[=weight], TRL's convention; several add up; none: the answer's exact match",
    )
    numbers: int = option(20, "arithmetic: both operands are below this", least=2)
    batch_size: int = option(16, "prompts in one forward pass", least=1)
    updates: int = option(1, "optimizer steps on each batch of samples", least=1)
    max_new_tokens: int = option(8, "longest sample", least=1)
    temperature: float = option(1.0, "of sampling and of the loss", least=1e-3)
    clip_low: float = option(0.2, "the ratio is clipped below at 1 - this", least=0)
    clip_high: float = option(0.2, "the ratio is clipped above at 1 + this", least=0)
    evaluate: int = option(256, "held-back prompts answered before and after", least=1)


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(RolloutConfig):
    """Groups of samples compared with each other; no value model."""

    out: str = option("runs/grpo", "folder of the run: logs, checkpoint, report")
    group_size: int = option(8, "samples per prompt", least=2)
    scale: str = option("group", "the advantage is divided by the deviation of: group, batch or none",
                        choices=("group", "batch", "none"))  # fmt: skip
    loss_type: str = option("dapo", "of fastloss.policy_loss; --loss torch knows dapo")
    beta: float = option(0.0, "coefficient of the KL to the model it starts from", least=0)


@dataclass(frozen=True, kw_only=True)
class PpoConfig(RolloutConfig):
    """A value head, generalised advantages, and the KL to the start in the reward."""

    out: str = option("runs/ppo", "folder of the run: logs, checkpoint, report")
    batch_size: int = option(64, "prompts in one forward pass", least=1)
    updates: int = option(2, "optimizer steps on each batch of samples", least=1)
    kl: float = option(0.02, "coefficient of the KL to the model it starts from, in the reward", least=0)
    gamma: float = option(1.0, "discount", least=0)
    lam: float = option(0.95, "lambda of the generalised advantages", least=0)
    value_coef: float = option(0.1, "coefficient of the value loss", least=0)
    value_clip: float = option(0.2, "how far a value moves in one batch of samples; 0 does not clip", least=0)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


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
