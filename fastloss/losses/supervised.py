"""supervised_loss and linear_supervised_loss: what fine-tuning puts in place of the negative log-likelihood of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks, compile_rows, compile_supervised
from fastloss.engine import head as heads
from fastloss.engine.autograd import differentiable_again, new_gradient, savable
from fastloss.engine.backend import check_targets, resolve_call, resolves_views
from fastloss.engine.changing import as_tensor
from fastloss.engine.checks import ShapeError
from fastloss.engine.contract import WHOLE, Backend
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.head import Schedule
from fastloss.engine.head_types import NOTHING, Grads, Needs
from fastloss.engine.jagged import takes_jagged
from fastloss.engine.sequences import layout_of
from fastloss.engine.shards import Shards, whole
from fastloss.engine.supervised import Labels, gradient_of_logits, rows_of_head, rows_of_logits, wanted
from fastloss.losses.distillation import gradients_ahead, tokens_of
from fastloss.losses.policy_inputs import shares
from fastloss.losses.token_stats import row_options
from fastloss.tables import (
    ACC_DTYPES,
    AGGREGATIONS,
    LATE_DTYPES,
    STATS,
    SUPERVISED_LOSSES,
    Number,
    SupervisedOptions,
)

# Those that need no length of their own.
MEANS = AGGREGATIONS[:3]


class SupervisedOutput(NamedTuple):
    """``loss`` (0-d, or per token with ``reduction="none"``) carries a gradient; ``metrics`` are detached 0-d tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]


