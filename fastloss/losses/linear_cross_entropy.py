"""linear_cross_entropy: cross-entropy from hidden states and a vocabulary matrix, without the logits of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks, compile_heads, devices
from fastloss.engine import head as heads
from fastloss.engine.autograd import differentiable_again, upstream_scale
from fastloss.engine.backend import Call, check_targets, resolve_call, resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.engine.coefficients import of_cross_entropy
from fastloss.engine.contract import WHOLE, Factor
from fastloss.engine.definition import REFERENCE
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.head import NOTHING, Grads, Head, Limits, Needs, Saved, Schedule
from fastloss.engine.head_rows import buffer_dtype, row_stride
from fastloss.engine.jagged import takes_jagged
from fastloss.engine.native import NativeBackend
from fastloss.engine.shards import Shards, whole
from fastloss.losses.cross_entropy import (
    LossOptions,
    constants_with_gradients,
    cross_entropy,
    flat_token_weight,
    kernel_options,
    loss_factor,
    loss_options,
    over_tokens,
    row_factors,
    token_weight_with_gradient,
    weights_of,
    z_loss_of_weighted_mean,
)
from fastloss.losses.token_stats import TokenStats
from fastloss.tables import ACC_DTYPES, LATE_DTYPES, LSE_PARTS, STATS, Number

# Bytes of the logits of a K-dimensional loss up to which they are made whole.
WHOLE_LOGITS = 16 << 20


@takes_jagged(TokenStats)
@takes_dtensors("linear_weight")
@resolves_views
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: Number = 1.0,
    normalizer: int | float | Tensor | None = None,
    token_weight: Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory: str = "auto",
    group: Any = None,
    logits_dtype: torch.dtype | None = None,
    lora: Any = None,
    skip: float = 0.0,
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    """Drop-in for ``torch.nn.functional.linear_cross_entropy`` (torch 2.13) that never holds the whole logits.

    Equal to ``cross_entropy(input @ linear_weight.T + linear_bias, target, …)``, in 3 GEMMs (2 with a frozen weight,
    1 without gradient); the weight's gradient is summed in float32. Follows autocast.

    Args:
        input: hidden states ``[D]``, ``[N, D]``, or ``[…, D]`` with an int64 target of shape ``[…]``.
        linear_weight: ``[C, D]``; ``[C, d1, …, D]`` for a K-dimensional loss, as in PyTorch.
        target: int64 or uint8 classes ``[N]`` (``[N, d1, …]``), or class probabilities ``[N, C]``.
        linear_bias: ``[C]`` (``[C, d1, …]``).
        weight, reduction, label_smoothing, z_loss, logit_scale, softcap, temperature, normalizer, return_stats, backend: as
            in :func:`cross_entropy`.
        ignore_index: None is -100 for classes; it must be None for class probabilities.
        options: torch's LinearCrossEntropyOptions; its ``batch_chunk_size``, where set, is honoured.
        token_weight: a factor of each token's loss and gradient, of the targets' shape (class probabilities: without C), any
            float dtype; that of an ignored token may be anything, NaN too. A mean still divides by the number of targets or the
            sum of their class weights; ``normalizer`` by what it says. As cheap as without, in 3 GEMMs; where it requires a
            gradient, the definition computes the call.
        loss_dtype: a float dtype of the returned loss; None is PyTorch's rule, that of :func:`cross_entropy`.
        chunk_size: rows of logits in memory at once; None chooses. ``fastloss.explain`` shows the choice.
        memory: "fast" takes the fewest GEMMs, for memory of a float32 gradient of the weight and 5% of the logits at most;
            "low" the least memory, up to 4 GEMMs; "auto" "low" up to 2 D rows and "fast" beyond.
        logits_dtype: torch.float32 never rounds the logits of low-precision operands to their dtype. In the CPU's blocks of the
            vocabulary they never are (``explain`` tells their dtype); a GPU then holds a chunk's logits in float32, and their gradient in the operands' dtype beside them.
        group: a ProcessGroup, or a DeviceMesh of one dimension, whose processes each have some rows of ``linear_weight`` and
            ``linear_bias``, one after the other, any number of them, also none. Input, target, options and ``weight`` (of all C
            classes) are the same on each; so are the results, and the gradient of the input, which is summed over the group.
            All processes must call. Class probabilities are those of the own rows, ``[N, C_r]``. Not with a K-dimensional loss.
        lora: a low-rank adapter of ``linear_weight``, which is never merged (docs/lora.md): ``(A, B, scale)``, A ``[r, D]``, B ``[C, r]`` and a
            number, adds ``scale · (input @ A.T) @ B.T`` to the logits; ``(u, B)`` adds ``u @ B.T``, u ``[…, r]`` made by the caller (a
            dropout). Gradients reach A, B or u, and the rest. Any float dtypes; u is rounded to the input's. With ``group`` B is that of the
            own classes. Not with a K-dimensional loss.
        skip: a number from 0 to less than 1: by how much of its coefficient a token's gradient of its logits may err, in the sum of absolute values. Of
            the blocks of classes with the least probability, together at most ``skip``/3 of a token's, never its target's, three in four are left out of
            the backward at random, and the fourth counts four times: the expected gradient is the exact one (docs/skip.md). Loss and statistics stay
            whole. Only the CPU's blocks of the vocabulary leave any out, with a trained weight, a reduced loss, and no label smoothing or
            probabilities: all else is exact, as 0 is, and ``fastloss.explain`` says which. ``fastloss.skipped_share()`` tells how much it was.

    Raises:
        ValueError, IndexError: as :func:`cross_entropy`; a ``skip`` outside of [0, 1).
        ShapeError, TypeError: a token weight of another shape or not of floats; a loss_dtype that is no float dtype.

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(3, 8), torch.zeros(5, 8, requires_grad=True)
    >>> round(fastloss.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2])).item(), 4)
    1.6094
    """
    checks.is_floating("input", input)
    checks.is_floating("linear_weight", linear_weight)
    checks.is_tensor("target", target)
    target = checks.wide_index(target)
    lead = input.shape[:-1]
    rows = input
    if input.dim() > 2 and target.dtype == torch.int64 and target.shape == lead and linear_weight.dim() == 2:
        rows, target = checks.as_rows(input), target.reshape(-1)  # tokens of any shape
    heads.check_linear(rows, linear_weight, linear_bias)
    places = linear_weight.shape[1:-1]
    vocab = linear_weight.shape[0]
    given = input
    if lora is not None:
        input, linear_bias = heads.with_lora(input, linear_weight, linear_bias, lora)
        rows = checks.as_rows(input) if rows.dim() < input.dim() else input
        loss_dtype = loss_dtype or checks.loss_dtype(given, target, weight)  # the adapter may be wider
    probabilities = target.shape == (*rows.shape[:-1], vocab, *places)
    if group is not None:  # a shard may have as many classes as there are tokens, or none
        probabilities = probabilities and target.is_floating_point()
    if probabilities and ignore_index is not None:
        raise ShapeError("ignore_index cannot be specified when target contains probabilities")
    if chunk_size is None and options is not None:
        chunk_size = getattr(options, "batch_chunk_size", None)
    limits = heads.limits_of(
        chunk_size, memory, group, rows, linear_weight,
        target if target.dtype == torch.int64 else None, -100 if ignore_index is None else ignore_index,
        logits_dtype, skip,
    )  # fmt: skip
    loss = loss_options(
        reduction, -100 if ignore_index is None else ignore_index, label_smoothing, z_loss, logit_scale, softcap,
        temperature, normalizer, return_stats, input, (*lead, *places), probabilities,
    )  # fmt: skip
    classes = vocab
    if limits.shards is not None:
        if places:
            raise NotImplementedError("group: expected one matrix [C, D], got a K-dimensional loss")
        classes = limits.shards.vocab
        if not probabilities:
            vocab = classes
    _check_target((*rows.shape[:-1], vocab, *places), target, weight, probabilities, given, classes)
    token_weight = flat_token_weight(token_weight, (*lead, *places), input.device)
    if loss_dtype is not None:
        checks.float_dtype("loss_dtype", loss_dtype)
    extra = _Extra(token_weight, loss_dtype)
    if places:
        return _k_dimensional(rows, linear_weight, target, linear_bias, weight, loss, limits, backend, extra)
    if rows.dim() == 1:
        rows, target = rows.unsqueeze(0), target.unsqueeze(0)
    return loss.shaped(
        _of_rows(rows, linear_weight, target, linear_bias, weight, loss, limits, backend, extra), lead
    )


class _Extra(NamedTuple):
    """What PyTorch's function has not. (torch 2.8 does not trace ``_replace``.)"""

    token_weight: Tensor | None  # one for each row or place
    loss_dtype: torch.dtype | None  # None: PyTorch's rule


