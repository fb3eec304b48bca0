"""policy_loss: policy-gradient losses of per-token log-probs (docs/policy_gradient.md)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import autograd, checks
from fastloss.engine import backend as backends
from fastloss.engine.autograd import differentiable_again
from fastloss.engine.backend import resolve_call, resolves_views
from fastloss.engine.contract import Backend, PolicyInputs
from fastloss.engine.definition import REFERENCE
from fastloss.engine.direct import DirectPolicy
from fastloss.engine.jagged import takes_jagged
from fastloss.engine.native import cpu_backend
from fastloss.losses.policy_inputs import check_like, lay_flat, normalizer_of, shares, weighted
from fastloss.losses.policy_options import VARIANTS, PolicySpec, options_of
from fastloss.losses.policy_selection import Selection, select, top_entropy
from fastloss.tables import ACC_DTYPES, AGGREGATIONS, POLICY_METRICS, POLICY_OUT, POLICY_PLACE, PolicyOptions


class PolicyOutput(NamedTuple):
    """The loss (0-d, float32 or float64) and detached 0-d metrics (see :func:`policy_loss`)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@takes_jagged()
@resolves_views
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    ref_logprobs: Tensor | None = None,
    loss_type: str = "dapo",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_unbiased: bool = False,
    importance_level: str | None = None,
    aggregation: str | None = None,
    max_length: float | None = None,
    normalizer: float | Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    entropy_aggregation: str | None = None,
    top_entropy_quantile: float = 1.0,
    off_policy_threshold: float | None = None,
    sampler_logprobs: Tensor | None = None,
    importance_mode: str | None = "token_truncate",
    importance_cap: float | None = None,
    importance_floor: float | None = None,
    weights: Tensor | None = None,
    cispo_min: float | None = None,
    cispo_max: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    kl_cov_coef: float = 1.0,
    kl_cov_ratio: float = 2e-4,
    clip_cov_ratio: float = 2e-4,
    clip_cov_low: float = 1.0,
    clip_cov_high: float = 5.0,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> PolicyOutput:
    """The policy-gradient loss of sampled tokens, with gradients through ``logprobs`` and ``entropy``.

    With ρ = exp(logprobs - old_logprobs), A the advantage and f the surrogate of ``loss_type``:
    ``loss = aggregate(f(ρ, A) + beta · KL(policy, reference) - entropy_coef · entropy)``. Formulas, papers and the names of
    TRL, verl and OpenRLHF: docs/policy_gradient.md.

    Args:
        logprobs: log-probs of the sampled tokens (nats), ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``.
        old_logprobs: those of the policy that the update started from; None: on-policy, ρ is exactly 1.
        advantages: ``[B]``, or like ``logprobs``.
        mask: bool or 0/1 like ``logprobs``, the tokens to train on; None: all. A masked position touches nothing,
            whatever it holds.
        ref_logprobs: those of the reference policy, for ``beta`` and the metric "kl".
        loss_type: "reinforce", "ppo", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "vespo",
            "luspo", "gpg", "importance_sampling", "rloo", "clip_cov", "kl_cov", "dppo_tv" or "dppo_kl".
        clip_low, clip_high: ρ is clipped to [1 - clip_low, 1 + clip_high] (gmpo: log ρ to [-clip_low, clip_high]; dppo:
            the largest divergence where A < 0 and where A > 0); None: the paper's range.
        dual_clip: at most ``dual_clip · |A|`` is lost where A < 0 (> 1; 3 is common). delta: ρ is also clipped above at
            ``delta`` where A < 0.
        beta: coefficient of the KL to the reference. kl_estimator: "k1", "k2", "k3", "abs" or "low_var_kl".
        kl_unbiased: multiply that KL by ρ (TRL's use_bias_correction_kl).
        importance_level: "token", "sequence" (mean log-ratio), "sequence_sum" or "geometric"; None: the paper's.
        aggregation: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean" or "seq-mean-token-sum-norm" (divided by
            ``max_length``, by default T); None: the paper's.
        normalizer: number or 0-d tensor in place of the count of tokens (token-mean) or of sequences (the others): the
            global batch's, so that micro-batches add up to it.
        entropy: per token like ``logprobs`` (nats). entropy_coef: of the entropy bonus. entropy_aggregation: its own
            aggregation; None: that of the loss.
        top_entropy_quantile: train only on this fraction of tokens, those of the highest entropy.
        off_policy_threshold: drop sequences with A < 0 whose mean (sampler or old) - current log-prob exceeds it.
        sampler_logprobs: those of the engine that sampled. The policy term is multiplied by exp(old - sampler), per
            token or per sequence, truncated to or masked outside [``importance_floor``, ``importance_cap``]:
            ``importance_mode`` "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", or None (no
            correction: only ``off_policy_threshold`` reads them).
        weights: factors of the policy term (not of the KL, nor of the entropy bonus), ``[B]`` or like ``logprobs``, a bool
            mask too: a correction of your own, :func:`trust_region_mask`, a sample's worth. No gradient flows to them.
        cispo_min, cispo_max: bounds of the weight of cispo and dppo; None: 0 and 1 + clip_high (dppo: 20).
        generator: clip_cov draws its tokens with it; None: it takes those with the largest covariance.
        cu_seqlens: int32/int64 ``[B + 1]``, the borders of packed sequences.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        the loss and metrics over unmasked tokens: policy_loss, clip_ratio/low, /high, /region, /dual, approx_kl (k1 of old
        to new), approx_kl_k3, ratio/mean, /min, /max, ess (effective sample size, as a fraction), and where they apply kl,
        entropy, importance/cut_fraction. With no unmasked token the loss and its gradient are 0.

    Raises:
        TypeError, ValueError: a shape, dtype, device or option that does not fit, by name.

    >>> import torch, fastloss
    >>> logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> out = fastloss.policy_loss(logprobs, None, torch.tensor([2.0]), torch.tensor([[True, True]]))
    >>> out.loss.backward()
    >>> out.loss.item(), logprobs.grad.tolist(), out.metrics["ratio/max"].item()
    (-2.0, [[-1.0, -1.0]], 1.0)
    """
    spec = PolicySpec(
        loss_type=loss_type,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        delta=delta,
        beta=beta,
        kl_estimator=kl_estimator,
        kl_unbiased=kl_unbiased,
        importance_level=importance_level,
        aggregation=aggregation,
        max_length=max_length,
        entropy_coef=entropy_coef,
        entropy_aggregation=entropy_aggregation,
        top_entropy_quantile=top_entropy_quantile,
        off_policy_threshold=off_policy_threshold,
        importance_mode=importance_mode,
        importance_cap=importance_cap,
        importance_floor=importance_floor,
        cispo_min=cispo_min,
        cispo_max=cispo_max,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
        kl_cov_coef=kl_cov_coef,
        kl_cov_ratio=kl_cov_ratio,
        clip_cov_ratio=clip_cov_ratio,
        clip_cov_low=clip_cov_low,
        clip_cov_high=clip_cov_high,
        generator=generator,
    )
    others = (old_logprobs, ref_logprobs, sampler_logprobs, entropy)
    if weights is None and _is_direct(logprobs, advantages, mask, others, cu_seqlens, backend):
        ready = _direct_options(
            ref_logprobs is not None,
            entropy is not None,
            sampler_logprobs is not None,
            logprobs.shape[1],
            *spec,
        )
        if ready is not None:
            norm = None
            if normalizer is not None:
                norm = normalizer_of(normalizer, logprobs.dtype, logprobs.device)
            assert mask is not None
            constants = (old_logprobs, advantages, mask, ref_logprobs, sampler_logprobs)
            return _direct(ready, logprobs, entropy, constants, norm)
    checks.is_floating("logprobs", logprobs)
    inputs = lay_flat(
        "logprobs",
        logprobs,
        mask=mask,
        cu_seqlens=cu_seqlens,
        dtype=logprobs.dtype,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        weights=weights,
        normalizer=normalizer,
    )
    options = options_of(
        spec,
        with_sampler=inputs.sampler is not None,
        with_ref=inputs.ref is not None,
        default_length=None if cu_seqlens is not None else inputs.layout.length,
    )
    if entropy is not None:
        check_like("entropy", entropy, logprobs)
    elif spec.entropy_coef or spec.top_entropy_quantile < 1:
        raise ValueError(
            f"entropy: expected a tensor for entropy_coef={entropy_coef} and top_entropy_quantile="
            f"{top_entropy_quantile}, got None"
        )
    call = resolve_call(
        "policy_loss",
        backend,
        logprobs,
        old_logprobs,
        advantages,
        mask,
        entropy,
        ref_logprobs,
        sampler_logprobs,
        weights,
        normalizer,
        cu_seqlens,
        has_operators=False,
    )
    call.announce()
    acc = ACC_DTYPES[logprobs.dtype]
    flat = logprobs.reshape(-1).to(acc).contiguous()
    h = None if entropy is None else entropy.reshape(-1).to(acc).contiguous()
    loss, out = of_batch(call.backend, spec, options, inputs, flat, h)
    metrics = metrics_from(
        out,
        with_ref=ref_logprobs is not None,
        with_entropy=entropy is not None,
        with_correction=options.correction > 0,
    )
    return PolicyOutput(loss, metrics)