@takes_jagged(SupervisedOutput)
@resolves_views
def supervised_loss(
    logits: Tensor,
    target: Tensor,
    *,
    loss_type: str = "nll",
    unlikely: Tensor | None = None,
    eaft_alpha: float = 1.0,
    eaft_scale: float = 3.0,
    focal_gamma: float = 2.0,
    power: float = 0.7,
    trim_threshold: float = 8.0,
    trim_width: float = 1.0,
    temperature: Number = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    aggregation: str = "token-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> SupervisedOutput:
    r"""A function of each target token's probability p, in place of -log p.

    sg is a constant in the gradient, H the entropy in nats. Which one to take: docs/supervised.md.

    ========================  ==========================================================  ==================
    ``loss_type``             a token's loss                                              paper
    ========================  ==========================================================  ==================
    ``nll``                   -log p
    ``dft``                   -sg[p] log p                                                arXiv:2508.05629
    ``eaft``                  -sg[H / eaft_scale]^eaft_alpha log p                        arXiv:2601.02151
    ``focal``                 -(1 - p)^focal_gamma log p                                  arXiv:1708.02002
    ``power``                 (1 - p^power) / power                                       arXiv:1805.07836
    ``deft``                  (1 - p^q) / q with q = sg[Σ_v p_v²]                         arXiv:2602.11424
    ``soft_trim``             -sg[σ((trim_threshold + log p) / trim_width)] log p         none
    ``unlikelihood``          -log(1 - p)                                                 arXiv:1908.04319
    ========================  ==========================================================  ==================

    Args:
        logits: ``[..., V]`` in float32, bfloat16, float16 or float64.
        target: int64 ``[...]``; ``ignore_index`` where a token has no loss.
        unlikely: bool ``[...]``: tokens that are to become unlikely, with the unlikelihood in place of ``loss_type``.
        eaft_scale: 3.0 is LLaMA-Factory's (about log 20; H there is of the 20 likeliest), 1.0 Axolotl's.
        focal_gamma: ≥ 0. power: in (0, 1]; towards 0 it is ``nll``, 1 is 1 - p.
        trim_threshold: in nats; a token's weight is 1/2 where -log p is this much, and falls over ``trim_width`` nats.
        temperature, logit_scale, softcap: as in :func:`token_stats`.
        token_weight: a constant factor of each token's loss, float ``[...]``. A mean stays over tokens.
        aggregation: of a mean: "token-mean"; "seq-mean-token-mean" and "seq-mean-token-sum", over the sequences of ``target [B, T]``,
            or packed ``[N]`` with ``cu_seqlens``. A sequence without a token that counts is one of them.
        normalizer: the sum is divided by it in place of the number of tokens (of sequences) that count.
        reduction: "mean", "sum" or "none".

    Returns:
        :class:`SupervisedOutput` in float32 (float64 for float64 logits). Metrics, means over the tokens that count: ``nll``, whatever
        the loss, and ``entropy`` where the loss reads it. No token that counts: all 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; the message names the argument.
        IndexError: a target outside the vocabulary (on the CPU; on a GPU the token's loss is NaN).

    >>> import torch, fastloss
    >>> logits = torch.zeros(1, 4, requires_grad=True)
    >>> round(fastloss.supervised_loss(logits, torch.tensor([2]), loss_type="dft").loss.item(), 4)
    0.3466
    """
    checks.is_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ShapeError(f"logits: expected shape [..., V], got {list(logits.shape)}")
    lead, vocab = logits.shape[:-1], logits.shape[-1]
    options = _options(
        loss_type, eaft_alpha, eaft_scale, focal_gamma, power, trim_threshold, trim_width, temperature, logit_scale,
        softcap, ignore_index, logits,
    )  # fmt: skip
    acc = ACC_DTYPES[logits.dtype]
    tokens = _tokens(
        logits,
        acc,
        target,
        unlikely,
        ignore_index,
        token_weight,
        aggregation,
        cu_seqlens,
        normalizer,
        reduction,
    )
    call = resolve_call("supervised_loss", backend, logits, target, token_weight, unlikely, options.row_scale)
    call.announce()
    check_targets(tokens.target, vocab, ignore_index)
    rows = checks.as_rows(logits)
    if call.by_definition:
        loss, nll, entropy = reference.supervised_rows(rows, tokens.target, tokens.unlikely, options)
    else:
        if rows.stride(1) != 1 and vocab > 1:
            rows = rows.contiguous()
        if call.traced:
            stats = compile_rows.token_stats(rows, tokens.target, options, wanted(options), call.backend.name)
            by_name = dict(zip(STATS, stats, strict=True))
            logprob, entropy = by_name["logprobs"], by_name["entropy"]
            sum_sq = by_name["log_sum_sq_probs"].exp()
            loss = reference.supervised_terms(logprob, entropy, sum_sq, tokens.unlikely, _as_tensors(options))
            loss, nll = loss.masked_fill(~tokens.valid, 0.0), -logprob
        else:
            loss, sums = Supervised.apply(rows, tokens.target, tokens.unlikely, call.backend, options)
            nll, entropy = sums[:, 1], sums[:, 2]
    value = _times(loss, tokens.weights)
    value = value.reshape(lead) if reduction == "none" else value.sum() * tokens.scale
    return SupervisedOutput(value, _metrics(nll, entropy, tokens, options))


@takes_jagged(SupervisedOutput)
@takes_dtensors("linear_weight")
@resolves_views
def linear_supervised_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    loss_type: str = "nll",
    unlikely: Tensor | None = None,
    eaft_alpha: float = 1.0,
    eaft_scale: float = 3.0,
    focal_gamma: float = 2.0,
    power: float = 0.7,
    trim_threshold: float = 8.0,
    trim_width: float = 1.0,
    temperature: Number = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    aggregation: str = "token-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: Any = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory: str = "auto",
    group: Any = None,
    logits_dtype: torch.dtype | None = None,
    lora: Any = None,
    backend: str = "auto",
) -> SupervisedOutput:
    """:func:`supervised_loss` of ``input @ linear_weight.T + linear_bias``, without the logits of the batch.

    The head's 3 GEMMs, as in :func:`linear_cross_entropy` (2 where one of hidden states and weight asks for no gradient). With
    ``reduction="none"`` the backward makes the logits again: 4.

    Args:
        input, linear_weight, linear_bias: hidden states ``[..., D]``, vocabulary matrix ``[V, D]``, bias ``[V]``.
        target and the rest: as in :func:`supervised_loss`.
        chunk_size, memory, group, logits_dtype, lora: as in :func:`linear_cross_entropy`.

    Raises:
        ValueError, TypeError, IndexError: as :func:`supervised_loss`.

    >>> import torch, fastloss
    >>> hidden, head, target = torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([2])
    >>> round(fastloss.linear_supervised_loss(hidden, head, target, loss_type="dft").loss.item(), 4)
    0.3466
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
    options = _options(
        loss_type, eaft_alpha, eaft_scale, focal_gamma, power, trim_threshold, trim_width, temperature, logit_scale,
        softcap, ignore_index, input,
    )  # fmt: skip
    dtype = heads.compute_dtype(input, linear_weight)
    tokens = _tokens(
        input, ACC_DTYPES[dtype], target, unlikely, ignore_index, token_weight, aggregation, cu_seqlens, normalizer,
        reduction,
    )  # fmt: skip
    call = resolve_call(
        "linear_supervised_loss", backend, input, linear_weight, linear_bias, target, token_weight, unlikely, options.row_scale,
        dtype=dtype,
    )  # fmt: skip
    needs, per_row = heads.needs_of(input, linear_weight, linear_bias), reduction == "none"
    if call.by_definition:
        call.announce()
        check_targets(tokens.target, vocab, ignore_index)
        all_weight, all_bias = whole(linear_weight, shards), whole(linear_bias, shards)
        assert all_weight is not None
        z = heads.defined_logits(rows, all_weight, all_bias, dtype, limits.float_logits)
        loss, nll, entropy = reference.supervised_rows(z, tokens.target, tokens.unlikely, options)
        value = _times(loss, tokens.weights)
        value = value.reshape(lead) if per_row else value.sum() * tokens.scale
        return SupervisedOutput(value, _metrics(nll, entropy, tokens, options))
    late = dtype in LATE_DTYPES
    factors = None if per_row else tokens.weights if late else tokens.weights * tokens.scale
    operands = (rows, linear_weight, linear_bias)
    labels = Labels(tokens.target, tokens.unlikely, factors)
    if call.traced:
        made = NOTHING if per_row else needs
        value, sums = compile_supervised.linear_supervised(
            operands, labels, options, made, dtype, limits, call.backend.name
        )
    else:
        head = heads.make_head(call.backend, *operands, dtype, shards)
        keep = heads.kept_rows(tokens.target, ignore_index)
        count = heads.count_kept(rows.shape[0], keep)
        schedule = heads.schedule_of_one_pass(head, count, needs, limits, logprobs_only=True)
        call.announce(**schedule.details(head, count, needs, per_row and bool(needs), wanted(options)))
        check_targets(tokens.target, vocab, ignore_index)
        run = _Run(call.backend, options, dtype, schedule, keep, needs, per_row, shards)
        value, sums = LinearSupervised.apply(*operands, *labels, run)
    if per_row:
        value = _times(value, tokens.weights).reshape(lead)
    elif late:
        value = value * tokens.scale
    return SupervisedOutput(value, _metrics(sums[:, 1], sums[:, 2], tokens, options))


class _Tokens(NamedTuple):
    """What a call's tokens are, flat."""

    target: Tensor  # int64 [N]
    unlikely: Tensor | None  # bool [N]
    valid: Tensor  # bool [N]
    weights: Tensor  # acc [N]: the tokens' own times their share in the mean, 0 where they do not count
    scale: Tensor  # acc, 0-d


