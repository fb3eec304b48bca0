"""linear_policy_loss: the policy-gradient loss from hidden states, without the logits of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import checks, devices
from fastloss.engine import head as heads
from fastloss.engine.autograd import differentiable_again, upstream_scale
from fastloss.engine.backend import check_targets, resolve_call, resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.engine.coefficients import of_token_stats
from fastloss.engine.contract import Backend, Factor, PolicyInputs
from fastloss.engine.definition import REFERENCE
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.head import Grads, Head, Limits, Needs, Schedule
from fastloss.engine.head_spans import Spans, spans_of
from fastloss.engine.jagged import takes_jagged
from fastloss.engine.sequences import Sequences, numbers_of
from fastloss.engine.shards import Shards
from fastloss.engine.support import sets_of
from fastloss.losses.policy import (
    PolicyOutput,
    choose,
    empty_out,
    entropy_share,
    metrics_from,
    of_batch,
    policy_loss,
    with_clip_counts,
)
from fastloss.losses.policy_inputs import (
    advantage_per_token,
    lay_flat,
    sampler_weight,
    shares,
    weighted,
)
from fastloss.losses.policy_options import VARIANTS, PolicySpec, options_of
from fastloss.losses.policy_selection import Selection
from fastloss.losses.token_stats import (
    TokenStats,
    linear_token_stats,
    row_options,
    support_details,
    support_sent,
)
from fastloss.tables import (
    ACC_DTYPES,
    CORRECTIONS,
    LATE_DTYPES,
    LSE_PARTS,
    POLICY_PLACE,
    Number,
    PolicyOptions,
    RowOptions,
    is_token_level,
)

# The target of a masked row: a number that is no class and no ignore_index of a user.
IGNORED = -(2**63)
_SCALE, _POLICY, _CUT = (POLICY_PLACE[name] for name in ("scale", "policy", "cut"))


@takes_jagged(TokenStats)
@takes_dtensors("linear_weight")
@resolves_views
def linear_policy_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
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
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    with_entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    support: Any = None,
    with_mass: bool = False,
    backend: str = "auto",
    **options: Any,
) -> Any:
    """:func:`policy_loss` of the tokens ``target`` under the logits of a linear head, which are never held.

    The gradient is made in the forward, while the logits of a token and of all others that its term needs are there: 3 GEMMs, 2
    with a frozen ``linear_weight``. For sequence-level ratios, ``off_policy_threshold`` and vespo these are the tokens of its
    sequence; for ``top_entropy_quantile``, clip_cov, kl_cov and dppo all of the batch. Where so many do not go together
    (:func:`fastloss.explain` says it), and for clip_cov with a generator, :func:`linear_token_stats` comes first and the backward
    makes the logits again: 4. On CPU masked rows cost no GEMM at all.

    Args:
        input: hidden states ``[B, T, D]``, or packed ``[N, D]`` with ``cu_seqlens``; the state that predicts the token.
        linear_weight: ``[V, D]``. linear_bias: ``[V]``.
        target: int64 ``[B, T]`` or ``[N]``, the sampled tokens; any value where masked.
        old_logprobs, advantages, mask, ref_logprobs, sampler_logprobs, weights, normalizer, cu_seqlens: as in
            :func:`policy_loss`.
        temperature, logit_scale, softcap: as in :func:`linear_token_stats`; entropy is that of the tempered logits.
        chunk_size: rows that go together at most; None chooses. memory, group, logits_dtype: as in :func:`linear_cross_entropy`.
        lora: as in :func:`linear_cross_entropy`. Not with ``support``.
        with_entropy: also the metric "entropy" where the loss does not need it.
        return_stats: also a :class:`TokenStats` of ``target``'s shape, from the same pass: logprobs, and entropy where it was
            computed, both detached, 0 where masked.
        support: the classes that the sampler kept at each position, as in :func:`token_stats`: log-probs, ratios, entropy, KL and gradients
            are those of the distribution over them alone, as the sampler's own log-probs are. No GEMM: the kept rows of the weight are
            multiplied alone. Masked positions may have any set, or none.
        with_mass: also the metrics "support/mass" and "support/mass_min": what the kept classes have in the whole distribution. It costs
            the whole head once.
        **options: the other keywords of :func:`policy_loss` (``loss_type``, ``clip_low``, ``beta``, …).

    Returns:
        PolicyOutput, or with ``return_stats`` the pair (PolicyOutput, TokenStats).

    Raises:
        TypeError: an unknown option. ValueError: a shape, dtype, device or option that does not fit, by name.
        IndexError: on CPU, an unmasked target outside [0, V).

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(1, 2, 8, requires_grad=True), torch.zeros(4, 8)
    >>> target, mask = torch.tensor([[1, 3]]), torch.tensor([[True, True]])
    >>> fastloss.linear_policy_loss(hidden, weight, target, None, torch.ones(1), mask).loss.item()
    -1.0
    """
    spec = PolicySpec(**options)
    if input.dim() < 2:
        raise ShapeError(
            f"input: expected shape [B, T, D], or [N, D] with cu_seqlens, got {list(input.shape)}"
        )
    heads.check_head(input, linear_weight, linear_bias)
    if lora is not None and support is not None:
        raise ValueError("lora: expected None beside support, got an adapter")
    input, linear_bias = heads.with_lora(input, linear_weight, linear_bias, lora)
    hidden = checks.as_rows(input)
    checks.index_target("target", target, tuple(input.shape[:-1]), input.device)
    limits = heads.limits_of(chunk_size, memory, group, input, linear_weight, None, 0, logits_dtype)
    row = row_options(temperature, logit_scale, softcap, IGNORED, input.shape[:-1], input)
    inputs = lay_flat(
        "target",
        target,
        mask=mask,
        cu_seqlens=cu_seqlens,
        dtype=input.dtype,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        weights=weights,
        normalizer=normalizer,
    )
    resolved = options_of(
        spec,
        with_sampler=inputs.sampler is not None,
        with_ref=inputs.ref is not None,
        default_length=None if cu_seqlens is not None else inputs.layout.length,
    )
    entropy = bool(spec.entropy_coef) or spec.top_entropy_quantile < 1 or with_entropy
    classes = target.reshape(-1).masked_fill(inputs.mask == 0, IGNORED)
    with_correction = resolved.correction > 0
    of_batch_options = resolved
    resolved, corrected, cut = _correction_ahead(resolved, inputs)
    selects = spec.top_entropy_quantile < 1 or VARIANTS[spec.loss_type].selects
    dtype = heads.compute_dtype(input, linear_weight)
    call = resolve_call(
        "linear_policy_loss",
        backend,
        input,
        linear_weight,
        linear_bias,
        target,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs,
        sampler_logprobs,
        weights,
        normalizer,
        cu_seqlens,
        row.row_scale,
        has_operators=False,
        dtype=dtype,
    )
    if with_mass and support is None:
        raise ValueError("support: expected the kept classes for with_mass=True, got None")
    needs = heads.needs_of(input, linear_weight, linear_bias)
    keep = None if call.by_definition else heads.kept_rows(classes, IGNORED)
    rows = heads.count_kept(hidden.shape[0], keep)
    head = Head(call.backend, hidden, linear_weight, None, dtype, limits.shards)
    schedule, parts = heads.schedule_of(head, rows, needs, limits), None
    if not call.by_definition and support is None:
        schedule, parts = _plan(head, needs, limits, inputs.layout, keep, resolved, spec, selects)
    if call.by_definition:
        call.announce()
    elif support is not None:
        sets = sets_of(support, target.shape, input.device)
        want = ("logprobs", *(("entropy",) if entropy else ()), *(("log_mass",) if with_mass else ()))
        told = support_sent(
            limits.shards,
            sets,
            want,
            classes,
            IGNORED,
            ACC_DTYPES[dtype],
            hidden if needs.hidden else None,
            True,
        )
        call.announce(**support_details(sets, dtype, with_mass), **told)
    else:
        ahead = parts is not None or (needs == Needs(True, False, False) and not resolved.entropy_coef)
        call.announce(
            **schedule.details(
                head,
                rows,
                needs,
                bool(needs) and not ahead,
                ("logprobs", "entropy") if entropy else ("logprobs",),
            )
        )
    if call.by_definition or not devices.may_wait(classes.device):
        # A masked row that stays in the GEMM adds 0 · hidden to the weight's gradient: NaN where its hidden state is NaN.
        hidden = hidden.masked_fill((inputs.mask == 0).unsqueeze(-1), 0)
        input = hidden.view(input.shape)
    if parts is None:
        name = "auto" if call.traced else call.backend.name
        stats = linear_token_stats(
            linear_weight=linear_weight,
            target=classes.view(target.shape),
            **heads.as_given(input, linear_weight, linear_bias),
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=IGNORED,
            outputs=("logprobs", *(("entropy",) if entropy else ()), *(("log_mass",) if with_mass else ())),
            detach=("entropy",) if entropy and not resolved.entropy_coef else (),
            chunk_size=chunk_size,
            memory=memory,
            group=limits.shards,
            logits_dtype=logits_dtype,
            support=support,
            backend=name,
        )
        assert stats.logprobs is not None
        output = policy_loss(
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
        if stats.log_mass is not None:
            output.metrics.update(mass_metrics(stats.log_mass, inputs.mask))
        return _with_stats(output, stats.logprobs, stats.entropy, target) if return_stats else output
    check_targets(classes.view(target.shape), heads.vocab_of(linear_weight, limits), IGNORED)
    share, scale = shares(
        inputs.mask.bool(),
        inputs.layout,
        resolved.aggregation,
        resolved.max_length,
        inputs.normalizer,
        ACC_DTYPES[input.dtype],
    )
    bonus_share, bonus_coef = None, 0.0
    if resolved.entropy_coef and (spec.entropy_aggregation is not None or spec.top_entropy_quantile < 1):
        if spec.top_entropy_quantile == 1:
            bonus_share = entropy_share(spec, resolved, inputs, None)
        bonus_coef, resolved = resolved.entropy_coef, replace(resolved, entropy_coef=0.0)
    per_token = replace(
        weighted(inputs, corrected), advantages=advantage_per_token(inputs).contiguous(), normalizer=1.0
    )
    run = _Run(
        backend=call.backend,
        spec=spec,
        of_batch=(of_batch_options, inputs),
        parts=parts,
        selects=selects,
        options=resolved,
        row=row,
        target=classes,
        inputs=per_token,
        share=share,
        scale=scale,
        bonus_share=bonus_share,
        bonus_coef=bonus_coef,
        with_entropy=entropy,
        dtype=dtype,
        schedule=schedule,
        needs=needs,
        keep=keep,
        shards=limits.shards,
    )
    loss, out, logprobs, token_entropy = _LinearPolicyLoss.apply(hidden, linear_weight, linear_bias, run)
    if cut is not None:
        out = torch.cat([out[:_CUT], cut.sum().to(out.dtype).reshape(1), out[_CUT + 1 :]])
    metrics = metrics_from(
        out, with_ref=ref_logprobs is not None, with_entropy=entropy, with_correction=with_correction
    )
    output = PolicyOutput(loss, metrics)
    return _with_stats(output, logprobs, token_entropy, target) if return_stats else output


@torch.no_grad()
def mass_metrics(log_mass: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The mean and the least of what was kept, over the unmasked tokens; 1 where there is none."""
    keep, mass = mask.bool(), log_mass.reshape(-1).exp()
    if not keep.numel():
        return {"support/mass": mass.new_ones(()), "support/mass_min": mass.new_ones(())}
    mean = torch.where(keep, mass, 0.0).sum() / keep.sum().clamp(min=1)
    least = torch.where(keep, mass, torch.inf).amin()
    return {
        "support/mass": torch.where(keep.any(), mean, 1.0),
        "support/mass_min": torch.where(keep.any(), least, 1.0),
    }


