"""distillation_loss and linear_distillation_loss: a student learns a teacher's distribution over the vocabulary.

No backend has a kernel for them: the definition (reference/distillation.py) computes every call, in chunks of rows from hidden states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastloss import reference
from fastloss.engine import checks
from fastloss.engine.backend import resolve_call, tracing_reason
from fastloss.engine.checks import ShapeError
from fastloss.reference.distillation import DistillationRows
from fastloss.tables import ACC_DTYPES, DISTILLATION_DIVERGENCES, DistillationOptions

NO_KERNEL = "distillation has no kernel: the definition computes it"
CHUNK_BYTES = 16 << 20  # of one chunk's student logits in the accumulation dtype


class DistillationOutput(NamedTuple):
    """``loss`` (0-d, or per token with ``reduction="none"``) carries a gradient; ``metrics`` are detached 0-d tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    interpolation: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    temperature_squared: bool = False,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    hard_loss_coef: float = 0.0,
    normalizer: Any = None,
    reduction: str = "mean",
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
        temperature: T of both; ``teacher_temperature`` sets the teacher's apart.
        temperature_squared: multiplies the divergence by T², as arXiv:1503.02531 does; TRL and Liger do not.
        token_weight: a constant factor of each token's loss, float ``[...]``. The mean stays over tokens.
        hard_loss_coef: coefficient of the cross-entropy against ``target`` at temperature 1.
        normalizer: the sum is divided by it in place of the number of tokens that count.
        reduction: "mean", "sum" or "none".

    Returns:
        :class:`DistillationOutput` in float32 (float64 for float64 logits). Metrics, means over tokens that count: ``kl``, ``reverse_kl``,
        ``agreement`` (equal arg-max), ``entropy``, ``teacher_entropy``, ``hard_loss``. No token that counts: all 0.

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
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ShapeError(f"logits: expected shape [..., V], got {list(logits.shape)}")
    if teacher_logits.dim() < 1 or teacher_logits.shape[-1] < 1:
        raise ShapeError(f"teacher_logits: expected shape [..., V], got {list(teacher_logits.shape)}")
    lead = tuple(logits.shape[:-1])
    checks.has_shape("teacher_logits", teacher_logits, (*lead, teacher_logits.shape[-1]))
    checks.same_device("teacher_logits", teacher_logits, logits.device)
    options = _options(
        divergence,
        interpolation,
        temperature,
        teacher_temperature,
        temperature_squared,
        hard_loss_coef,
        target,
    )
    classes = min(logits.shape[-1], teacher_logits.shape[-1])
    tokens = _tokens(logits, lead, target, ignore_index, token_weight, normalizer, reduction, classes)
    resolve_call(
        "distillation_loss", backend, logits, teacher_logits, unsupported=NO_KERNEL, has_operators=False
    ).announce()
    count = tokens.valid.shape[0]
    z = logits.reshape(count, logits.shape[-1])
    y = teacher_logits.reshape(count, teacher_logits.shape[-1])
    rows = reference.distillation_rows(z, y, tokens.target, tokens.valid, options)
    return DistillationOutput(
        _reduced(rows.loss * tokens.factor, reduction, lead), _metrics(rows, tokens.valid)
    )


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
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    temperature_squared: bool = False,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    hard_loss_coef: float = 0.0,
    normalizer: Any = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    backend: str = "auto",
) -> DistillationOutput:
    """:func:`distillation_loss` of ``input @ linear_weight.T`` and ``teacher_input @ teacher_weight.T``, a chunk of rows at a time.

    One GEMM for the teacher and three for the student (two where one of hidden states and weight asks for no gradient). With
    ``reduction="none"``, float16, torch.compile or torch.func the backward makes each chunk's logits again: two GEMMs more.

    Args:
        input, linear_weight, linear_bias: the student's hidden states ``[..., D]``, vocabulary matrix ``[V, D]``, bias ``[V]``.
        teacher_input, teacher_weight, teacher_bias: the teacher's, ``[..., D']``, ``[V', D']``, ``[V']``; no gradient.
        chunk_size: rows whose logits are held at once (by default, what 16 MiB of logits in float32 hold).
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
    student = "input", input, "linear_weight", linear_weight, "linear_bias", linear_bias
    teacher = "teacher_input", teacher_input, "teacher_weight", teacher_weight, "teacher_bias", teacher_bias
    for head in (student, teacher):
        _check_head(*head)
    lead = tuple(input.shape[:-1])
    checks.has_shape("teacher_input", teacher_input, (*lead, teacher_input.shape[-1]))
    checks.same_device("teacher_input", teacher_input, input.device)
    checks.chunk_size_value(chunk_size)
    options = _options(
        divergence,
        interpolation,
        temperature,
        teacher_temperature,
        temperature_squared,
        hard_loss_coef,
        target,
    )
    classes = min(linear_weight.shape[0], teacher_weight.shape[0])
    tokens = _tokens(input, lead, target, ignore_index, token_weight, normalizer, reduction, classes)
    count = tokens.valid.shape[0]
    acc = ACC_DTYPES[input.dtype]
    chunk = chunk_size or max(1, CHUNK_BYTES // (linear_weight.shape[0] * acc.itemsize))
    call = resolve_call(
        "linear_distillation_loss", backend, input, linear_weight, unsupported=NO_KERNEL, has_operators=False
    )
    held = min(chunk, count)
    size = held * (
        linear_weight.shape[0] * input.element_size() + teacher_weight.shape[0] * teacher_input.element_size()
    )
    again = (
        reduction == "none"
        or input.dtype == torch.float16
        or call.traced
        or bool(tracing_reason(input, linear_weight, linear_bias))
    )
    wanted = [t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)]
    student_gemms = 1 + (wanted[0] + wanted[1] + again if torch.is_grad_enabled() and any(wanted) else 0)
    call.announce(gemms=1 + student_gemms + (again and student_gemms > 1), chunk_rows=held, buffer_bytes=size)
    x = input.reshape(count, input.shape[-1])
    frozen = teacher_input.detach().reshape(count, teacher_input.shape[-1])
    heads = (linear_weight, linear_bias, frozen, teacher_weight.detach())
    bias = None if teacher_bias is None else teacher_bias.detach()
    if not again and torch.is_grad_enabled() and any(wanted):
        loss, *rest = _Chunks.apply(x, *heads, bias, tokens, options, chunk)
        return DistillationOutput(loss, _metrics(DistillationRows(loss, *rest), tokens.valid))
    parts = []
    for start in range(0, max(count, 1), chunk):
        part = slice(start, start + chunk)
        label = None if tokens.target is None else tokens.target[part]
        arguments = (
            x[part],
            linear_weight,
            linear_bias,
            frozen[part],
            heads[3],
            bias,
            label,
            tokens.valid[part],
        )
        if torch.is_grad_enabled() and any(wanted):
            parts.append(checkpoint(_chunk_rows, *arguments, options, use_reentrant=False))
        else:
            parts.append(_chunk_rows(*arguments, options))
    rows = DistillationRows(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return DistillationOutput(
        _reduced(rows.loss * tokens.factor, reduction, lead), _metrics(rows, tokens.valid)
    )


class _Tokens(NamedTuple):
    target: Tensor | None
    valid: Tensor  # bool [N]
    factor: Tensor  # [N]: the token's weight over the normalizer


def _options(
    divergence: str,
    interpolation: float,
    temperature: float,
    teacher_temperature: float | None,
    temperature_squared: bool,
    hard_loss_coef: float,
    target: Tensor | None,
) -> DistillationOptions:
    checks.is_one_of("divergence", divergence, DISTILLATION_DIVERGENCES)
    t = checks.number("temperature", temperature, low=0.0, open_low=True)
    teacher = (
        t
        if teacher_temperature is None
        else checks.number("teacher_temperature", teacher_temperature, low=0.0, open_low=True)
    )
    coef = checks.number("hard_loss_coef", hard_loss_coef, low=0.0)
    if coef and target is None:
        raise ValueError("hard_loss_coef: expected 0 where target is None")
    return DistillationOptions(
        divergence,
        checks.number("interpolation", interpolation, low=0.0, high=1.0),
        t,
        teacher,
        t * t if temperature_squared else 1.0,
        coef,
    )


def _tokens(
    like: Tensor,
    lead: tuple[int, ...],
    target: Tensor | None,
    ignore_index: int,
    token_weight: Tensor | None,
    normalizer: Any,
    reduction: str,
    classes: int,
) -> _Tokens:
    checks.is_one_of("reduction", reduction, checks.REDUCTIONS)
    acc, device = ACC_DTYPES[like.dtype], like.device
    if target is None:
        valid = torch.ones(lead, dtype=torch.bool, device=device).reshape(-1)
    else:
        checks.index_target("target", target, lead, device)
        if checks.host_reads(target):
            checks.reject_bad_targets(target, classes, ignore_index)
        target = target.reshape(-1)
        valid = target != ignore_index
    factor = torch.ones(valid.shape, dtype=acc, device=device)
    if token_weight is not None:
        checks.is_floating("token_weight", token_weight)
        checks.has_shape("token_weight", token_weight, lead)
        checks.same_device("token_weight", token_weight, device)
        factor = token_weight.detach().to(acc).reshape(-1)
    divisor = checks.normalizer_value(normalizer, reduction, device)
    if divisor is not None:
        factor = factor / divisor
    elif reduction == "mean":
        factor = factor / valid.sum().clamp(min=1)
    return _Tokens(target, valid, torch.where(valid, factor, 0.0))


def _check_head(
    name: str, hidden: Tensor, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None
) -> None:
    checks.is_floating(name, hidden)
    checks.is_floating(weight_name, weight)
    if hidden.dim() < 1:
        raise ShapeError(f"{name}: expected shape [..., D], got []")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ShapeError(f"{weight_name}: expected shape [V, {hidden.shape[-1]}], got {list(weight.shape)}")
    others = [(weight_name, weight)]
    if bias is not None:
        checks.is_floating(bias_name, bias)
        checks.has_shape(bias_name, bias, (weight.shape[0],))
        others.append((bias_name, bias))
    for other, value in others:
        checks.same_device(other, value, hidden.device)
        if value.dtype != hidden.dtype:
            raise TypeError(f"{other}: expected {name}'s dtype {hidden.dtype}, got {value.dtype}")


def _reduced(loss: Tensor, reduction: str, lead: tuple[int, ...]) -> Tensor:
    return loss.reshape(lead) if reduction == "none" else loss.sum()


def _metrics(rows: DistillationRows, valid: Tensor) -> dict[str, Tensor]:
    count = valid.sum().clamp(min=1)
    return {name: getattr(rows, name).sum() / count for name in DistillationRows._fields[1:]}


def _chunk_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    frozen: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    valid: Tensor,
    options: DistillationOptions,
) -> DistillationRows:
    logits = torch.nn.functional.linear(x, weight, bias)
    teacher_logits = torch.nn.functional.linear(frozen, teacher_weight, teacher_bias)
    return reference.distillation_rows(logits, teacher_logits, target, valid, options)


class _Chunks(torch.autograd.Function):
    """The reduced loss and per-row statistics; the gradients are made beside it, from the chunk's logits while they are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Tensor, teacher_weight: Tensor,
                teacher_bias: Tensor | None, tokens: _Tokens, options: DistillationOptions, chunk: int) -> Any:  # fmt: skip
        acc = ACC_DTYPES[x.dtype]
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = torch.zeros_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=acc) if need_weight else None
        dbias = torch.zeros(weight.shape[0], dtype=acc, device=x.device) if need_bias else None
        total = torch.zeros((), dtype=acc, device=x.device)
        parts = []
        for start in range(0, max(x.shape[0], 1), chunk):
            part = slice(start, start + chunk)
            logits = torch.nn.functional.linear(x[part], weight, bias).requires_grad_()
            teacher_logits = torch.nn.functional.linear(frozen[part], teacher_weight, teacher_bias)
            label = None if tokens.target is None else tokens.target[part]
            with torch.enable_grad():
                rows = reference.distillation_rows(logits, teacher_logits, label, tokens.valid[part], options)
                loss = (rows.loss * tokens.factor[part]).sum()
            (d,) = torch.autograd.grad(loss, logits)
            total += loss.detach()
            parts.append(rows[1:])
            if dx is not None:
                dx[part] = d @ weight
            if dweight is not None:
                dweight += d.T @ x[part]
            if dbias is not None:
                dbias += d.sum(0, dtype=acc)
        ctx.save_for_backward(dx, dweight, dbias)
        ctx.dtype = x.dtype
        statistics = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*statistics)
        return (total, *statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grads = (None if g is None else (g * grad).to(ctx.dtype) for g in ctx.saved_tensors)
        return (*grads, None, None, None, None, None, None)