def _tokens(
    like: Tensor,
    acc: torch.dtype,
    target: Tensor,
    unlikely: Tensor | None,
    ignore_index: int,
    token_weight: Tensor | None,
    aggregation: str,
    cu_seqlens: Tensor | None,
    normalizer: Any,
    reduction: str,
) -> _Tokens:
    checks.is_one_of("aggregation", aggregation, MEANS)
    checks.is_tensor("target", target)
    if unlikely is not None:
        checks.is_tensor("unlikely", unlikely)
        checks.has_shape("unlikely", unlikely, tuple(target.shape))
        checks.same_device("unlikely", unlikely, target.device)
        unlikely = (unlikely != 0).reshape(-1)
    flat = tokens_of(like, acc, target, ignore_index, token_weight, normalizer, reduction)
    assert flat.target is not None
    if aggregation == "token-mean":
        return _Tokens(flat.target, unlikely, flat.valid, flat.weights, flat.scale)
    if reduction != "mean":
        raise ValueError(
            f"aggregation: expected 'token-mean' with reduction={reduction!r}, got {aggregation!r}"
        )
    layout = layout_of("target", target, cu_seqlens)
    divisor = checks.normalizer_value(normalizer, reduction, target.device)
    share, scale = shares(flat.valid, layout, AGGREGATIONS.index(aggregation), 1.0, divisor, acc)
    return _Tokens(flat.target, unlikely, flat.valid, flat.weights * share, scale)


def _options(
    loss_type: str,
    eaft_alpha: float,
    eaft_scale: float,
    focal_gamma: float,
    power: float,
    trim_threshold: float,
    trim_width: float,
    temperature: Number,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    like: Tensor,
) -> SupervisedOptions:
    checks.is_one_of("loss_type", loss_type, SUPERVISED_LOSSES)
    row = row_options(temperature, logit_scale, softcap, ignore_index, like.shape[:-1], like)
    return SupervisedOptions(
        ignore_index=int(ignore_index),
        scale=row.scale,
        softcap=row.softcap,
        row_scale=row.row_scale,
        kind=SUPERVISED_LOSSES.index(loss_type),
        eaft_alpha=checks.number("eaft_alpha", eaft_alpha, low=0.0),
        eaft_scale=checks.number("eaft_scale", eaft_scale, low=0.0, open_low=True),
        focal_gamma=checks.number("focal_gamma", focal_gamma, low=0.0),
        power=checks.number("power", power, low=0.0, high=1.0, open_low=True),
        trim_threshold=checks.number("trim_threshold", trim_threshold),
        trim_width=checks.number("trim_width", trim_width, low=0.0, open_low=True),
    )


