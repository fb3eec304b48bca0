"""The operator of torch.compile for supervised losses from a head (engine/supervised.py)."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastloss.engine import backend as backends
from fastloss.engine import head as heads
from fastloss.engine.compile_ops import (
    NUMBERS,
    check_targets,
    fake_grads,
    floats_of,
    gemm_flops,
    grad_dtypes,
    limits_of,
    numbers_and_fields,
    numbers_of,
    one_pass_gradients,
    operator,
    or_nothing,
    record_of,
    save_one_pass,
)
from fastloss.engine.contract import WHOLE
from fastloss.engine.head import Limits, Needs
from fastloss.engine.supervised import Labels, rows_of_head
from fastloss.tables import (
    ACC_DTYPES,
    SUPERVISED_SUMS,
    SupervisedOptions,
)

_FIELDS = numbers_of(SupervisedOptions), floats_of(SupervisedOptions)
_TENSORS = (
    f"Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? unlikely, Tensor? row_scale, "
    f"Tensor? factors, {NUMBERS}"
)
HOW = "bool[] needs, ScalarType dtype, int chunk, str memory, bool float_logits, str backend"


@operator("linear_supervised", _TENSORS, SupervisedOptions, HOW, "Tensor[]")
def _linear(
    hidden, weight, bias, target, unlikely, row_scale, factors, numbers=None, *, needs, dtype, chunk, memory, float_logits, backend, **fields
):  # fmt: skip
    o = record_of(SupervisedOptions, fields, row_scale, numbers)
    kernels, needed = backends.runnable(backend), Needs(*needs)
    check_targets(target, weight.shape[0], o.ignore_index)
    head = heads.make_head(kernels, hidden, weight, bias, dtype)
    keep = heads.kept_rows(target, o.ignore_index, traced=True)
    count = heads.count_kept(hidden.shape[0], keep)
    limits = limits_of(chunk, memory, float_logits)
    schedule = heads.schedule_of_one_pass(head, count, needed, limits, logprobs_only=True)
    sums, grads = rows_of_head(head, needed, Labels(target, unlikely, factors), o, schedule, keep)
    loss = sums[:, 0]
    total = (
        loss.clone()
        if factors is None
        else kernels.sum_rows(torch.where(factors == 0, 0.0, loss * factors), WHOLE)
    )
    dtypes = grad_dtypes(hidden, weight, bias, dtype)
    return [total, sums, *or_nothing(hidden, heads.finish(grads, dtypes, head.backend))]


@_linear.register_fake
def _(hidden, weight, bias, target, unlikely, row_scale, factors, numbers=None, *, needs, dtype, **fields):
    rows, acc = hidden.shape[0], ACC_DTYPES[dtype]
    total = hidden.new_empty((rows,) if factors is None else (), dtype=acc)
    sums = hidden.new_empty((rows, len(SUPERVISED_SUMS)), dtype=acc)
    return [total, sums, *fake_grads(hidden, weight, bias, needs, grad_dtypes(hidden, weight, bias, dtype))]


def _backward(ctx, upstream):
    return tuple(one_pass_gradients(ctx, upstream[0], _linear, -2))


_linear.register_autograd(_backward, setup_context=save_one_pass(8, 7))


def linear_supervised(
    operands: tuple[Tensor, Tensor, Tensor | None],
    labels: Labels,
    options: SupervisedOptions,
    needs: Needs,
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(Σ factors · loss, or the loss [rows] where factors is None; sums [rows, 3])."""
    numbers, fields = numbers_and_fields(options, _FIELDS)
    total, sums, *_ = _linear(
        *operands, labels.target, labels.unlikely, options.row_scale, labels.factors, numbers, **fields, needs=list(needs), dtype=dtype,
        chunk=limits.chunk_size or 0, memory=limits.memory, float_logits=limits.float_logits, backend=backend,
    )  # fmt: skip
    return total, sums.detach()


@register_flop_formula(torch.ops.fastloss.linear_supervised)
def _(hidden_shape, weight_shape, *args, needs, out_shape=None, **kwargs) -> int:
    return gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))