def _with_stats(
    output: PolicyOutput, logprobs: Tensor, entropy: Tensor | None, target: Tensor
) -> tuple[PolicyOutput, TokenStats]:
    return output, TokenStats(
        logprobs=logprobs.detach().view(target.shape),
        entropy=None if entropy is None else entropy.detach().view(target.shape),
    )


def _correction_ahead(
    options: PolicyOptions, inputs: PolicyInputs
) -> tuple[PolicyOptions, Tensor | None, Tensor | None]:
    """A sequence-level sampler correction depends on old and sampler log-probs alone, so it is made before the head, as a
    weight per token: (options without it, that weight, the tokens that it cuts)."""
    sequence_level = CORRECTIONS[options.correction].startswith("sequence")
    without = replace(options, correction=0)
    if not sequence_level or inputs.old is None or not is_token_level(without):
        return options, None, None
    weight, cut = sampler_weight(inputs, options)
    return without, weight, cut & inputs.mask.bool()


class _Parts(NamedTuple):
    """The parts of a pass: equal ones, or of whole sequences."""

    spans: Spans | None = None
    offsets: Tensor | None = None  # int64 [sequences + 1], in computed rows

    def layout(self, part: int, rows: int, device: torch.device) -> Sequences:
        """The sequences of a part; where no token needs another, one of all its tokens."""
        if self.spans is None or self.offsets is None:
            return Sequences(None, rows, 1, rows, device)
        first, last = self.spans[1][part]
        return Sequences(
            self.offsets[first : last + 1] - self.spans[0][part][0], 0, last - first, rows, device
        )


