"""distillation_loss and linear_distillation_loss: a student learns a teacher's distribution over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks, compile_distillation
from fastloss.engine import head as heads
from fastloss.engine.autograd import differentiable_again, new_gradient, savable, upstream_scale
from fastloss.engine.backend import check_targets, resolve_call, resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.engine.contract import WHOLE, Backend
from fastloss.engine.distillation import (
    Columns,
    LogSums,
    details,
    gradient_of_columns,
    log_sums,
    of_heads,
    schedule_of,
    sent,
    sums_of_columns,
)
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.head import Schedule
from fastloss.engine.head_types import NOTHING, Grads, Head, Limits, Needs
from fastloss.engine.shards import Call as SharedCall
from fastloss.engine.shards import Shards, of_group, of_teacher, whole
from fastloss.tables import (
    ACC_DTYPES,
    DISTILLATION_DIVERGENCES,
    DISTILLATION_SUMS,
    LATE_DTYPES,
    DistillationOptions,
    Number,
)

METRICS = ("kl", "reverse_kl", "agreement", "entropy", "teacher_entropy", "hard_loss")
SLOPE = DISTILLATION_SUMS.index("slope")


class DistillationOutput(NamedTuple):
    """``loss`` (0-d, or per token with ``reduction="none"``) carries a gradient; ``metrics`` are detached 0-d tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]


@takes_dtensors("logits")
@resolves_views
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    interpolation: float = 0.5,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    temperature_squared: bool = False,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    hard_loss_coef: float = 0.0,
    normalizer: Any = None,
    reduction: str = "mean",
    group: Any = None,
    backend: str = "auto",
) -> DistillationOutput:
    r"""``D(softmax(y / T), softmax(z / T)) + hard_loss_coef · cross_entropy(z, target)``, ``y`` the teacher's logits.

    Formulas, papers and which one to take: docs/distillation.md. The teacher gets no gradient.

    Args:
        logits: the student's, ``[..., V]``, any float dtype.
        teacher_logits: ``[..., V']``. Where V and V' differ, the first min(V, V') classes are compared, the rest is padding.
        target: int64 ``[...]``. A token with ``ignore_index`` has no loss. None: every token counts.
        divergence: "forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl" or "alpha".
        interpolation: jsd's β (TRL's GKD: 0 is forward, 1 reverse KL), the skew, or alpha's α; in [0, 1].
        temperature: T of both: a number, or one for each token, what broadcasts to ``[...]``, without a gradient.
        teacher_temperature: sets the teacher's apart; a number, or one for each token.
        temperature_squared: multiplies the divergence by T², as arXiv:1503.02531 does; TRL and Liger do not.
        token_weight: a constant factor of each token's loss, float ``[...]``. The mean stays over tokens.
        hard_loss_coef: coefficient of the cross-entropy against ``target`` at temperature 1.
        normalizer: the sum is divided by it in place of the number of tokens that count.
        reduction: "mean", "sum" or "none".
        group: a ProcessGroup, or a DeviceMesh of one dimension, whose processes each have some columns of both models' logits, one after
            the other and cut at the same classes; targets and results are the same on each, and all must call.

    Returns:
        :class:`DistillationOutput` in float32 (float64 for float64 logits). Metrics, means over tokens that count: ``kl``, ``reverse_kl``,
        ``agreement`` (a class is the largest of both), ``entropy``, ``teacher_entropy``, ``hard_loss``. No token that counts: all 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; the message names the argument.
        IndexError: a target outside the vocabulary (on the CPU).

    >>> import torch, fastloss
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(fastloss.distillation_loss(student, teacher).loss.item(), 4)
    0.1109
    """
    checks.is_floating("logits", logits)
    checks.is_floating("teacher_logits", teacher_logits)
    if logits.dim() < 1 or (group is None and logits.shape[-1] < 1):
        raise ShapeError(f"logits: expected shape [..., V], got {list(logits.shape)}")
    if teacher_logits.dim() < 1 or (group is None and teacher_logits.shape[-1] < 1):
        raise ShapeError(f"teacher_logits: expected shape [..., V], got {list(teacher_logits.shape)}")
    lead = logits.shape[:-1]
    checks.has_shape("teacher_logits", teacher_logits, (*lead, teacher_logits.shape[-1]))
    checks.same_device("teacher_logits", teacher_logits, logits.device)
    options = _options(
        divergence, interpolation, temperature, teacher_temperature, temperature_squared, hard_loss_coef, target, ignore_index, lead,
        logits, torch.promote_types(logits.dtype, teacher_logits.dtype),
    )  # fmt: skip
    classes = own = min(logits.shape[-1], teacher_logits.shape[-1])
    dtype, shards = torch.promote_types(logits.dtype, teacher_logits.dtype), None
    if group is not None:
        together = SharedCall(lead.numel(), 0, dtype, target, ignore_index)
        shards = of_group(group, logits.shape[-1], logits.device, together)
        shards = of_teacher(group, shards, teacher_logits.shape[-1], logits.device)
        classes, own = shards.vocab, shards.own
        if classes < 1:
            raise ShapeError("logits: expected at least one class, got 0")
    tokens = tokens_of(logits, ACC_DTYPES[dtype], target, ignore_index, token_weight, normalizer, reduction)
    call = resolve_call(
        "distillation_loss", backend, logits, teacher_logits, tokens.target, token_weight, options.row_scale,
        options.teacher_row_scale, dtype=dtype, has_operators=shards is None,
    )  # fmt: skip
    call.announce(**({} if shards is None else sent(shards, lead.numel(), options, ACC_DTYPES[dtype])))
    check_targets(tokens.target, classes, ignore_index)
    # [N, classes]: the wider vocabulary's padding is left out, and autograd gives it a gradient of 0.
    z, y = (x[..., :own].reshape(lead.numel(), own).to(dtype) for x in (logits, teacher_logits.detach()))
    if call.by_definition:
        if shards is not None:
            columns = whole(z.t(), shards), whole(y.t(), shards)
            z, y = (x.t() for x in columns if x is not None)
        loss, *statistics = reference.distillation_rows(z, y, tokens.target, options)
        return _output(loss, statistics, tokens, reduction, lead)
    z, y = _dense(z), _dense(y)
    if call.traced:
        loss, sums = compile_distillation.distillation(z, y, tokens.target, options, call.backend.name)
    else:
        loss, sums = Distillation.apply(z, y, tokens.target, call.backend, options, shards)
    return _output(loss, _columns(sums), tokens, reduction, lead)