def _as_tensors(o: SupervisedOptions) -> SupervisedOptions:
    """Numbers that change under torch.compile as tensors: a power of a tensor takes no symbolic one."""
    return SupervisedOptions(
        o.ignore_index, o.scale, o.softcap, o.row_scale, o.kind, as_tensor(o.eaft_alpha), as_tensor(o.eaft_scale),
        as_tensor(o.focal_gamma), as_tensor(o.power), as_tensor(o.trim_threshold), as_tensor(o.trim_width),
    )  # fmt: skip


def _times(loss: Tensor, weights: Tensor) -> Tensor:
    """A token of weight 0 adds nothing, infinite or not."""
    return torch.where(weights == 0, 0.0, loss * weights)


def _metrics(nll: Tensor, entropy: Tensor, tokens: _Tokens, o: SupervisedOptions) -> dict[str, Tensor]:
    given = {"nll": nll, "entropy": entropy} if "entropy" in wanted(o) else {"nll": nll}
    count = tokens.valid.sum().clamp(min=1)
    return {name: x.detach().sum() / count for name, x in given.items()}


def _again(ctx: Any) -> Any:
    logits, target, unlikely, *_ = ctx.saved_tensors
    return [reference.supervised_rows(logits, target, unlikely, ctx.call[1])[0], None], [logits]


class Supervised(torch.autograd.Function):
    """(logits, target, unlikely) -> (loss ``[N]``, sums ``[N, 3]``, which are detached)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        unlikely: Tensor | None,
        backend: Backend,
        options: SupervisedOptions,
    ) -> Any:
        labels = Labels(target, unlikely, None)
        sums, slope, lse_parts = rows_of_logits(backend, logits.detach(), labels, options)
        ctx.call = backend, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, *savable(target, unlikely), slope, lse_parts)
        ctx.mark_non_differentiable(sums)
        return sums[:, 0].clone(), sums

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> Any:
        backend, options = ctx.call
        logits, target, _unlikely, slope, lse_parts = ctx.saved_tensors
        none = (None,) * 4
        if upstream is None:
            return (None, *none)
        out = new_gradient(logits.shape, logits.dtype, logits.device)
        factors = upstream.to(slope.dtype)
        gradient_of_logits(backend, logits.detach(), target, slope, factors, lse_parts, options, out)
        return (out, *none)


@dataclass(frozen=True)
class _Run:
    """What forward and backward need beside the tensors."""

    backend: Backend
    options: SupervisedOptions
    dtype: torch.dtype  # of the GEMMs
    schedule: Schedule
    keep: Tensor | None  # the rows that are computed; None: all
    needs: Needs
    per_row: bool
    shards: Shards | None

    def sums(self, operands: Any, labels: Labels, needs: Needs) -> Any:
        hidden, weight, bias = operands
        head = heads.make_head(self.backend, hidden, weight, bias, self.dtype, self.shards)
        return rows_of_head(head, needs, labels, self.options, self.schedule, self.keep)


def _linear_again(ctx: Any) -> Any:
    run: _Run = ctx.run
    heads.again_only_whole(run.shards)
    hidden, weight, bias, target, unlikely, factors = ctx.saved_tensors
    logits = heads.defined_logits(hidden, weight, bias, run.dtype, run.schedule.float_logits)
    loss = reference.supervised_rows(logits, target, unlikely, run.options)[0]
    return [loss if run.per_row else _times(loss, factors).sum(), None], [hidden, weight, bias]


class LinearSupervised(torch.autograd.Function):
    """(hidden, weight, bias, target, unlikely, factors ``[N]``) -> (Σ factors · loss, or the loss ``[N]``; sums)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        unlikely: Tensor | None,
        factors: Tensor | None,
        run: _Run,
    ) -> Any:
        ctx.run, ctx.ahead = run, not run.per_row
        target, unlikely = savable(target, unlikely)  # type: ignore[assignment]
        needs = run.needs if ctx.ahead else NOTHING
        sums, grads = run.sums((hidden, weight, bias), Labels(target, unlikely, factors), needs)
        late = run.dtype in LATE_DTYPES
        dtypes = heads.leaf_dtypes(hidden, weight, bias)
        ctx.grads = grads if late else heads.finish(grads, dtypes, run.backend)
        ctx.save_for_backward(hidden, weight, bias, target, unlikely, factors)
        ctx.mark_non_differentiable(sums)
        loss = sums[:, 0]
        if factors is None:
            return loss.clone(), sums
        return run.backend.sum_rows(_times(loss, factors), WHOLE), sums

    @staticmethod
    @differentiable_again(_linear_again)
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        run: _Run = ctx.run
        *operands, target, unlikely, factors = ctx.saved_tensors

        def again(factors: Tensor) -> Grads:
            return run.sums(operands, Labels(target, unlikely, factors.to(ACC_DTYPES[run.dtype])), run.needs)[
                1
            ]

        return (*gradients_ahead(ctx, upstream, operands, factors, again), *[None] * 4)
