"""Distillation, top to bottom: a teacher's distribution over each token of the data's answers, or of the student's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from . import chat, measure, parallel, sft
from .chat import Example
from .config import DistillConfig
from .data import IGNORE, Batch, fingerprint, fit, padded
from .export import export
from .loop import Metrics, StepFn
from .losses import example, explained, named
from .model import Head, check_packing, head_of
from .run import Result, begun, open_folder, train
from .sampler import check_sampler, sample
from .stage import Stage
from .start import language_model, tokenizer_of
from .step import autocast, begins, cut_backward, learned, loss_and_grad, targets
from .teacher import Lesson, Stored, Teacher, check_plain


@dataclass(frozen=True)
class Out:
    loss: Tensor  # sum over tokens / normalizer
    metrics: dict[str, Tensor]  # means over the tokens


Loss = Callable[[Tensor, Head, Lesson, Tensor, float, DistillConfig], Out]


def fastloss_loss(
    hidden: Tensor, head: Head, lesson: Lesson, target: Tensor, normalizer: float, config: DistillConfig
) -> Out:
    """Never holds the logits of the batch, neither the student's nor the teacher's."""
    import fastloss

    shared: dict[str, Any] = {
        "linear_bias": head.bias, "divergence": config.divergence, "interpolation": config.interpolation,
        "temperature": config.temperature, "hard_loss_coef": config.hard, "ignore_index": IGNORE, "normalizer": normalizer,
    }  # fmt: skip
    if lesson.named is not None:
        out = fastloss.linear_topk_distillation_loss(
            hidden, head.weight, *lesson.named, target, tail=config.tail, logit_scale=head.scale,
            softcap=head.softcap, **shared,
        )  # fmt: skip
    else:
        assert lesson.hidden is not None and lesson.head is not None
        out = fastloss.linear_distillation_loss(
            _scaled(hidden, head), head.weight, _scaled(lesson.hidden, lesson.head), lesson.head.weight, target,
            teacher_bias=lesson.head.bias, **shared,
        )  # fmt: skip
    return Out(out.loss, out.metrics)


def _scaled(hidden: Tensor, head: Head) -> Tensor:
    return hidden if head.scale == 1.0 else hidden * head.scale


def torch_loss(
    hidden: Tensor, head: Head, lesson: Lesson, target: Tensor, normalizer: float, config: DistillConfig
) -> Out:
    """What most training loops do: all logits of both models, in float32."""
    assert lesson.hidden is not None and lesson.head is not None
    z = head.logits(hidden)
    vocab = min(z.shape[1], lesson.head.weight.shape[0])
    log_q = (z[:, :vocab] / config.temperature).log_softmax(-1)
    log_p = (lesson.head.logits(lesson.hidden)[:, :vocab] / config.temperature).log_softmax(-1)
    forward, reverse = _kl(log_p, log_q), _kl(log_q, log_p)
    if config.divergence == "jsd":
        w = torch.tensor(config.interpolation, dtype=z.dtype, device=z.device)
        mean = torch.logaddexp(log_p + w.log(), log_q + (1 - w).log())
        each = w * _kl(log_p, mean) + (1 - w) * _kl(log_q, mean)
    else:
        each = forward if config.divergence == "forward_kl" else reverse
    loss = each.sum()
    if config.hard:
        loss = loss + config.hard * F.cross_entropy(z, target, ignore_index=IGNORE, reduction="sum")
    agreement = (log_q.argmax(-1) == log_p.argmax(-1)).float().mean()
    return Out(loss / normalizer, {"kl": forward.detach().mean(), "agreement": agreement})


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


LOSSES: dict[str, Loss] = {"fastloss": fastloss_loss, "torch": torch_loss}
TORCH_KNOWS = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Student:
    """Who learns, from whom."""

    model: Any
    head: Head
    tok: Any
    teacher: Teacher | Stored
    config: DistillConfig

    def examples(self, data: sft.Data, position: int, step: int) -> tuple[list[Example], Batch]:
        """Those of a pass, and the batch of them: the data's, or with the student's own answers."""
        groups = data.taken(position, self.config)
        taken = [example for group in groups for example in group]
        if not self.answers_itself(step):
            return taken, data.laid_out(groups, self.config)
        own = self.answered(taken, self._noise(groups, position))
        return own, padded(own)

    def _noise(self, groups: list[list[Example]], position: int) -> Tensor:
        """The random numbers of each sample: a function of the seed and the row's place in the run, whoever reads it.
        # float64 [samples, max_new_tokens]"""
        parts = []
        for place, group in enumerate(groups, position):
            generator = torch.Generator(device="cpu").manual_seed(
                (self.config.seed * 1_000_003 + place * 7_919 + 1) % 2**63
            )
            shape = len(group), self.config.max_new_tokens
            parts.append(torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator))
        return torch.cat(parts)

    def answers_itself(self, step: int) -> bool:
        """Every process says the same of a step, and so does a run that is resumed."""
        share = self.config.on_policy
        return share > 0 and random.Random(f"{self.config.seed} {step}").random() < share

    def answered(self, taken: Sequence[Example], noise: Tensor) -> list[Example]:
        """The student's samples in place of the last answers of the data."""
        prompts = [prompt_of(example) for example in taken]
        stop = chat.ends(self.tok, self.model.generation_config.eos_token_id)
        with autocast(self.config, self.head.weight.device):
            answers = sample(
                self.model, self.head, prompts, max_new_tokens=self.config.max_new_tokens, end=stop,
                temperature=self.config.sample_temperature, noise=noise,
            )  # fmt: skip
        made = []
        for given, prompt, ids in zip(taken, prompts, answers, strict=True):
            own = Example(prompt + ids, [False] * len(prompt) + [True] * len(ids))
            kept, _, _ = fit([own], self.config.seq_len)
            made.append(kept[0] if kept else given)  # a prompt as long as a row: the data's answer stays
        return made


