"""TRL's DistillationTrainer: its divergence between two heads, and the student's entropy, in one pass of fastloss's.

TRL makes both models' logits for the statistics, again for a mixture (0 < beta < 1), and again in the backward. Here the
gradient is made in the pass that makes the loss: 1 GEMM for the teacher and 3 for the student.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.integrations.handle import expect_source, replace_everywhere

__all__ = ["replace_divergence"]

READ = "550cb45191ab1654"  # of TRL 1.16


def _whole(x: Any, dtype: torch.dtype | None = None) -> Any:
    """FSDP2's shards put together, once."""
    if not isinstance(x, torch.distributed.tensor.DTensor):
        return x
    return x.full_tensor() if dtype is None else x.full_tensor().to(dtype)


def replace_divergence() -> Callable[[], None]:
    """The trainer's loss of hidden states replaced. Returns what puts it back.

    Raises:
        UnknownVersion: the code of TRL is not that which was read.
    """
    from trl.trainer import distillation_trainer

    stock = distillation_trainer._chunked_divergence_loss
    expect_source(stock, READ, "trl", "1.16")

    @functools.wraps(stock)
    def divergence_loss(
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid = completion_mask != 0
        if (
            student_final_logit_softcapping is not None
            or teacher_final_logit_softcapping is not None
            or min(student_logit_scale, teacher_logit_scale) <= 0
            or student_hidden_states.dtype != teacher_hidden_states.dtype
        ):
            return stock(
                student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight,
                completion_mask, beta, num_items_in_batch, student_lm_head_bias, teacher_lm_head_bias, student_logit_scale,
                teacher_logit_scale, student_final_logit_softcapping, teacher_final_logit_softcapping, temperature,
            )  # fmt: skip
        tokens = valid.sum()
        total = tokens if num_items_in_batch is None else num_items_in_batch
        out = fastloss.linear_distillation_loss(
            student_hidden_states[valid],
            _whole(student_lm_head_weight, student_hidden_states.dtype),
            teacher_hidden_states[valid],
            _whole(teacher_lm_head_weight, teacher_hidden_states.dtype),
            linear_bias=_whole(student_lm_head_bias),
            teacher_bias=_whole(teacher_lm_head_bias),
            divergence="jsd",
            interpolation=beta,
            temperature=temperature / student_logit_scale,
            teacher_temperature=temperature / teacher_logit_scale,
            normalizer=torch.as_tensor(total, device=valid.device).clamp(min=1),
            logits_dtype=torch.float32,
        )
        return out.loss, out.metrics["entropy"] * tokens, tokens

    return replace_everywhere("trl", stock, divergence_loss)
