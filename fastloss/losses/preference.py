"""preference_loss: contrasts of a chosen and a rejected response, from their log-probs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import autograd, checks
from fastloss.engine import backend as backends
from fastloss.engine.autograd import segment_sum
from fastloss.engine.backend import resolve_call, resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.engine.contract import Backend
from fastloss.engine.definition import REFERENCE
from fastloss.engine.direct import DirectPairs
from fastloss.engine.native import cpu_backend
from fastloss.engine.sequences import Tokens, tokens_of
from fastloss.losses import pair_terms
from fastloss.losses.pair_terms import (
    PreferenceSpec,
    constant,
    nll_logps,
    pair_batch,
    parse_options,
    reference_logps,
)
from fastloss.tables import ACC_DTYPES, Number, PairConstants, PairOptions


class PreferenceOutput(NamedTuple):
    """``loss`` alone carries a gradient; the rest is detached.

    Attributes:
        loss: 0-d, or ``[B]`` with ``reduction="none"``.
        chosen_rewards, rejected_rewards: ``beta · (log p - log p_ref)``, ``[B]``; per token where the loss is (simpo, orpo).
        chosen_logps, rejected_logps: Σ log p of the responses, ``[B]``.
        metrics: 0-d tensors under TRL's names (docs/preference.md).
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    metrics: dict[str, Tensor]