@takes_dtensors("linear_weight")
@resolves_views
def linear_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    interpolation: float = 0.5,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    temperature_squared: bool = False,
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
    """:func:`distillation_loss` of ``input @ linear_weight.T`` and ``teacher_input @ teacher_weight.T``, a chunk of rows at a time.

    One GEMM for the teacher and three for the student (two where one of hidden states and weight asks for no gradient). With
    ``reduction="none"`` the backward makes each chunk's logits again: two GEMMs more.

    Args:
        input, linear_weight, linear_bias: the student's hidden states ``[..., D]``, vocabulary matrix ``[V, D]``, bias ``[V]``.
        teacher_input, teacher_weight, teacher_bias: the teacher's, ``[..., D']``, ``[V', D']``, ``[V']``; no gradient.
        chunk_size: rows whose logits are held at once. memory: "auto", "low" (fewer at once) or "fast".
        logits_dtype: as in :func:`linear_cross_entropy`, of both models. lora: as there, of the student.
        group: as in :func:`linear_cross_entropy`; the teacher's vocabulary is cut over the same processes, at the same classes. Where one
            is wider, its further classes are at the end of the last processes' shards.
        target and the rest: as in :func:`distillation_loss`.

    Returns:
        :class:`DistillationOutput`, as :func:`distillation_loss`.

    Raises:
        ValueError, TypeError, IndexError: as :func:`distillation_loss`.

    >>> import torch, fastloss
    >>> hidden, head = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> fastloss.linear_distillation_loss(hidden, head, hidden, head).loss.item()
    0.0
    """
    heads.check_head(input, linear_weight, linear_bias)
    input, linear_bias = heads.with_lora(input, linear_weight, linear_bias, lora)
    rows = checks.as_rows(input)
    frozen = _check_teacher(input, teacher_input, teacher_weight, teacher_bias)
    limits = heads.limits_of(
        chunk_size, memory, group, input, linear_weight, target, ignore_index, logits_dtype
    )
    dtype = heads.compute_dtype(input, linear_weight)
    teacher_dtype = heads.compute_dtype(teacher_input, teacher_weight)
    both, lead = torch.promote_types(dtype, teacher_dtype), input.shape[:-1]
    options = _options(
        divergence, interpolation, temperature, teacher_temperature, temperature_squared, hard_loss_coef, target, ignore_index, lead,
        input, both,
    )  # fmt: skip
    classes = own = min(linear_weight.shape[0], teacher_weight.shape[0])
    shards = limits.shards
    if shards is not None:
        shards = of_teacher(group, shards, teacher_weight.shape[0], input.device)
        limits, classes, own = limits._replace(shards=shards), shards.vocab, shards.own
    if classes < 1:
        raise ShapeError("linear_weight: expected at least one class, got 0")
    acc = ACC_DTYPES[both]
    tokens = tokens_of(input, acc, target, ignore_index, token_weight, normalizer, reduction)
    call = resolve_call(
        "linear_distillation_loss", backend, input, linear_weight, linear_bias, teacher_input, teacher_weight, teacher_bias,
        tokens.target, token_weight, options.row_scale, options.teacher_row_scale, dtype=both,
        unsupported=_other_precision(dtype, teacher_dtype),
    )  # fmt: skip
    # The wider vocabulary's padding is left out: no GEMM multiplies it, and autograd gives it a gradient of 0.
    weight = _first(linear_weight, own)
    bias = None if linear_bias is None else _first(linear_bias, own)
    theirs = (
        frozen,
        _first(teacher_weight.detach(), own),
        None if teacher_bias is None else teacher_bias.detach()[:own],
    )
    operands = (rows, weight, bias, *theirs)
    if call.by_definition:
        call.announce()
        check_targets(tokens.target, classes, ignore_index)
        z = _whole_logits(rows, weight, bias, dtype, limits)
        with torch.no_grad():
            y = _whole_logits(*theirs, teacher_dtype, limits)
        loss, *statistics = reference.distillation_rows(z.to(acc), y.to(acc), tokens.target, options)
        return _output(loss, statistics, tokens, reduction, lead)
    needs, per_row = heads.needs_of(input, linear_weight, linear_bias), reduction == "none"
    # A loss per token is multiplied by its upstream gradient in the backward; float16's gradients are divided there.
    factors = None if per_row else tokens.weights if dtype in LATE_DTYPES else tokens.weights * tokens.scale
    if call.traced:
        made = NOTHING if per_row else needs
        loss, sums = compile_distillation.linear_distillation(
            operands, tokens.target, factors, options, made, (dtype, teacher_dtype), limits, call.backend.name
        )
    else:
        student = heads.make_head(call.backend, rows, weight, bias, dtype, shards)
        teacher = heads.make_head(call.backend, *theirs, teacher_dtype)
        keep = heads.kept_rows(tokens.target, ignore_index)
        kept = heads.count_kept(rows.shape[0], keep)
        schedule = schedule_of(student, kept, needs, limits)
        call.announce(**details(student, teacher, schedule, kept, needs, per_row and bool(needs), options))
        check_targets(tokens.target, classes, ignore_index)
        run = _Run(call.backend, options, dtype, teacher_dtype, schedule, keep, needs, per_row, shards)
        loss, sums = LinearDistillation.apply(*operands, tokens.target, factors, run)
    if per_row:
        return _output(loss, _columns(sums), tokens, reduction, lead)
    return DistillationOutput(
        loss * tokens.scale if dtype in LATE_DTYPES else loss, means(METRICS, _columns(sums), tokens)
    )


