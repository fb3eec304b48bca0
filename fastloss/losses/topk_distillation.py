"""topk_distillation_loss and linear_topk_distillation_loss: a student learns from a teacher that named K classes a position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks, compile_topk
from fastloss.engine import head as heads
from fastloss.engine.autograd import differentiable_again, new_gradient, savable
from fastloss.engine.backend import check_targets, resolve_call, resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.engine.contract import WHOLE, Backend
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.head_types import NOTHING, Grads, Limits, Needs
from fastloss.engine.selection import Taken
from fastloss.engine.shards import Shards, whole
from fastloss.engine.topk import (
    Teacher,
    details,
    rows_of_columns,
    rows_of_head,
    rows_of_logits,
    schedule_of,
    selected_by,
    sent,
    taken_of_columns,
    teacher_of,
)
from fastloss.losses.cross_entropy import cross_entropy
from fastloss.losses.distillation import (
    DistillationOutput,
    Tokens,
    at_the_end,
    gradients_ahead,
    means,
    squared,
    tokens_of,
)
from fastloss.losses.linear_cross_entropy import linear_cross_entropy
from fastloss.losses.selected_logprobs import (
    check_ids,
    positive_options,
    reject_bad_ids,
    shards_of_logits,
    whole_columns,
)
from fastloss.losses.token_stats import token_stats
from fastloss.tables import (
    ACC_DTYPES,
    DISTILLATION_DIVERGENCES,
    LATE_DTYPES,
    TAILS,
    TOPK_SUMS,
    Number,
    TopKOptions,
)

METRICS = TOPK_SUMS[1:]
# Classes that a teacher may name at a position: [rows, K] is then small beside [rows, V].
MOST = 512


@takes_dtensors("logits")
@resolves_views
def topk_distillation_loss(
    logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    target: Tensor | None = None,
    *,
    tail: str = "bin",
    divergence: str = "forward_kl",
    interpolation: float = 0.5,
    temperature: Number = 1.0,
    temperature_squared: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    hard_loss_coef: float = 0.0,
    normalizer: Any = None,
    reduction: str = "mean",
    group: Any = None,
    backend: str = "auto",
) -> DistillationOutput:
    r"""The divergence of a student from a teacher of whom K classes a position are known (served by an engine, or stored).

    p is the teacher's distribution over the classes that it named, q the student's ``softmax(z)`` there; what becomes of the others says
    ``tail``. Formulas and which one to take: docs/distillation.md.

    Args:
        logits: the student's, ``[..., V]``, any float dtype.
        teacher_ids: int64 ``[..., K]``, K from 1 to 512. -1 is padding; of an id that repeats the probabilities add up.
        teacher_logprobs: nats ``[..., K]``, at the temperature that the teacher is meant to have; -inf is a probability of 0. No gradient.
        target: int64 ``[...]``. A token with ``ignore_index`` has no loss. None: every token counts for which the teacher named a class.
        tail: "bin" (all other classes are one more outcome, of probability 1 - Σ), "renormalize" (p and q over the named classes alone)
            or "none" (Σ over the named classes alone, of probabilities over the whole vocabulary: what verl computes).
        divergence, interpolation: as in :func:`distillation_loss`.
        temperature: T, the student's: a number, or one for each token, what broadcasts to ``[...]``, without a gradient.
        temperature_squared: multiplies the divergence by T².
        logit_scale, softcap: z is ``logit_scale · softcap · tanh(logits / softcap) / T``.
        hard_loss_coef: coefficient of the cross-entropy against ``target`` at temperature 1. With another T it is a second call.
        token_weight, normalizer, reduction: as in :func:`distillation_loss`.

    Returns:
        :class:`DistillationOutput` in float32 (float64 for float64 logits). Metrics, means over tokens that count: ``kl``, ``reverse_kl``,
        ``agreement`` (the teacher's likeliest class is the student's), ``mass`` and ``teacher_mass`` (probability of the named classes),
        ``hard_loss``.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; K larger than V or 512.
        IndexError: an id or a target outside the vocabulary (on the CPU; on a GPU the token's loss is NaN).

    >>> import torch, fastloss
    >>> ids, logprobs = torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.25]]).log()
    >>> round(fastloss.topk_distillation_loss(torch.zeros(1, 4), ids, logprobs).loss.item(), 4)
    0.1733
    """
    checks.is_floating("logits", logits)
    shards, vocab = shards_of_logits(logits, group, target, ignore_index)
    lead = logits.shape[:-1]
    _check_teacher(teacher_ids, teacher_logprobs, lead, vocab, logits.device)
    later, options = _options(
        tail, divergence, interpolation, temperature, temperature_squared, logit_scale, softcap, hard_loss_coef, target, ignore_index,
        lead, logits,
    )  # fmt: skip
    ids, logprobs = checks.as_rows(teacher_ids), checks.as_rows(teacher_logprobs.detach())
    tokens = _tokens(logits, ids, target, ignore_index, token_weight, normalizer, reduction)
    call = resolve_call(
        "topk_distillation_loss", backend, logits, ids, logprobs, tokens.target, token_weight, options.row_scale,
        has_operators=shards is None,
    )  # fmt: skip
    width = ids.shape[1] + (options.hard_loss_coef > 0)
    call.announce(
        terms="PyTorch's operations on [rows, K] beside the row kernels",
        **({} if shards is None else sent(shards, ids.shape[0], width, ACC_DTYPES[logits.dtype])),
    )
    reject_bad_ids("teacher_ids", teacher_ids, vocab)
    check_targets(tokens.target, vocab, ignore_index)
    rows = logits.reshape(lead.numel(), logits.shape[-1])
    if call.by_definition:
        every = whole_columns(rows, shards)
        loss, *statistics = reference.topk_distillation_rows(every, ids, logprobs, tokens.target, options)
    else:
        if rows.stride(1) != 1 and rows.shape[1] > 1:
            rows = rows.contiguous()
        if call.traced:
            loss, sums = compile_topk.topk_distillation(
                rows, ids, logprobs, tokens.target, options, call.backend.name
            )
        else:
            loss, sums = TopKDistillation.apply(
                rows, ids, logprobs, tokens.target, call.backend, options, shards
            )
        statistics = list(sums.unbind(1)[1:])
    if later:
        assert tokens.target is not None
        how: dict[str, Any] = {
            "ignore_index": ignore_index, "logit_scale": logit_scale, "softcap": softcap, "backend": backend,
        }  # fmt: skip
        if shards is None:
            hard = cross_entropy(rows, tokens.target, reduction="none", loss_dtype=loss.dtype, **how)
        else:
            logp = token_stats(rows, tokens.target, group=shards, detach=(), **how).logprobs
            assert logp is not None
            hard = -logp
        loss, statistics = loss + later * hard, [*statistics[:-1], hard]
    value = loss * tokens.weights
    value = value.reshape(lead) if reduction == "none" else value.sum() * tokens.scale
    return DistillationOutput(value, means(METRICS, statistics, tokens))


@takes_dtensors("linear_weight")
@resolves_views
def linear_topk_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    tail: str = "bin",
    divergence: str = "forward_kl",
    interpolation: float = 0.5,
    temperature: Number = 1.0,
    temperature_squared: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    hard_loss_coef: float = 0.0,
    normalizer: Any = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory: str = "auto",
    group: Any = None,
    logits_dtype: torch.dtype | None = None,
    lora: Any = None,
    backend: str = "auto",
) -> DistillationOutput:
    """:func:`topk_distillation_loss` of ``input @ linear_weight.T + linear_bias``, without the logits of the batch.

    The head's 3 GEMMs, as in :func:`linear_cross_entropy` (2 where one of hidden states and weight asks for no gradient). With
    ``reduction="none"`` the backward makes the logits again: 4. A hard loss at another temperature than 1 is a second pass.

    Args:
        input, linear_weight, linear_bias: hidden states ``[..., D]``, vocabulary matrix ``[V, D]``, bias ``[V]``.
        teacher_ids and the rest: as in :func:`topk_distillation_loss`.
        chunk_size, memory, group, logits_dtype, lora: as in :func:`linear_cross_entropy`.

    >>> import torch, fastloss
    >>> ids, logprobs = torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.25]]).log()
    >>> out = fastloss.linear_topk_distillation_loss(torch.zeros(1, 8), torch.zeros(4, 8), ids, logprobs)
    >>> round(out.loss.item(), 4)
    0.1733
    """
    heads.check_head(input, linear_weight, linear_bias)
    input, linear_bias = heads.with_lora(input, linear_weight, linear_bias, lora)
    rows, lead = checks.as_rows(input), input.shape[:-1]
    limits = heads.limits_of(
        chunk_size, memory, group, input, linear_weight, target, ignore_index, logits_dtype
    )
    vocab, shards = heads.vocab_of(linear_weight, limits), limits.shards
    if vocab < 1:
        raise ShapeError("linear_weight: expected at least one class, got 0")
    _check_teacher(teacher_ids, teacher_logprobs, lead, vocab, input.device)
    later, options = _options(
        tail, divergence, interpolation, temperature, temperature_squared, logit_scale, softcap, hard_loss_coef, target, ignore_index,
        lead, input,
    )  # fmt: skip
    dtype = heads.compute_dtype(input, linear_weight)
    ids, logprobs = checks.as_rows(teacher_ids), checks.as_rows(teacher_logprobs.detach())
    tokens = _tokens(input, ids, target, ignore_index, token_weight, normalizer, reduction, ACC_DTYPES[dtype])
    call = resolve_call(
        "linear_topk_distillation_loss", backend, input, linear_weight, linear_bias, ids, logprobs,
        tokens.target, token_weight, options.row_scale, dtype=dtype,
    )  # fmt: skip
    needs, per_row = heads.needs_of(input, linear_weight, linear_bias), reduction == "none"
    factors = None if per_row else tokens.weights if dtype in LATE_DTYPES else tokens.weights * tokens.scale
    given = (ids, logprobs, tokens.target, factors)
    if call.by_definition:
        call.announce()
        reject_bad_ids("teacher_ids", teacher_ids, vocab)
        check_targets(tokens.target, vocab, ignore_index)
        all_weight, all_bias = whole(linear_weight, shards), whole(linear_bias, shards)
        assert all_weight is not None
        z = heads.defined_logits(rows, all_weight, all_bias, dtype, limits.float_logits)
        loss, *statistics = reference.topk_distillation_rows(z, ids, logprobs, tokens.target, options)
        value = loss * tokens.weights
        value = value.reshape(lead) if per_row else value.sum() * tokens.scale
    else:
        operands = (rows, linear_weight, linear_bias)
        if call.traced:
            made = NOTHING if per_row else needs
            value, sums = compile_topk.linear_topk_distillation(
                operands, given, options, made, dtype, limits, call.backend.name
            )
        else:
            acc = ACC_DTYPES[dtype]
            mark = teacher_of(ids, logprobs, tokens.target, None, vocab, options, acc).mark
            keep = heads.kept_rows(mark, options.row_options().ignore_index)
            run = _Run(call.backend, options, dtype, limits, keep, needs, per_row)
            head = heads.make_head(call.backend, rows, linear_weight, linear_bias, dtype, shards)
            count = heads.count_kept(rows.shape[0], keep)
            schedule = schedule_of(head, count, needs, limits)
            width = ids.shape[1] + (options.hard_loss_coef > 0)
            call.announce(**details(head, count, needs, per_row and bool(needs), schedule, width, "terms"))
            reject_bad_ids("teacher_ids", teacher_ids, vocab)
            check_targets(tokens.target, vocab, ignore_index)
            value, sums = LinearTopKDistillation.apply(*operands, *given, run)
        statistics = list(sums.unbind(1)[1:])
        if per_row:
            value = (value * tokens.weights).reshape(lead)
        elif dtype in LATE_DTYPES:
            value = value * tokens.scale
    if later:
        assert tokens.target is not None
        hard, stats = linear_cross_entropy(
            linear_weight=linear_weight, target=tokens.target, **heads.as_given(rows, linear_weight, linear_bias),
            ignore_index=ignore_index, reduction="none" if per_row else "sum", token_weight=None if per_row else tokens.weights,
            logit_scale=logit_scale, softcap=softcap, chunk_size=chunk_size, memory=memory, group=shards, logits_dtype=logits_dtype,
            return_stats=True, loss_dtype=value.dtype, backend=backend,
        )  # fmt: skip
        more = (hard * tokens.weights).reshape(lead) * later if per_row else hard * (tokens.scale * later)
        value = value + more
        statistics[-1] = -stats.logprobs
    return DistillationOutput(value, means(METRICS, statistics, tokens))


def _check_teacher(ids: Tensor, logprobs: Tensor, lead: torch.Size, vocab: int, device: torch.device) -> None:
    check_ids("teacher_ids", ids, lead, device)
    k = ids.shape[-1]
    if k > min(vocab, MOST):
        raise ShapeError(
            f"teacher_ids: expected at most {min(vocab, MOST)} ids a position (of {vocab} classes), got {k}"
        )
    checks.is_floating("teacher_logprobs", logprobs)
    checks.has_shape("teacher_logprobs", logprobs, tuple(ids.shape))
    checks.same_device("teacher_logprobs", logprobs, device)


def _options(
    tail: str,
    divergence: str,
    interpolation: float,
    temperature: Number,
    temperature_squared: bool,
    logit_scale: float,
    softcap: float | None,
    hard_loss_coef: float,
    target: Tensor | None,
    ignore_index: int,
    lead: torch.Size,
    like: Tensor,
) -> tuple[float, TopKOptions]:
    """(the coefficient of a hard loss that has logits of its own, 0: none; the options of the rest)."""
    checks.is_one_of("tail", tail, TAILS)
    checks.is_one_of("divergence", divergence, DISTILLATION_DIVERGENCES)
    w = checks.number("interpolation", interpolation, low=0.0, high=1.0)
    row = positive_options(temperature, logit_scale, softcap, lead, like)
    coef = checks.number("hard_loss_coef", hard_loss_coef, low=0.0)
    if coef and target is None:
        raise ValueError("hard_loss_coef: expected 0 where target is None")
    name = at_the_end(divergence, w)
    factor, row_factor = squared(temperature, row.row_scale) if temperature_squared else (1.0, None)
    apart = isinstance(temperature, Tensor) or temperature != 1.0
    options = TopKOptions(
        DISTILLATION_DIVERGENCES.index(name), w, TAILS.index(tail), row.scale, row.softcap, factor, 0.0 if apart else coef,
        int(ignore_index), row.row_scale, row_factor,
    )  # fmt: skip
    return (coef if apart else 0.0), options


def _tokens(
    like: Tensor,
    ids: Tensor,
    target: Tensor | None,
    ignore_index: int,
    token_weight: Tensor | None,
    normalizer: Any,
    reduction: str,
    acc: torch.dtype | None = None,
) -> Tokens:
    counts = None if target is not None else (ids != -1).any(1)
    acc = ACC_DTYPES[like.dtype] if acc is None else acc
    return tokens_of(like, acc, target, ignore_index, token_weight, normalizer, reduction, counts)


def _again(ctx: Any) -> Any:
    logits, ids, logprobs, target, *_ = ctx.saved_tensors
    _, options, shards = ctx.call
    heads.again_only_whole(shards)
    return [reference.topk_distillation_rows(logits, ids, logprobs, target, options).loss, None], [logits]


class TopKDistillation(torch.autograd.Function):
    """(logits, the teacher's ids and log-probs, target) -> (loss ``[N]``, sums ``[N, 7]``, which are detached)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        logprobs: Tensor,
        target: Tensor | None,
        backend: Backend,
        options: TopKOptions,
        shards: Shards | None = None,
    ) -> Any:
        vocab, taken = logits.shape[1] if shards is None else shards.vocab, None
        teacher = teacher_of(ids, logprobs, target, None, vocab, options, ACC_DTYPES[logits.dtype])
        if shards is None:
            sums = rows_of_logits(backend, logits.detach(), teacher, options)
        else:
            taken = taken_of_columns(
                shards, backend, logits.detach(), teacher.mark, selected_by(teacher), options.row_options()
            )
            sums = rows_of_columns(shards, backend, logits.detach(), taken, teacher, options)
        ctx.call = backend, options, shards
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, *savable(ids, logprobs), target, *(taken or ()))
        ctx.mark_non_differentiable(sums)
        return sums[:, 0].clone(), sums

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> Any:
        backend, options, shards = ctx.call
        logits, ids, logprobs, target, *taken = ctx.saved_tensors
        none = (None,) * 6
        if upstream is None:
            return (None, *none)
        acc, vocab = ACC_DTYPES[logits.dtype], logits.shape[1] if shards is None else shards.vocab
        teacher = teacher_of(ids, logprobs, target, upstream.to(acc), vocab, options, acc)
        out = new_gradient(logits.shape, logits.dtype, logits.device)
        if shards is None:
            rows_of_logits(backend, logits.detach(), teacher, options, out)
        else:
            rows_of_columns(shards, backend, logits.detach(), Taken(*taken), teacher, options, out)
        return (out, *none)