def prompt_of(example: Example) -> list[int]:
    """What comes before the last answer; at least one token."""
    last = max(i for i, learned in enumerate(example.learned) if learned)
    start = last
    while start > 1 and example.learned[start - 1]:
        start -= 1
    return example.ids[:start]


def make_step(student: Student, loss_fn: Loss, data: sft.Data) -> StepFn:
    config, head, model = student.config, student.head, student.model
    device = head.weight.device

    def step_fn(step: int) -> Metrics:
        passes = []
        for start in config.starts(step):
            examples, batch = student.examples(data, start, step)
            passes.append((examples, batch.to(device)))
        tokens = int(parallel.summed(sum(int((b.targets != IGNORE).sum()) for _, b in passes))[0])
        total, loss_s = torch.zeros((), dtype=torch.float32, device=device), 0.0
        seen: list[tuple[Tensor, int]] = []
        for examples, batch in passes:
            lesson = student.teacher.lesson(batch, examples)
            hidden = learned(model, batch, config)  # [N, D]
            of = loss_of(head, loss_fn, lesson, targets(batch), tokens, config, seen)
            loss, seconds = cut_backward(hidden, of)
            loss_s += seconds
            total += loss
        step_loss, kl = parallel.summed(total, sum(float(value) * count for value, count in seen))
        own = float(student.answers_itself(step))
        return {"loss": step_loss, "kl": kl / tokens, "own_answers": own, "tokens": tokens, "loss_s": loss_s}

    return step_fn