def _whole_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, limits: Limits
) -> Tensor:
    """For the definition."""
    all_weight = whole(weight, limits.shards)
    assert all_weight is not None
    return heads.defined_logits(hidden, all_weight, whole(bias, limits.shards), dtype, limits.float_logits)


def _first(x: Tensor, classes: int) -> Tensor:
    return x if x.shape[0] == classes else x[:classes]


def _other_precision(dtype: torch.dtype, teacher_dtype: torch.dtype) -> str:
    """Why no kernel can compare the two models; empty if one can."""
    if ACC_DTYPES[dtype] == ACC_DTYPES[teacher_dtype]:
        return ""
    return f"logits in {dtype} and {teacher_dtype} are compared by the definition"


@dataclass(frozen=True)
class Tokens:
    """What a call's tokens are, flat."""

    target: Tensor | None  # int64 [N]
    valid: Tensor  # bool [N]
    weights: Tensor  # acc [N]: the tokens' own, 0 where they do not count
    scale: Tensor  # acc, 0-d: one over the normalizer


def _options(
    divergence: str,
    interpolation: float,
    temperature: Number,
    teacher_temperature: Number | None,
    temperature_squared: bool,
    hard_loss_coef: float,
    target: Tensor | None,
    ignore_index: int,
    lead: torch.Size,
    like: Tensor,
    dtype: torch.dtype,
) -> DistillationOptions:
    """``lead``: the shape of the tokens, which may have a temperature each; ``dtype``: the one in which both models are compared."""
    checks.is_one_of("divergence", divergence, DISTILLATION_DIVERGENCES)
    w = checks.number("interpolation", interpolation, low=0.0, high=1.0)

    def scales(name: str, t: Number) -> tuple[float, Tensor | None]:
        if isinstance(t, Tensor):
            return 1.0, checks.row_scale(t, lead, like, name).to(ACC_DTYPES[dtype])
        return 1.0 / checks.number(name, t, low=0.0, open_low=True), None

    student = scales("temperature", temperature)
    teacher = student if teacher_temperature is None else scales("teacher_temperature", teacher_temperature)
    coef = checks.number("hard_loss_coef", hard_loss_coef, low=0.0)
    if coef and target is None:
        raise ValueError("hard_loss_coef: expected 0 where target is None")
    name = at_the_end(divergence, w)
    code = DISTILLATION_DIVERGENCES.index(name)
    factor, row_factor = squared(temperature, student[1]) if temperature_squared else (1.0, None)
    return DistillationOptions(
        code, w, student[0], teacher[0], factor, coef, int(ignore_index), student[1], teacher[1], row_factor
    )


