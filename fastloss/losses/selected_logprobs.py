"""selected_logprobs and linear_selected_logprobs: log-probabilities of K given classes at each position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks, compile_topk
from fastloss.engine import head as heads
from fastloss.engine.autograd import differentiable_again, new_gradient
from fastloss.engine.backend import check_targets, resolve_call, resolves_views, targets_are_validated
from fastloss.engine.checks import ShapeError
from fastloss.engine.contract import Backend
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.head_types import NOTHING, Limits, Needs
from fastloss.engine.selection import LEFT_OUT, Taken, marks
from fastloss.engine.shards import Call as SharedCall
from fastloss.engine.shards import Shards, of_group, whole
from fastloss.engine.topk import (
    Chosen,
    details,
    logprobs_gradient,
    logprobs_of_columns,
    logprobs_of_head,
    logprobs_of_logits,
    schedule_of,
    sent,
    taken_of_columns,
)
from fastloss.losses.token_stats import row_options
from fastloss.tables import ACC_DTYPES, Number, RowOptions


@takes_dtensors("logits")
@resolves_views
def selected_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: Number = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probabilities of ``ids [..., K]`` under ``softmax(z)``, ``z = logit_scale · softcap · tanh(logits / softcap) / temperature``.

    The gradient of position n is ``dz_v = -(Σ_k c_k) p_v + Σ_k c_k [v = id_k]``, c the upstream gradient: one tensor of the logits' shape.

    Args:
        logits: ``[..., V]`` in float32, bfloat16, float16 or float64.
        ids: int64 ``[..., K]``. An id may repeat; -1 is padding: 0, and no gradient.
        temperature: > 0; a number, or one for each token, what broadcasts to ``[...]``, without a gradient. logit_scale: > 0.
        group: as in :func:`token_stats`; ids are classes of the whole vocabulary, the same on each process.

    Returns:
        nats, float32 (float64 for float64 logits) ``[..., K]``.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit.
        IndexError: on the CPU, an id that is neither -1 nor a class. On a GPU its position is NaN.

    >>> import torch, fastloss
    >>> fastloss.selected_logprobs(torch.zeros(1, 4), torch.tensor([[2, 0, -1]]))
    tensor([[-1.3863, -1.3863,  0.0000]])
    """
    checks.is_floating("logits", logits)
    checks.is_tensor("ids", ids)
    shards, vocab = shards_of_logits(logits, group, ids, -1)
    lead = logits.shape[:-1]
    check_ids("ids", ids, lead, logits.device)
    options = positive_options(temperature, logit_scale, softcap, lead, logits)
    call = resolve_call(
        "selected_logprobs", backend, logits, ids, options.row_scale, has_operators=shards is None
    )
    acc, count = ACC_DTYPES[logits.dtype], lead.numel()
    call.announce(
        selected="PyTorch's operations on [rows, K] beside the row kernels",
        **({} if shards is None else sent(shards, count, ids.shape[-1], acc)),
    )
    reject_bad_ids("ids", ids, vocab)
    rows, flat = logits.reshape(count, logits.shape[-1]), checks.as_rows(ids)
    if call.by_definition:
        rows = whole_columns(rows, shards)
        out = reference.selected_logprobs(rows, flat, scale=options.factor, softcap=options.softcap or None)
        return out.reshape(ids.shape)
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    if call.traced:
        return compile_topk.selected_logprobs(rows, flat, options, call.backend.name).reshape(ids.shape)
    return SelectedLogprobs.apply(rows, flat, call.backend, options, shards).reshape(ids.shape)


def shards_of_logits(
    logits: Tensor, group: Any, target: Tensor | None, ignore_index: int
) -> tuple[Shards | None, int]:
    """(who has which columns of ``logits [..., V]``; classes of the whole vocabulary). ``target``: classes that must be some."""
    if logits.dim() < 1 or (group is None and logits.shape[-1] < 1):
        raise ShapeError(f"logits: expected shape [..., V], got {list(logits.shape)}")
    if group is None:
        return None, logits.shape[-1]
    call = SharedCall(logits.shape[:-1].numel(), 0, logits.dtype, target, ignore_index)
    shards = of_group(group, logits.shape[-1], logits.device, call)
    if shards.vocab < 1:
        raise ShapeError("logits: expected at least one class, got 0")
    return shards, shards.vocab