@resolves_views
def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
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
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    chosen_nll_logps: Tensor | None = None,
    chosen_nll_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    chosen_token_weight: Tensor | None = None,
    rejected_token_weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> PreferenceOutput:
    r"""A contrast of each chosen response with its rejected one: DPO and its family, or a mixture of them.

    With log-ratios ``x = log π(y|x) - log π_ref(y|x)``, the default is DPO (arXiv:2305.18290),

    .. math:: -(1-\epsilon)\log\sigma(u) - \epsilon\log\sigma(-u), \qquad u = \beta\,(f(x_c) - f(x_r)) - \gamma

    docs/preference.md has every ``loss_type``, its formula, its paper, and which one to take.

    Args:
        chosen_logps, rejected_logps: Σ log p of each response, ``[B]``; or token log-probs, ``[B, T]`` with masks (the two
            T may differ), or packed ``[N]`` with ``chosen_cu_seqlens`` and ``rejected_cu_seqlens``. Any float dtype.
        ref_chosen_logps, ref_rejected_logps: the same of the reference model, ``[B]`` or of the policy's shape; constants.
        loss_type: "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
            "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "orpo", "simper"; or
            several, added with ``loss_weights`` (MPO, arXiv:2411.10442).
        beta: > 0; or one per pair, ``[B]`` (β-DPO, arXiv:2407.08639).
        label_smoothing: the probability that a label is wrong, in [0, 1]; or one per pair (an AI judge's doubt).
        reference_free: the reference is taken to be uniform, whatever is passed.
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence" (arXiv:2309.16240).
        margin: what the contrast must exceed, in units of u; or one per pair (ODPO, arXiv:2402.10571).
        length_normalized: every term sees log-probs per token.
        average_rewards: rewards per token; None: where every term is per token (simpo, orpo, simper).
        ld_alpha: weight in [0, 1] of the tokens past the shorter response's length (LD-DPO); needs token log-probs.
        chosen_lengths, rejected_lengths: tokens of each response, ``[B]``; known already where masks are given.
        chosen_mask, rejected_mask: bool or 0/1, of the token log-probs' shape; what is masked touches nothing.
        chosen_nll_logps: what the sft term takes in place of ``chosen_logps``, ``[B]``, with ``chosen_nll_lengths``.
        weights: a constant factor of each pair's loss, ``[B]`` (WPO, arXiv:2406.11827).
        chosen_token_weight, rejected_token_weight: a constant factor of each token's log-prob, of the token log-probs' shape, in both models'
            sums (TIS-DPO, arXiv:2410.04350; references ``[B]`` are taken as sums that have it); that of a masked token may be anything. It
            changes neither lengths nor the likelihood term "sft".
        reduction: "mean", "sum" or "none".

    Returns:
        :class:`PreferenceOutput`, in float32 (float64 for float64 log-probs). No pairs: loss 0.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message names the argument.

    >>> import torch, fastloss
    >>> chosen, rejected = torch.tensor([-10.0, -20.0]), torch.tensor([-12.0, -19.0])
    >>> out = fastloss.preference_loss(chosen, rejected, torch.tensor([-11.0, -20.0]), torch.tensor([-11.0, -20.0]))
    >>> round(out.loss.item(), 4), out.metrics["rewards/accuracies"].item()
    (0.6713, 0.5)
    """
    if reduction not in checks.REDUCTIONS:
        checks.is_one_of("reduction", reduction, checks.REDUCTIONS)
    spec = PreferenceSpec(
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
    if reference_free:
        ref_chosen_logps = ref_rejected_logps = None
    whole_responses = (
        ld_alpha is None
        and chosen_lengths is rejected_lengths is chosen_mask is rejected_mask is weights is None
        and chosen_cu_seqlens is rejected_cu_seqlens is chosen_nll_logps is chosen_nll_lengths is None
        and chosen_token_weight is rejected_token_weight is None
    )
    refs = ref_chosen_logps, ref_rejected_logps
    numbers = beta, label_smoothing, 0.0 if margin is None else margin
    if whole_responses and is_direct_pairs(chosen_logps, rejected_logps, *refs, numbers, backend):
        with_reference = ref_chosen_logps is not None, ref_rejected_logps is not None
        native = _direct_options(
            reduction, chosen_logps.shape[0], with_reference, reference_free, numbers, *spec
        )
        if native is not None:
            loss, won, lost, means = direct_pairs(
                native, chosen_logps, rejected_logps, *refs, per_pair=reduction == "none"
            )
            metrics = dict(zip(pair_terms.METRICS, means, strict=True))
            return PreferenceOutput(loss, won, lost, chosen_logps.detach(), rejected_logps.detach(), metrics)
    o = parse_options(spec)
    checks.is_floating("chosen_logps", chosen_logps)
    checks.is_floating("rejected_logps", rejected_logps)
    if chosen_logps.dtype != rejected_logps.dtype:
        raise ShapeError(f"rejected_logps: expected {chosen_logps.dtype}, got {rejected_logps.dtype}")
    checks.same_device("rejected_logps", rejected_logps, chosen_logps.device)
    acc, device = ACC_DTYPES[chosen_logps.dtype], chosen_logps.device
    c, r = chosen_logps.to(acc), rejected_logps.to(acc)
    sides = _sides(
        c,
        r,
        chosen_mask,
        rejected_mask,
        chosen_cu_seqlens,
        rejected_cu_seqlens,
        chosen_lengths,
        ld_alpha,
        (chosen_token_weight, rejected_token_weight),
        acc,
    )
    count = c.shape[0] if sides is None else sides[0].layout.count
    if (r.shape[0] if sides is None else sides[1].layout.count) != count:
        raise ShapeError(f"rejected_logps: expected {count} responses as chosen_logps, got {r.shape[0]}")
    ref_c, ref_r = reference_logps(o, reference_free, ref_chosen_logps, ref_rejected_logps)
    lengths: tuple[Tensor | None, Tensor | None] = (chosen_lengths, rejected_lengths)
    if sides is not None:
        lengths = sides[0].lengths, sides[1].lengths
    pairs = pair_batch(o, count, acc, device, lengths, beta, label_smoothing, margin, weights)
    call = resolve_call(
        "preference_loss", backend, c, r, ref_c, ref_r, beta, label_smoothing, margin, weights, chosen_mask, rejected_mask,
        chosen_cu_seqlens, rejected_cu_seqlens, *lengths, chosen_nll_logps, chosen_nll_lengths, chosen_token_weight,
        rejected_token_weight, has_operators=False,
    )  # fmt: skip
    call.announce()

    nll = None
    if chosen_nll_logps is not None:
        nll = nll_logps(chosen_nll_logps, chosen_nll_lengths, pairs, o, count, acc, device)
    if sides is None:
        rc = constant("ref_chosen_logps", ref_c, count, acc, device)
        rr = constant("ref_rejected_logps", ref_r, count, acc, device)
    else:
        chosen, rejected = sides
        tails: tuple[Tensor | None, Tensor | None] = (None, None)
        if ld_alpha is not None:
            ld_alpha = checks.number("ld_alpha", ld_alpha, low=0.0, high=1.0)
            shared = torch.minimum(chosen.lengths, rejected.lengths)
            tails = chosen.tail_weights(shared, ld_alpha), rejected.tail_weights(shared, ld_alpha)
        tails = (
            _weighted("chosen_token_weight", chosen, c, chosen_token_weight, tails[0]),
            _weighted("rejected_token_weight", rejected, r, rejected_token_weight, tails[1]),
        )
        if nll is None and tails[0] is not None and o.has("sft"):  # weights leave it alone
            nll = _sum(call.backend, chosen, c, None)
        by_token = ld_alpha is not None
        rc = _reference_sum(call.backend, "ref_chosen_logps", ref_c, c, chosen, tails[0], by_token, acc)
        rr = _reference_sum(call.backend, "ref_rejected_logps", ref_r, r, rejected, tails[1], by_token, acc)
        c = _sum(call.backend, chosen, c, tails[0])
        r = _sum(call.backend, rejected, r, tails[1])
    pairs = replace(pairs, constants=replace(pairs.constants, ref_chosen=rc, ref_rejected=rr))
    loss, won, lost, sums = pair_terms.contrast(call.backend, c, r, nll, pairs, o, reduction)
    c, r = c.detach(), r.detach()
    metrics = pair_terms.metrics(sums, c, r, nll if nll is None else nll.detach(), pairs, o)
    return PreferenceOutput(loss, won, lost, c, r, metrics)


def _sum(backend: Backend, side: Tokens, values: Tensor, tails: Tensor | None) -> Tensor:
    """Σ over each response; ``tails`` (acc ``[N]``) are weights in place of the mask."""
    weights = side.mask if tails is None else tails
    return segment_sum(backend, values.reshape(-1), weights, side.layout)


def _weighted(
    name: str, side: Tokens, like: Tensor, token_weight: Tensor | None, tails: Tensor | None
) -> Tensor | None:
    """``tails`` times the tokens' own weights."""
    if token_weight is None:
        return tails
    checks.token_weight(name, token_weight, tuple(like.shape), like.device)
    own = side.weighted(token_weight.detach().reshape(-1))
    return own if tails is None else own * tails


def _sides(
    c: Tensor,
    r: Tensor,
    chosen_mask: Tensor | None,
    rejected_mask: Tensor | None,
    chosen_cu_seqlens: Tensor | None,
    rejected_cu_seqlens: Tensor | None,
    chosen_lengths: Tensor | None,
    ld_alpha: float | None,
    token_weights: tuple[Tensor | None, Tensor | None],
    acc: torch.dtype,
) -> tuple[Tokens, Tokens] | None:
    """The layouts of token log-probs; None for log-probs of whole responses."""
    extra = (chosen_mask, rejected_mask, chosen_cu_seqlens, rejected_cu_seqlens, *token_weights)
    if c.dim() == 1 and chosen_cu_seqlens is None:
        names = (
            "chosen_mask",
            "rejected_mask",
            "chosen_cu_seqlens",
            "rejected_cu_seqlens",
            "chosen_token_weight",
            "rejected_token_weight",
        )
        for name, value in zip(names, extra, strict=True):
            if value is not None:
                raise ShapeError(
                    f"{name}: expected token log-probs [B, T], got chosen_logps of shape {list(c.shape)}"
                )
        if ld_alpha is not None:
            raise ShapeError(
                f"ld_alpha: expected token log-probs [B, T] with masks, got chosen_logps of shape {list(c.shape)}"
            )
        checks.has_shape("rejected_logps", r, tuple(c.shape))
        return None
    if chosen_lengths is not None:
        raise ValueError("chosen_lengths: expected None beside token log-probs, whose masks give the lengths")
    return (
        tokens_of("chosen_", c, chosen_mask, chosen_cu_seqlens, acc),
        tokens_of("rejected_", r, rejected_mask, rejected_cu_seqlens, acc),
    )


def _reference_sum(
    backend: Backend,
    name: str,
    ref: Tensor | None,
    like: Tensor,
    side: Tokens,
    tails: Tensor | None,
    by_token: bool,
    acc: torch.dtype,
) -> Tensor | None:
    if ref is None:
        return None
    if tuple(ref.shape) != tuple(like.shape) or (ref.dim() == 1 and side.layout.offsets is None):
        if by_token:
            raise ShapeError(
                f"{name}: expected token log-probs of shape {list(like.shape)} for ld_alpha, got {list(ref.shape)}"
            )
        return constant(name, ref, side.layout.count, acc, like.device)
    checks.same_device(name, ref, like.device)
    return _sum(backend, side, ref.detach().to(acc), tails)


# --- the commonest contrasts with the fewest Python calls around the kernel: one number a response, float32 or float64 on the
# CPU, options that are the same for all pairs. On 64 pairs those calls are the whole cost.

_cpu = cpu_backend()
_NUMBERS = (float, int)
_DTYPES = (torch.float32, torch.float64)
MEANS, EXTREMES = 6, 2
_is_compiling = torch.compiler.is_compiling


def is_direct_pairs(c: Any, r: Any, rc: Any, rr: Any, numbers: tuple[Any, Any, Any], backend: str) -> bool:
    """Whether :func:`direct_pairs` takes the call; if not, the general path checks it and says what is wrong."""
    return (
        not _is_compiling()
        and _cpu.direct is not None
        and type(c) in backends.PLAIN
        and c.is_cpu
        and c.dtype in _DTYPES
        and len(size := c.shape) == 1
        and size[0] > 0
        and r is not None
        and backends.are_alike(c, c, r, rc, rr)
        and type(numbers[0]) in _NUMBERS
        and type(numbers[1]) in _NUMBERS
        and type(numbers[2]) in _NUMBERS
        and backends.is_direct(backend)
    )


@functools.lru_cache(maxsize=64, typed=True)
def _direct_options(
    reduction: str,
    count: int,
    with_reference: tuple[bool, bool],
    reference_free: bool,
    numbers: tuple[float, float, float],
    *fields: Any,
) -> DirectPairs | None:
    """The native options of a direct call; None where the general path has more to do, or an error to raise."""
    o = parse_options(PreferenceSpec(*fields))
    complete = (
        reference_free or with_reference == (True, True) or not (o.needs_reference or any(with_reference))
    )
    if not (o.one_launch and complete) or o.needs_lengths:
        return None
    pair_batch(o, count, torch.float64, torch.device("cpu"), (None, None), *numbers, None)  # checks them
    scale = 1.0 / count if reduction == "mean" else 1.0
    beta, smoothing, margin = numbers
    return DirectPairs(
        PairOptions(
            terms=tuple((pair_terms.CODES[name], scale * weight) for name, weight in o.loss_weights),
            divergence=o.divergence,
            alpha=o.alpha,
            beta=beta,
            smoothing=smoothing,
            margin=margin,
            delta=o.delta,
            tau=o.tau,
        )
    )


def direct_pairs(
    native: DirectPairs,
    c: Tensor,
    r: Tensor,
    rc: Tensor | None = None,
    rr: Tensor | None = None,
    *,
    per_pair: bool = False,
    extremes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """(loss or its sum, chosen rewards, rejected rewards, metrics) of a call that :func:`is_direct_pairs`."""
    metrics = c.new_empty(MEANS + EXTREMES if extremes else MEANS)
    won, lost = torch.empty_like(c), torch.empty_like(c)
    given = native, per_pair, extremes, won, lost, metrics
    if (c.requires_grad or r.requires_grad) and torch.is_grad_enabled():
        loss = autograd.made_in_forward(c, r, _run_direct, _direct_defined, given, (rc, rr))
    else:
        loss, _ = _run_direct(given, c, r, rc, rr)
    return loss, won, lost, metrics.unbind()


def _run_direct(
    given: tuple[DirectPairs, bool, bool, Tensor, Tensor, Tensor],
    c: Tensor,
    r: Tensor,
    rc: Tensor | None,
    rr: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    native, per_pair, extremes, won, lost, metrics = given
    d_c, d_r = torch.empty_like(c), torch.empty_like(c)
    loss = torch.empty_like(c) if per_pair else c.new_empty(())
    native.run(c, r, rc, rr, per_pair, loss, d_c, d_r, won, lost, metrics, extremes)
    return loss, (d_c, d_r)


def _direct_defined(
    given: tuple[DirectPairs, bool, bool, Tensor, Tensor, Tensor],
    c: Tensor,
    r: Tensor,
    rc: Tensor | None,
    rr: Tensor | None,
) -> Tensor:
    native, per_pair, *_ = given
    constants = PairConstants(ref_chosen=rc, ref_rejected=rr)
    loss = REFERENCE.pair_loss(c, r, None, constants, native.options).loss
    return loss if per_pair else loss.sum()