def squared(temperature: Number, row_scale: Tensor | None) -> tuple[float, Tensor | None]:
    """(T² of all tokens, and what multiplies it for each ``[N]``). ``row_scale``: one over each token's."""
    if isinstance(temperature, Tensor):
        assert row_scale is not None
        return 1.0, row_scale.square().reciprocal()
    t = float(temperature)  # one that changes under torch.compile stays symbolic
    return t * t, None


# A divergence at an end of its interpolation is the KL that it tends to.
_AT_0 = {
    "jsd": "forward_kl",
    "alpha": "reverse_kl",
    "skewed_forward_kl": "forward_kl",
    "skewed_reverse_kl": "reverse_kl",
}
_AT_1 = {"jsd": "reverse_kl", "alpha": "forward_kl"}


def at_the_end(divergence: str, interpolation: float) -> str:
    """The divergence that ``divergence`` is at this interpolation. (A number that changes under torch.compile is no key.)"""
    if interpolation == 0.0:
        return _AT_0.get(divergence, divergence)
    if interpolation == 1.0:
        return _AT_1.get(divergence, divergence)
    return divergence


def tokens_of(
    like: Tensor,
    acc: torch.dtype,
    target: Tensor | None,
    ignore_index: int,
    token_weight: Tensor | None,
    normalizer: Any,
    reduction: str,
    counts: Tensor | None = None,
) -> Tokens:
    """Of ``like [..., any]``. ``counts``: bool ``[N]``, which tokens do where there is no target; None: all."""
    checks.is_one_of("reduction", reduction, checks.REDUCTIONS)
    lead, device = tuple(like.shape[:-1]), like.device
    valid = torch.ones(lead, dtype=torch.bool, device=device).reshape(-1) if counts is None else counts
    if target is not None:
        checks.index_target("target", target, lead, device)
        target = target.reshape(-1).contiguous()
        valid = target != ignore_index
    weights = valid.to(acc)
    if token_weight is not None:
        checks.is_floating("token_weight", token_weight)
        checks.has_shape("token_weight", token_weight, lead)
        checks.same_device("token_weight", token_weight, device)
        weights = torch.where(valid, token_weight.detach().to(acc).reshape(-1), 0.0)
    divisor = checks.normalizer_value(normalizer, reduction, device)
    scale = torch.ones((), dtype=acc, device=device)
    if divisor is not None:
        scale = scale / divisor
    elif reduction == "mean":
        scale = scale / valid.sum().clamp(min=1)
    return Tokens(target, valid, weights, scale)