def _plan(
    head: Head,
    needs: Needs,
    limits: Limits,
    layout: Sequences,
    keep: Tensor | None,
    options: PolicyOptions,
    spec: PolicySpec,
    selects: bool,
) -> tuple[Schedule, _Parts | None]:
    """The schedule, and the parts of a pass that makes the gradients on its way; None: statistics first, and a backward of their own."""
    rows = heads.count_kept(layout.n, keep)
    logprobs_only = not options.entropy_coef
    if is_token_level(options) and not selects:
        return heads.schedule_of_one_pass(head, rows, needs, limits, logprobs_only), _Parts()
    offsets, device = layout.offsets, layout.device
    known = offsets is None and keep is None
    # A second backward would draw other tokens; and nobody may ask a GPU for the sequences' lengths here.
    if spec.generator is not None or not (known or devices.may_wait(device)):
        return heads.schedule_of(head, rows, needs, limits), None
    if offsets is None:
        offsets = torch.arange(layout.count + 1, dtype=torch.int64, device=device) * layout.length
    if keep is not None:
        offsets = torch.searchsorted(keep, offsets)
    bounds = [layout.length * s for s in range(layout.count + 1)] if known else numbers_of(offsets)
    schedule, spans = spans_of(head, needs, limits, bounds, coupled=selects, logprobs_only=logprobs_only)
    return schedule, None if spans is None else _Parts(spans, offsets)