def loss_of(
    head: Head, loss_fn: Loss, lesson: Lesson, target: Tensor, normalizer: float, config: DistillConfig,
    seen: list[tuple[Tensor, int]],
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """The pass's share of the step's mean over tokens; its KL from the teacher, and of how many tokens, go to ``seen``."""

    def of(hidden: Tensor) -> Tensor:
        with autocast(config, hidden.device):
            out = loss_fn(hidden, head.gathered(), lesson, target, normalizer, config)
        seen.append((out.metrics["kl"], len(target)))
        return out.loss

    return of


@torch.no_grad()
def evaluate(student: Student, loss_fn: Loss, data: sft.Data) -> dict[str, float]:
    """On the held-back answers' tokens: KL from the teacher, and how often both hold the same token for the likeliest; and the
    exact match of sft."""
    model, head, config = student.model, student.head, student.config
    model.eval()
    values: dict[str, float] = {}
    if data.val:
        by_length = sorted(data.val, key=lambda one: len(one.ids))

        def of(start: int) -> tuple[float, float, int]:
            part = by_length[start : start + 32]
            batch = padded(part).to(head.weight.device)
            lesson, hidden, target = (
                student.teacher.lesson(batch, part),
                learned(model, batch, config),
                targets(batch),
            )
            with autocast(config, hidden.device):
                out = loss_fn(hidden, head.gathered(), lesson, target, 1.0, config)
            n = len(target)
            return float(out.metrics["kl"]) * n, float(out.metrics["agreement"]) * n, n

        found = parallel.spread(of, range(0, len(by_length), 32))
        kl, agreement, tokens = (sum(column) for column in zip(*found, strict=True))
        values = {"kl": kl / tokens, "agreement": agreement / tokens}
    if data.questions:
        values |= sft.exact_match(model, head, student.tok, data.questions, config.max_new_tokens)
    model.train()
    return values


@begun
def run(config: DistillConfig, *, resume: bool, overwrite: bool, console: Console) -> Result:
    loss_fn = named(LOSSES, config.loss)
    if not config.teacher and not config.data:
        raise ValueError(
            "teacher: expected a folder, or --data whose rows carry a stored teacher, got neither"
        )
    if config.on_policy and not config.teacher:
        raise ValueError(
            "on_policy: expected --teacher, which reads what the student samples, got a stored one"
        )
    if config.compare or config.loss == "torch":
        if config.top_k or not config.teacher or config.divergence not in TORCH_KNOWS:
            raise ValueError(
                f"loss: PyTorch's is of a teacher's whole distribution and of {', '.join(TORCH_KNOWS)}; leave out --compare"
            )
    folder = open_folder(config, resume, overwrite, console)
    tok = tokenizer_of(config, folder, console)
    data = parallel.from_reader(partial(sft.prepare, config, tok, console))
    model = language_model(config, tok)
    head = head_of(model)
    teacher = Teacher(config, tok, head.vocab) if config.teacher else Stored(config, tok)
    if config.teacher and not config.top_k:
        check_plain("model", head)
    if config.packing:
        check_packing(model, len(tok))
    if data.questions or config.on_policy:
        check_sampler(model, head, len(tok), instead=" (--exact 0 and --on-policy 0 do without)")
    student = Student(model, head, tok, teacher, config)

    def first() -> tuple[Tensor, Lesson, Tensor]:
        groups = data.taken(0, config)
        batch = data.laid_out(groups, config).to(head.weight.device)
        with torch.no_grad():
            hidden = learned(model, batch, config)
        return hidden, teacher.lesson(batch, [e for group in groups for e in group]), targets(batch)

    def one_loss(name: str) -> Any:
        hidden, lesson, target = first()
        of = loss_of(head, named(LOSSES, name), lesson, target, len(target), config, [])
        return partial(loss_and_grad, hidden, of)

    def loss_by(name: str) -> str:
        import fastloss

        _, lesson, target = first()
        whole = head.gathered()
        hidden, weight = example(whole, len(target), torch.bfloat16 if config.bf16 else torch.float32)
        if lesson.named is not None:
            return explained(
                name, fastloss.linear_topk_distillation_loss, hidden, weight, *lesson.named, target, tail=config.tail,
                linear_bias=whole.bias, divergence=config.divergence,
            )  # fmt: skip
        assert lesson.head is not None
        taught, matrix = example(lesson.head, len(target), hidden.dtype)
        return explained(
            name, fastloss.linear_distillation_loss, hidden, weight, taught.detach(), matrix.detach(), target,
            linear_bias=whole.bias, divergence=config.divergence,
        )  # fmt: skip

    plain = (
        "torch" if config.teacher and not config.top_k and config.divergence in TORCH_KNOWS else config.loss
    )
    tasks = sorted({row["task"] for row in data.questions if "task" in row})
    stage = Stage(
        title="distill",
        model=model,
        source=f"{data.source}; teacher: {config.teacher or 'stored in the rows'}"
        + (f", its {config.top_k} likeliest tokens" if config.top_k and config.teacher else ""),
        fingerprint=fingerprint(
            data.train, config.seq_len, config.seed, config.rows_per_step, config.packing, config.on_policy
        ),
        step=lambda name, _: make_step(student, named(LOSSES, name), data),
        loss_alone=one_loss,
        loss_by=loss_by,
        model_flops=lambda: measure.count_flops(partial(make_step(student, named(LOSSES, plain), data), 0)),
        same_shape=False,
        examples=lambda step: begins(
            tok,
            (i for row in data.order.step(step, config.rows_per_step) for i in data.groups[row]),
            lambda number: data.train[number].ids,
        ),
        held_back=lambda: evaluate(student, loss_fn, data),
        metrics={
            "kl": "KL from the teacher (nats per token)",
            "agreement": "likeliest token is the teacher's",
            "exact": "exact match",
            **{f"exact_{task}": f"exact match, {task}" for task in tasks},
        },
        export=partial(export, model, tok),
        curves={"loss": "loss (nats per answer token)", "kl": "KL from the teacher (nats per token)"},
    )
    return train(stage, config, folder, resume=resume, console=console)
