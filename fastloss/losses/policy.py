"""policy_loss and its kin: policy-gradient losses of per-token log-probs (docs/policy_gradient.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import backend as dispatch
from fastloss.engine import checks, policy
from fastloss.engine.native_rows import acc_dtype
from fastloss.engine.plain_policy import is_plain, plain_policy_loss, ready
from fastloss.engine.policy import PolicyCall
from fastloss.losses.policy_batch import Batch, check_like, lay_flat, normalizer_of, options_of
from fastloss.losses.policy_options import AGGREGATIONS, KL_KINDS, PolicyOptions, Spec
from fastloss.losses.policy_selection import select, top_entropy


class PolicyOutput(NamedTuple):
    """The loss (0-d, float32 or float64) and detached 0-d metrics (see :func:`policy_loss`)."""

    loss: Tensor
    metrics: dict[str, Tensor]


class ValueOutput(NamedTuple):
    """The loss of a value head and detached 0-d metrics (see :func:`value_loss`)."""

    loss: Tensor
    metrics: dict[str, Tensor]


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
            "luspo", "gpg", "rloo", "clip_cov", "kl_cov", "dppo_tv" or "dppo_kl".
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
    fields = (
        loss_type,
        clip_low,
        clip_high,
        dual_clip,
        delta,
        beta,
        kl_estimator,
        kl_unbiased,
        importance_level,
        aggregation,
        max_length,
        entropy_coef,
        entropy_aggregation,
        top_entropy_quantile,
        off_policy_threshold,
        importance_mode,
        importance_cap,
        importance_floor,
        cispo_min,
        cispo_max,
        sapo_temperature_pos,
        sapo_temperature_neg,
        vespo_k_pos,
        vespo_lambda_pos,
        vespo_k_neg,
        vespo_lambda_neg,
        kl_cov_coef,
        kl_cov_ratio,
        clip_cov_ratio,
        clip_cov_low,
        clip_cov_high,
        generator,
    )
    others = (old_logprobs, ref_logprobs, sampler_logprobs, entropy)
    if weights is None and is_plain(logprobs, advantages, mask, others, cu_seqlens, backend):
        prepared = ready(
            ref_logprobs is not None,
            entropy is not None,
            sampler_logprobs is not None,
            logprobs.shape[1],
            *fields,
        )
        if prepared is not None:
            assert mask is not None
            norm = None if normalizer is None else normalizer_of(normalizer, logprobs)
            return PolicyOutput(
                *plain_policy_loss(
                    prepared,
                    logprobs,
                    entropy,
                    old_logprobs,
                    advantages,
                    mask,
                    ref_logprobs,
                    sampler_logprobs,
                    norm,
                )
            )
    spec = Spec(*fields)
    checks.is_floating("logprobs", logprobs)
    batch = lay_flat(
        "logprobs",
        logprobs,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs,
        sampler_logprobs,
        weights,
        cu_seqlens,
    )
    options = options_of(spec, batch, packed=cu_seqlens is not None)
    if entropy is not None:
        check_like("entropy", entropy, logprobs)
    elif spec.entropy_coef or spec.top_entropy_quantile < 1:
        raise ValueError(
            f"entropy: expected a tensor for entropy_coef={entropy_coef} and top_entropy_quantile="
            f"{top_entropy_quantile}, got None"
        )
    norm = normalizer_of(normalizer, logprobs)
    rows = None
    if not torch.compiler.is_compiling():
        choice = dispatch.choose(
            backend,
            logprobs,
            unsupported=dispatch.tracing_reason(logprobs, old_logprobs, advantages, mask, entropy),
        )
        dispatch.announce("policy_loss", choice)
        rows = choice.rows
    acc = acc_dtype(logprobs.dtype)
    flat = logprobs.reshape(-1).to(acc).contiguous()
    h = None if entropy is None else entropy.reshape(-1).to(acc).contiguous()
    loss, out = run(spec, options, rows, batch, flat, h, norm)
    metrics = policy.metrics_from(
        out,
        with_ref=ref_logprobs is not None,
        with_entropy=entropy is not None,
        with_correction=options.correction > 0,
    )
    return PolicyOutput(loss, metrics)


def run(
    spec: Spec,
    options: PolicyOptions,
    rows: Any,
    batch: Batch,
    logprobs: Tensor,
    entropy: Tensor | None,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss of flat acc log-probs: what needs a view over the whole batch here, the rest in one launch."""
    weight = chosen = None
    if spec.top_entropy_quantile < 1:
        assert entropy is not None
        chosen = top_entropy(entropy, batch.mask, spec.top_entropy_quantile)
        weight = chosen.to(logprobs.dtype)
    selected = select(logprobs, batch, spec, options)
    if selected.weight is not None:
        weight = selected.weight if weight is None else weight * selected.weight
    bonus = None
    if entropy is None or not options.entropy_coef:
        entropy = None if entropy is None else entropy.detach()
    elif spec.entropy_aggregation is not None or chosen is not None:
        share = entropy_share(spec, options, batch, chosen, normalizer, logprobs.dtype)
        bonus = options.entropy_coef * (share * torch.where(share != 0, entropy, 0)).sum()
        entropy, options = entropy.detach(), checks.replaced(options, entropy_coef=0.0)
    call = PolicyCall(rows, batch, options, normalizer, batch.weighted(weight), selected.penalised)
    loss, out = policy.policy_loss(logprobs, entropy, call)
    if selected.low is not None and selected.high is not None:  # the clip statistics are the divergence's
        clipped = torch.stack([selected.low.sum(), selected.high.sum()]).to(out.dtype)
        out = torch.cat([out[:3], clipped, out[5:]])
    return (loss if bonus is None else loss - bonus), out