@dataclass(frozen=True)
class _Run:
    """What forward and backward need beside the tensors with gradients; per-token tensors are acc ``[N]``."""

    backend: Backend
    spec: PolicySpec
    of_batch: tuple[PolicyOptions, PolicyInputs]  # of all rows
    parts: _Parts
    selects: bool  # tokens are chosen over the whole batch
    options: PolicyOptions
    row: RowOptions
    target: Tensor  # IGNORED where masked
    inputs: PolicyInputs
    share: Tensor  # unscaled
    scale: Tensor  # 0-d
    bonus_share: Tensor | None  # scaled; an entropy bonus with an aggregation of its own
    bonus_coef: float
    with_entropy: bool
    dtype: torch.dtype
    schedule: Schedule
    needs: Needs
    keep: Tensor | None  # kept_rows
    shards: Shards | None


def _again(ctx: Any) -> Any:
    run: _Run = ctx.run
    heads.again_only_whole(run.shards)
    hidden, weight, bias = ctx.saved_tensors
    logits = heads.defined_logits(hidden, weight, bias, run.dtype, run.schedule.float_logits)
    want = ("logprobs", "entropy") if run.with_entropy else ("logprobs",)
    stats = REFERENCE.row_stats(logits, run.target, run.row, want=want)
    options, inputs = run.of_batch
    loss, _ = of_batch(REFERENCE, run.spec, options, inputs, stats["logprobs"], stats.get("entropy"))
    return [loss, None, None, None], [hidden, weight, bias]


