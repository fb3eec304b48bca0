"""kto_loss and bco_loss: responses that are good or bad on their own, from log-probs or from the head."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import autograd, checks
from fastloss.engine import backend as backends
from fastloss.engine import head as heads
from fastloss.engine import head_groups as groups
from fastloss.engine.autograd import differentiable_again, segment_sum
from fastloss.engine.backend import resolve_call, resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.engine.contract import Backend
from fastloss.engine.definition import REFERENCE
from fastloss.engine.direct import DirectUnpaired
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.jagged import takes_jagged
from fastloss.engine.native import cpu_backend
from fastloss.engine.sequences import tokens_of
from fastloss.losses.pair_terms import constant
from fastloss.losses.token_stats import TokenStats, row_options, stats_from
from fastloss.tables import ACC_DTYPES, UNPAIRED_TERMS, Number, UnpairedConstants, UnpairedOptions


class UnpairedOutput(NamedTuple):
    """``loss`` alone carries a gradient; the rest is detached.

    Attributes:
        loss: 0-d, or ``[B]`` with ``reduction="none"``.
        rewards: ``beta · (log p - log p_ref)``, ``[B]``.
        logps: Σ log p of the responses, ``[B]``.
        metrics: 0-d tensors under TRL's names; "chosen" are the desirable responses. A mean over none is 0.
    """

    loss: Tensor
    rewards: Tensor
    logps: Tensor
    metrics: dict[str, Tensor]


@takes_jagged()
@resolves_views
def kto_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    desirable: Tensor,
    *,
    kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    kl: float | Tensor | None = None,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> UnpairedOutput:
    r"""KTO (arXiv:2402.01306) from log-ratios ``x = log π(y|x) - log π_ref(y|x)``, and APO-zero without pairs.

    .. math:: \lambda_D (1 - \sigma(\beta(x - kl))) \;\text{(desirable)}, \qquad
              \lambda_U (1 - \sigma(\beta(kl - x))) \;\text{(undesirable)}

    Args:
        logps: Σ log p of each response, ``[B]``; or token log-probs ``[B, T]`` with ``mask``, or packed ``[N]`` with
            ``cu_seqlens`` ``[B + 1]``.
        ref_logps: the reference model's, ``[B]`` or of ``logps``'s shape; None is a uniform reference.
        desirable: bool ``[B]``.
        kl_logps, ref_kl_logps: Σ log p of mismatched responses under both models, any one length: their mean difference, at least
            0, is ``kl``.
        kl: the estimate itself, a number or a 0-d tensor (a mean over all ranks). It's a constant.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv:2408.06266), which has no ``kl``.
        desirable_weight, undesirable_weight: λ_D, λ_U.
        weights: a constant factor of each response's loss, ``[B]``.
        token_weight: a constant factor of each token's log-prob, of the token log-probs' shape, in both models' sums (a ``ref_logps [B]`` is
            taken as sums that have it); that of a masked token may be anything.

    Returns:
        :class:`UnpairedOutput`, in float32 (float64 for float64 log-probs). No responses: loss 0.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message names the argument.

    >>> import torch, fastloss
    >>> logps, ref = torch.tensor([-10.0, -20.0]), torch.tensor([-10.0, -20.0])
    >>> fastloss.kto_loss(logps, ref, torch.tensor([True, False]), kl=0.0).loss
    tensor(0.5000)
    """
    if weights is None and mask is None and cu_seqlens is None and token_weight is None:
        shift = (kl_logps, ref_kl_logps) if kl is None and kl_logps is not None else kl
        given = (kl_logps is None) == (ref_kl_logps is None) and (kl is None or kl_logps is None)
        needs = loss_type == "kto"
        numbers = beta, desirable_weight, undesirable_weight
        if (
            given
            and needs == (shift is not None)
            and _is_direct(logps, ref_logps, desirable, shift, numbers, backend)
        ):
            return _direct(loss_type, numbers, reduction, logps, ref_logps, desirable, shift)
    checks.is_one_of("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    options = _checked(loss_type, beta, desirable_weight, undesirable_weight, reduction)
    return _unpaired(
        "kto_loss",
        options,
        logps,
        ref_logps,
        desirable,
        lambda acc, device: _kto_kl(loss_type, kl, kl_logps, ref_kl_logps, acc, device),
        weights,
        mask,
        cu_seqlens,
        token_weight,
        backend,
    )


@takes_jagged()
@resolves_views
def bco_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    desirable: Tensor,
    *,
    delta: float | Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> UnpairedOutput:
    r"""BCO (arXiv:2404.04656): a classifier of good and bad responses whose logit is the reward, less a shift.

    .. math:: -\log\sigma(\beta x - \delta) \;\text{(desirable)}, \qquad -\log\sigma(-(\beta x - \delta)) \;\text{(undesirable)}

    Args:
        delta: the shift δ; None is the mean reward of the batch, a constant. ``metrics["delta"]`` has it, for a running
            mean over steps or ranks.
        weights: a constant factor of each response's loss, ``[B]``: the density ratio of the paper's underlying
            distribution matching.

    The other arguments are those of :func:`kto_loss`.

    >>> import torch, fastloss
    >>> logps = torch.tensor([-10.0, -20.0])
    >>> round(fastloss.bco_loss(logps, logps, torch.tensor([True, False])).loss.item(), 4)
    0.6931
    """
    plain = weights is None and mask is None and cu_seqlens is None and token_weight is None
    numbers = beta, desirable_weight, undesirable_weight
    if plain and _is_direct(logps, ref_logps, desirable, delta, numbers, backend):
        return _direct("bco", numbers, reduction, logps, ref_logps, desirable, delta)
    options = _checked("bco", beta, desirable_weight, undesirable_weight, reduction)
    return _unpaired(
        "bco_loss",
        options,
        logps,
        ref_logps,
        desirable,
        lambda acc, device: _constant_scalar("delta", delta, acc, device),
        weights,
        mask,
        cu_seqlens,
        token_weight,
        backend,
    )


@dataclass(frozen=True)
class _Options:
    """The checked options of a call."""

    name: str  # of UNPAIRED_TERMS
    beta: float
    desirable_weight: float
    undesirable_weight: float
    reduction: str

    def of_batch(self, total: int) -> UnpairedOptions:
        """The record and the constants for the kernels: the mean's divisor is in the weights."""
        scale = 1.0 / max(total, 1) if self.reduction == "mean" else 1.0
        return UnpairedOptions(
            term=UNPAIRED_TERMS.index(self.name),
            beta=self.beta,
            desirable_weight=self.desirable_weight * scale,
            undesirable_weight=self.undesirable_weight * scale,
        )


