"""The torch.library operators through which torch.compile, export and fake tensors reach the kernels.

An operator takes tensors by position and the fields of an option record by name: its schema is made of the record, so that a
new option needs no line here. Outputs come in one order: the loss, the statistics of fastloss.tables.STATS (empty where not
wanted), then gradients. FLOP formulas stand beside the head's operators: an opaque operator would count 0 and lower a
user's MFU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastloss.engine import backend as backends
from fastloss.engine import checks
from fastloss.engine import head as heads
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
    TopKOptions,
)

_SCHEMA_TYPES = {"int": "int", "float": "float", "bool": "bool", "str": "str"}


def _numbers(record: type) -> tuple[str, ...]:
    """The fields of an option record but its tensors, which an operator that has a gradient takes by position alone."""
    return tuple(f.name for f in dataclasses.fields(record) if str(f.type) in _SCHEMA_TYPES)


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


def _record(kind: type, arguments: dict[str, Any], row_scale: Tensor | None = None) -> Any:
    """The option record among an operator's arguments."""
    record = kind(**{name: arguments[name] for name in _numbers(kind)})
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
    if dtype not in LATE_DTYPES:
        return 1.0
    return factor if factor_tensor is None else factor_tensor * factor


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

_ROW_SCALE = "Tensor? row_scale=None"  # RowOptions's
_GIVEN = "Tensor? target, Tensor lse_parts, Tensor? a, Tensor? b, Tensor? c, Tensor? d, Tensor? w"


@_operator("row_grad", f"Tensor logits, {_GIVEN}, {_ROW_SCALE}", RowOptions, "str backend", "Tensor")
def _row_grad(logits, target, lse_parts, a, b, c, d, w, row_scale=None, *, backend, **fields):  # type: ignore[no-untyped-def]
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.runnable(backend).row_grad(
        logits,
        target,
        _record(RowOptions, fields, row_scale),
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
    return _row_grad(
        logits, target, lse_parts, *k, w, options.row_scale, **_row_fields(options), backend=backend
    )


# By name and not by dataclasses.fields(RowOptions), whose class torch.compile of torch 2.13 does not trace.
_ROW_FIELDS = _numbers(RowOptions)


def _row_fields(options: RowOptions) -> dict[str, Any]:
    """A CrossEntropyOptions is given to row_grad too, which takes what is of the row alone."""
    return {name: getattr(options, name) for name in _ROW_FIELDS}


def _all_fields(options: RowOptions | DistillationOptions | TopKOptions) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "row_scale"}


_LOSS = "float factor, str reduction, str want"


@_operator(
    "cross_entropy",
    f"Tensor logits, Tensor? target, Tensor? w, Tensor? factor_tensor, {_ROW_SCALE}",
    CrossEntropyOptions,
    f"{_LOSS}, str backend",
    "Tensor[]",
)
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, target, w, factor_tensor, row_scale=None, *, factor, reduction, want, backend, **fields
):
    options, names = _record(CrossEntropyOptions, fields, row_scale), _names(want)
    _check_targets(target, logits.shape[1], options.ignore_index)
    out = backends.runnable(backend).row_cross_entropy(logits, target, options, want=names, w=w)
    total = _sum(backend, out["loss"], reduction, Factor(factor, factor_tensor))
    return [total, *_pack(out, names, logits, logits.dtype)]


@_cross_entropy.register_fake
def _(logits, target, w, factor_tensor, row_scale=None, *, reduction, want, **fields):  # type: ignore[no-untyped-def]
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=ACC_DTYPES[logits.dtype])
    return [loss, *_fake_stats(logits, rows, _names(want), logits.dtype)]


