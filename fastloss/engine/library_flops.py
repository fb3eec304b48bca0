"""FLOPs of the head's operators: an opaque operator would count 0 and lower a user's MFU."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from fastloss.engine import library_linear as library_linear


def _gemm_flops(hidden_shape, weight_shape, count: int) -> int:  # type: ignore[no-untyped-def]
    rows, dim = hidden_shape
    return 2 * rows * dim * weight_shape[0] * count


@register_flop_formula(torch.ops.fastloss.linear_cross_entropy)
def _(
    hidden_shape,
    weight_shape,
    bias,
    target,
    w,
    factor_tensor,
    factor,
    reduction,
    ignore_index,
    label_smoothing,  # type: ignore[no-untyped-def]
    z_loss,
    scale,
    softcap,
    want,
    needs,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    return _gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))


@register_flop_formula(torch.ops.fastloss.linear_token_stats)
def _(hidden_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _gemm_flops(hidden_shape, weight_shape, 1)


@register_flop_formula(torch.ops.fastloss.linear_row_grad)
def _(
    hidden_shape,
    weight_shape,
    bias,
    target,
    lse,
    a,
    b,
    c,
    d,
    w,
    ignore_index,
    scale,
    softcap,
    needs,
    *args,  # type: ignore[no-untyped-def]
    out_shape=None,
    **kwargs,
) -> int:
    return _gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))
