"""A product that PyTorch has no CPU GEMM for: bfloat16 operands, float32 result."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from fastloss.engine import cpu_rows


def supports_gemm_bf16() -> bool:
    """Whether this processor has AVX512_BF16; elsewhere float32 GEMMs over converted operands are as fast."""
    return cpu_rows.native is not None and cpu_rows.native.supports_gemm_bf16()


def gemm_bf16(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """``out = a.t() @ b``, or ``out += a.t() @ b``: a ``[k, m]`` and b ``[k, n]``, each dense in the last dimension."""
    if _get_current_dispatch_mode() is None:
        _run(out, a, b, accumulate)
    else:  # FlopCounterMode and its like see operators only
        _operator(out, a, b, accumulate)


def _run(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    (inner, rows), columns = a.shape, b.shape[1]
    cpu_rows.native.gemm_bf16(
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), out.data_ptr(), out.stride(0),
        rows, columns, inner, accumulate, torch.get_num_threads(),
    )  # fmt: skip


@torch.library.custom_op("fastloss::gemm_bf16", mutates_args=("out",))
def _operator(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    _run(out, a, b, accumulate)


@register_flop_formula(torch.ops.fastloss.gemm_bf16)
def _(out_shape_: list[int], a_shape: list[int], b_shape: list[int], *args: object, **kwargs: object) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]