class _LinearPolicyLoss(torch.autograd.Function):
    """(hidden, weight, bias) -> (loss, out [16], logprobs [N], entropy [N] or None); the gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, run: _Run) -> Any:
        ctx.run = run
        head = heads.make_head(run.backend, hidden, weight, bias, run.dtype, run.shards)
        loss, out, tokens, grads = _one_pass(head, run)
        ctx.late = run.dtype in LATE_DTYPES
        dtypes = heads.leaf_dtypes(hidden, weight, bias)
        ctx.grads = grads if ctx.late else heads.finish(grads, dtypes, run.backend)
        ctx.save_for_backward(hidden, weight, bias)
        rest = out, tokens["logprobs"], tokens.get("entropy")
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        return loss, *rest

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        run: _Run = ctx.run
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # retain_graph: the first backward gave the buffers away
            head = heads.make_head(run.backend, hidden, weight, bias, run.dtype, run.shards)
            grads = _one_pass(head, run)[-1]
        late = Factor(1.0, run.scale) if ctx.late else None
        scale = upstream_scale(run.backend, upstream.to(ACC_DTYPES[run.dtype]), late)
        return (*heads.finish(grads, heads.leaf_dtypes(hidden, weight, bias), run.backend, scale), None)


def _one_pass(head: Head, run: _Run) -> tuple[Tensor, Tensor, dict[str, Tensor], Grads]:
    """Loss, ``out [16]``, the tokens' statistics ``[N]`` and the gradients of the loss (without the scale where that is late: float16). A token's share of
    the aggregate is known from the mask, so its coefficients are made as soon as the logits are of all tokens that its term needs."""
    keep = run.keep
    late = head.dtype in LATE_DTYPES
    target, share = heads.pick(run.target, keep), heads.pick(run.share, keep)
    assert share is not None
    share = share if late else share * run.scale
    bonus_share = heads.pick(run.bonus_share, keep)
    inputs = run.inputs
    constants = {
        name: heads.pick(getattr(inputs, name), keep)
        for name in ("advantages", "mask", "old", "ref", "sampler", "token_weight")
    }
    want = (LSE_PARTS, "logprobs", "entropy") if run.with_entropy else (LSE_PARTS, "logprobs")
    outs: list[Tensor] = []
    bonuses: list[Tensor] = []
    tokens: list[dict[str, Tensor]] = []
    logprobs_only = not (run.options.entropy_coef or run.bonus_coef)
    bounds = None if run.parts.spans is None else run.parts.spans[0]
    with heads.begin(head, run.needs, keep, run.schedule, bounds, logprobs_only) as pass_:
        for number, part in enumerate(pass_.parts()):
            own = part.of(target)
            if not own.shape[0]:
                continue
            stats = part.stats(own, run.row, want)
            entropy = stats.get("entropy")
            given = PolicyInputs(
                layout=run.parts.layout(number, own.shape[0], own.device),
                share=part.of(share),
                normalizer=1.0,
                **{name: part.of(x) for name, x in constants.items()},
            )
            selected, own_bonus = Selection(), part.of(bonus_share)
            if run.selects:
                given, selected = choose(run.spec, run.options, given, stats["logprobs"], entropy)
                if run.bonus_coef and selected.chosen is not None:
                    whole = replace(given, normalizer=run.of_batch[1].normalizer)
                    own_bonus = entropy_share(run.spec, run.options, whole, selected.chosen)
            result = run.backend.policy_loss(stats["logprobs"], entropy, given, run.options)
            outs.append(with_clip_counts(result.out, selected))
            tokens.append({name: stats[name] for name in want[1:]})
            d_entropy = result.d_entropy if run.options.entropy_coef else None
            if own_bonus is not None:
                assert entropy is not None
                bonuses.append((own_bonus * torch.where(own_bonus != 0, entropy, 0)).sum())
                d_entropy = -run.bonus_coef * (own_bonus / run.scale if late else own_bonus)
            k = of_token_stats(result.d_logprobs, d_entropy, None, entropy)
            part.gradients(own, run.row, stats[LSE_PARTS], k)
        nothing = torch.zeros_like(run.share)
        of_tokens = pass_.collect(tokens) if tokens else dict.fromkeys(want[1:], nothing)
        grads = pass_.grads()
        out = _added(torch.stack(outs)) if outs else empty_out(run.share)
        loss = out[0] * run.scale if late else out[0].clone()
        # The shares that the launches summed contain the scale already: metrics_from expects it in a place of its own.
        policy_term = out[_POLICY] if late else out[_POLICY] / run.scale
        out = torch.cat(
            [loss.reshape(1), run.scale.reshape(1), out[_SCALE + 1 : _POLICY], policy_term.reshape(1)]
        )
        if bonuses:
            loss = loss - run.bonus_coef * torch.stack(bonuses).sum()
    return loss, out, of_tokens, grads


def _added(parts: Tensor) -> Tensor:
    """``out [chunks, 16]`` of chunks whose scale is the same -> ``[16]``."""
    low, high = POLICY_PLACE["min_ratio"], POLICY_PLACE["max_ratio"]
    out = parts.sum(0)
    seen = parts[:, POLICY_PLACE["tokens"]] > 0  # a chunk without tokens says 1 for its extremes
    one = torch.ones((), dtype=parts.dtype, device=parts.device)
    inf = one * torch.inf
    out[_SCALE] = parts[0, _SCALE]
    out[low] = torch.where(seen.any(), torch.where(seen, parts[:, low], inf).amin(), one)
    out[high] = torch.where(seen.any(), torch.where(seen, parts[:, high], -inf).amax(), one)
    return out