def _check_target(
    logits_shape: tuple[int, ...],
    target: Tensor,
    weight: Tensor | None,
    probabilities: bool,
    input: Tensor,
    classes: int,
) -> None:
    """``classes``: those of the whole vocabulary."""
    checks.same_device("target", target, input.device)
    batched = len(logits_shape) > 1
    if probabilities:
        if not target.is_floating_point():
            raise ShapeError(
                f"target: Expected floating point type for target with class probabilities, got {target.dtype}"
            )
    else:
        expected = (*logits_shape[:1], *logits_shape[2:]) if batched else ()
        checks.index_target("target", target, expected, input.device)
    if weight is not None:
        checks.is_floating("weight", weight)
        checks.same_device("weight", weight, input.device)
        checks.has_shape("weight", weight, (classes,))
        if not probabilities:
            checks.class_weight_dtype(weight, input)


def _of_rows(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    loss: LossOptions,
    limits: Limits,
    backend: str,
    extra: _Extra,
) -> Any:
    """The loss of ``input [N, D]``, or ``(loss, TokenStats)``."""
    dtype = heads.compute_dtype(input, linear_weight)
    loss_dtype = extra.loss_dtype or checks.loss_dtype(input, target, weight)
    call = resolve_call(
        "linear_cross_entropy",
        backend,
        input,
        linear_weight,
        linear_bias,
        target,
        weight,
        extra.token_weight,
        loss.normalizer,
        loss.row.row_scale,
        unsupported=constants_with_gradients(target, weight)
        or token_weight_with_gradient(extra.token_weight)
        or z_loss_of_weighted_mean(loss, weight, target),
        dtype=dtype,
    )
    if not heads.vocab_of(linear_weight, limits):
        if loss.return_stats:
            raise ShapeError("linear_weight: expected at least one class for return_stats, got 0")
        call = call.without_kernels("there is no class")
    if call.by_definition:
        exact: dict[str, Any] = {"skip": "not used, exact: the definition"} if limits.skip else {}
        call.announce(**exact)
        own = _Extra(extra.token_weight, loss_dtype)
        all_weight, all_bias = whole(linear_weight, limits.shards), whole(linear_bias, limits.shards)
        assert all_weight is not None
        if loss.probabilities and limits.shards is not None:
            columns = whole(target.t(), limits.shards)
            assert columns is not None
            target = columns.t()
        with heads.float_operands(limits.float_logits, input, all_weight, all_bias) as (x, matrix, bias):
            return _by_definition(call, x, matrix, target, bias, weight, loss, own)
    rows, vocab, acc = input.shape[0], heads.vocab_of(linear_weight, limits), ACC_DTYPES[dtype]
    needs = heads.needs_of(input, linear_weight, linear_bias)
    per_row = loss.reduction == "none"
    # A loss per row with d weight: its coefficients are known in the backward, which makes the logits again.
    again = per_row and (needs.weight or needs.bias)
    if call.traced:
        classes, w = weights_of(target, weight, loss, acc)
        factor, loss = loss_factor(call, classes, w, loss, rows, vocab, acc)
        factors = row_factors(extra.token_weight, classes, loss.row.ignore_index, acc)
        out = compile_heads.linear_cross_entropy(
            input, linear_weight, linear_bias, classes, w, factors, factor, kernel_options(loss), loss.reduction, loss.want,
            NOTHING if again else needs, dtype, limits, call.backend.name,
        )  # fmt: skip
        return loss.with_stats(out[0].to(loss_dtype), out[1:7], STATS)
    head = heads.make_head(call.backend, input, linear_weight, linear_bias, dtype, limits.shards)
    keep = None if loss.probabilities else heads.kept_rows(target, loss.row.ignore_index)
    computed = heads.count_kept(rows, keep)
    smooth = loss.probabilities or loss.row.label_smoothing > 0
    schedule = heads.schedule_of_cross_entropy(head, computed, needs, limits, per_row, smooth)
    schedule = heads.with_exponentials(schedule, head, needs, loss.want, per_row, smooth)
    sent = ("logprobs", *loss.want, *(("distance",) if loss.row.label_smoothing else ()))
    if loss.probabilities:
        sent = ("distance", "mass", *loss.want)
    call.announce(
        lambda: _row_kernel(head, schedule, loss, bool(needs) and not per_row and extra.token_weight is None),
        **schedule.details(head, computed, needs, again, sent),
    )
    classes, w = weights_of(target, weight, loss, acc, limits.shards)
    counted = computed if devices.may_wait(target.device) else None
    factor, loss = loss_factor(call, classes, w, loss, rows, vocab, acc, counted)
    run = _Run(loss, factor, loss_dtype, dtype, schedule, needs, keep, limits.shards)
    factors = row_factors(extra.token_weight, classes, loss.row.ignore_index, acc)
    out = LinearCrossEntropy.apply(input, linear_weight, linear_bias, classes, w, factors, call.backend, run)
    return loss.with_stats(out[0], out[1:], loss.want) if loss.want else out


