"""The operators of torch.compile for statistics over the classes that a sampler kept (engine/support.py)."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.engine import backend as backends
from fastloss.engine import head as heads
from fastloss.engine.autograd import new_gradient
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.compile_ops import (
    NUMBERS,
    OUTPUTS,
    ROW,
    all_of,
    contiguous,
    count_arguments,
    fake_grads,
    fake_stats,
    names_of,
    numbers_and_fields,
    operator,
    or_nothing,
    pack_stats,
    record_of,
    stats_coefficients,
)
from fastloss.engine.head_types import Needs
from fastloss.engine.sequences import packed_layout
from fastloss.engine.support import (
    Layout,
    Sets,
    first_bad,
    gradient_of,
    gradients_of_head,
    kept_of_head,
    kept_of_logits,
    lay_out,
    spread,
    stats_of,
)
from fastloss.tables import ACC_DTYPES, LSE_PARTS, RowOptions

_SETS = "Tensor? target, Tensor ids, Tensor? offsets, Tensor? row_scale"
_SAVED = "Tensor z, Tensor lse_parts, Tensor? a, Tensor? b, Tensor? c"


def _layout(
    rows: int,
    target: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    vocab: int,
    o: RowOptions,
    check: bool = True,
) -> Layout:
    if check and offsets is not None:
        packed_layout("support", offsets, ids.shape[0], ids.device)
    layout = lay_out(Sets(ids, offsets, rows), target, vocab, o.ignore_index)
    if check and (ids.device.type == "cpu" or backends.targets_are_validated()):
        if error := first_bad(layout, target, torch.Size([rows]), vocab):
            raise error
    return layout


def _coefficients(a: Tensor | None, b: Tensor | None, c: Tensor | None) -> Coefficients:
    return contiguous(Coefficients(a, b, c))


# --- from logits ---------------------------------------------------------------------------------------------------------


@operator(
    "support_stats", f"Tensor logits, {_SETS}, {NUMBERS}", RowOptions, "str want, str backend", "Tensor[]"
)
def _stats(logits, target, ids, offsets, row_scale, numbers=None, *, want, backend, **fields):
    options, names = record_of(RowOptions, fields, row_scale, numbers), names_of(want)
    layout = _layout(logits.shape[0], target, ids, offsets, logits.shape[1], options)
    z = kept_of_logits(logits, layout, options)
    out = stats_of(backends.runnable(backend), z, layout, heads.with_lse_parts(names))
    return [*pack_stats(out, names, z, logits.dtype), z]


@_stats.register_fake
def _(logits, target, ids, offsets, row_scale, numbers=None, *, want, **fields):
    like = logits.new_empty(0, dtype=ACC_DTYPES[logits.dtype])
    return [*fake_stats(like, logits.shape[0], names_of(want), logits.dtype), like.new_empty(ids.shape[0])]


@operator(
    "support_stats_grad", f"Tensor logits, {_SETS}, {_SAVED}, {NUMBERS}", RowOptions, "str backend", "Tensor"
)
def _grad(logits, target, ids, offsets, row_scale, z, lse_parts, a, b, c, numbers=None, *, backend, **fields):
    options = record_of(RowOptions, fields, row_scale, numbers)
    layout = _layout(logits.shape[0], target, ids, offsets, logits.shape[1], options, check=False)
    d_z = gradient_of(backends.runnable(backend), z, layout, options, lse_parts, _coefficients(a, b, c))
    out = new_gradient(logits.shape, logits.dtype, logits.device)
    spread(d_z, layout, out)
    return out


@_grad.register_fake
def _(logits, *tensors, **fields):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, keyword_only_inputs, output):
    ctx.given, ctx.arguments = keyword_only_inputs, count_arguments(inputs, 5)
    by_name = dict(zip(OUTPUTS, output[:-1], strict=True))
    ctx.save_for_backward(*all_of(inputs, 6), output[-1], by_name[LSE_PARTS], by_name["entropy"])


def _k(given: dict[str, Any], upstream: list[Tensor], entropy: Tensor, dtype: torch.dtype) -> Coefficients:
    return stats_coefficients(names_of(given["want"]), upstream[:-1], entropy, dtype)


def _backward(ctx, upstream):
    *inputs, numbers, z, parts, entropy = ctx.saved_tensors
    k = _k(ctx.given, upstream, entropy, parts.dtype)
    given = {name: x for name, x in ctx.given.items() if name != "want"}
    return _grad(*inputs, z, parts, *k[:3], numbers, **given), *[None] * (ctx.arguments - 1)


_stats.register_autograd(_backward, setup_context=_save)


def support_stats(
    logits: Tensor,
    target: Tensor | None,
    sets: Sets,
    options: RowOptions,
    want: tuple[str, ...],
    backend: str,
) -> list[Tensor]:
    """The statistics in the order of STATS."""
    numbers, fields = numbers_and_fields(options, ROW)
    out = _stats(
        logits,
        target,
        sets.ids,
        sets.offsets,
        options.row_scale,
        numbers,
        **fields,
        want=",".join(want),
        backend=backend,
    )
    return list(out[:-2])


# --- from a head ---------------------------------------------------------------------------------------------------------

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, "


@operator(
    "linear_support_stats", f"{HEAD}{_SETS}, {NUMBERS}", RowOptions, "str want, ScalarType dtype, str backend", "Tensor[]"
)  # fmt: skip
def _linear(
    hidden, weight, bias, target, ids, offsets, row_scale, numbers=None, *, want, dtype, backend, **fields
):
    options = record_of(RowOptions, fields, row_scale, numbers)
    names, kernels = names_of(want), backends.runnable(backend)
    layout = _layout(hidden.shape[0], target, ids, offsets, weight.shape[0], options)
    z = kept_of_head(kernels, hidden, weight, bias, layout, options, dtype)
    return [*pack_stats(stats_of(kernels, z, layout, heads.with_lse_parts(names)), names, z, dtype), z]


@_linear.register_fake
def _(hidden, weight, bias, target, ids, offsets, row_scale, numbers=None, *, want, dtype, **fields):
    like = hidden.new_empty(0, dtype=ACC_DTYPES[dtype])
    return [*fake_stats(like, hidden.shape[0], names_of(want), dtype), like.new_empty(ids.shape[0])]


@operator(
    "linear_support_stats_grad", f"{HEAD}{_SETS}, {_SAVED}, {NUMBERS}", RowOptions,
    "bool[] needs, ScalarType dtype, str backend", "Tensor[]",
)  # fmt: skip
def _linear_grad(
    hidden,
    weight,
    bias,
    target,
    ids,
    offsets,
    row_scale,
    z,
    lse_parts,
    a,
    b,
    c,
    numbers=None,
    *,
    needs,
    dtype,
    backend,
    **fields,
):
    options, kernels = record_of(RowOptions, fields, row_scale, numbers), backends.runnable(backend)
    layout = _layout(hidden.shape[0], target, ids, offsets, weight.shape[0], options, check=False)
    d_z = gradient_of(kernels, z, layout, options, lse_parts, _coefficients(a, b, c))
    grads = gradients_of_head(kernels, hidden, weight, bias, d_z, layout, dtype, Needs(*needs))
    return or_nothing(hidden, heads.finish(grads, heads.leaf_dtypes(hidden, weight, bias), kernels))


@_linear_grad.register_fake
def _(hidden, weight, bias, *given, needs, **fields):
    return fake_grads(hidden, weight, bias, needs, heads.leaf_dtypes(hidden, weight, bias))


def _save_linear(ctx, inputs, keyword_only_inputs, output):
    ctx.given, ctx.needs = keyword_only_inputs, list(ctx.needs_input_grad[:3])
    ctx.arguments = count_arguments(inputs, 7)
    by_name = dict(zip(OUTPUTS, output[:-1], strict=True))
    ctx.save_for_backward(*all_of(inputs, 8), output[-1], by_name[LSE_PARTS], by_name["entropy"])


def _backward_linear(ctx, upstream):
    *inputs, numbers, z, parts, entropy = ctx.saved_tensors
    k = _k(ctx.given, upstream, entropy, parts.dtype)
    given = {name: x for name, x in ctx.given.items() if name != "want"}
    made = _linear_grad(*inputs, z, parts, *k[:3], numbers, needs=ctx.needs, **given)
    grads = [x if need else None for x, need in zip(made, ctx.needs, strict=True)]
    return (*grads, *[None] * (ctx.arguments - 3))


_linear.register_autograd(_backward_linear, setup_context=_save_linear)


def linear_support_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    sets: Sets,
    options: RowOptions,
    want: tuple[str, ...],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """The statistics in the order of STATS."""
    numbers, fields = numbers_and_fields(options, ROW)
    out = _linear(
        hidden, weight, bias, target, sets.ids, sets.offsets, options.row_scale, numbers, **fields, want=",".join(want),
        dtype=dtype, backend=backend,
    )  # fmt: skip
    return list(out[:-2])
