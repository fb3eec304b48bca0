"""linear_policy_loss: the policy-gradient loss from hidden states, without the logits of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import backend as dispatch
from fastloss.engine import checks, head, policy
from fastloss.engine.checks import ShapeError
from fastloss.engine.head import Needs
from fastloss.engine.native_rows import acc_dtype
from fastloss.engine.policy_linear import IGNORED, LinearPolicyCall, LinearPolicyLoss
from fastloss.losses.policy import PolicyOutput, entropy_share, policy_loss
from fastloss.losses.policy_batch import Batch, lay_flat, normalizer_of, options_of
from fastloss.losses.policy_options import PolicyOptions, Spec, is_token_level
from fastloss.losses.token_stats import linear_token_stats


def linear_policy_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    with_entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> PolicyOutput:
    """:func:`policy_loss` of the tokens ``target`` under the logits of a linear head, which are never held.

    Where a token's term needs no other token of its sequence the gradient is made in the forward: 3 GEMMs, 2 with a frozen
    ``linear_weight``. Sequence-level ratios, ``off_policy_threshold``, ``top_entropy_quantile``, vespo, clip_cov, kl_cov and dppo
    take :func:`linear_token_stats` and recompute in the backward: 4. On CPU masked rows cost no GEMM at all.

    Args:
        input: hidden states ``[B, T, D]``, or packed ``[N, D]`` with ``cu_seqlens``; the state that predicts the token.
        linear_weight: ``[V, D]``. linear_bias: ``[V]``.
        target: int64 ``[B, T]`` or ``[N]``, the sampled tokens; any value where masked.
        old_logprobs, advantages, mask, ref_logprobs, sampler_logprobs, weights, normalizer, cu_seqlens: as in
            :func:`policy_loss`.
        temperature, logit_scale, softcap: as in :func:`linear_token_stats`; entropy is that of the tempered logits.
        chunk_size: rows of logits in memory at once; None chooses.
        with_entropy: also the metric "entropy" where the loss does not need it.
        **options: the other keywords of :func:`policy_loss` (``loss_type``, ``clip_low``, ``beta``, …).

    Raises:
        TypeError: an unknown option. ValueError: a shape, dtype, device or option that does not fit, by name.
        IndexError: on CPU, an unmasked target outside [0, V).

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(1, 2, 8, requires_grad=True), torch.zeros(4, 8)
    >>> target, mask = torch.tensor([[1, 3]]), torch.tensor([[True, True]])
    >>> fastloss.linear_policy_loss(hidden, weight, target, None, torch.ones(1), mask).loss.item()
    -1.0
    """
    from fastloss.engine.calls import check_linear, compute_dtype, is_traced

    spec = Spec(**options)
    checks.is_floating("input", input)
    checks.is_floating("linear_weight", linear_weight)
    if input.dim() < 2 or linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ShapeError(
            f"linear_weight: expected shape [V, D] for input [..., D], got {list(linear_weight.shape)} for "
            f"{list(input.shape)}"
        )
    hidden = input.reshape(-1, input.shape[-1])
    check_linear(hidden, linear_weight, linear_bias)
    checks.index_target("target", target, tuple(input.shape[:-1]), input.device)
    checks.chunk_size_value(chunk_size)
    scale = checks.number("logit_scale", logit_scale) / checks.number(
        "temperature", temperature, low=0.0, open_low=True
    )
    cap = checks.softcap_value(softcap)
    batch = lay_flat(
        "target",
        target,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs,
        sampler_logprobs,
        weights,
        cu_seqlens,
        dtype=input.dtype,
    )
    resolved = options_of(spec, batch, packed=cu_seqlens is not None)
    norm = normalizer_of(normalizer, input)
    entropy = bool(spec.entropy_coef) or spec.top_entropy_quantile < 1 or with_entropy
    outputs = ("logprobs", "entropy") if entropy else ("logprobs",)
    flat_target = target.reshape(-1).masked_fill(batch.mask == 0, IGNORED)
    resolved, token_weight, cut = _correction_ahead(resolved, batch)
    token_level = is_token_level(resolved) and spec.top_entropy_quantile == 1 and not spec.variant.selects
    name, rows = "auto", None
    dtype = compute_dtype(input)
    if not is_traced(input):
        choice = dispatch.choose(
            backend, input, unsupported=dispatch.tracing_reason(input, linear_weight, linear_bias, target)
        )
        name, rows = choice.name, choice.rows
        computed = head.count_kept(hidden.shape[0], flat_target, IGNORED)
        chunk = min(
            chunk_size or head.default_chunk(computed, linear_weight.shape[0], dtype, input.device),
            max(computed, 1),
        )
        on = torch.is_grad_enabled()
        needs = Needs(
            on and input.requires_grad,
            on and linear_weight.requires_grad,
            linear_bias is not None and on and linear_bias.requires_grad,
        )
        plan: dict[str, Any] = {}
        if rows is not None:
            ahead = token_level or (needs == Needs(True, False, False) and not entropy)
            plan = {
                "gemms": head.gemm_count(needs, bool(needs) and not ahead),
                "rows": computed,
                "chunk_rows": chunk,
                "buffer_bytes": head.Head(hidden, linear_weight, None, dtype, chunk).buffer_bytes,
            }
        dispatch.announce("linear_policy_loss", choice, **plan)
    if rows is None or input.device.type != "cpu":
        # Rows that are not taken out reach the weight's gradient as 0 · hidden, which a NaN survives.
        hidden = hidden.masked_fill((batch.mask == 0).unsqueeze(-1), 0)
        input = hidden.view(input.shape)
    if rows is None or not token_level:
        stats = linear_token_stats(
            input,
            linear_weight,
            flat_target.view(target.shape),
            linear_bias=linear_bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=IGNORED,
            outputs=outputs,
            chunk_size=chunk_size,
            backend=name,
        )
        assert stats.logprobs is not None
        return policy_loss(
            stats.logprobs,
            old_logprobs,
            advantages,
            mask,
            ref_logprobs=ref_logprobs,
            sampler_logprobs=sampler_logprobs,
            weights=weights,
            normalizer=normalizer,
            entropy=stats.entropy,
            cu_seqlens=cu_seqlens,
            backend=name,
            **options,
        )
    if input.device.type == "cpu" or dispatch.targets_are_validated():
        checks.reject_bad_targets(flat_target.view(target.shape), linear_weight.shape[0], IGNORED)
    acc = acc_dtype(input.dtype)
    keep = batch.mask.bool()
    n = batch.sequences.sum(keep.to(acc)).clamp(min=1)
    share, total_scale = reference.shares(
        keep, n, batch.sequences, resolved.aggregation, resolved.max_length, norm
    )
    bonus_share, bonus_coef = None, 0.0
    if resolved.entropy_coef and spec.entropy_aggregation is not None:
        bonus_share = entropy_share(spec, resolved, batch, None, norm, acc)
        bonus_coef, resolved = resolved.entropy_coef, resolved._replace(entropy_coef=0.0)
    call = LinearPolicyCall(
        rows,
        resolved,
        flat_target,
        batch.advantage_per_token().contiguous(),
        batch.mask,
        batch.old,
        batch.ref,
        batch.sampler,
        batch.weighted(token_weight),
        share,
        total_scale,
        bonus_share,
        bonus_coef,
        scale,
        cap,
        entropy,
    )
    loss, out = LinearPolicyLoss.apply(hidden, linear_weight, linear_bias, call, dtype, chunk, needs)
    if cut is not None:
        out = torch.cat([out[:14], cut.sum().to(out.dtype).reshape(1), out[15:]])
    metrics = policy.metrics_from(
        out,
        with_ref=ref_logprobs is not None,
        with_entropy=entropy,
        with_correction=resolved.correction > 0 or cut is not None,
    )
    return PolicyOutput(loss, metrics)


def _correction_ahead(
    options: PolicyOptions, batch: Batch
) -> tuple[PolicyOptions, Tensor | None, Tensor | None]:
    """A sequence-level sampler correction needs old and sampler log-probs alone: made before the head, a token weight."""
    if options.correction < 3 or batch.old is None or not is_token_level(options._replace(correction=0)):
        return options, None, None
    mask = batch.mask.bool()
    old, sampler = (torch.where(mask, x, 0) for x in (batch.old, batch.sampler) if x is not None)
    weight, cut = reference.correction(old, sampler, mask, batch.sequences, options)
    return options._replace(correction=0), weight, cut & mask
