"""The torch.library operators through which torch.compile, export and fake tensors reach the kernels.

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
from torch.utils.flop_counter import register_flop_formula

from fastloss.engine import backend as backends
from fastloss.engine import checks
from fastloss.engine import head as heads
from fastloss.engine.changing import constant, in_one_tensor
from fastloss.engine.coefficients import Coefficients, of_cross_entropy, of_upstream
from fastloss.engine.contract import WHOLE, Factor
from fastloss.engine.distillation import log_sums, of_heads
from fastloss.engine.distillation import schedule_of as schedule_of_distillation
from fastloss.engine.head import NOTHING, Head, Limits, Needs, Saved, Schedule
from fastloss.tables import (
    ACC_DTYPES,
    ARGMAX,
    DISTILLATION_SUMS,
    LATE_DTYPES,
    LSE_PARTS,
    STATS,
    CrossEntropyOptions,
    DistillationOptions,
    RowOptions,
)

_SCHEMA_TYPES = {"int": "int", "float": "float", "bool": "bool", "str": "str"}


def _numbers(record: type) -> tuple[str, ...]:
    """The fields of an option record but its tensors, which an operator that has a gradient takes by position alone."""
    return tuple(f.name for f in dataclasses.fields(record) if str(f.type) in _SCHEMA_TYPES)


def _floats(record: type) -> tuple[str, ...]:
    """Those of them that may change from call to call (engine/changing.py), in the order of ``numbers``."""
    return tuple(f.name for f in dataclasses.fields(record) if str(f.type) == "float")


def _fields(record: type) -> str:
    """The numbers of an option record as keyword-only arguments of a schema."""
    types = {f.name: _SCHEMA_TYPES.get(str(f.type)) for f in dataclasses.fields(record)}
    return ", ".join(f"{types[name]} {name}" for name in _numbers(record))


def _operator(name: str, tensors: str, record: type, more: str, returns: str) -> Callable[..., Any]:
    """``torch.library.custom_op`` with the record's fields, and ``more``, as keyword-only arguments."""
    schema = f"({tensors}, *, {_fields(record)}, {more}) -> {returns}"

    def decorate(function: Callable[..., Any]) -> Any:
        return torch.library.custom_op(f"fastloss::{name}", function, mutates_args=(), schema=schema)

    return decorate


def _record(
    kind: type, arguments: dict[str, Any], row_scale: Tensor | None = None, numbers: Tensor | None = None
) -> Any:
    """The option record among an operator's arguments."""
    values = () if numbers is None else numbers.tolist()
    return _filled(kind, arguments, row_scale, values)


def _traced_record(
    kind: type, arguments: dict[str, Any], row_scale: Tensor | None, numbers: Tensor | None
) -> Any:
    """As :func:`_record`, in a backward that is traced: what changes stays a tensor."""
    values = () if numbers is None else numbers.unbind()
    return _filled(kind, arguments, row_scale, values)


def _filled(kind: type, arguments: dict[str, Any], row_scale: Tensor | None, values: Sequence[Any]) -> Any:
    fields = {name: arguments[name] for name in _numbers(kind)}
    for name, value in zip(_floats(kind), values):
        if math.isnan(fields[name]):
            fields[name] = value
    record = kind(**fields)
    return record if row_scale is None else dataclasses.replace(record, row_scale=row_scale)


def _names(want: str) -> tuple[str, ...]:
    return tuple(want.split(",")) if want else ()


OUTPUTS = (*STATS, LSE_PARTS)
_LSE_PARTS_AT = len(OUTPUTS)  # after the loss