def _by_definition(
    call: Call,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    loss: LossOptions,
    extra: _Extra,
) -> Any:
    row = loss.row
    if not loss.probabilities:
        check_targets(target, linear_weight.shape[0], row.ignore_index)
    shared: dict[str, Any] = {
        "linear_bias": linear_bias,
        "ignore_index": row.ignore_index,
        "scale": row.factor,
        "softcap": row.softcap or None,
    }
    value = reference.linear_cross_entropy(
        input,
        linear_weight,
        target,
        weight=weight,
        reduction=loss.reduction,
        label_smoothing=row.label_smoothing,
        z_loss=row.z_loss,
        normalizer=loss.normalizer,
        token_weight=extra.token_weight,
        **shared,
    ).to(extra.loss_dtype)
    if not loss.return_stats:
        return value
    with torch.no_grad():
        classes = None if loss.probabilities else target
        stats = reference.linear_token_stats(input, linear_weight, classes, **shared)
    return value, TokenStats(**stats)


@dataclass(frozen=True)
class _Run:
    """What forward and backward need beside the tensors."""

    loss: LossOptions
    factor: Factor
    loss_dtype: torch.dtype
    dtype: torch.dtype  # of the GEMMs
    schedule: Schedule
    needs: Needs
    keep: Tensor | None  # kept_rows
    shards: Shards | None