def _checked(
    name: str, beta: float, desirable_weight: float, undesirable_weight: float, reduction: str
) -> _Options:
    checks.is_one_of("reduction", reduction, checks.REDUCTIONS)
    return _Options(
        name=name,
        beta=checks.number("beta", beta, low=0.0, open_low=True),
        desirable_weight=checks.number("desirable_weight", desirable_weight, low=0.0),
        undesirable_weight=checks.number("undesirable_weight", undesirable_weight, low=0.0),
        reduction=reduction,
    )


# --- the short way: whole responses on the CPU, one native call that makes loss, gradient and metrics -----------------

_cpu = cpu_backend()
_NUMBERS = (float, int)
_is_compiling = torch.compiler.is_compiling


def _is_direct(
    logps: Any, ref: Any, desirable: Any, shift: Any, numbers: tuple[Any, Any, Any], backend: str
) -> bool:
    """Whether :func:`_direct` takes the call; if not, the general path checks it and says what is wrong."""
    if (
        _is_compiling()
        or _cpu.direct is None
        or type(logps) not in backends.PLAIN
        or not logps.is_cpu
        or logps.dtype not in (torch.float32, torch.float64)
        or logps.dim() != 1
        or not logps.numel()
        or any(type(number) not in _NUMBERS for number in numbers)
        or not backends.are_alike(logps, logps, ref)
        or type(desirable) not in backends.PLAIN
        or desirable.dtype is not torch.bool
        or not desirable.is_cpu
        or desirable.shape != logps.shape
        or not desirable.is_contiguous()
        or not backends.is_direct(backend)
    ):
        return False
    if type(shift) is tuple:
        first, second = shift
        return (
            type(first) in backends.PLAIN
            and first.dtype is logps.dtype
            and first.dim() == 1
            and second is not None
            and backends.are_alike(first, first, second)
        )
    if shift is None or type(shift) in _NUMBERS:
        return True
    return (
        type(shift) in backends.PLAIN and shift.is_cpu and shift.dtype is logps.dtype and shift.numel() == 1
    )