def of_batch(
    backend: Backend,
    spec: PolicySpec,
    options: PolicyOptions,
    inputs: PolicyInputs,
    logprobs: Tensor,
    entropy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss of flat acc log-probs: selections over the whole batch by PyTorch, everything else in one launch."""
    inputs, selected = choose(spec, options, inputs, logprobs, entropy)
    bonus = None
    if entropy is None or not options.entropy_coef:
        entropy = None if entropy is None else entropy.detach()
    elif spec.entropy_aggregation is not None or selected.chosen is not None:
        share = entropy_share(spec, options, inputs, selected.chosen)
        bonus = options.entropy_coef * (share * torch.where(share != 0, entropy, 0)).sum()
        entropy, options = entropy.detach(), replace(options, entropy_coef=0.0)
    loss, out = _launch(backend, logprobs, entropy, inputs, options)
    return (loss if bonus is None else loss - bonus), with_clip_counts(out, selected)


def choose(
    spec: PolicySpec,
    options: PolicyOptions,
    inputs: PolicyInputs,
    logprobs: Tensor,
    entropy: Tensor | None,
) -> tuple[PolicyInputs, Selection]:
    """What is selected over the whole batch, and the inputs with its weights."""
    weight = chosen = None
    if spec.top_entropy_quantile < 1:
        assert entropy is not None
        chosen = top_entropy(entropy, inputs.mask, spec.top_entropy_quantile)
        weight = chosen.to(logprobs.dtype)
    selected = checks.replaced(select(logprobs, inputs, spec, options), chosen=chosen)
    if selected.weight is not None:
        weight = selected.weight if weight is None else weight * selected.weight
    return replace(weighted(inputs, weight), select=selected.penalised), selected


def with_clip_counts(out: Tensor, selected: Selection) -> Tensor:
    """``out [16]``; where a divergence takes tokens out, the clip counts are its."""
    if selected.low is None or selected.high is None:
        return out
    clipped = torch.stack([selected.low.sum(), selected.high.sum()]).to(out.dtype)
    return torch.cat([out[:3], clipped, out[5:]])


def entropy_share(
    spec: PolicySpec, options: PolicyOptions, inputs: PolicyInputs, chosen: Tensor | None
) -> Tensor:
    """Each token's share (scaled) of an entropy bonus that does not follow the loss: its own aggregation, over the
    tokens that it acts on, or the loss's aggregation with the top-entropy tokens alone."""
    mask, normalizer = inputs.mask.bool(), inputs.normalizer
    how, over = options.aggregation, mask
    if spec.entropy_aggregation is not None:
        how = AGGREGATIONS.index(spec.entropy_aggregation)
        over = mask if chosen is None else chosen
        # The loss's normalizer counts what this aggregation counts only if both count tokens, or both sequences.
        if (how == 0) != (options.aggregation == 0):
            normalizer = None
    acc = inputs.advantages.dtype
    share, scale = shares(over, inputs.layout, how, options.max_length, normalizer, acc)
    return scale * (share if chosen is None else share * chosen)


def _again(ctx: Any) -> Any:
    logprobs, entropy, *_ = ctx.saved_tensors
    return [REFERENCE.policy_loss(logprobs, entropy, *ctx.given).loss, None], [logprobs, entropy]


class _PolicyLoss(torch.autograd.Function):
    """(logprobs, entropy) -> (loss, out [16]); both carry gradients, made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        backend: Backend,
        inputs: PolicyInputs,
        options: PolicyOptions,
    ) -> Any:
        result = backend.policy_loss(logprobs, entropy, inputs, options)
        ctx.given = inputs, options
        ctx.save_for_backward(logprobs, entropy, result.d_logprobs, result.d_entropy, result.out)
        ctx.mark_non_differentiable(result.out)
        return result.loss.clone(), result.out

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        *_, d_logprobs, d_entropy, out = ctx.saved_tensors
        scale = upstream * out[POLICY_PLACE["scale"]]
        need_logprobs, need_entropy, *_ = ctx.needs_input_grad
        return (
            d_logprobs * scale if need_logprobs else None,
            d_entropy * scale if need_entropy and d_entropy is not None else None,
            None,
            None,
            None,
        )


def _launch(
    backend: Backend,
    logprobs: Tensor,
    entropy: Tensor | None,
    inputs: PolicyInputs,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """Loss and ``out [16]`` (fastloss.tables.POLICY_OUT)."""
    if backend.differentiable:
        result = backend.policy_loss(logprobs, entropy, inputs, options)
        return result.loss, result.out
    if logprobs.numel() == 0:
        nothing = logprobs.sum() if entropy is None else logprobs.sum() + entropy.sum()
        return nothing * 0, empty_out(logprobs)
    return _PolicyLoss.apply(logprobs, entropy, backend, inputs, options)


def empty_out(like: Tensor) -> Tensor:
    """The statistics of no tokens at all."""
    out = torch.zeros(len(POLICY_OUT), dtype=like.dtype, device=like.device)
    for name in ("scale", "min_ratio", "max_ratio"):
        out[POLICY_PLACE[name]] = 1
    return out


def metrics_from(
    out: Tensor, *, with_ref: bool, with_entropy: bool, with_correction: bool
) -> dict[str, Tensor]:
    """The public metrics, on the device, without a synchronisation. Means are over unmasked tokens."""
    with torch.no_grad():
        tokens = out[POLICY_PLACE["tokens"]].clamp(min=1)
        mean = dict(zip(POLICY_OUT, (out / tokens).unbind(), strict=True))
        total = dict(zip(POLICY_OUT, out.unbind(), strict=True))
        tiny = torch.finfo(out.dtype).tiny
        values = (
            total["policy"] * total["scale"],
            mean["low_clipped"],
            mean["high_clipped"],
            mean["low_clipped"] + mean["high_clipped"],
            mean["dual_clipped"],
            mean["k1"],
            mean["k3"],
            mean["ratio"],
            total["min_ratio"],
            total["max_ratio"],
            mean["ratio"] * total["ratio"] / total["ratio_squared"].clamp(min=tiny),
            mean["kl"] if with_ref else None,
            mean["entropy"] if with_entropy else None,
            mean["cut"] if with_correction else None,
        )
        return {name: value for name, value in zip(POLICY_METRICS, values, strict=True) if value is not None}


# --- the commonest policy loss with the fewest Python calls around the kernel: padded float32 or float64 log-probs on the CPU,
# nothing selected over the batch. One native call makes the loss, the metrics and the gradient, times the scale.

_cpu = cpu_backend()
_BOOL = torch.bool
_DTYPES = (torch.float32, torch.float64)
_is_compiling = torch.compiler.is_compiling


class _Ready(NamedTuple):
    """The options of a direct call, checked. Cached: every training step has the same."""

    native: DirectPolicy
    options: PolicyOptions
    names: tuple[str, ...]  # of the metrics; "" where one does not apply
    entropy_coef: float


def _is_direct(
    logprobs: Any,
    advantages: Any,
    mask: Any,
    others: tuple[Any, ...],
    cu_seqlens: Tensor | None,
    backend: str,
) -> bool:
    """Whether :func:`_direct` takes the call; if not, the general path checks it and says what is wrong."""
    if (
        _is_compiling()
        or _cpu.direct is None
        or cu_seqlens is not None
        or type(logprobs) not in backends.PLAIN
        or type(advantages) is not Tensor
        or type(mask) is not Tensor
    ):
        return False
    size = logprobs.shape
    return (
        logprobs.is_cpu
        and logprobs.dtype in _DTYPES
        and len(size) == 2
        and 0 not in size
        and logprobs.is_contiguous()
        and mask.is_cpu
        and mask.shape == size
        and mask.is_contiguous()
        and advantages.dtype is logprobs.dtype
        and advantages.is_cpu
        and advantages.is_contiguous()
        and (advantages.shape == size[:1] or advantages.shape == size)
        and backends.are_alike(logprobs, *others)
        and backends.is_direct(backend)
    )


@functools.lru_cache(maxsize=64, typed=True)
def _direct_options(
    with_ref: bool, with_entropy: bool, with_sampler: bool, length: int, *fields: Any
) -> _Ready | None:
    """Of the fields of a :class:`PolicySpec`, whose types count too; None where something is chosen over the whole batch, or
    missing."""
    spec = PolicySpec(*fields)
    options = options_of(spec, with_sampler=with_sampler, with_ref=with_ref, default_length=length)
    selects = VARIANTS[spec.loss_type].selects or spec.top_entropy_quantile < 1
    if selects or spec.entropy_aggregation is not None or (spec.entropy_coef and not with_entropy):
        return None
    given = {"kl": with_ref, "entropy": with_entropy, "importance/cut_fraction": options.correction > 0}
    names = tuple(name if given.get(name, True) else "" for name in POLICY_METRICS)
    return _Ready(DirectPolicy(options), options, names, options.entropy_coef)


def _direct(
    ready: _Ready,
    logprobs: Tensor,
    entropy: Tensor | None,
    constants: tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None],
    normalizer: float | Tensor | None,
) -> PolicyOutput:
    """Loss and metrics of a call that :func:`_is_direct`. ``constants``: old, advantages, mask, ref, sampler."""
    old, advantages, mask, ref, sampler = constants
    if mask.dtype is not _BOOL:
        mask = mask != 0
    metrics = logprobs.new_empty(len(POLICY_METRICS))
    given, constants = (ready, normalizer, metrics), (old, advantages, mask, ref, sampler)
    wanted = logprobs.requires_grad or (entropy is not None and entropy.requires_grad)
    if wanted and torch.is_grad_enabled():
        loss = autograd.made_in_forward(logprobs, entropy, _run_direct, _direct_defined, given, constants)
    else:
        loss, _ = _run_direct(given, logprobs, entropy, *constants)
    named = dict(zip(ready.names, metrics.unbind(), strict=True))
    named.pop("", None)
    return PolicyOutput(loss, named)


def _run_direct(
    given: tuple[_Ready, float | Tensor | None, Tensor],
    logprobs: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None,
    sampler: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    ready, normalizer, metrics = given
    loss, grad = logprobs.new_empty(()), torch.empty_like(logprobs)
    grad_entropy = torch.empty_like(grad) if ready.entropy_coef and entropy is not None else None
    ready.native.run(
        logprobs, old, advantages, mask, ref, entropy, sampler, normalizer, grad, grad_entropy, loss, metrics
    )
    return loss, (grad, grad_entropy)


def _direct_defined(
    given: tuple[_Ready, float | Tensor | None, Tensor],
    logprobs: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None,
    sampler: Tensor | None,
) -> Tensor:
    ready, normalizer, _ = given
    inputs = lay_flat(
        "logprobs",
        logprobs,
        mask=mask,
        cu_seqlens=None,
        dtype=logprobs.dtype,
        advantages=advantages,
        old_logprobs=old,
        ref_logprobs=ref,
        sampler_logprobs=sampler,
        normalizer=normalizer,
    )
    flat = None if entropy is None else entropy.reshape(-1)
    return REFERENCE.policy_loss(logprobs.reshape(-1), flat, inputs, ready.options).loss
