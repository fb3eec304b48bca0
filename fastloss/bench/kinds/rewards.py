"""Reward models: of pairs ("reward") and of the steps of an answer ("process-reward")."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import IGNORE, Call, Case, Data, Loss
from fastloss.bench.exact import Exact, over_numbers
from fastloss.bench.kinds.base import Kind, integers, normal, places, read_all_write_one

CENTER = 0.01


def cases(quick: bool) -> Iterator[Case]:
    yield Case("reward-64", "reward", 64, 0, 0, torch.float32, calls=20 if quick else 300)


def process_cases(quick: bool) -> Iterator[Case]:
    answers, length = (4, 64) if quick else (64, 4096)
    name = f"process-reward-{answers}x{length}"
    # One token in 32 ends a step.
    yield Case(
        name, "process-reward", answers * length, 0, 0, torch.float32, length=length, ignored=1 - 1 / 32
    )


def _tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    return dict(zip(("chosen", "rejected"), normal(2, case.rows, generator=generator)))


def _process_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (case.rows // case.length, case.length)
    labels = integers(0, 2, shape, generator=generator)
    labels[:, places(case.length) % round(1 / (1 - case.ignored)) != 0] = IGNORE
    return {"scores": normal(*shape, 2, generator=generator), "labels": labels}


def _ours(case: Case, call: Call) -> Loss:
    return lambda chosen, rejected: (
        fastloss.reward_model_loss(chosen, rejected, center_coefficient=CENTER, **call).loss
    )


def _eager(case: Case) -> Loss:
    """As TRL 1.16's RewardTrainer."""

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(chosen - rejected).mean() + CENTER * torch.mean((chosen + rejected) ** 2)

    return loss


def _ours_process(case: Case, call: Call) -> Loss:
    return lambda scores, labels: fastloss.process_reward_loss(scores, labels, **call).loss


def _eager_process(case: Case) -> Loss:
    return lambda scores, labels: F.cross_entropy(scores.flatten(0, 1), labels.flatten())


def _truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, _eager(case))


def _process_truth(case: Case, data: Data) -> Exact:
    return over_numbers(data, _eager_process(case))


KINDS = {
    "reward": Kind(
        cases,
        _tensors,
        lambda case: ("chosen", "rejected"),
        _ours,
        _eager,
        _truth,
        kept=lambda tensors: len(tensors["chosen"]),
    ),
    "process-reward": Kind(
        process_cases,
        _process_tensors,
        lambda case: ("scores",),
        _ours_process,
        _eager_process,
        _process_truth,
        ("read all, write one", read_all_write_one),
        kept=lambda tensors: int((tensors["labels"] != IGNORE).sum()),
    ),
}