@functools.lru_cache(maxsize=64, typed=True)
def _direct_options(
    name: str, numbers: tuple[float, float, float], reduction: str, count: int, kl: float | None
) -> DirectUnpaired:
    """The native options of a direct call, checked."""
    checks.is_one_of("loss_type", name, UNPAIRED_TERMS)
    if kl is not None:
        checks.number("delta" if name == "bco" else "kl", kl)
    return DirectUnpaired(_checked(name, *numbers, reduction).of_batch(count))


def _direct(
    name: str,
    numbers: tuple[float, float, float],
    reduction: str,
    logps: Tensor,
    ref: Tensor | None,
    desirable: Tensor,
    shift: Any,
) -> UnpairedOutput:
    number = shift if type(shift) in _NUMBERS else None
    native = _direct_options(name, numbers, reduction, logps.shape[0], number)
    rewards, metrics = torch.empty_like(logps), logps.new_empty(8)
    given = native, reduction == "none", shift, rewards, metrics
    if logps.requires_grad and torch.is_grad_enabled():
        loss = autograd.made_in_forward(logps, None, _run_direct, _direct_defined, given, (ref, desirable))
    else:
        loss, _ = _run_direct(given, logps, None, ref, desirable)
    good, bad, margin, good_logps, bad_logps, goods, bads, kl = metrics.unbind()
    named = {
        "rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": margin, "logps/chosen": good_logps,
        "logps/rejected": bad_logps, "count/chosen": goods, "count/rejected": bads, "delta" if name == "bco" else "kl": kl,
    }  # fmt: skip
    return UnpairedOutput(loss, rewards, logps.detach(), named)


def _run_direct(given: Any, logps: Tensor, _: None, ref: Tensor | None, desirable: Tensor) -> Any:
    native, per_response, shift, rewards, metrics = given
    d_logps = torch.empty_like(logps)
    loss = torch.empty_like(logps) if per_response else logps.new_empty(())
    native.run(logps, ref, desirable, shift, per_response, loss, d_logps, rewards, metrics)
    return loss, (d_logps, None)


def _direct_defined(given: Any, logps: Tensor, _: None, ref: Tensor | None, desirable: Tensor) -> Tensor:
    native, per_response, *_, metrics = given
    kl = metrics[7:].detach()
    constants = UnpairedConstants(desirable=desirable.to(torch.uint8), ref=ref, kl=kl)
    loss = REFERENCE.unpaired_loss(logps, constants, native.options).loss
    return loss if per_response else loss.sum()


# --- the general way ---------------------------------------------------------------------------------------------------


