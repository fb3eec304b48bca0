"""linear_preference_loss, and the same under its papers' names: losses of pairs from hidden states and a vocabulary matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastloss.engine import checks
from fastloss.engine import head as heads
from fastloss.engine import head_groups as groups
from fastloss.engine.autograd import segment_sum
from fastloss.engine.backend import resolves_views
from fastloss.engine.contract import Backend
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.jagged import takes_jagged
from fastloss.losses import pair_terms
from fastloss.losses.pair_terms import (
    SORTED,
    PairBatch,
    PreferenceOptions,
    PreferenceSpec,
    constant,
    pair_batch,
    parse_options,
    reference_logps,
)
from fastloss.losses.preference import PreferenceOutput
from fastloss.losses.token_stats import TokenStats, row_options, stats_from
from fastloss.tables import Number

_OUTPUTS = ("chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps", "sums", "likelihood")


@takes_jagged(TokenStats)
@takes_dtensors("linear_weight")
@resolves_views
def linear_preference_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    reference_free: bool = False,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    bco_delta: float = 0.0,
    simpo_gamma: float = 0.5,
    simpo_alpha: float = 0.0,
    margin: Number | None = None,
    length_normalized: bool = False,
    average_rewards: bool | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    weights: Tensor | None = None,
    token_weight: Tensor | None = None,
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
    """:func:`preference_loss` of ``input @ linear_weight.T + linear_bias``, without ever holding those logits.

    The reference costs 1 GEMM, the policy 3 (2 with a frozen head): chunked by whole pairs, a pair's gradient is made while
    its logits are still in the buffer. Tokens without a target cost nothing. 4 GEMMs, the backward making the
    logits again, where a pair is longer than the buffer, for aot and aot_unpaired, and with ``reduction="none"``.

    Args:
        input: hidden states ``[2B, T, D]``, the B chosen sequences and then the B rejected; or packed ``[N, D]`` with
            ``cu_seqlens`` ``[2B + 1]``. Position t is that which predicts ``target[t]``: shift before the call.
        linear_weight: ``[V, D]``. linear_bias: ``[V]``.
        target: int64 ``[2B, T]`` or ``[N]``; ``ignore_index`` on prompts and padding.
        ref_input, ref_weight, ref_bias: the reference model's, for the same targets; no gradient. Or its log-probs:
        ref_chosen_logps, ref_rejected_logps: ``[B]``.
        use_weighting: WPO (arXiv:2406.11827): pairs are weighted by the policy's own probability of them.
        weights: a constant factor of each pair's loss, ``[B]``.
        token_weight: a constant factor of each token's log-prob, of ``target``'s shape, in both models' sums (TIS-DPO, arXiv:2410.04350); that
            of an ignored token may be anything. It changes neither lengths nor the likelihood term "sft".
        temperature, logit_scale, softcap: as in :func:`linear_token_stats`, for both models.
        token_metrics: also entropy, mean_token_accuracy, logits/chosen, logits/rejected, from the same pass.
        chunk_size: rows that go together at most; in chunks of rows None lets a pair's logits take as much as the weight and its
            gradient. memory, group, logits_dtype: as in :func:`linear_cross_entropy`; the reference's vocabulary is cut over the same processes.
        lora: as in :func:`linear_cross_entropy`, of the policy alone: without its adapter the policy is its own reference, ``ref_weight`` the same
            matrix.
        return_stats: also a :class:`TokenStats` of ``target``'s shape, from the same pass, detached and 0 where ignored: logprobs, with
            ``token_metrics`` entropy, mean_logits and is_top1, with ``use_weighting`` log_sum_sq_probs.

    The other options are those of :func:`preference_loss`; lengths and masks come from the targets.

    Returns:
        PreferenceOutput, or with ``return_stats`` the pair (PreferenceOutput, TokenStats).

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message names the argument.
        IndexError: on CPU, a bad target; see :func:`cross_entropy`.

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(2, 3, 8, requires_grad=True), torch.zeros(4, 8)
    >>> target = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    >>> out = fastloss.linear_preference_loss(hidden, weight, target, reference_free=True)
    >>> out.chosen_logps, out.rejected_logps
    (tensor([-2.7726]), tensor([-1.3863]))
    """
    checks.is_one_of("reduction", reduction, checks.REDUCTIONS)
    o = parse_options(
        PreferenceSpec(
            loss_type=loss_type if isinstance(loss_type, str) else tuple(loss_type),
            loss_weights=None if loss_weights is None else tuple(loss_weights),
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
            discopop_tau=discopop_tau,
            bco_delta=bco_delta,
            simpo_gamma=simpo_gamma,
            simpo_alpha=simpo_alpha,
            length_normalized=length_normalized,
            average_rewards=average_rewards,
        )
    )
    options = row_options(temperature, logit_scale, softcap, ignore_index, input.shape[:-1], input)
    x = groups.check_grouped_head(
        input,
        linear_weight,
        target,
        linear_bias,
        cu_seqlens,
        options,
        heads.limits_of(chunk_size, memory, group, input, linear_weight, target, ignore_index, logits_dtype),
        width=2,
        lora=lora,
    )
    groups.check_reference(input, ref_input, ref_weight, ref_bias)
    lengths = x.rows.tokens.lengths
    count, acc, device = x.rows.groups, lengths.dtype, input.device
    if ref_input is not None:
        if ref_chosen_logps is not None or ref_rejected_logps is not None:
            raise ValueError("ref_chosen_logps: expected None beside ref_input, got a tensor")
        if o.simpo_alpha and not reference_free:
            raise ValueError("simpo_alpha: expected 0 with ref_input (or reference_free=True)")
    else:
        ref_chosen_logps, ref_rejected_logps = reference_logps(
            o, reference_free, ref_chosen_logps, ref_rejected_logps
        )
    if use_weighting and (weights is not None or o.has(*SORTED)):
        raise ValueError(
            "use_weighting: expected False with weights, or with loss_type 'aot' or 'aot_unpaired'"
        )
    pairs = pair_batch(
        o, count, acc, device, (lengths[0::2], lengths[1::2]), beta, label_smoothing, margin, weights
    )
    if ld_alpha is not None:
        ld_alpha = checks.number("ld_alpha", ld_alpha, low=0.0, high=1.0)
    rc = constant("ref_chosen_logps", ref_chosen_logps, count, acc, device)
    rr = constant("ref_rejected_logps", ref_rejected_logps, count, acc, device)
    with_ref = ref_input is not None and not reference_free
    plan = groups.plan_groups(
        "linear_preference_loss",
        x,
        backend,
        (
            beta,
            label_smoothing,
            margin,
            weights,
            token_weight,
            rc,
            rr,
            ref_input,
            ref_weight,
            ref_bias,
            cu_seqlens,
        ),
        coupled=o.has(*SORTED),
        per_group=reduction == "none",
        ref=with_ref,
    )
    tails = None
    if ld_alpha is not None:
        shared = torch.minimum(lengths[0::2], lengths[1::2]).repeat_interleave(2)
        tails = x.rows.tokens.tail_weights(shared, ld_alpha)
    own_weights = groups.token_weights(x, token_weight, tuple(target.shape))
    if own_weights is not None:
        tails = own_weights if tails is None else own_weights * tails
    if with_ref:
        assert ref_input is not None and ref_weight is not None
        ref = groups.reference_sums(plan.call, x, ref_input, ref_weight, ref_bias, tails)
        rc, rr = ref[0::2].contiguous(), ref[1::2].contiguous()
    constants = replace(pairs.constants, ref_chosen=rc, ref_rejected=rr)
    pairs = replace(pairs, constants=constants)
    if plan.spans is not None and constants.chosen_lengths is not None:
        pairs = replace(pairs, mean_tokens=constants.chosen_lengths.mean())

    loss = _PairsOfHead(x, pairs, o, reduction, tails, use_weighting, part_by_part=plan.spans is not None)
    want = ("logprobs", *(("log_sum_sq_probs",) if use_weighting else ()))
    if token_metrics:
        want = (*want, *groups.METRIC_STATS)
    total = max(count, 1) if reduction == "mean" else 1
    keep = groups.TOKEN_STATS if return_stats else groups.METRIC_STATS
    value, out = groups.evaluate(x, plan, loss, want, _OUTPUTS, total, keep)
    c, r = out["chosen_logps"], out["rejected_logps"]
    metrics = pair_terms.metrics(out["sums"].sum(0), c, r, out["likelihood"], pairs, o)
    if token_metrics:
        chosen = (torch.arange(2 * count, device=device, dtype=torch.int64) % 2 == 0).to(acc)
        metrics.update(groups.token_metrics(out, x, plan.call.backend, chosen))
    output = PreferenceOutput(value, out["chosen_rewards"], out["rejected_rewards"], c, r, metrics)
    if not return_stats:
        return output
    of_targets = groups.in_place_of_targets(out, x, target)
    return output, stats_from(of_targets, tuple(of_targets))


@dataclass(frozen=True)
class _PairsOfHead:
    """The loss of whole pairs from the log-probs of their tokens: what engine/head_groups.py asks for each chunk."""

    x: groups.GroupedHead
    pairs: PairBatch
    options: PreferenceOptions
    reduction: str
    tails: Tensor | None
    use_weighting: bool
    part_by_part: bool

    def of_groups(
        self,
        backend: Backend,
        logprobs: Tensor,
        stats: dict[str, Tensor],
        rows: tuple[int, int],
        groups: tuple[int, int],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (start, stop), (first, last), o = rows, groups, self.options
        layout = self.x.rows.part(first, last, start, stop)
        pairs = self.pairs.part(first, last) if self.part_by_part else self.pairs
        likelihood = None  # Σ log p of the sft term, which the tokens' weights leave alone
        weights = None if self.tails is None else self.tails[start:stop]
        logps = segment_sum(backend, logprobs, weights, layout)
        if self.tails is not None and o.has("sft"):
            likelihood = segment_sum(backend, logprobs, None, layout)[0::2]
        if self.use_weighting:
            lengths = self.x.rows.tokens.lengths
            aligned = (logprobs - stats["log_sum_sq_probs"].to(lengths.dtype)).detach()
            mean = segment_sum(backend, aligned, None, layout) / lengths[2 * first : 2 * last].clamp(min=1)
            weight = (mean[0::2] + mean[1::2]).exp()
            pairs = replace(pairs, constants=replace(pairs.constants, weight=weight))
        c, r = logps[0::2], logps[1::2]
        loss, won, lost, sums = pair_terms.contrast(backend, c, r, likelihood, pairs, o, self.reduction)
        values = (won, lost, c, r, sums.reshape(1, -1), c if likelihood is None else likelihood)
        return loss, {name: x.detach() for name, x in zip(_OUTPUTS, values, strict=True)}


def linear_dpo_loss(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> PreferenceOutput:
    """DPO (arXiv:2305.18290) from the head: :func:`linear_preference_loss` with ``loss_type="sigmoid"``.

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> target = torch.tensor([[0, 1, 2], [3, 3, 0]])
    >>> out = fastloss.linear_dpo_loss(hidden, weight, target, ref_input=hidden, ref_weight=weight)
    >>> round(out.loss.item(), 4)
    0.6931
    """
    return linear_preference_loss(input, linear_weight, target, loss_type="sigmoid", **options)


def linear_simpo_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, cpo_alpha: float = 0.0, **options: Any
) -> PreferenceOutput:
    """:func:`simpo_loss` from the head.

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> out = fastloss.linear_simpo_loss(hidden, weight, torch.tensor([[0, 1, 2], [3, 3, 0]]), simpo_gamma=0.0)
    >>> round(out.loss.item(), 4)
    0.6931
    """
    return _mixed(input, linear_weight, target, "simpo", cpo_alpha, **options)


def linear_cpo_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    loss_type: str = "sigmoid",
    cpo_alpha: float = 1.0,
    **options: Any,
) -> PreferenceOutput:
    """:func:`cpo_loss` from the head.

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> out = fastloss.linear_cpo_loss(hidden, weight, torch.tensor([[0, 1, 2], [3, 3, 0]]))
    >>> round(out.metrics["nll_loss"].item(), 4)
    1.3863
    """
    checks.is_one_of("loss_type", loss_type, ("sigmoid", "hinge", "ipo", "simpo"))
    if loss_type == "ipo":
        options.setdefault("average_rewards", True)
    return _mixed(input, linear_weight, target, loss_type, cpo_alpha, **options)


def linear_orpo_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any
) -> PreferenceOutput:
    """:func:`orpo_loss` from the head; its likelihood term is over the tokens that have a target.

    >>> import torch, fastloss
    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> out = fastloss.linear_orpo_loss(hidden, weight, torch.tensor([[0, 1, 2], [3, 3, 0]]))
    >>> round(out.metrics["log_odds_chosen"].item(), 4)
    0.0
    """
    return _mixed(input, linear_weight, target, "orpo", 1.0, **options)


def _mixed(
    input: Tensor, linear_weight: Tensor, target: Tensor, loss_type: str, nll_weight: float, **options: Any
) -> PreferenceOutput:
    """A contrast without a reference, and ``nll_weight`` times the likelihood of the chosen."""
    names = [loss_type, "sft"] if nll_weight else [loss_type]
    factors = [1.0, nll_weight] if nll_weight else None
    return linear_preference_loss(
        input, linear_weight, target, loss_type=names, loss_weights=factors, reference_free=True, **options
    )