def _again(ctx: Any) -> Any:
    run: _Run = ctx.run
    heads.again_only_whole(run.shards)
    hidden, weight, bias, classes, w, factors, *_ = ctx.saved_tensors
    logits = heads.defined_logits(hidden, weight, bias, run.dtype, run.schedule.float_logits)
    out = REFERENCE.row_cross_entropy(logits, classes, kernel_options(run.loss), w=w)["loss"]
    if factors is not None:
        out = out * factors
    per_row = run.loss.reduction == "none"
    return [out if per_row else REFERENCE.sum_rows(out, run.factor)], [hidden, weight, bias]


def _row_kernel(head: Head, schedule: Schedule, loss: LossOptions, makes_gradient: bool) -> dict[str, str]:
    """What ``explain`` tells of the kernel that reads the rows of a chunk's logits."""
    if not isinstance(head.backend, NativeBackend) or schedule.by_vocabulary or schedule.columns:
        return {}
    if schedule.exponentials or head.shards is not None:
        return {}
    vocab, device = head.weight.shape[0], head.weight.device
    stride, dtype = row_stride(vocab, device), buffer_dtype(head, schedule.float_logits)
    return head.backend.row_kernel(
        torch.empty(0, dtype=dtype, device=device), kernel_options(loss), vocab=vocab, row_stride=stride,
        grad=(0, stride) if makes_gradient else None, labels=not loss.probabilities, bias=head.bias is not None, want=loss.want,
    )  # fmt: skip


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, bias, classes, w, factors of the rows) -> loss and detached statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        classes: Tensor | None,
        w: Tensor | None,
        factors: Tensor | None,
        backend: Any,
        run: _Run,
    ) -> Any:
        ctx.backend, ctx.run = backend, run
        head = heads.make_head(backend, hidden, weight, bias, run.dtype, run.shards)
        per_row = run.loss.reduction == "none"
        # With a frozen weight a row's d hidden is its upstream gradient times a vector that can be made now.
        ctx.ahead = not per_row or not (run.needs.weight or run.needs.bias)
        needs = run.needs if ctx.ahead else NOTHING
        out, grads = _forward(head, run, needs, classes, w, factors)
        ctx.late = run.dtype in LATE_DTYPES and not per_row
        ctx.grads = (
            grads if ctx.late else heads.finish(grads, heads.leaf_dtypes(hidden, weight, bias), backend)
        )
        lse_parts = None if ctx.ahead else out[LSE_PARTS]
        mass = None if ctx.ahead else out.get("mass")  # Σ w of whole rows, where the vocabulary is cut
        ctx.save_for_backward(hidden, weight, bias, classes, w, factors, lse_parts, mass)
        loss = (out["loss"] if per_row else backend.sum_rows(out["loss"], run.factor)).to(run.loss_dtype)
        if not run.loss.want:
            return loss
        stats = [out[name] for name in run.loss.want]
        ctx.mark_non_differentiable(*stats)
        return (loss, *stats)

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        run: _Run = ctx.run
        hidden, weight, bias, classes, w, factors, lse_parts, mass = ctx.saved_tensors
        head = heads.make_head(ctx.backend, hidden, weight, bias, run.dtype, run.shards)
        dtypes = heads.leaf_dtypes(hidden, weight, bias)
        rest = (None,) * 5
        per_row = run.loss.reduction == "none"
        if not ctx.ahead:
            options = kernel_options(run.loss)
            own = upstream if factors is None else upstream * factors
            vocab = weight.shape[0] if run.shards is None else run.shards.vocab
            k = of_cross_entropy(own, lse_parts, classes, w, vocab, options, mass)
            saved = Saved(classes, lse_parts, k, options, run.keep, w)
            grads = heads.recompute(head, run.needs, run.schedule, saved)
            return (*heads.finish(grads, dtypes, ctx.backend), *rest)
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # retain_graph: the first backward gave the buffers away
            grads = _forward(head, run, run.needs, classes, w, factors)[1]
        if per_row:
            column = upstream.to(torch.promote_types(run.dtype, upstream.dtype))[:, None]
            return (*heads.finish(grads, dtypes, ctx.backend, column), *rest)
        scale = upstream_scale(ctx.backend, upstream, run.factor if ctx.late else None)
        return (*heads.finish(grads, dtypes, ctx.backend, scale), *rest)