def _unpaired(
    function: str,
    o: _Options,
    logps: Tensor,
    ref_logps: Tensor | None,
    desirable: Tensor,
    shift: Any,
    weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    token_weight: Tensor | None,
    backend: str,
) -> UnpairedOutput:
    checks.is_floating("logps", logps)
    acc = ACC_DTYPES[logps.dtype]
    x = logps.to(acc)
    tokens = None
    if logps.dim() != 1 or cu_seqlens is not None:
        tokens = tokens_of("", x, mask, cu_seqlens, acc)
    for name, given in (("mask", mask), ("token_weight", token_weight)):
        if tokens is None and given is not None:
            raise ShapeError(
                f"{name}: expected token log-probs [B, T], got logps of shape {list(logps.shape)}"
            )
    own = None
    if tokens is not None and token_weight is not None:
        checks.token_weight("token_weight", token_weight, tuple(logps.shape), x.device)
        own = tokens.weighted(token_weight.detach().reshape(-1))
    count = x.shape[0] if tokens is None else tokens.layout.count
    good = _labels(desirable, count, x.device)
    weight = constant("weights", weights, count, acc, x.device)
    kl = shift(acc, x.device)
    call = resolve_call(
        function,
        backend,
        x,
        ref_logps,
        desirable,
        weights,
        mask,
        cu_seqlens,
        kl,
        token_weight,
        has_operators=False,
    )
    call.announce()
    if tokens is not None:
        x = groups.sum_tokens(call.backend, tokens, x, own)
    if ref_logps is None or tokens is None or ref_logps.shape != logps.shape:
        ref = constant("ref_logps", ref_logps, count, acc, x.device)
    else:
        ref = groups.sum_tokens(call.backend, tokens, ref_logps.detach().to(acc), own)
    if kl is None and o.name == "bco":
        ratio = x.detach() if ref is None else x.detach() - ref
        kl = (o.beta * ratio.sum() / max(count, 1)).reshape(1)
    constants = UnpairedConstants(desirable=good, ref=ref, weight=weight, kl=kl)
    loss, rewards, sums = _launch(call.backend, x, constants, o.of_batch(count), o.reduction == "none")
    return UnpairedOutput(loss, rewards, x.detach(), _metrics(o, sums, count, kl))


def _again(ctx: Any) -> Any:
    logps, _ = ctx.saved_tensors
    constants, options, per_response = ctx.given
    loss = REFERENCE.unpaired_loss(logps, constants, options).loss
    return [loss if per_response else loss.sum()], [logps]


class _UnpairedLoss(torch.autograd.Function):
    """(logps) -> loss of each response, or their sum; the gradient is made in the forward, in one launch."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        backend: Backend,
        constants: UnpairedConstants,
        options: UnpairedOptions,
        per_response: bool,
        rest: list[Tensor],
    ) -> Tensor:
        out = backend.unpaired_loss(logps.contiguous(), constants, options)
        rest.extend((out.reward, out.sums))  # without a gradient
        ctx.given = constants, options, per_response
        ctx.save_for_backward(logps, out.d_logps)
        return out.loss if per_response else out.sums[0].clone()

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return (ctx.saved_tensors[1] * upstream, *[None] * 5)


def _launch(
    backend: Backend,
    logps: Tensor,
    constants: UnpairedConstants,
    options: UnpairedOptions,
    per_response: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: (loss of each response, or their sum; rewards; sums)."""
    if backend.differentiable:
        out = backend.unpaired_loss(logps, constants, options)
        return out.loss if per_response else out.loss.sum(), out.reward, out.sums
    rest: list[Tensor] = []
    loss = _UnpairedLoss.apply(logps, backend, constants, options, per_response, rest)
    return loss, rest[0], rest[1]


def _metrics(o: _Options, sums: Tensor, count: int, kl: Tensor | None) -> dict[str, Tensor]:
    _, good, good_reward, bad_reward, good_logps, bad_logps, _ = sums.unbind()
    bad = count - good
    good_mean, bad_mean = good_reward / good.clamp(min=1), bad_reward / bad.clamp(min=1)
    out = {
        "rewards/chosen": good_mean,
        "rewards/rejected": bad_mean,
        "rewards/margins": torch.where((good > 0) & (bad > 0), good_mean - bad_mean, 0.0),
        "logps/chosen": good_logps / good.clamp(min=1),
        "logps/rejected": bad_logps / bad.clamp(min=1),
        "count/chosen": good,
        "count/rejected": bad,
    }
    if o.name == "bco":
        assert kl is not None
        out["delta"] = kl.reshape(())
    else:
        out["kl"] = sums.new_zeros(()) if kl is None else kl.reshape(())
    return out


