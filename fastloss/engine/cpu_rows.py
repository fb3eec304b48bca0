"""Adapter of the ``cpu`` backend."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastloss.engine.native_pairs import NativePairs
from fastloss.engine.native_policy import NativePolicy
from fastloss.engine.native_rows import DTYPE_CODES, NativeRows

try:
    native: Any = importlib.import_module("fastloss._cpu")
    _why_not = ""
except ImportError as error:
    native = None
    _why_not = f"the native CPU module is not there ({error})"

rows = NativeRows(native, lambda _: torch.get_num_threads())
row_stats, row_grad, row_cross_entropy = rows.row_stats, rows.row_grad, rows.row_cross_entropy
pairs = NativePairs(native, lambda _: torch.get_num_threads())
segment_sum, segment_expand = pairs.segment_sum, pairs.segment_expand
pair_loss, unpaired_loss = pairs.pair_loss, pairs.unpaired_loss
policies = NativePolicy(native, lambda _: torch.get_num_threads())
policy_loss, gae, discounted_returns = policies.policy_loss, policies.gae, policies.discounted_returns


def why_not() -> str:
    return _why_not


def why_not_for(tensor: Tensor) -> str:
    if tensor.device.type != "cpu":
        return f"it takes cpu tensors, got {tensor.device.type}"
    if tensor.dtype not in DTYPE_CODES:
        return f"it has no kernel for {tensor.dtype}"
    return ""


def count_targets(target: Tensor, vocab: int, ignore_index: int) -> tuple[int, int]:
    """(targets that are not ignored, flat position of the first bad one or -1)."""
    return native.count_targets(target.data_ptr(), target.numel(), vocab, ignore_index)


def sum_rows(values: Tensor, factor: float) -> Tensor:
    """factor · Σ values, added in order in double: the same bits for any number of threads."""
    out = torch.empty((), dtype=values.dtype)
    native.sum_rows(values.data_ptr(), DTYPE_CODES[values.dtype], values.numel(), factor, out.data_ptr())
    return out
