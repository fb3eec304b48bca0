"""Megatron-LM: ``fused_vocab_parallel_cross_entropy`` by fastloss, on one rank or over a tensor-parallel group."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.engine.shards import Shards
from fastloss.integrations.handle import Handle, expect_signature, replace_everywhere

__all__ = ["apply"]


def apply() -> Handle:
    """Every model of this process: per-token losses ``[sequence, batch]`` from ``[sequence, batch, V]``, float32.

    Over a tensor-parallel group one all-gather of 12 bytes a token takes the place of Megatron's two all-reduces.

    Raises:
        UnknownVersion: the function is not the one that was read (megatron-core 0.16).
    """
    module = importlib.import_module("megatron.core.fusions.fused_cross_entropy")
    before = module.fused_vocab_parallel_cross_entropy
    if getattr(before, "_fastloss", False):
        return Handle([])
    expect_signature(before, "vocab_parallel_logits, target, tp_group", "megatron.core")

    def fused_vocab_parallel_cross_entropy(
        vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any
    ) -> Any:
        group = None
        if tp_group is not None and (world := torch.distributed.get_world_size(tp_group)) > 1:
            # Megatron pads the vocabulary: all ranks have as many classes.
            sizes = (vocab_parallel_logits.shape[-1],) * world
            group = Shards(sizes, torch.distributed.get_rank(tp_group), tp_group)
        # -(2**63): Megatron masks by itself, no token is ignored.
        stats = fastloss.token_stats(vocab_parallel_logits, target, ignore_index=-(2**63), group=group)
        assert stats.logprobs is not None
        return -stats.logprobs

    fused_vocab_parallel_cross_entropy._fastloss = True  # type: ignore[attr-defined]
    return Handle([replace_everywhere("megatron", before, fused_vocab_parallel_cross_entropy)])