def _forward(
    head: Head,
    run: _Run,
    needs: Needs,
    classes: Tensor | None,
    w: Tensor | None,
    factors: Tensor | None,
) -> tuple[dict[str, Tensor], Grads]:
    """Losses and statistics of all rows, and the gradients of their sum times the factor (late for float16)."""
    early = run.loss.reduction != "none" and head.dtype not in LATE_DTYPES
    factor = run.factor if early else WHOLE
    options = kernel_options(run.loss)
    return heads.cross_entropy(
        head, needs, classes, w, options, run.loss.want, factor, run.schedule, run.keep, factors,
        summed=run.loss.reduction != "none",
    )  # fmt: skip


def linear_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, lora: Any) -> Tensor:
    """The whole logits of a head, with ``lora`` as in :func:`linear_cross_entropy`, for who needs them all."""
    if lora is not None:
        heads.check_head(input, linear_weight, linear_bias)
        input, linear_bias = heads.with_lora(input, linear_weight, linear_bias, lora)
    return heads.products(input, linear_weight, linear_bias)


def _k_dimensional(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    loss: LossOptions,
    limits: Limits,
    backend: str,
    extra: _Extra,
) -> Any:
    """PyTorch's K-dimensional loss: ``linear_weight [C, d1, …, D]`` against ``target [N, d1, …]`` (probabilities
    ``[N, C, d1, …]``), one head per place, one mean over all places. Small logits are made whole, in one GEMM over all places."""
    vocab, *places, dim = linear_weight.shape
    logits_bytes = input.shape[0] * linear_weight.numel() // max(1, dim) * input.element_size()
    if (
        logits_bytes <= WHOLE_LOGITS
        and extra == (None, None)
        and not limits.float_logits
        and not limits.skip
        and loss.row.row_scale is None
    ):
        bias = None if linear_bias is None else linear_bias.reshape(-1)
        logits = torch.nn.functional.linear(input, checks.as_rows(linear_weight), bias)
        row = loss.row
        return cross_entropy(
            logits.view(input.shape[0], vocab, *places),
            target,
            weight,
            ignore_index=row.ignore_index,
            reduction=loss.reduction,
            label_smoothing=row.label_smoothing,
            z_loss=row.z_loss,
            logit_scale=row.scale,
            softcap=row.softcap or None,
            normalizer=loss.normalizer,
            return_stats=loss.return_stats,
            backend=backend,
        )
    weights = linear_weight.flatten(1, -2)  # [C, places, D]
    biases = None if linear_bias is None else linear_bias.flatten(1)
    targets = target.flatten(2 if loss.probabilities else 1)
    factors = extra.token_weight
    factors = None if factors is None else factors.view(-1, weights.shape[1])
    count = None
    if loss.reduction == "mean" and loss.normalizer is None:
        count, kept = _count(target, weight, loss, vocab, weights.shape[1])
        if weight is not None and not loss.probabilities and loss.row.z_loss:
            loss = over_tokens(loss, float(count), int(kept))
    each = replace(loss, reduction="none" if loss.reduction == "none" else "sum", normalizer=None)
    parts = [
        _of_rows(
            input,
            weights[:, k],
            targets[..., k],
            None if biases is None else biases[:, k],
            weight,
            _of_place(each, k, weights.shape[1]),
            limits,
            backend,
            _Extra(None if factors is None else factors[:, k], extra.loss_dtype),
        )
        for k in range(weights.shape[1])
    ]
    losses = [part[0] for part in parts] if loss.return_stats else parts
    shape = (input.shape[0], *places)
    value = (
        torch.stack(losses, dim=-1).reshape(shape) if loss.reduction == "none" else torch.stack(losses).sum()
    )
    if loss.normalizer is not None:
        value = value / loss.normalizer
    elif count is not None:
        value = _mean(value, count)
    if not loss.return_stats:
        return value
    stats = [part[1] for part in parts]
    return value, TokenStats(
        *(
            None if field[0] is None else torch.stack(field, dim=-1).reshape(shape)
            for field in zip(*stats, strict=True)
        )
    )


def _of_place(loss: LossOptions, place: int, places: int) -> LossOptions:
    return replace(loss, row=loss.row.of_rows(lambda x: x.view(-1, places)[:, place].contiguous()))


def _mean(value: Tensor, count: Tensor) -> Tensor:
    """``value / count``; of no token it is NaN, whose gradient is 0, as PyTorch's."""
    empty = count == 0
    return value / count.masked_fill(empty, 1) + torch.where(empty, torch.nan, 0.0)


def _count(
    target: Tensor, weight: Tensor | None, loss: LossOptions, vocab: int, places: int
) -> tuple[Tensor, Tensor]:
    """(what the loss's mean is divided by: the targets that count, or the sum of their class weights; how many count)."""
    if loss.probabilities:
        rows = torch.full((), target.shape[0] * places, dtype=torch.int64, device=target.device)
        return rows, rows
    kept = target != loss.row.ignore_index
    if weight is None:
        return kept.sum(), kept.sum()
    return (weight.detach()[target.clamp(0, vocab - 1)] * kept).sum(), kept.sum()
