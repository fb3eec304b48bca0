"""What the operators of torch.compile, export and fake tensors share; compile_rows.py, compile_heads.py, compile_distillation.py and their kin are
the operators.

An operator takes tensors by position and the fields of an option record by name: its schema is made of the record, so that a
new option needs no line here. Outputs come in one order: the loss, the statistics of fastloss.tables.STATS (empty where not
wanted), then gradients. FLOP formulas stand beside the head's operators: an opaque operator would count 0 and lower a
user's MFU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.engine import backend as backends
from fastloss.engine import checks
from fastloss.engine import head as heads
from fastloss.engine.changing import constant, in_one_tensor
from fastloss.engine.coefficients import Coefficients, of_upstream
from fastloss.engine.contract import Factor
from fastloss.engine.head import Head, Limits, Needs, Schedule
from fastloss.tables import (
    ACC_DTYPES,
    LATE_DTYPES,
    LSE_PARTS,
    STATS,
    CrossEntropyOptions,
    DistillationOptions,
    RowOptions,
)

_SCHEMA_TYPES = {"int": "int", "float": "float", "bool": "bool", "str": "str"}


def numbers_of(record: type) -> tuple[str, ...]:
    """The fields of an option record but its tensors, which an operator that has a gradient takes by position alone."""
    return tuple(f.name for f in dataclasses.fields(record) if str(f.type) in _SCHEMA_TYPES)


def floats_of(record: type) -> tuple[str, ...]:
    """Those of them that may change from call to call (engine/changing.py), in the order of ``numbers``."""
    return tuple(f.name for f in dataclasses.fields(record) if str(f.type) == "float")


def _fields(record: type) -> str:
    """The numbers of an option record as keyword-only arguments of a schema."""
    types = {f.name: _SCHEMA_TYPES.get(str(f.type)) for f in dataclasses.fields(record)}
    return ", ".join(f"{types[name]} {name}" for name in numbers_of(record))


def operator(name: str, tensors: str, record: type, more: str, returns: str) -> Callable[..., Any]:
    """``torch.library.custom_op`` with the record's fields, and ``more``, as keyword-only arguments."""
    schema = f"({tensors}, *, {_fields(record)}, {more}) -> {returns}"

    def decorate(function: Callable[..., Any]) -> Any:
        return torch.library.custom_op(f"fastloss::{name}", function, mutates_args=(), schema=schema)

    return decorate


def record_of(
    kind: type, arguments: dict[str, Any], row_scale: Tensor | None = None, numbers: Tensor | None = None
) -> Any:
    """The option record among an operator's arguments."""
    values = () if numbers is None else numbers.tolist()
    return _filled(kind, arguments, row_scale, values)


def traced_record_of(
    kind: type, arguments: dict[str, Any], row_scale: Tensor | None, numbers: Tensor | None
) -> Any:
    """As :func:`record_of`, in a backward that is traced: what changes stays a tensor."""
    values = () if numbers is None else numbers.unbind()
    return _filled(kind, arguments, row_scale, values)


def _filled(kind: type, arguments: dict[str, Any], row_scale: Tensor | None, values: Sequence[Any]) -> Any:
    fields = {name: arguments[name] for name in numbers_of(kind)}
    for name, value in zip(floats_of(kind), values):
        if math.isnan(fields[name]):
            fields[name] = value
    record = kind(**fields)
    return record if row_scale is None else dataclasses.replace(record, row_scale=row_scale)


def names_of(want: str) -> tuple[str, ...]:
    return tuple(want.split(",")) if want else ()


OUTPUTS = (*STATS, LSE_PARTS)


LSE_PARTS_AT = len(OUTPUTS)  # after the loss