@dataclass(frozen=True)
class _Run:
    """What forward and backward need beside the tensors."""

    backend: Backend
    options: TopKOptions
    dtype: torch.dtype
    limits: Limits
    keep: Tensor | None  # the rows that are computed; None: all
    needs: Needs
    per_row: bool

    def sums(self, operands: Any, teacher: Teacher, needs: Needs) -> Any:
        hidden, weight, bias = operands
        head = heads.make_head(self.backend, hidden, weight, bias, self.dtype, self.limits.shards)
        count = heads.count_kept(operands[0].shape[0], self.keep)
        schedule = schedule_of(head, count, needs, self.limits)
        return rows_of_head(head, needs, teacher, self.options, schedule, self.keep)


def _linear_again(ctx: Any) -> Any:
    run: _Run = ctx.run
    heads.again_only_whole(run.limits.shards)
    hidden, weight, bias, ids, logprobs, target, factors = ctx.saved_tensors
    logits = heads.defined_logits(hidden, weight, bias, run.dtype, run.limits.float_logits)
    loss = reference.topk_distillation_rows(logits, ids, logprobs, target, run.options).loss
    return [loss if run.per_row else (loss * factors).sum(), None], [hidden, weight, bias]


class LinearTopKDistillation(torch.autograd.Function):
    """(hidden, weight, bias, the teacher's ids and log-probs, target, factors ``[N]``) -> (Σ factors · loss, or the loss ``[N]``; sums)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        logprobs: Tensor,
        target: Tensor | None,
        factors: Tensor | None,
        run: _Run,
    ) -> Any:
        ctx.run, ctx.ahead = run, not run.per_row
        ids, logprobs = savable(ids, logprobs)  # type: ignore[assignment]
        needs = run.needs if ctx.ahead else NOTHING
        vocab = heads.vocab_of(weight, run.limits)
        teacher = teacher_of(
            ids, logprobs, target, factors if needs else None, vocab, run.options, ACC_DTYPES[run.dtype]
        )  # fmt: skip
        sums, grads = run.sums((hidden, weight, bias), teacher, needs)
        late = run.dtype in LATE_DTYPES
        dtypes = heads.leaf_dtypes(hidden, weight, bias)
        ctx.grads = grads if late else heads.finish(grads, dtypes, run.backend)
        ctx.save_for_backward(hidden, weight, bias, ids, logprobs, target, factors)
        ctx.mark_non_differentiable(sums)
        loss = sums[:, 0]
        if factors is None:
            return loss.clone(), sums
        return run.backend.sum_rows(loss * factors, WHOLE), sums

    @staticmethod
    @differentiable_again(_linear_again)
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        run: _Run = ctx.run
        *operands, ids, logprobs, target, factors = ctx.saved_tensors

        def again(factors: Tensor) -> Grads:
            vocab, acc = heads.vocab_of(operands[1], run.limits), ACC_DTYPES[run.dtype]
            teacher = teacher_of(ids, logprobs, target, factors, vocab, run.options, acc)
            return run.sums(operands, teacher, run.needs)[1]

        return (*gradients_ahead(ctx, upstream, operands, factors, again), *[None] * 5)