def _check_teacher(input: Tensor, teacher_input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The teacher's rows ``[N, D']``, checked under their own names."""
    checks.is_floating("teacher_input", teacher_input)
    checks.is_floating("teacher_weight", weight)
    checks.has_shape("teacher_input", teacher_input, (*input.shape[:-1], teacher_input.shape[-1]))
    checks.same_device("teacher_input", teacher_input, input.device)
    width = teacher_input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ShapeError(f"teacher_weight: expected shape [V, {width}], got {list(weight.shape)}")
    checks.same_device("teacher_weight", weight, input.device)
    if weight.dtype != teacher_input.dtype and not checks.autocasts(input.device.type):
        raise ShapeError(
            f"teacher_weight: expected {teacher_input.dtype} as teacher_input, got {weight.dtype}"
        )
    if bias is not None:
        checks.is_floating("teacher_bias", bias)
        checks.has_shape("teacher_bias", bias, (weight.shape[0],))
        checks.same_device("teacher_bias", bias, input.device)
    return checks.as_rows(teacher_input.detach())


def _output(
    loss: Tensor, statistics: Sequence[Tensor], tokens: Tokens, reduction: str, lead: torch.Size
) -> DistillationOutput:
    """``loss [N]``, each token's; ``statistics``: those of DISTILLATION_SUMS after the loss."""
    value = loss * tokens.weights
    value = value.reshape(lead) if reduction == "none" else value.sum() * tokens.scale
    return DistillationOutput(value, means(METRICS, statistics, tokens))


def means(names: Sequence[str], statistics: Sequence[Tensor], tokens: Tokens) -> dict[str, Tensor]:
    """The metrics: of each statistic the mean over the tokens that count."""
    count = tokens.valid.sum().clamp(min=1)
    return {name: x.detach().sum() / count for name, x in zip(names, statistics, strict=True)}


def _columns(sums: Tensor) -> list[Tensor]:
    """The metrics' columns of the sums ``[N, 8]``."""
    return [sums[:, DISTILLATION_SUMS.index(name)] for name in METRICS]


def _dense(rows: Tensor) -> Tensor:
    """``[N, V]`` whose rows a kernel can read."""
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _again(ctx: Any) -> Any:
    logits, teacher, target, *_ = ctx.saved_tensors
    _, options, shards = ctx.call
    heads.again_only_whole(shards)
    return [reference.distillation_rows(logits, teacher, target, options).loss, None], [logits]


