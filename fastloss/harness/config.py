"""The options of a run: dataclasses, one field per option, saved beside what the run made."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastloss.tables import DISTILLATION_DIVERGENCES

from . import parallel as processes
from .layout import Layout

C = TypeVar("C", bound="TrainConfig")


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: int | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field with its help text (the command line shows it), the least and most it takes or its choices."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    group: ClassVar[str] = "Data"

    data: tuple[str, ...] = option(
        (), "your files, folders, globs, hf:NAME[:config][:split]; none: what Python itself carries"
    )
    column: tuple[str, ...] = option((), "completion=answer: the data's column `answer` is our `completion`")
    skip_bad_rows: bool = option(False, "count and skip rows of --data that do not fit, instead of an error")
    seq_len: int = option(256, "tokens in a row, at most", least=2)
    val_fraction: float = option(0.05, "share of the data held back to measure on", least=0)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    group: ClassVar[str] = "Model"

    model: str = option("", "transformers folder to start from; none: a random Llama of the sizes below")
    vocab_size: int = option(8192, "tokens of the BPE and rows of the vocabulary matrix", least=260)
    hidden: int = option(256, "width of the hidden states", least=1)
    layers: int = option(4, "number of layers", least=1)
    heads: int = option(4, "attention heads", least=1)
    intermediate: int = option(688, "width of the MLP", least=1)
    tie: bool = option(False, "one matrix for the embedding and the head")
    lora_rank: int = option(
        0, "train LoRA adapters of this rank in a frozen model; 0: the whole model", least=0
    )
    lora_alpha: float = option(16.0, "LoRA: the adapters' product counts this / rank", least=0)
    lora_targets: tuple[str, ...] = option(
        (), "LoRA: names of modules; none: every linear layer but the head"
    )


@dataclass(frozen=True, kw_only=True)
class OptimisationOptions:
    group: ClassVar[str] = "Optimisation"

    steps: int = option(200, "optimizer steps", least=1)
    batch_size: int = option(
        8, "rows in one forward pass of one process (of one replica, with tp or cp)", least=1
    )
    accumulate: int = option(1, "forward passes per optimizer step", least=1)
    lr: float = option(2e-3, "peak learning rate", least=0)
    warmup: int = option(20, "steps of linear warm-up", least=0)
    min_lr: float = option(0.1, "where the cosine ends, as a share of the peak", least=0)
    weight_decay: float = option(0.1, "AdamW weight decay of matrices", least=0)
    beta1: float = option(0.9, "AdamW: decay of the mean gradient", least=0)
    beta2: float = option(0.95, "AdamW: decay of the mean squared gradient", least=0)
    clip: float = option(1.0, "largest gradient norm; 0 does not clip", least=0)
    spike: float = option(0.0, "a step is bad with a loss or gradient norm this many standard deviations above the mean "
                          "of the last 128; 0: only where it is not finite", least=0)  # fmt: skip
    on_bad_step: str = option("stop", "what a bad step does: stop the run, or skip its update and go on",
                              choices=("stop", "skip"))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    group: ClassVar[str] = "Loss"

    loss: str = option("fastloss", "fastloss, or torch (whole logits)")
    router_aux: float = option(
        -1.0, "mixtures of experts: coefficient of the load-balancing loss in pretrain and sft; below 0: router_aux_loss_coef "
        "where the model's config has output_router_logits",
    )  # fmt: skip
    router_z: float = option(0.0, "mixtures of experts: coefficient of the routers' z-loss", least=0)
    compare: bool = option(False, "measure PyTorch's loss beside this one after the run (whole logits)")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    group: ClassVar[str] = "Run"

    out: str = option("runs/train", "folder of the run: logs, checkpoint, report")
    seed: int = option(0, "weights, order of the data, sampling, dropout", least=0, most=2**63 - 1)
    date: str = option(
        "", "what chat templates take for today, as 2026-11-26; none: the day on which the run began"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …")
    threads: int = option(0, "CPU threads; 0 leaves torch's choice", least=0)
    bf16: bool = option(False, "autocast to bfloat16")
    parallel: str = option("replicate", "how the processes of torchrun divide the work: a model each (replicate), or a shard of it (fsdp); "
                           "before it tp=N, N parts of each matrix, and cp=N, N pieces of each row, as tp=2,fsdp")  # fmt: skip
    checkpoint_activations: bool = option(
        False, "layers keep their input alone and run again in the backward"
    )
    save_every: int = option(100, "steps between checkpoints; 0 saves only at the end", least=0)
    keep: int = option(2, "checkpoints kept, the youngest", least=1)
    wandb: str = option("", "Weights & Biases project that logs the run too (extra `wandb`)")
    stop_after: int = option(0, "stop and save after this step of `steps`; 0 goes to the end", least=0)


# the fields of the last base come first
@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunOptions, LossOptions, OptimisationOptions, ModelOptions, DataOptions):
    """What every stage needs; a stage's own config adds to it."""

    cuts_rows: ClassVar[bool] = False  # a row's tokens may lie on several processes (cp)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, least, choices = getattr(self, f.name), f.metadata["least"], f.metadata["choices"]
            most = f.metadata["most"]
            if least is not None and not value >= least:
                raise ValueError(f"{f.name}: expected at least {least}, got {value}")
            if most is not None and value > most:
                raise ValueError(f"{f.name}: expected at most {most}, got {value}")
            if choices and value not in choices:
                raise ValueError(f"{f.name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
            if f.type == "tuple[str, ...]":
                object.__setattr__(self, f.name, tuple(value))
        if self.date and not _is_date(self.date):
            raise ValueError(f"date: expected a day like 2026-11-26, got {self.date!r}")
        self._check_parallel()
        if not self.val_fraction < 1:
            raise ValueError(f"val_fraction: expected less than 1, got {self.val_fraction}")

    def _check_parallel(self) -> None:
        """What does not go together."""
        layout = Layout.parse(self.parallel)
        if layout.cp > 1 and not self.cuts_rows:
            raise ValueError(
                f"parallel: cp={layout.cp} is for pretrain and sft, where each token has a loss of its own"
            )
        if layout.tp > 1 and self.lora_rank:
            raise ValueError(f"parallel: tp={layout.tp} takes no LoRA adapters; use fsdp, or lora_rank 0")
        if layout.tp > 1 and self.loss == "torch-linear":
            raise ValueError(
                f"parallel: tp={layout.tp} cuts the matrix that torch-linear reads whole; use fastloss or torch"
            )

    @property
    def rows_per_step(self) -> int:
        """Of all processes."""
        return self.batch_size * self.accumulate * processes.replicas()

    def starts(self, step: int) -> list[int]:
        """Where in the data this process's passes of a step begin. A pass of all processes reads rows that lie together,
        so N replicas with batches of b read what one reads with batches of N·b."""
        first = step * self.rows_per_step + processes.replica() * self.batch_size
        return [first + i * processes.replicas() * self.batch_size for i in range(self.accumulate)]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Next-token prediction on text, from random weights or (keep_weights) a model's."""

    group: ClassVar[str] = "Only in pretrain"
    cuts_rows: ClassVar[bool] = True

    out: str = option("runs/pretrain", "folder of the run: logs, checkpoint, report")
    model: str = option("", "folder with a transformers config.json; none: a Llama of the sizes below")
    keep_weights: bool = option(False, "start from the weights of --model too: continued pretraining")
    loss: str = option("fastloss", "fastloss, torch (whole logits) or torch-linear (torch's own fused head)")
    skip: float = option(
        0.0,
        "fastloss: by how much of its coefficient a token's gradient may err, less than 1, for fewer products; 0: not at all",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.skip < 1:
            raise ValueError(f"skip: expected less than 1, got {self.skip}")
        if self.keep_weights and not self.model:
            raise ValueError("keep_weights: expected --model, whose weights they are, got none")
        if self.lora_rank and not self.keep_weights:
            raise ValueError("lora_rank: expected --keep-weights: random weights are nothing to adapt")


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainConfig):
    """Instruction tuning: cross-entropy on the answers alone."""

    group: ClassVar[str] = "Only in sft"
    cuts_rows: ClassVar[bool] = True

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
class DistillConfig(SftConfig):
    """Learning from a teacher's distribution over each token, of the data's answers or of the student's own."""

    group: ClassVar[str] = "Only in distill"
    cuts_rows: ClassVar[bool] = False

    out: str = option("runs/distill", "folder of the run: logs, checkpoint, report")
    loss: str = option("fastloss", "fastloss or torch (whole logits of both models)")
    lr: float = option(5e-4, "peak learning rate", least=0)
    teacher: str = option(
        "", "transformers folder of the teacher; none: rows of --data carry teacher_ids and teacher_logprobs"
    )
    top_k: int = option(
        0, "learn from this many of the teacher's likeliest tokens; 0: from all", least=0, most=512
    )
    tail: str = option("bin", "with --top-k or stored rows: the other tokens are one more outcome (bin), left out after "
                       "renormalising (renormalize), or no term (none)", choices=("bin", "renormalize", "none"))  # fmt: skip
    divergence: str = option("forward_kl", "of fastloss.distillation_loss; --loss torch knows forward_kl, reverse_kl, jsd",
                             choices=DISTILLATION_DIVERGENCES)  # fmt: skip
    interpolation: float = option(0.5, "the teacher's part in jsd and the skewed divergences", least=0)
    temperature: float = option(1.0, "of both distributions", least=1e-3)
    hard: float = option(0.0, "coefficient of the cross-entropy on the tokens themselves", least=0)
    on_policy: float = option(
        0.0, "share of steps whose answers the student samples itself (GKD)", least=0, most=1
    )
    sample_temperature: float = option(1.0, "of these samples", least=1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if Layout.parse(self.parallel).tp > 1:
            raise ValueError("parallel: distill takes no tp; use replicate or fsdp")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """A reward model: one score per answer, the better answer's above the worse one's."""

    group: ClassVar[str] = "Only in reward"

    out: str = option("runs/reward", "folder of the run: logs, checkpoint, report")
    loss: str = option("fastloss", "fastloss or torch")
    lr: float = option(3e-4, "peak learning rate", least=0)
    batch_size: int = option(16, "pairs in one forward pass", least=1)
    margin: float = option(
        1.0, "counts the rows' margin (or score_chosen - score_rejected) this much; 0: not", least=0
    )
    center: float = option(0.0, "coefficient of the squared sum of a pair's scores", least=0)


@dataclass(frozen=True, kw_only=True)
class DpoConfig(TrainConfig):
    """Direct preference optimisation against the model it starts from."""

    group: ClassVar[str] = "Only in dpo"

    out: str = option("runs/dpo", "folder of the run: logs, checkpoint, report")
    lr: float = option(1e-4, "peak learning rate", least=0)
    batch_size: int = option(16, "pairs in one forward pass", least=1)
    loss_type: str = option("sigmoid", "of fastloss.preference_loss; --loss torch knows sigmoid")
    beta: float = option(0.1, "how strongly the log-ratio counts", least=0)
    label_smoothing: float = option(0.0, "share of pairs labelled wrong", least=0)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(TrainConfig):
    """What GRPO and PPO share: sampling and rewards."""

    group: ClassVar[str] = "Samples and their rewards"

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

    group: ClassVar[str] = "Only in grpo"

    out: str = option("runs/grpo", "folder of the run: logs, checkpoint, report")
    group_size: int = option(8, "samples per prompt", least=2)
    scale: str = option("group", "the advantage is divided by the deviation of: group, batch or none",
                        choices=("group", "batch", "none"))  # fmt: skip
    loss_type: str = option("dapo", "of fastloss.policy_loss; --loss torch knows dapo")
    beta: float = option(0.0, "coefficient of the KL to the model it starts from", least=0)
    top_k: int = option(0, "the sampler keeps so many of the likeliest tokens; 0: all", least=0)
    top_p: float = option(
        1.0, "the sampler keeps the likeliest tokens that have this probability together", least=1e-6
    )
    whole: bool = option(
        False, "log-probs over the whole vocabulary though the sampler cuts it: a bias, to be seen"
    )


@dataclass(frozen=True, kw_only=True)
class PpoConfig(RolloutConfig):
    """A value head, generalised advantages, and the KL to the start in the reward."""

    group: ClassVar[str] = "Only in ppo"

    out: str = option("runs/ppo", "folder of the run: logs, checkpoint, report")
    batch_size: int = option(64, "prompts in one forward pass", least=1)
    updates: int = option(2, "optimizer steps on each batch of samples", least=1)
    kl: float = option(0.02, "coefficient of the KL to the model it starts from, in the reward", least=0)
    gamma: float = option(1.0, "discount", least=0)
    lam: float = option(0.95, "lambda of the generalised advantages", least=0)
    value_coef: float = option(0.1, "coefficient of the value loss", least=0)
    value_clip: float = option(0.2, "how far a value moves in one batch of samples; 0 does not clip", least=0)


def _is_date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def groups(kind: type[TrainConfig]) -> dict[str, list[dataclasses.Field[Any]]]:
    """The fields by the group of the class that first has them: the panels of --help."""
    found: dict[str, list[dataclasses.Field[Any]]] = {}
    for f in dataclasses.fields(kind):
        first = next(c for c in reversed(kind.__mro__) if f.name in inspect.get_annotations(c))
        found.setdefault(vars(first)["group"], []).append(f)
    return found


def by_group(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The values by group, without those that are empty: what a run prints."""
    values = {
        group: {f.name: getattr(config, f.name) for f in fields}
        for group, fields in groups(type(config)).items()
    }
    return {group: {k: v for k, v in some.items() if v not in ("", ())} for group, some in values.items()}


def save(config: TrainConfig, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(config), encoding="utf-8")


def load(kind: type[C], path: Path) -> C:
    """The config that a run saved, or one written by hand: YAML, or JSON, which is YAML too."""
    text = path.read_text(encoding="utf-8")
    try:
        given = OmegaConf.create(text)
        if not isinstance(given, DictConfig):
            raise ValueError("expected lines of `option: value`, got a list")
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
        return config
    except yaml.MarkedYAMLError as error:
        line, what = error.problem_mark.line + 1 if error.problem_mark else 1, error.problem
    except OmegaConfBaseException as error:
        line, what = _line(text, error.full_key), f"{error.full_key}: {str(error.msg).splitlines()[0]}"
    except ValueError as error:  # an option's own check, which begins with its name
        line, what = _line(text, str(error).partition(":")[0]), str(error)
    raise ValueError(f"{path}:{line}: {what}")


def _line(text: str, key: str | None) -> int:
    root = yaml.compose(text)
    keys = [k for k, _ in root.value if k.value == key] if isinstance(root, yaml.MappingNode) else []
    return keys[0].start_mark.line + 1 if keys else 1