def _stats_type(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if name == "is_top1" else ACC_DTYPES[dtype]


def _pack(out: dict[str, Tensor], want: tuple[str, ...], like: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The statistics in the order of STATS, empty where not wanted, and lse_parts, which the backward needs."""
    return [
        *(out[n] if n in want else like.new_empty(0, dtype=_stats_type(n, dtype)) for n in STATS),
        out[LSE_PARTS],
    ]


def _fake_stats(like: Tensor, rows: Any, want: tuple[str, ...], dtype: torch.dtype) -> list[Tensor]:
    return [
        *(like.new_empty(rows if n in want else 0, dtype=_stats_type(n, dtype)) for n in STATS),
        like.new_empty((rows, 2), dtype=ACC_DTYPES[dtype]),
    ]


def _check_targets(target: Tensor | None, vocab: int, ignore_index: int) -> None:
    if target is not None and (target.device.type == "cpu" or backends.targets_are_validated()):
        checks.reject_bad_targets(target, vocab, ignore_index)


def _sum(backend: str, loss: Tensor, reduction: str, factor: Factor) -> Tensor:
    return loss if reduction == "none" else backends.runnable(backend).sum_rows(loss, factor)


def _late(dtype: torch.dtype, factor: float, factor_tensor: Tensor | None) -> Tensor | float:
    """What unscaled gradients are multiplied by: 0 where that is one over no row, for 0 · inf is NaN."""
    if dtype not in LATE_DTYPES:
        return 1.0
    return Factor(factor, factor_tensor, of_count=True).of_gradient()


def _times_factor(g: Tensor, factor: float, factor_tensor: Tensor | None, rows: int) -> Tensor:
    return (g * factor if factor_tensor is None else g * factor * factor_tensor).expand(rows)


def _stats_coefficients(
    want: tuple[str, ...], upstream: list[Tensor], entropy: Tensor, dtype: torch.dtype
) -> Coefficients:
    by_name = dict(zip(OUTPUTS, upstream, strict=True))
    return of_upstream(want, [by_name.get(name) for name in want], entropy, dtype)


def _all_of(inputs: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """``inputs``, and None for last arguments that were left at it."""
    return (*inputs, *[None] * (count - len(inputs)))


def _arguments(inputs: tuple[Any, ...], required: int) -> int:
    """Of how many arguments PyTorch expects a gradient: it drops the last ones that have their default, None."""
    count = len(inputs)
    while count > required and inputs[count - 1] is None:
        count -= 1
    return count


def _contiguous(k: Coefficients) -> Coefficients:
    return Coefficients(*[None if x is None else x.contiguous() for x in k])


# --- rows of logits ------------------------------------------------------------------------------------------------

NUMBERS = "Tensor? numbers=None"  # engine/changing.py
_ROW_SCALE = f"Tensor? row_scale=None, {NUMBERS}"  # RowOptions's
_GIVEN = "Tensor? target, Tensor lse_parts, Tensor? a, Tensor? b, Tensor? c, Tensor? d, Tensor? w"


@_operator("row_grad", f"Tensor logits, {_GIVEN}, {_ROW_SCALE}", RowOptions, "str backend", "Tensor")
def _row_grad(  # type: ignore[no-untyped-def]
    logits, target, lse_parts, a, b, c, d, w, row_scale=None, numbers=None, *, backend, **fields
):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.runnable(backend).row_grad(
        logits,
        target,
        _record(RowOptions, fields, row_scale, numbers),
        lse_parts=lse_parts,
        coefficients=Coefficients(a, b, c, d),
        out=out,
        w=w,
    )
    return out


@_row_grad.register_fake
def _(logits, *tensors, **fields):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def row_grad(
    logits: Tensor,
    target: Tensor | None,
    lse_parts: Tensor,
    k: Coefficients,
    w: Tensor | None,
    options: RowOptions,
    backend: str,
) -> Tensor:
    numbers, fields = _given(options, _ROW)
    return _row_grad(logits, target, lse_parts, *k, w, options.row_scale, numbers, **fields, backend=backend)


# By name and not by dataclasses.fields of a record, whose class torch.compile of torch 2.13 does not trace.
_ROW = _numbers(RowOptions), _floats(RowOptions)
_CROSS_ENTROPY = _numbers(CrossEntropyOptions), _floats(CrossEntropyOptions)
_DISTILLATION = _numbers(DistillationOptions), _floats(DistillationOptions)


def _given(
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


_LOSS = "float factor, str reduction, str want"


@_operator(
    "cross_entropy",
    f"Tensor logits, Tensor? target, Tensor? w, Tensor? factor_tensor, {_ROW_SCALE}",
    CrossEntropyOptions,
    f"{_LOSS}, str backend",
    "Tensor[]",
)
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits,
    target,
    w,
    factor_tensor,
    row_scale=None,
    numbers=None,
    *,
    factor,
    reduction,
    want,
    backend,
    **fields,
):
    options, names = _record(CrossEntropyOptions, fields, row_scale, numbers), _names(want)
    _check_targets(target, logits.shape[1], options.ignore_index)
    out = backends.runnable(backend).row_cross_entropy(logits, target, options, want=names, w=w)
    total = _sum(backend, out["loss"], reduction, Factor(factor, factor_tensor))
    return [total, *_pack(out, names, logits, logits.dtype)]


@_cross_entropy.register_fake
def _(logits, target, w, factor_tensor, row_scale=None, numbers=None, *, reduction, want, **fields):  # type: ignore[no-untyped-def]
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=ACC_DTYPES[logits.dtype])
    return [loss, *_fake_stats(logits, rows, _names(want), logits.dtype)]


def _save_cross_entropy(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given, ctx.arguments = keyword_only_inputs, _arguments(inputs, 4)
    ctx.save_for_backward(*_all_of(inputs, 6), output[_LSE_PARTS_AT])


def _backward_cross_entropy(ctx, upstream):  # type: ignore[no-untyped-def]
    """The gradient is made here, of the upstream one, and not in the forward: multiplying it afterwards would be another pass
    over all logits, into memory of its own. A graph may not write into what it saved (retain_graph runs it twice, and
    functionalisation copies what an operator writes to), so that eager's multiplication in place is no way out."""
    logits, target, w, factor_tensor, row_scale, numbers, lse_parts = ctx.saved_tensors
    given, g = ctx.given, upstream[0]
    options = _traced_record(CrossEntropyOptions, given, row_scale, numbers)
    if given["reduction"] != "none":
        g = _times_factor(g, given["factor"], factor_tensor, logits.shape[0])
    k = _contiguous(of_cross_entropy(g, lse_parts, target, w, logits.shape[1], options))
    grad = row_grad(logits, target, lse_parts, k, w, options, given["backend"])
    return grad, *[None] * (ctx.arguments - 1)


_cross_entropy.register_autograd(_backward_cross_entropy, setup_context=_save_cross_entropy)


def cross_entropy(
    logits: Tensor,
    target: Tensor | None,
    w: Tensor | None,
    factor: Factor,
    options: CrossEntropyOptions,
    reduction: str,
    want: tuple[str, ...],
    backend: str,
) -> list[Tensor]:
    """[loss, statistics …, lse_parts]."""
    numbers, fields = _given(options, _CROSS_ENTROPY)
    return _cross_entropy(
        logits,
        target,
        w,
        factor.tensor,
        options.row_scale,
        numbers,
        **fields,
        factor=factor.value,
        reduction=reduction,
        want=",".join(want),
        backend=backend,
    )


@_operator(
    "token_stats",
    f"Tensor logits, Tensor? target, {_ROW_SCALE}",
    RowOptions,
    "str want, str backend",
    "Tensor[]",
)
def _token_stats(logits, target, row_scale=None, numbers=None, *, want, backend, **fields):  # type: ignore[no-untyped-def]
    options, names = _record(RowOptions, fields, row_scale, numbers), _names(want)
    _check_targets(target, logits.shape[1], options.ignore_index)
    out = backends.runnable(backend).row_stats(logits, target, options, want=heads.with_lse_parts(names))
    return _pack(out, names, logits, logits.dtype)


@_token_stats.register_fake
def _(logits, target, row_scale=None, numbers=None, *, want, **fields):  # type: ignore[no-untyped-def]
    return _fake_stats(logits, logits.shape[0], _names(want), logits.dtype)


def _save_token_stats(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given, ctx.arguments = keyword_only_inputs, _arguments(inputs, 2)
    by_name = dict(zip(OUTPUTS, output, strict=True))
    ctx.save_for_backward(*_all_of(inputs, 4), by_name[LSE_PARTS], by_name["entropy"])


def _backward_token_stats(ctx, upstream):  # type: ignore[no-untyped-def]
    logits, target, row_scale, numbers, lse_parts, entropy = ctx.saved_tensors
    k = _stats_coefficients(_names(ctx.given["want"]), upstream, entropy, lse_parts.dtype)
    options = _traced_record(RowOptions, ctx.given, row_scale, numbers)
    grad = row_grad(logits, target, lse_parts, k, None, options, ctx.given["backend"])
    return grad, *[None] * (ctx.arguments - 1)


_token_stats.register_autograd(_backward_token_stats, setup_context=_save_token_stats)


def token_stats(
    logits: Tensor, target: Tensor | None, options: RowOptions, want: tuple[str, ...], backend: str
) -> list[Tensor]:
    """The statistics in the order of STATS."""
    names = ",".join(name for name in want if name != ARGMAX)
    numbers, fields = _given(options, _ROW)
    return _token_stats(logits, target, options.row_scale, numbers, **fields, want=names, backend=backend)[
        :-1
    ]


# --- the linear head -----------------------------------------------------------------------------------------------

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_HOW = "bool[] needs, ScalarType dtype, int chunk, str backend, str memory='auto', bool float_logits=False"


def _limits(chunk: int, memory: str = "auto", float_logits: bool = False, skip: float = 0.0) -> Limits:
    return Limits(chunk or None, memory, None, float_logits, skip)


def _given_limits(given: dict[str, Any]) -> Limits:
    """Of a saved call; graphs that were exported before the later options have defaults for them."""
    return _limits(given["chunk"], given.get("memory", "auto"), given.get("float_logits", False))


def _schedule(
    head: Head, target: Tensor | None, ignore_index: int, needs: Needs, limits: Limits
) -> tuple[Schedule, Tensor | None]:
    """The schedule, and the rows that are computed."""
    keep = heads.kept_rows(target, ignore_index, traced=True)
    return heads.schedule_of(head, heads.count_kept(head.hidden.shape[0], keep), needs, limits), keep


def _or_nothing(like: Tensor, grads: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [like.new_empty(0) if g is None else g for g in grads]


def _fake_grads(hidden, weight, bias, needs, dtypes):  # type: ignore[no-untyped-def]
    shapes = (hidden.shape, weight.shape, weight.shape[:1] if bias is None else bias.shape)
    return [
        hidden.new_empty(shape, dtype=t) if need else hidden.new_empty(0)
        for need, shape, t in zip(needs, shapes, dtypes, strict=True)
    ]


@_operator("linear_row_grad", f"{_HEAD}, {_GIVEN}, {_ROW_SCALE}", RowOptions, _HOW, "Tensor[]")
def _linear_row_grad(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    target,
    lse_parts,
    a,
    b,
    c,
    d,
    w,
    row_scale=None,
    numbers=None,
    *,
    needs,
    dtype,
    chunk,
    backend,
    memory="auto",
    float_logits=False,
    **fields,
):
    options = _record(RowOptions, fields, row_scale, numbers)
    needed = Needs(*needs)
    head = heads.make_head(backends.runnable(backend), hidden, weight, bias, dtype)
    schedule, keep = _schedule(
        head, target, options.ignore_index, needed, _limits(chunk, memory, float_logits)
    )
    saved = Saved(target, lse_parts, Coefficients(a, b, c, d), options, keep, w)
    grads = heads.recompute(head, needed, schedule, saved)
    dtypes = heads.leaf_dtypes(hidden, weight, bias)
    return _or_nothing(hidden, heads.finish(grads, dtypes, head.backend))


@_linear_row_grad.register_fake
def _(hidden, weight, bias, *given, needs, **fields):  # type: ignore[no-untyped-def]
    return _fake_grads(hidden, weight, bias, needs, heads.leaf_dtypes(hidden, weight, bias))


def linear_row_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Saved,
    needs: list[bool],
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
) -> list[Tensor | None]:
    numbers, fields = _given(saved.options, _ROW)
    grads = _linear_row_grad(
        hidden,
        weight,
        bias,
        saved.target,
        saved.lse_parts,
        *saved.coefficients,
        saved.w,
        saved.options.row_scale,
        numbers,
        **fields,
        needs=needs,
        dtype=dtype,
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
    )
    return [x if need else None for x, need in zip(grads, needs, strict=True)]


@_operator(
    "linear_cross_entropy",
    f"{_HEAD}, Tensor? target, Tensor? w, Tensor? factor_tensor, Tensor? token_weight=None, {_ROW_SCALE}",
    CrossEntropyOptions,
    f"{_LOSS}, {_HOW}, float skip=0.0",
    "Tensor[]",
)
def _linear_cross_entropy(  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, w, factor_tensor, token_weight=None, row_scale=None, numbers=None, *,
    factor, reduction, want, needs, dtype, chunk, backend, memory="auto", float_logits=False, skip=0.0, **fields,
):  # fmt: skip
    options = _record(CrossEntropyOptions, fields, row_scale, numbers)
    needed, names = Needs(*needs), _names(want)
    _check_targets(target, weight.shape[0], options.ignore_index)
    head = heads.make_head(backends.runnable(backend), hidden, weight, bias, dtype)
    per_row = reduction == "none"
    keep = heads.kept_rows(target, options.ignore_index, traced=True)
    rows = heads.count_kept(hidden.shape[0], keep)
    smooth = target is None or options.label_smoothing > 0
    schedule = heads.schedule_of_cross_entropy(
        head, rows, needed, _limits(chunk, memory, float_logits, skip), per_row, smooth
    )
    f = Factor(factor, factor_tensor)
    out, grads = heads.cross_entropy(
        head,
        needed,
        target,
        w,
        options,
        names,
        WHOLE if dtype in LATE_DTYPES else f,
        schedule,
        keep,
        token_weight,
    )
    dtypes = _grad_dtypes(hidden, weight, bias, dtype)
    return [
        _sum(backend, out["loss"], reduction, f),
        *_pack(out, names, out["loss"], dtype),
        *_or_nothing(hidden, heads.finish(grads, dtypes, head.backend)),
    ]


def _grad_dtypes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[torch.dtype, ...]:
    """float16 gradients wait, unscaled, in float32 for the upstream gradient."""
    if dtype in LATE_DTYPES:
        return hidden.dtype, torch.float32, torch.float32
    return heads.leaf_dtypes(hidden, weight, bias)


@_linear_cross_entropy.register_fake
def _(
    hidden,
    weight,
    bias,
    target,
    w,
    factor_tensor,
    token_weight=None,
    row_scale=None,
    numbers=None,
    *,
    reduction,
    want,
    needs,
    dtype,
    **fields,
):  # type: ignore[no-untyped-def]
    rows = hidden.shape[0]
    loss = hidden.new_empty((rows,) if reduction == "none" else (), dtype=ACC_DTYPES[dtype])
    grads = _fake_grads(hidden, weight, bias, needs, _grad_dtypes(hidden, weight, bias, dtype))
    return [loss, *_fake_stats(loss, rows, _names(want), dtype), *grads]


def _save_linear_cross_entropy(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, w, factor_tensor, token_weight, row_scale, numbers = _all_of(inputs, 9)
    ctx.arguments = _arguments(inputs, 6)
    ctx.given = keyword_only_inputs
    ctx.needs = list(ctx.needs_input_grad[:3])
    ctx.dtypes = heads.leaf_dtypes(hidden, weight, bias)
    made = any(ctx.given["needs"])
    operands: tuple[Tensor | None, ...] = (hidden, weight, bias, target, w, token_weight, row_scale, numbers)
    if made:
        operands = (None,) * len(operands)
    grads = output[-3:] if made else (None,) * 3
    ctx.save_for_backward(*operands, *grads, None if made else output[_LSE_PARTS_AT], factor_tensor)


def _backward_linear_cross_entropy(ctx, upstream):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, w, token_weight, row_scale, numbers, *made, lse_parts, factor_tensor = (
        ctx.saved_tensors
    )
    given, g = ctx.given, upstream[0]
    factor, dtype, per_row = given["factor"], given["dtype"], given["reduction"] == "none"
    if any(given["needs"]):
        scale = g[:, None] if per_row else g * _late(dtype, factor, factor_tensor)
        needs = zip(made, given["needs"], ctx.dtypes, strict=True)
        acc = ACC_DTYPES[dtype]  # a scalar is not rounded to the gradient's dtype first
        grads = [(x.to(acc) * scale.to(acc)).to(t) if need else None for x, need, t in needs]
    else:
        options = _traced_record(CrossEntropyOptions, given, row_scale, numbers)
        if not per_row:
            g = _times_factor(g, factor, factor_tensor, hidden.shape[0])
        if token_weight is not None:
            g = g * token_weight
        k = _contiguous(of_cross_entropy(g, lse_parts, target, w, weight.shape[0], options))
        saved = Saved(target, lse_parts, k, options, None, w)
        how = ctx.needs, dtype, _given_limits(given), given["backend"]
        grads = linear_row_grad(hidden, weight, bias, saved, *how)
    return (*grads, *[None] * (ctx.arguments - 3))


_linear_cross_entropy.register_autograd(
    _backward_linear_cross_entropy, setup_context=_save_linear_cross_entropy
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    w: Tensor | None,
    token_weight: Tensor | None,
    factor: Factor,
    options: CrossEntropyOptions,
    reduction: str,
    want: tuple[str, ...],
    needs: Needs,
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
) -> list[Tensor]:
    """[loss, statistics …, lse_parts, d hidden, d weight, d bias]."""
    numbers, fields = _given(options, _CROSS_ENTROPY)
    return _linear_cross_entropy(
        hidden,
        weight,
        bias,
        target,
        w,
        factor.tensor,
        token_weight,
        options.row_scale,
        numbers,
        **fields,
        factor=factor.value,
        reduction=reduction,
        want=",".join(want),
        needs=list(needs),
        dtype=dtype,
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
        skip=limits.skip,
    )


@_operator(
    "linear_token_stats",
    f"{_HEAD}, Tensor? target, {_ROW_SCALE}",
    RowOptions,
    "str want, ScalarType dtype, int chunk, str backend, str memory='auto', bool float_logits=False",
    "Tensor[]",
)
def _linear_token_stats(
    hidden, weight, bias, target, row_scale=None, numbers=None, *,
    want, dtype, chunk, backend, memory="auto", float_logits=False, **fields,
):  # type: ignore[no-untyped-def]  # fmt: skip
    options, names = _record(RowOptions, fields, row_scale, numbers), _names(want)
    _check_targets(target, weight.shape[0], options.ignore_index)
    head = heads.make_head(backends.runnable(backend), hidden, weight, bias, dtype)
    schedule, keep = _schedule(
        head, target, options.ignore_index, NOTHING, _limits(chunk, memory, float_logits)
    )
    out, _ = heads.stats(head, target, options, names, schedule, keep)
    found = out[ARGMAX] if ARGMAX in names else out[LSE_PARTS].new_empty(0, dtype=torch.int64)
    return [*_pack(out, names, out[LSE_PARTS], dtype), found]


@_linear_token_stats.register_fake
def _(hidden, weight, bias, target, row_scale=None, numbers=None, *, want, dtype, **fields):  # type: ignore[no-untyped-def]
    like = hidden.new_empty(0, dtype=ACC_DTYPES[dtype])
    found = like.new_empty(hidden.shape[0] if ARGMAX in _names(want) else 0, dtype=torch.int64)
    return [*_fake_stats(like, hidden.shape[0], _names(want), dtype), found]


def _save_linear_token_stats(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given = keyword_only_inputs
    ctx.needs, ctx.arguments = list(ctx.needs_input_grad[:3]), _arguments(inputs, 4)
    by_name = dict(zip(OUTPUTS, output[:-1], strict=True))
    ctx.save_for_backward(*_all_of(inputs, 6), by_name[LSE_PARTS], by_name["entropy"])


def _backward_linear_token_stats(ctx, upstream):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, row_scale, numbers, lse_parts, entropy = ctx.saved_tensors
    given = ctx.given
    k = _stats_coefficients(_names(given["want"]), upstream[:-1], entropy, lse_parts.dtype)
    saved = Saved(target, lse_parts, k, _traced_record(RowOptions, given, row_scale, numbers), None)
    how = (
        ctx.needs,
        given["dtype"],
        _given_limits(given),
        given["backend"],
    )
    return (*linear_row_grad(hidden, weight, bias, saved, *how), *[None] * (ctx.arguments - 3))


_linear_token_stats.register_autograd(_backward_linear_token_stats, setup_context=_save_linear_token_stats)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    options: RowOptions,
    want: tuple[str, ...],
    dtype: torch.dtype,
    limits: Limits,
    backend: str,
) -> list[Tensor]:
    """The statistics in the order of STATS, and "argmax"."""
    numbers, fields = _given(options, _ROW)
    *stats, _, found = _linear_token_stats(
        hidden,
        weight,
        bias,
        target,
        options.row_scale,
        numbers,
        **fields,
        want=",".join(want),
        dtype=dtype,
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
    )
    return [*stats, found]


# --- distillation --------------------------------------------------------------------------------------------------

# DistillationOptions's tensors, and the numbers that change.
_OWN = f"Tensor? row_scale=None, Tensor? teacher_row_scale=None, Tensor? row_factor=None, {NUMBERS}"


def _distillation_record(  # type: ignore[no-untyped-def]
    fields, row_scale, teacher_row_scale, row_factor, numbers
) -> DistillationOptions:
    record = _record(DistillationOptions, fields, row_scale, numbers)
    return dataclasses.replace(record, teacher_row_scale=teacher_row_scale, row_factor=row_factor)


@_operator(
    "distillation_grad",
    "Tensor logits, Tensor teacher, Tensor? target, Tensor student_parts, Tensor teacher_parts, Tensor? hard_parts, "
    f"Tensor slopes, Tensor factors, {_OWN}",
    DistillationOptions,
    "str backend",
    "Tensor",
)
def _distillation_grad(  # type: ignore[no-untyped-def]
    logits,
    teacher,
    target,
    student_parts,
    teacher_parts,
    hard_parts,
    slopes,
    factors,
    row_scale=None,
    teacher_row_scale=None,
    row_factor=None,
    numbers=None,
    *,
    backend,
    **fields,
):
    options = _distillation_record(fields, row_scale, teacher_row_scale, row_factor, numbers)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.runnable(backend).row_divergence_grad(
        logits, teacher, target, options, lse_parts=student_parts,
        teacher_lse_parts=teacher_parts, slopes=slopes, factors=factors, out=out, hard_lse_parts=hard_parts,
    )  # fmt: skip
    return out


@_distillation_grad.register_fake
def _(logits, *tensors, **fields):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@_operator(
    "distillation",
    f"Tensor logits, Tensor teacher, Tensor? target, {_OWN}",
    DistillationOptions,
    "str backend",
    "Tensor[]",
)
def _distillation(  # type: ignore[no-untyped-def]
    logits, teacher, target, row_scale=None, teacher_row_scale=None, row_factor=None, numbers=None, *, backend, **fields
):  # fmt: skip
    options = _distillation_record(fields, row_scale, teacher_row_scale, row_factor, numbers)
    kernels = backends.runnable(backend)
    _check_targets(target, logits.shape[1], options.ignore_index)
    parts = log_sums(kernels, logits, teacher, target, options)
    sums = kernels.row_divergence(
        logits, teacher, target, options,
        lse_parts=parts.student, teacher_lse_parts=parts.teacher, hard_lse_parts=parts.hard,
    )  # fmt: skip
    hard = parts.hard
    if hard is None:  # a coefficient that changes may have become 0
        hard = torch.zeros_like(parts.student) if fields["hard_loss_coef"] else sums.new_empty(0)
    return [sums[:, 0].clone(), sums, parts.student, parts.teacher, hard.clone()]


@_distillation.register_fake
def _(logits, teacher, target, *own, hard_loss_coef, **fields):  # type: ignore[no-untyped-def]
    rows, acc = logits.shape[0], ACC_DTYPES[logits.dtype]
    shapes = [
        (rows,),
        (rows, len(DISTILLATION_SUMS)),
        (rows, 2),
        (rows, 2),
        (rows, 2) if hard_loss_coef else (0,),
    ]
    return [logits.new_empty(shape, dtype=acc) for shape in shapes]


def _save_distillation(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given = keyword_only_inputs
    _, sums, student_parts, teacher_parts, hard_parts = output
    hard = hard_parts if ctx.given["hard_loss_coef"] else None
    ctx.arguments = _arguments(inputs, 3)
    logits, teacher, target, *own = _all_of(inputs, 7)
    ctx.save_for_backward(logits, teacher, target, student_parts, teacher_parts, hard, sums, *own)


def _backward_distillation(ctx, upstream):  # type: ignore[no-untyped-def]
    *tensors, sums, row_scale, teacher_row_scale, row_factor, numbers = ctx.saved_tensors
    slopes = sums[:, DISTILLATION_SUMS.index("slope")].contiguous()
    factors = upstream[0].to(slopes.dtype).contiguous()
    own = row_scale, teacher_row_scale, row_factor, numbers
    grad = _distillation_grad(*tensors, slopes, factors, *own, **ctx.given)
    return grad, *[None] * (ctx.arguments - 1)


_distillation.register_autograd(_backward_distillation, setup_context=_save_distillation)


def distillation(
    logits: Tensor, teacher: Tensor, target: Tensor | None, options: DistillationOptions, backend: str
) -> tuple[Tensor, Tensor]:
    """(loss [rows], sums [rows, 8])."""
    numbers, fields = _given(options, _DISTILLATION)
    own = options.row_scale, options.teacher_row_scale, options.row_factor, numbers
    loss, sums, *_ = _distillation(logits, teacher, target, *own, **fields, backend=backend)
    return loss, sums.detach()


_TWO_HEADS = (
    f"{_HEAD}, Tensor teacher_hidden, Tensor teacher_weight, "
    + "Tensor? teacher_bias, Tensor? target, Tensor? factors, "
    + _OWN
)
_HOW_TWO = "bool[] needs, ScalarType dtype, ScalarType teacher_dtype, int chunk, str memory, str backend, bool float_logits=False"


@_operator("linear_distillation", _TWO_HEADS, DistillationOptions, _HOW_TWO, "Tensor[]")
def _linear_distillation(  # type: ignore[no-untyped-def]
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, factors, row_scale=None,
    teacher_row_scale=None, row_factor=None, numbers=None, *,
    needs, dtype, teacher_dtype, chunk, memory, backend, float_logits=False, **fields,
):  # fmt: skip
    options = _distillation_record(fields, row_scale, teacher_row_scale, row_factor, numbers)
    kernels = backends.runnable(backend)
    _check_targets(target, weight.shape[0], options.ignore_index)
    head = heads.make_head(kernels, hidden, weight, bias, dtype)
    teacher = heads.make_head(kernels, teacher_hidden, teacher_weight, teacher_bias, teacher_dtype)
    keep, needed = heads.kept_rows(target, options.ignore_index, traced=True), Needs(*needs)
    rows = heads.count_kept(hidden.shape[0], keep)
    schedule = schedule_of_distillation(head, rows, needed, _limits(chunk, memory, float_logits))
    sums, grads = of_heads(head, teacher, needed, target, factors, options, schedule, keep)
    loss = sums[:, 0]
    total = loss.clone() if factors is None else kernels.sum_rows(loss * factors, WHOLE)
    dtypes = _grad_dtypes(hidden, weight, bias, dtype)
    return [total, sums, *_or_nothing(hidden, heads.finish(grads, dtypes, head.backend))]


@_linear_distillation.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, factors, *own,
    needs, dtype, teacher_dtype, **fields,
):  # fmt: skip
    rows, acc = hidden.shape[0], ACC_DTYPES[torch.promote_types(dtype, teacher_dtype)]
    total = hidden.new_empty((rows,) if factors is None else (), dtype=acc)
    sums = hidden.new_empty((rows, len(DISTILLATION_SUMS)), dtype=acc)
    return [total, sums, *_fake_grads(hidden, weight, bias, needs, _grad_dtypes(hidden, weight, bias, dtype))]


def _save_one_pass(count: int, required: int) -> Callable[..., None]:
    """Of an operator of ``count`` tensors, of which those after the ``required`` first may be left out, whose forward may have made the
    head's gradients, its last three outputs: those, or what makes them."""

    def save(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
        ctx.given, ctx.needs = keyword_only_inputs, list(ctx.needs_input_grad[:3])
        ctx.dtypes, ctx.arguments = heads.leaf_dtypes(*inputs[:3]), _arguments(inputs, required)
        made = any(ctx.given["needs"])
        ctx.save_for_backward(
            *((None,) * count if made else _all_of(inputs, count)), *(output[-3:] if made else (None,) * 3)
        )

    return save


def _one_pass_gradients(  # type: ignore[no-untyped-def]
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


def _backward_linear_distillation(ctx, upstream):  # type: ignore[no-untyped-def]
    return tuple(_one_pass_gradients(ctx, upstream[0], _linear_distillation, _DISTILLATION_FACTORS_AT))


_DISTILLATION_FACTORS_AT = 7  # among the inputs
_linear_distillation.register_autograd(_backward_linear_distillation, setup_context=_save_one_pass(12, 8))


def linear_distillation(
    operands: tuple[Tensor | None, ...],
    target: Tensor | None,
    factors: Tensor | None,
    options: DistillationOptions,
    needs: Needs,
    dtypes: tuple[torch.dtype, torch.dtype],
    limits: Limits,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(Σ factors · loss, or the loss [rows] where factors is None; sums [rows, 8])."""
    numbers, fields = _given(options, _DISTILLATION)
    total, sums, *_ = _linear_distillation(
        *operands,
        target,
        factors,
        options.row_scale,
        options.teacher_row_scale,
        options.row_factor,
        numbers,
        **fields,
        needs=list(needs),
        dtype=dtypes[0],
        teacher_dtype=dtypes[1],
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
    )
    return total, sums.detach()


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def _gemm_flops(hidden_shape: Any, weight_shape: Any, count: int) -> int:
    rows, dim = hidden_shape
    return 2 * rows * dim * weight_shape[0] * count


@register_flop_formula(torch.ops.fastloss.linear_cross_entropy)
def _(hidden_shape, weight_shape, *args, needs, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))


@register_flop_formula(torch.ops.fastloss.linear_distillation)
def _(
    hidden_shape, weight_shape, bias_shape, teacher_hidden_shape, teacher_weight_shape, *args, needs, **kwargs
) -> int:  # type: ignore[no-untyped-def]
    student = _gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))
    return student + _gemm_flops(teacher_hidden_shape, teacher_weight_shape, 1)


@register_flop_formula(torch.ops.fastloss.linear_token_stats)
def _(hidden_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _gemm_flops(hidden_shape, weight_shape, 1)


@register_flop_formula(torch.ops.fastloss.linear_row_grad)
def _(hidden_shape, weight_shape, *args, needs, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _gemm_flops(hidden_shape, weight_shape, 1 + sum(needs[:2]))
