"""What a stage hands to the shared run: a record of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from .loop import StepFn


@dataclass(frozen=True)
class Stage:
    """What a stage hands to :func:`run.train`. Nothing is inherited; each field is one thing that stages differ in."""

    title: str
    model: nn.Module  # all that is optimised and saved
    source: str  # what the data is, for the report
    fingerprint: str  # of the data and its order
    # name of a loss, tensors carried from step to step -> the step; what is carried is in the checkpoint
    step: Callable[[str, dict[str, Tensor]], StepFn]
    loss_alone: Callable[[str], Callable[[], object]] | None  # forward and backward of the loss on one batch
    loss_by: Callable[[str], str]  # who computes the loss of that name here
    model_flops: Callable[[], int]  # of the first step, counted with PyTorch's plain loss
    same_shape: bool  # every step has the FLOPs of the first
    examples: Callable[[int], dict[int, str]]  # of a step: number in the training data, how it begins
    held_back: Callable[[], dict[str, float]]
    metrics: dict[
        str, str
    ]  # held-back metric -> its words in the report; the first one heads the chain's table
    export: Callable[[Path], None]  # the folder that the next stage starts from
    curves: dict[str, str] = field(default_factory=lambda: {"loss": "loss (nats per token)"})