def whole_columns(rows: Tensor, shards: Shards | None) -> Tensor:
    """The columns of all processes, for the definition."""
    columns = None if shards is None else whole(rows.t(), shards)
    return rows if columns is None else columns.t()


@takes_dtensors("linear_weight")
@resolves_views
def linear_selected_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: Number = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    memory: str = "auto",
    group: Any = None,
    logits_dtype: torch.dtype | None = None,
    lora: Any = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`selected_logprobs` of ``input @ linear_weight.T + linear_bias``, normalised over the whole vocabulary, without those logits.

    1 GEMM, and 3 in the backward, which makes the logits again (2 where one of hidden states and weight asks for no gradient).

    Args:
        input: hidden states ``[..., D]``. linear_weight: ``[V, D]``. linear_bias: ``[V]``. All may ask for gradients.
        ids and the rest: as in :func:`selected_logprobs`. A position whose ids are all -1 is not computed (on the CPU).
        chunk_size, memory, group, logits_dtype, lora: as in :func:`linear_cross_entropy`.

    >>> import torch, fastloss
    >>> fastloss.linear_selected_logprobs(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([[2, 0, -1]]))
    tensor([[-1.3863, -1.3863,  0.0000]])
    """
    heads.check_head(input, linear_weight, linear_bias)
    input, linear_bias = heads.with_lora(input, linear_weight, linear_bias, lora)
    rows = checks.as_rows(input)
    checks.is_tensor("ids", ids)
    limits = heads.limits_of(chunk_size, memory, group, input, linear_weight, ids, -1, logits_dtype)
    vocab = heads.vocab_of(linear_weight, limits)
    if vocab < 1:
        raise ShapeError("linear_weight: expected at least one class, got 0")
    check_ids("ids", ids, input.shape[:-1], input.device)
    options = positive_options(temperature, logit_scale, softcap, input.shape[:-1], input)
    dtype = heads.compute_dtype(input, linear_weight)
    call = resolve_call(
        "linear_selected_logprobs",
        backend,
        input,
        linear_weight,
        linear_bias,
        ids,
        options.row_scale,
        dtype=dtype,
    )
    flat = checks.as_rows(ids).contiguous()
    if call.by_definition:
        call.announce()
        reject_bad_ids("ids", ids, vocab)
        weight, bias = (whole(x, limits.shards) for x in (linear_weight, linear_bias))
        assert weight is not None
        logits = heads.defined_logits(rows, weight, bias, dtype, limits.float_logits)
        out = reference.selected_logprobs(logits, flat, scale=options.factor, softcap=options.softcap or None)
        return out.reshape(ids.shape)
    if call.traced:
        out = compile_topk.linear_selected_logprobs(
            rows, linear_weight, linear_bias, flat, options, dtype, limits, call.backend.name
        )
        return out.reshape(ids.shape)
    mark = marks(flat, None, vocab, LEFT_OUT)
    keep = heads.kept_rows(mark, LEFT_OUT)
    needs = heads.needs_of(input, linear_weight, linear_bias)
    run = _Run(call.backend, options, dtype, limits, needs, mark, keep)
    head = heads.make_head(call.backend, rows, linear_weight, linear_bias, dtype, limits.shards)
    count = heads.count_kept(rows.shape[0], keep)
    schedule = schedule_of(head, count, needs, limits)
    told = details(head, count, needs, bool(needs), schedule, flat.shape[1], "selected")
    if schedule.by_vocabulary and needs:  # the backward is a pass of its own, which keeps logits
        told |= schedule.details(head, count, needs, False)
        told["gemms"] += 1
    call.announce(**told)
    reject_bad_ids("ids", ids, vocab)
    return LinearSelectedLogprobs.apply(rows, linear_weight, linear_bias, flat, run).reshape(ids.shape)


def check_ids(name: str, ids: Tensor, lead: torch.Size, device: torch.device) -> None:
    """``[..., K]``, K at least 1."""
    checks.is_tensor(name, ids)
    if ids.dim() != len(lead) + 1 or ids.shape[:-1] != lead or ids.shape[-1] < 1:
        raise ShapeError(f"{name}: expected shape {[*lead, 'K']} with K at least 1, got {list(ids.shape)}")
    checks.index_target(name, ids, tuple(ids.shape), device)


def reject_bad_ids(name: str, ids: Tensor, vocab: int) -> None:
    """On the CPU, and with ``validate_targets(True)`` on a GPU: IndexError for an id that is neither -1 nor a class."""
    if torch.compiler.is_compiling() or not (ids.device.type == "cpu" or targets_are_validated()):
        return
    check_targets(ids, vocab, -1)


def positive_options(
    temperature: Number, logit_scale: float, softcap: float | None, lead: torch.Size, like: Tensor
) -> RowOptions:
    """``lead``: the shape of the tokens, which may have a temperature each; ``like``: the logits or hidden states."""
    checks.number("logit_scale", logit_scale, low=0.0, open_low=True)
    return row_options(temperature, logit_scale, softcap, LEFT_OUT, lead, like)


def _again(ctx: Any) -> Any:
    logits, ids, *_ = ctx.saved_tensors
    heads.again_only_whole(ctx.call[2])
    options: RowOptions = ctx.call[1]
    return [
        reference.selected_logprobs(logits, ids, scale=options.factor, softcap=options.softcap or None)
    ], [logits]


class SelectedLogprobs(torch.autograd.Function):
    """(logits ``[N, V]``, ids ``[N, K]``) -> ``[N, K]``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        backend: Backend,
        options: RowOptions,
        shards: Shards | None = None,
    ) -> Tensor:
        mark = marks(ids, None, logits.shape[1] if shards is None else shards.vocab, LEFT_OUT)
        ctx.call, ctx.mark = (backend, options, shards), mark
        if shards is not None:
            taken = taken_of_columns(shards, backend, logits.detach(), mark, ids, options)
            ctx.save_for_backward(logits, ids, *taken)
            own = Chosen(mark, ids, None, options.row_scale)
            return logprobs_of_columns(shards, backend, logits.detach(), taken, own, options)
        out, parts = logprobs_of_logits(backend, logits.detach(), ids, mark, options)
        ctx.save_for_backward(logits, ids, parts)
        return out

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor) -> Any:
        backend, options, shards = ctx.call
        logits, ids, *saved = ctx.saved_tensors
        out = new_gradient(logits.shape, logits.dtype, logits.device)
        own = Chosen(ctx.mark, ids, upstream.to(saved[0].dtype).contiguous(), options.row_scale)
        if shards is None:
            logprobs_gradient(backend, logits, own, saved[0], options, out)
        else:
            logprobs_of_columns(shards, backend, logits.detach(), Taken(*saved), own, options, out)
        return out, None, None, None, None