def _labels(desirable: Tensor, count: int, device: torch.device) -> Tensor:
    checks.is_tensor("desirable", desirable)
    if desirable.dtype != torch.bool or tuple(desirable.shape) != (count,):
        raise ShapeError(
            f"desirable: expected bool of shape [{count}], got {desirable.dtype} of shape {list(desirable.shape)}"
        )
    checks.same_device("desirable", desirable, device)
    return desirable.to(torch.uint8).contiguous()


def _constant_scalar(
    name: str, value: float | Tensor | None, acc: torch.dtype, device: torch.device
) -> Tensor | None:
    """acc [1] on the device, detached."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        # A product, which takes a number that changes under torch.compile.
        return torch.ones(1, dtype=acc, device=device) * checks.number(name, value)
    if value.numel() != 1:
        raise ShapeError(f"{name}: expected a number or a 0-d tensor, got shape {list(value.shape)}")
    return value.detach().to(device=device, dtype=acc).reshape(1)


def _kto_kl(
    loss_type: str,
    kl: float | Tensor | None,
    kl_logps: Tensor | None,
    ref_kl_logps: Tensor | None,
    acc: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    pair = kl_logps, ref_kl_logps
    if loss_type == "apo_zero_unpaired":
        for name, value in zip(("kl", "kl_logps", "ref_kl_logps"), (kl, *pair), strict=True):
            if value is not None:
                raise ValueError(
                    f"{name}: expected None for loss_type 'apo_zero_unpaired', which has no KL term"
                )
        return None
    if (pair[0] is None) != (pair[1] is None) or (kl is None) == (pair[0] is None):
        raise ValueError("kl: expected either kl, or both kl_logps and ref_kl_logps, for loss_type 'kto'")
    if kl is not None:
        return _constant_scalar("kl", kl, acc, device)
    assert kl_logps is not None and ref_kl_logps is not None
    checks.is_floating("kl_logps", kl_logps)
    checks.is_floating("ref_kl_logps", ref_kl_logps)
    checks.has_shape("ref_kl_logps", ref_kl_logps, tuple(kl_logps.shape))
    if kl_logps.dim() != 1:
        raise ShapeError(f"kl_logps: expected shape [B], got {list(kl_logps.shape)}")
    difference = kl_logps.detach().to(acc) - ref_kl_logps.detach().to(acc)
    return (difference.sum() / max(difference.numel(), 1)).clamp(min=0).reshape(1)


@takes_jagged(TokenStats)
@takes_dtensors("linear_weight")
@resolves_views
def linear_kto_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    desirable: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    kl: float | Tensor | None = None,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: Number = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_metrics: bool = True,
    chunk_size: int | None = None,
    memory: str = "auto",
    group: Any = None,
    logits_dtype: torch.dtype | None = None,
    lora: Any = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    """:func:`kto_loss` of ``input @ linear_weight.T + linear_bias``, without ever holding those logits.

    GEMMs as in :func:`linear_preference_loss`, chunked by whole sequences.

    Args:
        input: hidden states ``[B, T, D]``, or packed ``[N, D]`` with ``cu_seqlens`` ``[B + 1]``.
        target: int64 ``[B, T]`` or ``[N]``; ``ignore_index`` on prompts and padding.
        desirable: bool ``[B]``.
        ref_input, ref_weight, ref_bias: the reference model's; or its log-probs ``ref_logps`` ``[B]``; neither: uniform.
        chunk_size, memory, group, logits_dtype, lora: as in :func:`linear_preference_loss`.
        token_weight: as in :func:`linear_preference_loss`.
        kl_logps, ref_kl_logps, kl: as in :func:`kto_loss`; :func:`linear_token_stats` gives the log-probs at 1 GEMM.
        return_stats: also a :class:`TokenStats` of ``target``'s shape, as in :func:`linear_preference_loss`.

    Returns:
        UnpairedOutput, or with ``return_stats`` the pair (UnpairedOutput, TokenStats).

    >>> import torch, fastloss
    >>> hidden, weight, target = torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.zeros(2, 3, dtype=torch.long)
    >>> out = fastloss.linear_kto_loss(hidden, weight, target, torch.tensor([True, False]), kl=0.0)
    >>> out.logps
    tensor([-4.1589, -4.1589])
    """
    checks.is_one_of("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    o = _checked(loss_type, beta, desirable_weight, undesirable_weight, reduction)
    options = row_options(temperature, logit_scale, softcap, ignore_index, input.shape[:-1], input)
    x = groups.check_grouped_head(
        input,
        linear_weight,
        target,
        linear_bias,
        cu_seqlens,
        options,
        heads.limits_of(chunk_size, memory, group, input, linear_weight, target, ignore_index, logits_dtype),
        width=1,
        lora=lora,
    )
    groups.check_reference(input, ref_input, ref_weight, ref_bias)
    if ref_input is not None and ref_logps is not None:
        raise ValueError("ref_logps: expected None beside ref_input, got a tensor")
    count, acc = x.rows.groups, x.rows.tokens.lengths.dtype
    good = _labels(desirable, count, input.device)
    weight = constant("weights", weights, count, acc, input.device)
    ref = constant("ref_logps", ref_logps, count, acc, input.device)
    shift = _kto_kl(loss_type, kl, kl_logps, ref_kl_logps, acc, input.device)
    plan = groups.plan_groups(
        "linear_kto_loss",
        x,
        backend,
        (desirable, weights, token_weight, shift, ref_logps, ref_input, ref_weight, ref_bias, cu_seqlens),
        coupled=False,
        per_group=reduction == "none",
        ref=ref_input is not None,
    )
    own_weights = groups.token_weights(x, token_weight, tuple(target.shape))
    if ref_input is not None:
        assert ref_weight is not None
        ref = groups.reference_sums(plan.call, x, ref_input, ref_weight, ref_bias, own_weights)
    constants = UnpairedConstants(desirable=good, ref=ref, weight=weight, kl=shift)
    loss = _ResponsesOfHead(x, constants, o, count, own_weights)
    want = ("logprobs", *(groups.METRIC_STATS if token_metrics else ()))
    total = max(count, 1) if reduction == "mean" else 1
    keep = groups.TOKEN_STATS if return_stats else groups.METRIC_STATS
    value, out = groups.evaluate(x, plan, loss, want, ("rewards", "logps", "sums"), total, keep)
    metrics = _metrics(o, out["sums"].sum(0), count, shift)
    if token_metrics:
        metrics.update(groups.token_metrics(out, x, plan.call.backend, good.to(acc)))
    output = UnpairedOutput(value, out["rewards"], out["logps"], metrics)
    if not return_stats:
        return output
    of_targets = groups.in_place_of_targets(out, x, target)
    return output, stats_from(of_targets, tuple(of_targets))


@dataclass(frozen=True)
class _ResponsesOfHead:
    """The loss of some responses from the log-probs of their tokens: what engine/head_groups.py asks for each chunk."""

    x: groups.GroupedHead
    constants: UnpairedConstants
    options: _Options
    total: int
    token_weights: Tensor | None  # acc [rows]

    def of_groups(
        self,
        backend: Backend,
        logprobs: Tensor,
        stats: dict[str, Tensor],
        rows: tuple[int, int],
        groups: tuple[int, int],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        first, last = groups
        weights = None if self.token_weights is None else self.token_weights[slice(*rows)]
        logps = segment_sum(backend, logprobs, weights, self.x.rows.part(first, last, *rows))
        k = self.constants
        constants = UnpairedConstants(
            desirable=k.desirable[first:last],
            ref=None if k.ref is None else k.ref[first:last],
            weight=None if k.weight is None else k.weight[first:last],
            kl=k.kl,
        )
        options, per_response = self.options.of_batch(self.total), self.options.reduction == "none"
        loss, rewards, sums = _launch(backend, logps, constants, options, per_response)
        return loss, {"rewards": rewards, "logps": logps.detach(), "sums": sums.reshape(1, -1)}
