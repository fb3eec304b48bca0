"""What the torch.library operators share: their outputs in a fixed order, targets, reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.engine import backend as dispatch
from fastloss.engine import coefficients
from fastloss.engine import cross_entropy as ce
from fastloss.engine import token_stats as ts
from fastloss.engine.native_rows import STATS, acc_dtype


def rows_of(backend: str) -> Any:
    adapter, reason = dispatch._load(backend)
    if reason:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    return adapter


def pack(out: dict[str, Tensor], want: str, like: Tensor) -> list[Tensor]:
    names = want.split(",") if want else []
    return [out[n] if n in names or n == "logsumexp" else _nothing(like, n) for n in STATS]


def _nothing(like: Tensor, name: str = "") -> Tensor:
    return like.new_empty(0, dtype=torch.uint8 if name == "is_top1" else acc_dtype(like.dtype))


def fake_stats(like: Tensor, rows: int, want: str) -> list[Tensor]:
    names = want.split(",") if want else []
    return [
        like.new_empty(
            rows if n in names or n == "logsumexp" else 0,
            dtype=torch.uint8 if n == "is_top1" else acc_dtype(like.dtype),
        )
        for n in STATS
    ]


def check_targets(target: Tensor | None, vocab: int, ignore_index: int) -> None:
    if target is not None and (target.device.type == "cpu" or dispatch.targets_are_validated()):
        ce.reject_bad_targets(target, vocab, ignore_index)


def reduced_loss(loss: Tensor, reduction: str, factor: ce.Factor) -> Tensor:
    return loss if reduction == "none" else ce.reduced(loss, factor, loss.dtype)


def late(dtype: torch.dtype, factor: float, factor_tensor: Tensor | None) -> Tensor | float:
    if not ce.factor_is_late(dtype):
        return 1.0
    return factor if factor_tensor is None else factor_tensor * factor


def stats_coefficients(want: str, upstream: list[Tensor], entropy: Tensor, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    names = want.split(",")
    g = {n: x for n, x in zip(STATS, upstream, strict=True) if n in names and n in ts.DIFFERENTIABLE}
    made = [coefficients.vector(g.get(n), dtype) for n in ts.DIFFERENTIABLE]
    return coefficients.of_token_stats(made[0], made[1], made[2], entropy)