def entropy_share(
    spec: Spec,
    options: PolicyOptions,
    batch: Batch,
    chosen: Tensor | None,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Each token's share (scaled) of an entropy bonus that does not follow the loss: its own aggregation, over the
    tokens that it acts on, or the loss's aggregation with the top-entropy tokens alone."""
    mask = batch.mask.bool()
    how, over = options.aggregation, mask
    if spec.entropy_aggregation is not None:
        how = AGGREGATIONS.index(spec.entropy_aggregation)
        over = mask if chosen is None else chosen
        # The loss's normalizer counts what this aggregation counts only if both count tokens, or both sequences.
        if (how == 0) != (options.aggregation == 0):
            normalizer = None
    n = batch.sequences.sum(over.to(dtype)).clamp(min=1)
    share, scale = reference.shares(over, n, batch.sequences, how, options.max_length, normalizer)
    return scale * (share if chosen is None else share * chosen)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, kind: str = "k3", backend: str = "auto") -> Tensor:
    """A per-token estimate of KL(policy, reference) from sampled tokens, with gradient through ``logprobs``.

    With t = clamp(ref - logprobs, -20, 20): k1 = -t, k2 = t²/2, k3 = e^t - 1 - t, abs = |t|, low_var_kl = clamp(k3, -10, 10)
    (joschu.net/blog/kl-approx.html). For a KL in the reward: ``rewards - beta * kl_estimate(old, ref, kind="k1")`` per
    token, or its masked sum per sequence.

    Args:
        logprobs, ref_logprobs: the same shape, any.

    Returns:
        float32 (float64 for float64 log-probs), the same shape.

    >>> import torch, fastloss
    >>> fastloss.kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), kind="k1")
    tensor([0.5000])
    """
    checks.is_floating("logprobs", logprobs)
    check_like("ref_logprobs", ref_logprobs, logprobs)
    checks.is_one_of("kind", kind, KL_KINDS)
    _reference_only(backend, "kl_estimate")
    acc = acc_dtype(logprobs.dtype)
    return reference.kl_estimate(logprobs.to(acc), ref_logprobs.detach().to(acc), kind)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    *,
    clip_range: float | None = None,
    aggregation: str = "token-mean",
    max_length: float | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> ValueOutput:
    """PPO's loss of a value head: ``½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)``, aggregated.

    The ½ is TRL's and verl's. Without ``clip_range``: ``½ (V - R)²``.

    Args:
        values: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``; carries the gradient.
        old_values, returns: like ``values``, constants. ``old_values`` may be None without ``clip_range``.
        mask: bool or 0/1 like ``values``; None: all.
        clip_range: ε > 0. aggregation, max_length, normalizer: as in :func:`policy_loss`.

    Returns:
        the loss and the metrics value/clip_ratio, value/explained_variance (1 - Var(R - V)/Var(R); 0 where R is constant),
        value/mean.

    >>> import torch, fastloss
    >>> values = torch.tensor([[1.0, 3.0]])
    >>> fastloss.value_loss(values, None, torch.zeros(1, 2), None).loss
    tensor(2.5000)
    """
    checks.is_floating("values", values)
    batch = lay_flat("values", values, None, None, mask, None, None, None, cu_seqlens)
    check_like("returns", returns, values)
    checks.is_one_of("aggregation", aggregation, AGGREGATIONS)
    if clip_range is not None:
        checks.number("clip_range", clip_range, low=0.0, open_low=True)
        if old_values is None:
            raise ValueError(f"old_values: expected a tensor for clip_range={clip_range}, got None")
    if old_values is not None:
        check_like("old_values", old_values, values)
    options = options_of(
        Spec(aggregation=aggregation, max_length=max_length), batch, packed=cu_seqlens is not None
    )
    norm = normalizer_of(normalizer, values)
    _reference_only(backend, "value_loss")
    acc = acc_dtype(values.dtype)
    flat = values.reshape(-1).to(acc)
    keep = batch.mask.bool()
    n = batch.sequences.sum(keep.to(acc)).clamp(min=1)
    share, scale = reference.shares(keep, n, batch.sequences, options.aggregation, options.max_length, norm)
    loss, metrics = reference.value_loss(
        flat,
        None if old_values is None else old_values.reshape(-1).to(acc),
        returns.reshape(-1).to(acc),
        keep,
        clip_range=clip_range,
        share=share,
        scale=scale,
    )
    return ValueOutput(loss, metrics)


def _reference_only(backend: str, function: str) -> None:
    """These few pointwise operations are PyTorch's on every backend."""
    if backend not in ("auto", *dispatch.NAMES):
        raise ValueError(
            f"backend: expected one of 'auto', {', '.join(map(repr, dispatch.NAMES))}, got {backend!r}"
        )
    if not torch.compiler.is_compiling():
        dispatch.announce(
            function, dispatch.Choice("reference", None, "a few pointwise operations of PyTorch")
        )