def _save_cross_entropy(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given, ctx.arguments = keyword_only_inputs, _arguments(inputs, 4)
    ctx.save_for_backward(*_all_of(inputs, 5), output[_LSE_PARTS_AT])


def _backward_cross_entropy(ctx, upstream):  # type: ignore[no-untyped-def]
    """The gradient is made here, of the upstream one, and not in the forward: multiplying it afterwards would be another pass
    over all logits, into memory of its own. A graph may not write into what it saved (retain_graph runs it twice, and
    functionalisation copies what an operator writes to), so that eager's multiplication in place is no way out."""
    logits, target, w, factor_tensor, row_scale, lse_parts = ctx.saved_tensors
    given, g = ctx.given, upstream[0]
    options = _record(CrossEntropyOptions, given, row_scale)
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
    return _cross_entropy(
        logits,
        target,
        w,
        factor.tensor,
        options.row_scale,
        **_all_fields(options),
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
def _token_stats(logits, target, row_scale=None, *, want, backend, **fields):  # type: ignore[no-untyped-def]
    options, names = _record(RowOptions, fields, row_scale), _names(want)
    _check_targets(target, logits.shape[1], options.ignore_index)
    out = backends.runnable(backend).row_stats(logits, target, options, want=heads.with_lse_parts(names))
    return _pack(out, names, logits, logits.dtype)


@_token_stats.register_fake
def _(logits, target, row_scale=None, *, want, **fields):  # type: ignore[no-untyped-def]
    return _fake_stats(logits, logits.shape[0], _names(want), logits.dtype)


def _save_token_stats(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given, ctx.arguments = keyword_only_inputs, _arguments(inputs, 2)
    by_name = dict(zip(OUTPUTS, output, strict=True))
    ctx.save_for_backward(*_all_of(inputs, 3), by_name[LSE_PARTS], by_name["entropy"])


def _backward_token_stats(ctx, upstream):  # type: ignore[no-untyped-def]
    logits, target, row_scale, lse_parts, entropy = ctx.saved_tensors
    k = _stats_coefficients(_names(ctx.given["want"]), upstream, entropy, lse_parts.dtype)
    options = _record(RowOptions, ctx.given, row_scale)
    grad = row_grad(logits, target, lse_parts, k, None, options, ctx.given["backend"])
    return grad, *[None] * (ctx.arguments - 1)


_token_stats.register_autograd(_backward_token_stats, setup_context=_save_token_stats)


def token_stats(
    logits: Tensor, target: Tensor | None, options: RowOptions, want: tuple[str, ...], backend: str
) -> list[Tensor]:
    """The statistics in the order of STATS."""
    names = ",".join(name for name in want if name != ARGMAX)
    return _token_stats(
        logits, target, options.row_scale, **_row_fields(options), want=names, backend=backend
    )[:-1]


# --- the linear head -----------------------------------------------------------------------------------------------

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_HOW = "bool[] needs, ScalarType dtype, int chunk, str backend, str memory='auto', bool float_logits=False"


def _limits(chunk: int, memory: str = "auto", float_logits: bool = False) -> Limits:
    return Limits(chunk or None, memory, None, float_logits)


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
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
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
    *,
    needs,
    dtype,
    chunk,
    backend,
    memory="auto",
    float_logits=False,
    **fields,
):
    options = _record(RowOptions, fields, row_scale)
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
    grads = _linear_row_grad(
        hidden,
        weight,
        bias,
        saved.target,
        saved.lse_parts,
        *saved.coefficients,
        saved.w,
        saved.options.row_scale,
        **_row_fields(saved.options),
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
    f"{_LOSS}, {_HOW}",
    "Tensor[]",
)
def _linear_cross_entropy(  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, w, factor_tensor, token_weight=None, row_scale=None, *,
    factor, reduction, want, needs, dtype, chunk, backend, memory="auto", float_logits=False, **fields,
):  # fmt: skip
    options, needed, names = _record(CrossEntropyOptions, fields, row_scale), Needs(*needs), _names(want)
    _check_targets(target, weight.shape[0], options.ignore_index)
    head = heads.make_head(backends.runnable(backend), hidden, weight, bias, dtype)
    per_row = reduction == "none"
    keep = heads.kept_rows(target, options.ignore_index, traced=True)
    rows = heads.count_kept(hidden.shape[0], keep)
    smooth = target is None or options.label_smoothing > 0
    schedule = heads.schedule_of_cross_entropy(
        head, rows, needed, _limits(chunk, memory, float_logits), per_row, smooth
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
    hidden, weight, bias, target, w, factor_tensor, token_weight, row_scale = _all_of(inputs, 8)
    ctx.arguments = _arguments(inputs, 6)
    ctx.given = keyword_only_inputs
    ctx.needs = list(ctx.needs_input_grad[:3])
    ctx.dtypes = heads.leaf_dtypes(hidden, weight, bias)
    made = any(ctx.given["needs"])
    operands = (None,) * 7 if made else (hidden, weight, bias, target, w, token_weight, row_scale)
    grads = output[-3:] if made else (None,) * 3
    ctx.save_for_backward(*operands, *grads, None if made else output[_LSE_PARTS_AT], factor_tensor)


def _backward_linear_cross_entropy(ctx, upstream):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, w, token_weight, row_scale, *made, lse_parts, factor_tensor = (
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
        options = _record(CrossEntropyOptions, given, row_scale)
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
    return _linear_cross_entropy(
        hidden,
        weight,
        bias,
        target,
        w,
        factor.tensor,
        token_weight,
        options.row_scale,
        **_all_fields(options),
        factor=factor.value,
        reduction=reduction,
        want=",".join(want),
        needs=list(needs),
        dtype=dtype,
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
    )


@_operator(
    "linear_token_stats",
    f"{_HEAD}, Tensor? target, {_ROW_SCALE}",
    RowOptions,
    "str want, ScalarType dtype, int chunk, str backend, str memory='auto', bool float_logits=False",
    "Tensor[]",
)
def _linear_token_stats(
    hidden, weight, bias, target, row_scale=None, *,
    want, dtype, chunk, backend, memory="auto", float_logits=False, **fields,
):  # type: ignore[no-untyped-def]  # fmt: skip
    options, names = _record(RowOptions, fields, row_scale), _names(want)
    _check_targets(target, weight.shape[0], options.ignore_index)
    head = heads.make_head(backends.runnable(backend), hidden, weight, bias, dtype)
    schedule, keep = _schedule(
        head, target, options.ignore_index, NOTHING, _limits(chunk, memory, float_logits)
    )
    out, _ = heads.stats(head, target, options, names, schedule, keep)
    found = out[ARGMAX] if ARGMAX in names else out[LSE_PARTS].new_empty(0, dtype=torch.int64)
    return [*_pack(out, names, out[LSE_PARTS], dtype), found]


@_linear_token_stats.register_fake
def _(hidden, weight, bias, target, row_scale=None, *, want, dtype, **fields):  # type: ignore[no-untyped-def]
    like = hidden.new_empty(0, dtype=ACC_DTYPES[dtype])
    found = like.new_empty(hidden.shape[0] if ARGMAX in _names(want) else 0, dtype=torch.int64)
    return [*_fake_stats(like, hidden.shape[0], _names(want), dtype), found]


def _save_linear_token_stats(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    ctx.given = keyword_only_inputs
    ctx.needs, ctx.arguments = list(ctx.needs_input_grad[:3]), _arguments(inputs, 4)
    by_name = dict(zip(OUTPUTS, output[:-1], strict=True))
    ctx.save_for_backward(*_all_of(inputs, 5), by_name[LSE_PARTS], by_name["entropy"])


def _backward_linear_token_stats(ctx, upstream):  # type: ignore[no-untyped-def]
    hidden, weight, bias, target, row_scale, lse_parts, entropy = ctx.saved_tensors
    given = ctx.given
    k = _stats_coefficients(_names(given["want"]), upstream[:-1], entropy, lse_parts.dtype)
    saved = Saved(target, lse_parts, k, _record(RowOptions, given, row_scale), None)
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
    *stats, _, found = _linear_token_stats(
        hidden,
        weight,
        bias,
        target,
        options.row_scale,
        **_row_fields(options),
        want=",".join(want),
        dtype=dtype,
        chunk=limits.chunk_size or 0,
        memory=limits.memory,
        float_logits=limits.float_logits,
        backend=backend,
    )
    return [*stats, found]


# --- distillation --------------------------------------------------------------------------------------------------


@_operator(
    "distillation_grad",
    "Tensor logits, Tensor teacher, Tensor? target, Tensor student_parts, Tensor teacher_parts, Tensor? hard_parts, "
    "Tensor slopes, Tensor factors",
    DistillationOptions,
    "str backend",
    "Tensor",
)
def _distillation_grad(  # type: ignore[no-untyped-def]
    logits, teacher, target, student_parts, teacher_parts, hard_parts, slopes, factors, *, backend, **fields
):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.runnable(backend).row_divergence_grad(
        logits, teacher, target, _record(DistillationOptions, fields), lse_parts=student_parts,
        teacher_lse_parts=teacher_parts, slopes=slopes, factors=factors, out=out, hard_lse_parts=hard_parts,
    )  # fmt: skip
    return out


@_distillation_grad.register_fake
def _(logits, *tensors, **fields):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@_operator(
    "distillation",
    "Tensor logits, Tensor teacher, Tensor? target",
    DistillationOptions,
    "str backend",
    "Tensor[]",
)
def _distillation(logits, teacher, target, *, backend, **fields):  # type: ignore[no-untyped-def]
    options, kernels = _record(DistillationOptions, fields), backends.runnable(backend)
    _check_targets(target, logits.shape[1], options.ignore_index)
    parts = log_sums(kernels, logits, teacher, target, options)
    sums = kernels.row_divergence(
        logits, teacher, target, options,
        lse_parts=parts.student, teacher_lse_parts=parts.teacher, hard_lse_parts=parts.hard,
    )  # fmt: skip
    hard = sums.new_empty(0) if parts.hard is None else parts.hard.clone()
    return [sums[:, 0].clone(), sums, parts.student, parts.teacher, hard]


@_distillation.register_fake
def _(logits, teacher, target, *, hard_loss_coef, **fields):  # type: ignore[no-untyped-def]
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
    ctx.save_for_backward(*inputs, student_parts, teacher_parts, hard, sums)


def _backward_distillation(ctx, upstream):  # type: ignore[no-untyped-def]
    *tensors, sums = ctx.saved_tensors
    slopes = sums[:, DISTILLATION_SUMS.index("slope")].contiguous()
    factors = upstream[0].to(slopes.dtype).contiguous()
    return _distillation_grad(*tensors, slopes, factors, **ctx.given), None, None


_distillation.register_autograd(_backward_distillation, setup_context=_save_distillation)


def distillation(
    logits: Tensor, teacher: Tensor, target: Tensor | None, options: DistillationOptions, backend: str
) -> tuple[Tensor, Tensor]:
    """(loss [rows], sums [rows, 8])."""
    loss, sums, *_ = _distillation(logits, teacher, target, **_all_fields(options), backend=backend)
    return loss, sums.detach()


_TWO_HEADS = f"{_HEAD}, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? target, Tensor? factors"
_HOW_TWO = "bool[] needs, ScalarType dtype, ScalarType teacher_dtype, int chunk, str memory, str backend, bool float_logits=False"


@_operator("linear_distillation", _TWO_HEADS, DistillationOptions, _HOW_TWO, "Tensor[]")
def _linear_distillation(  # type: ignore[no-untyped-def]
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, factors, *,
    needs, dtype, teacher_dtype, chunk, memory, backend, float_logits=False, **fields,
):  # fmt: skip
    options, kernels = _record(DistillationOptions, fields), backends.runnable(backend)
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
def _(hidden, weight, bias, *others, needs, dtype, teacher_dtype, **fields):  # type: ignore[no-untyped-def]
    rows, acc = hidden.shape[0], ACC_DTYPES[torch.promote_types(dtype, teacher_dtype)]
    total = hidden.new_empty((rows,) if others[-1] is None else (), dtype=acc)
    sums = hidden.new_empty((rows, len(DISTILLATION_SUMS)), dtype=acc)
    return [total, sums, *_fake_grads(hidden, weight, bias, needs, _grad_dtypes(hidden, weight, bias, dtype))]


def _save_one_pass(ctx, inputs, keyword_only_inputs, output):  # type: ignore[no-untyped-def]
    """Of an operator whose forward may have made the head's gradients, its last three outputs: those, or what makes them."""
    ctx.given, ctx.needs = keyword_only_inputs, list(ctx.needs_input_grad[:3])
    ctx.dtypes = heads.leaf_dtypes(*inputs[:3])
    made = any(ctx.given["needs"])
    ctx.save_for_backward(
        *((None,) * len(inputs) if made else inputs), *(output[-3:] if made else (None,) * 3)
    )


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
    return [*grads, *[None] * (len(inputs) - 3)]


def _backward_linear_distillation(ctx, upstream):  # type: ignore[no-untyped-def]
    return tuple(_one_pass_gradients(ctx, upstream[0], _linear_distillation, -1))


_linear_distillation.register_autograd(_backward_linear_distillation, setup_context=_save_one_pass)


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
    total, sums, *_ = _linear_distillation(
        *operands,
        target,
        factors,
        **_all_fields(options),
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