class Distillation(torch.autograd.Function):
    """(logits, teacher's logits, target) -> (loss ``[N]``, sums ``[N, 8]``, which are detached)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        backend: Backend,
        options: DistillationOptions,
        shards: Shards | None = None,
    ) -> Any:
        if shards is None:
            parts = log_sums(backend, logits, teacher, target, options)
            sums = backend.row_divergence(
                logits, teacher, target, options,
                lse_parts=parts.student, teacher_lse_parts=parts.teacher, hard_lse_parts=parts.hard,
            )  # fmt: skip
        else:
            columns = Columns(shards, backend, logits.detach(), teacher)
            parts, sums = sums_of_columns(columns, target, options)
        ctx.call = backend, options, shards
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, *savable(teacher), target, *parts, sums[:, SLOPE].contiguous())
        ctx.mark_non_differentiable(sums)
        return sums[:, 0].clone(), sums

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> Any:
        backend, options, shards = ctx.call
        logits, teacher, target, student_parts, teacher_parts, hard_parts, slopes = ctx.saved_tensors
        none = (None,) * 5
        if upstream is None:
            return (None, *none)
        out = new_gradient(logits.shape, logits.dtype, logits.device)
        if shards is not None:
            columns = Columns(shards, backend, logits.detach(), teacher)
            parts = LogSums(student_parts, teacher_parts, hard_parts)
            factors = upstream.to(slopes.dtype).contiguous()
            gradient_of_columns(columns, target, options, parts, slopes, factors, out)
            return (out, *none)
        backend.row_divergence_grad(
            logits, teacher, target, options, lse_parts=student_parts, teacher_lse_parts=teacher_parts,
            slopes=slopes, factors=upstream.to(slopes.dtype).contiguous(), out=out, hard_lse_parts=hard_parts,
        )  # fmt: skip
        return (out, *none)


@dataclass(frozen=True)
class _Run:
    """What forward and backward need beside the tensors."""

    backend: Backend
    options: DistillationOptions
    dtype: torch.dtype  # of the student's GEMMs
    teacher_dtype: torch.dtype
    schedule: Schedule
    keep: Tensor | None  # the rows that are computed; None: all
    needs: Needs
    per_row: bool
    shards: Shards | None = None

    def heads(self, *operands: Any) -> tuple[Head, Head]:
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = operands
        return (
            heads.make_head(self.backend, hidden, weight, bias, self.dtype, self.shards),
            heads.make_head(self.backend, teacher_hidden, teacher_weight, teacher_bias, self.teacher_dtype),
        )


def _linear_again(ctx: Any) -> Any:
    run: _Run = ctx.run
    heads.again_only_whole(run.shards)
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, factors = ctx.saved_tensors
    logits = heads.defined_logits(hidden, weight, bias, run.dtype, run.schedule.float_logits)
    with torch.no_grad():
        theirs = teacher_hidden, teacher_weight, teacher_bias
        teacher = heads.defined_logits(*theirs, run.teacher_dtype, run.schedule.float_logits)
    loss = reference.distillation_rows(logits, teacher, target, run.options).loss
    return [loss if run.per_row else (loss * factors).sum(), None], [hidden, weight, bias]


def gradients_ahead(
    ctx: Any,
    upstream: Tensor,
    operands: Sequence[Tensor | None],
    factors: Tensor | None,
    again: Callable[[Tensor], Grads],
) -> Grads:
    """Of a head's hidden states, weight and bias: what the forward made (``ctx.grads``), times the upstream gradient; else
    ``again`` makes them, of each row's loss times a factor."""
    hidden, weight, bias = operands
    assert hidden is not None and weight is not None
    backend = ctx.run.backend
    grads, ctx.grads = ctx.grads, None
    scale = upstream_scale(backend, upstream, None) if ctx.ahead else None
    if not ctx.ahead:
        grads = again(upstream.contiguous())
    elif grads is None:  # retain_graph: the first backward gave the buffers away
        assert factors is not None
        grads = again(factors)
    return heads.finish(grads, heads.leaf_dtypes(hidden, weight, bias), backend, scale)


class LinearDistillation(torch.autograd.Function):
    """(the student's operands, the teacher's, target, factors ``[N]``) -> (Σ factors · loss, or the loss ``[N]``; sums)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        target: Tensor | None,
        factors: Tensor | None,
        run: _Run,
    ) -> Any:
        operands = hidden, weight, bias, *savable(teacher_hidden, teacher_weight, teacher_bias)
        ctx.run, ctx.ahead = run, not run.per_row
        needs = run.needs if ctx.ahead else NOTHING
        sums, grads = of_heads(
            *run.heads(*operands), needs, target, factors, run.options, run.schedule, run.keep
        )
        ctx.late = run.dtype in LATE_DTYPES
        ctx.grads = (
            grads if ctx.late else heads.finish(grads, heads.leaf_dtypes(hidden, weight, bias), run.backend)
        )
        ctx.save_for_backward(*operands, target, factors)
        ctx.mark_non_differentiable(sums)
        loss = sums[:, 0]
        if factors is None:
            return loss.clone(), sums
        return run.backend.sum_rows(loss * factors, WHOLE), sums

    @staticmethod
    @differentiable_again(_linear_again)
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        run: _Run = ctx.run
        *operands, target, factors = ctx.saved_tensors

        def again(factors: Tensor) -> Grads:
            pair = run.heads(*operands)
            return of_heads(*pair, run.needs, target, factors, run.options, run.schedule, run.keep)[1]

        return (*gradients_ahead(ctx, upstream, operands[:3], factors, again), *[None] * 6)