@dataclass(frozen=True)
class _Run:
    """What forward and backward need beside the tensors."""

    backend: Backend
    options: RowOptions
    dtype: torch.dtype
    limits: Limits
    needs: Needs
    mark: Tensor
    keep: Tensor | None  # the rows that are computed; None: all


def _linear_again(ctx: Any) -> Any:
    run: _Run = ctx.run
    heads.again_only_whole(run.limits.shards)
    hidden, weight, bias, ids = ctx.saved_tensors
    logits = heads.defined_logits(hidden, weight, bias, run.dtype, run.limits.float_logits).to(
        ACC_DTYPES[run.dtype]
    )
    o = run.options
    return [reference.selected_logprobs(logits, ids, scale=o.factor, softcap=o.softcap or None)], [
        hidden,
        weight,
        bias,
    ]


class LinearSelectedLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, ids ``[N, K]``) -> ``[N, K]``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, run: _Run
    ) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(hidden, weight, bias, ids)
        own = Chosen(run.mark, ids, None, run.options.row_scale)
        return _pass(hidden, weight, bias, own, NOTHING, run)[0]

    @staticmethod
    @differentiable_again(_linear_again)
    def backward(ctx: Any, upstream: Tensor) -> Any:
        run: _Run = ctx.run
        hidden, weight, bias, ids = ctx.saved_tensors
        c = upstream.to(ACC_DTYPES[run.dtype]).contiguous()
        own = Chosen(run.mark, ids, c, run.options.row_scale)
        _, grads = _pass(hidden, weight, bias, own, run.needs, run)
        return (*heads.finish(grads, heads.leaf_dtypes(hidden, weight, bias), run.backend), None, None)


def _pass(hidden: Tensor, weight: Tensor, bias: Tensor | None, own: Chosen, needs: Needs, run: _Run) -> Any:
    head = heads.make_head(run.backend, hidden, weight, bias, run.dtype, run.limits.shards)
    count = heads.count_kept(hidden.shape[0], run.keep)
    schedule = schedule_of(head, count, needs, run.limits)
    return logprobs_of_head(head, needs, own, run.options, schedule, run.keep)