def _stats_type(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if name == "is_top1" else ACC_DTYPES[dtype]


def pack_stats(
    out: dict[str, Tensor], want: tuple[str, ...], like: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The statistics in the order of STATS, empty where not wanted, and lse_parts, which the backward needs."""
    return [
        *(out[n] if n in want else like.new_empty(0, dtype=_stats_type(n, dtype)) for n in STATS),
        out[LSE_PARTS],
    ]


def fake_stats(like: Tensor, rows: Any, want: tuple[str, ...], dtype: torch.dtype) -> list[Tensor]:
    return [
        *(like.new_empty(rows if n in want else 0, dtype=_stats_type(n, dtype)) for n in STATS),
        like.new_empty((rows, 2), dtype=ACC_DTYPES[dtype]),
    ]


def check_targets(target: Tensor | None, vocab: int, ignore_index: int) -> None:
    if target is not None and (target.device.type == "cpu" or backends.targets_are_validated()):
        checks.reject_bad_targets(target, vocab, ignore_index)


def sum_of(backend: str, loss: Tensor, reduction: str, factor: Factor) -> Tensor:
    return loss if reduction == "none" else backends.runnable(backend).sum_rows(loss, factor)


def late_factor(dtype: torch.dtype, factor: float, factor_tensor: Tensor | None) -> Tensor | float:
    """What unscaled gradients are multiplied by: 0 where that is one over no row, for 0 · inf is NaN."""
    if dtype not in LATE_DTYPES:
        return 1.0
    return Factor(factor, factor_tensor, of_count=True).of_gradient()


def times_factor(g: Tensor, factor: float, factor_tensor: Tensor | None, rows: int) -> Tensor:
    return (g * factor if factor_tensor is None else g * factor * factor_tensor).expand(rows)


def stats_coefficients(
    want: tuple[str, ...], upstream: list[Tensor], entropy: Tensor, dtype: torch.dtype
) -> Coefficients:
    by_name = dict(zip(OUTPUTS, upstream, strict=True))
    return of_upstream(want, [by_name.get(name) for name in want], entropy, dtype)


def all_of(inputs: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """``inputs``, and None for last arguments that were left at it."""
    return (*inputs, *[None] * (count - len(inputs)))


def count_arguments(inputs: tuple[Any, ...], required: int) -> int:
    """Of how many arguments PyTorch expects a gradient: it drops the last ones that have their default, None."""
    count = len(inputs)
    while count > required and inputs[count - 1] is None:
        count -= 1
    return count


def contiguous(k: Coefficients) -> Coefficients:
    return Coefficients(*[None if x is None else x.contiguous() for x in k])


NUMBERS = "Tensor? numbers=None"  # engine/changing.py


ROW_SCALE = f"Tensor? row_scale=None, {NUMBERS}"  # RowOptions's


GIVEN = "Tensor? target, Tensor lse_parts, Tensor? a, Tensor? b, Tensor? c, Tensor? d, Tensor? w"


# By name and not by dataclasses.fields of a record, whose class torch.compile of torch 2.13 does not trace.
ROW = numbers_of(RowOptions), floats_of(RowOptions)


CROSS_ENTROPY = numbers_of(CrossEntropyOptions), floats_of(CrossEntropyOptions)


DISTILLATION = numbers_of(DistillationOptions), floats_of(DistillationOptions)


def numbers_and_fields(
    options: Any, names: tuple[tuple[str, ...], tuple[str, ...]]
) -> tuple[Tensor | None, dict[str, Any]]:
    """``numbers`` and the keywords of an operator that is given ``options``, of a record whose fields are ``names``: a
    CrossEntropyOptions is given to row_grad too, which takes what is of the row alone."""
    fields = {name: getattr(options, name) for name in names[0]}
    numbers = in_one_tensor([fields[name] for name in names[1]])
    if numbers is not None:
        for name in names[1]:
            fields[name] = constant(fields[name])
    return numbers, fields


LOSS = "float factor, str reduction, str want"


HEAD = "Tensor hidden, Tensor weight, Tensor? bias"


HOW = "bool[] needs, ScalarType dtype, int chunk, str backend, str memory='auto', bool float_logits=False"


def limits_of(chunk: int, memory: str = "auto", float_logits: bool = False, skip: float = 0.0) -> Limits:
    return Limits(chunk or None, memory, None, float_logits, skip)


def given_limits(given: dict[str, Any]) -> Limits:
    """Of a saved call; graphs that were exported before the later options have defaults for them."""
    return limits_of(given["chunk"], given.get("memory", "auto"), given.get("float_logits", False))


def schedule_and_rows(
    head: Head, target: Tensor | None, ignore_index: int, needs: Needs, limits: Limits
) -> tuple[Schedule, Tensor | None]:
    """The schedule, and the rows that are computed."""
    keep = heads.kept_rows(target, ignore_index, traced=True)
    return heads.schedule_of(head, heads.count_kept(head.hidden.shape[0], keep), needs, limits), keep


def or_nothing(like: Tensor, grads: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [like.new_empty(0) if g is None else g for g in grads]


def fake_grads(hidden, weight, bias, needs, dtypes):  # type: ignore[no-untyped-def]
    shapes = (hidden.shape, weight.shape, weight.shape[:1] if bias is None else bias.shape)
    return [
        hidden.new_empty(shape, dtype=t) if need else hidden.new_empty(0)
        for need, shape, t in zip(needs, shapes, dtypes, strict=True)
    ]


def grad_dtypes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[torch.dtype, ...]:
    """float16 gradients wait, unscaled, in float32 for the upstream gradient."""
    if dtype in LATE_DTYPES:
        return hidden.dtype, torch.float32, torch.float32
    return heads.leaf_dtypes(hidden, weight, bias)


def save_one_pass(count: int, required: int) -> Callable[..., None]:
    """Of an operator of ``count`` tensors, of which those after the ``required`` first may be left out, whose forward may have made the
    head's gradients, its last three outputs: those, or what makes them."""

    def save(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
        ctx.given, ctx.needs = keyword_only_inputs, list(ctx.needs_input_grad[:3])
        ctx.dtypes, ctx.arguments = heads.leaf_dtypes(*inputs[:3]), count_arguments(inputs, required)
        made = any(ctx.given["needs"])
        ctx.save_for_backward(
            *((None,) * count if made else all_of(inputs, count)), *(output[-3:] if made else (None,) * 3)
        )

    return save


def one_pass_gradients(  # type: ignore[no-untyped-def]
    ctx, g: Tensor, again: Callable[..., Any], factors_at: int
) -> list[Tensor | None]:
    """What the forward made times the upstream gradient, or of another call, with ``g`` in the rows' factors; then None for each
    constant. ``factors_at``: the place of the factors among the inputs."""
    *inputs, d_hidden, d_weight, d_bias = ctx.saved_tensors
    if any(ctx.given["needs"]):
        made, needs = [x * g for x in (d_hidden, d_weight, d_bias)], ctx.given["needs"]
    else:
        needs, factors = ctx.needs, inputs[factors_at]
        inputs[factors_at] = g.contiguous() if factors is None else g * factors
        _, _, *made = again(*inputs, **{**ctx.given, "needs": needs})
    grads = [x.to(t) if need else None for x, need, t in zip(made, needs, ctx.dtypes, strict=True)]
    return [*grads, *[None] * (ctx.arguments - 3)]


def gemm_flops(hidden_shape: Any, weight_shape: Any, count: int) -> int:
    rows, dim = hidden_shape
    return 2 * rows * dim * weight_shape[0] * count
