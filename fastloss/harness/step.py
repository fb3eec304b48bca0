"""Pieces of a step that every stage uses: the graph cut at the hidden states, and tokens picked from rows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import chat, measure
from .config import TrainConfig
from .data import IGNORE, Batch
from .model import hidden_states


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if config.bf16 else contextlib.nullcontext()


def learned(model: Any, batch: Batch, config: TrainConfig) -> Tensor:
    """Hidden states at the tokens to learn, sequence after sequence; the head never sees the others.  # [N, D]"""
    with autocast(config, batch.inputs.device):
        hidden = hidden_states(model, batch.inputs, batch.positions, batch.mask)
    return hidden[batch.targets != IGNORE]


def targets(batch: Batch) -> Tensor:
    """The tokens to learn, sequence after sequence.  # [N]"""
    return batch.targets[batch.targets != IGNORE]


def offsets(batch: Batch) -> Tensor:
    """Where each sequence begins in :func:`targets`; the last is the end.  # [B + 1] int64"""
    lengths = (batch.targets != IGNORE).sum(1)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def begins(tok: Any, numbers: Iterable[int], ids: Callable[[int], list[int]]) -> dict[int, str]:
    """Of examples by their number in the training data: how each begins."""
    return {number: chat.decode(tok, ids(number)[:24]) for number in numbers}


def cut_backward(
    hidden: Tensor, loss_of: Callable[[Tensor], Tensor], beside: Tensor | None = None
) -> tuple[Tensor, float]:
    """Backward of ``loss_of(hidden)`` with the graph cut at ``hidden``; the loss, and the seconds it took. ``beside``: a loss of the
    body's own (harness/routers.py), whose backward goes with that of ``hidden``.

    The loss runs forward and backward on its own, then its gradient goes into the body's backward. The
    arithmetic is that of one backward, and every step gives the loss's full time.
    """
    measure.synchronize(hidden.device)
    started = time.perf_counter()
    loss, grad = loss_and_grad(hidden, loss_of)
    measure.synchronize(hidden.device)
    seconds = time.perf_counter() - started
    if beside is None:
        hidden.backward(grad)
    else:
        torch.autograd.backward([hidden, beside], [grad, None])
    return loss, seconds


def loss_and_grad(hidden: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for ``hidden``; the head's gradient is added to its parameter."""
    leaf = hidden.detach().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad
