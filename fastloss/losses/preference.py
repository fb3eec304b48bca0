"""preference_loss and its front doors: contrasts of a chosen and a rejected response, from their log-probs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import backend as dispatch
from fastloss.engine import checks, plain_pairs
from fastloss.engine import sequences as segments
from fastloss.engine.checks import ShapeError
from fastloss.engine.native_rows import acc_dtype
from fastloss.losses import pairs
from fastloss.losses.pairs import Options, Pairs

Number = float | Tensor


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
            "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "orpo"; or several, added
            with ``loss_weights`` (MPO, arXiv:2411.10442).
        beta: > 0; or one per pair, ``[B]`` (β-DPO, arXiv:2407.08639).
        label_smoothing: the probability that a label is wrong, in [0, 1]; or one per pair (an AI judge's doubt).
        reference_free: the reference is taken to be uniform, whatever is passed.
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence" (arXiv:2309.16240).
        margin: what the contrast must exceed, in units of u; or one per pair (ODPO, arXiv:2402.10571).
        length_normalized: every term sees log-probs per token.
        average_rewards: rewards per token; None: where every term is per token (simpo, orpo).
        ld_alpha: weight in [0, 1] of the tokens past the shorter response's length (LD-DPO); needs token log-probs.
        chosen_lengths, rejected_lengths: tokens of each response, ``[B]``; known already where masks are given.
        chosen_mask, rejected_mask: bool or 0/1, of the token log-probs' shape; what is masked touches nothing.
        chosen_nll_logps: what the sft term takes in place of ``chosen_logps``, ``[B]``, with ``chosen_nll_lengths``.
        weights: a constant factor of each pair's loss, ``[B]`` (WPO, arXiv:2406.11827).
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
    fields = (
        loss_type if isinstance(loss_type, str) else tuple(loss_type),
        None if loss_weights is None else tuple(loss_weights),
        f_divergence_type,
        f_alpha_divergence_coef,
        discopop_tau,
        bco_delta,
        simpo_gamma,
        simpo_alpha,
        length_normalized,
        average_rewards,
    )
    if reference_free:
        ref_chosen_logps = ref_rejected_logps = None
    whole = (
        ld_alpha is None
        and chosen_lengths is rejected_lengths is chosen_mask is rejected_mask is weights is None
        and chosen_cu_seqlens is rejected_cu_seqlens is chosen_nll_logps is chosen_nll_lengths is None
    )
    refs = ref_chosen_logps, ref_rejected_logps
    numbers = beta, label_smoothing, 0.0 if margin is None else margin
    if whole and plain_pairs.is_plain(chosen_logps, rejected_logps, *refs, numbers, backend):
        native = _ready(
            reduction,
            chosen_logps.shape[0],
            (ref_chosen_logps is not None, ref_rejected_logps is not None),
            reference_free,
            numbers,
            *fields,
        )
        if native is not None:
            loss, won, lost, means = plain_pairs.plain_pair_loss(
                native, chosen_logps, rejected_logps, *refs, per_pair=reduction == "none"
            )
            metrics = dict(zip(pairs.METRICS, means, strict=True))
            return PreferenceOutput(loss, won, lost, chosen_logps.detach(), rejected_logps.detach(), metrics)
    o = parse(*fields)
    checks.is_floating("chosen_logps", chosen_logps)
    checks.is_floating("rejected_logps", rejected_logps)
    if chosen_logps.dtype != rejected_logps.dtype:
        raise ShapeError(f"rejected_logps: expected {chosen_logps.dtype}, got {rejected_logps.dtype}")
    checks.same_device("rejected_logps", rejected_logps, chosen_logps.device)
    acc = acc_dtype(chosen_logps.dtype)
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
        acc,
    )
    count = c.shape[0] if sides is None else sides[0].sequences
    if (r.shape[0] if sides is None else sides[1].sequences) != count:
        raise ShapeError(f"rejected_logps: expected {count} responses as chosen_logps, got {r.shape[0]}")
    ref_c, ref_r = reference_logps(o, reference_free, ref_chosen_logps, ref_rejected_logps)
    lengths: tuple[Tensor | None, Tensor | None] = (chosen_lengths, rejected_lengths)
    if sides is not None:
        lengths = sides[0].lengths, sides[1].lengths
    given = given_pairs(o, count, acc, c.device, lengths, beta, label_smoothing, margin, weights)
    rows = choose("preference_loss", backend, c, r, ref_c, ref_r)

    nll = None
    if chosen_nll_logps is not None:
        nll = nll_logps(chosen_nll_logps, chosen_nll_lengths, given, o, count, acc, c.device)
    if sides is None:
        rc, rr = (
            constant(n, x, count, acc, c.device)
            for n, x in (("ref_chosen_logps", ref_c), ("ref_rejected_logps", ref_r))
        )
    else:
        chosen, rejected = sides
        tails: tuple[Tensor | None, Tensor | None] = (None, None)
        if ld_alpha is not None:
            ld_alpha = checks.number("ld_alpha", ld_alpha, low=0.0, high=1.0)
            shared = torch.minimum(chosen.lengths, rejected.lengths)
            tails = chosen.tails(shared, ld_alpha), rejected.tails(shared, ld_alpha)
            if nll is None and o.has("sft"):  # it is not desensitised
                nll = chosen.sum(rows, c)
        rc = _reference_sum(rows, "ref_chosen_logps", ref_c, c, chosen, tails[0], acc)
        rr = _reference_sum(rows, "ref_rejected_logps", ref_r, r, rejected, tails[1], acc)
        c, r = chosen.sum(rows, c, tails[0]), rejected.sum(rows, r, tails[1])
    given = checks.replaced(given, rc=rc, rr=rr)
    loss, won, lost, sums = pairs.contrast(rows, c, r, nll, given, o, reduction)
    c, r = c.detach(), r.detach()
    return PreferenceOutput(
        loss, won, lost, c, r, pairs.metrics(sums, c, r, nll if nll is None else nll.detach(), given, o)
    )


@functools.lru_cache(maxsize=64, typed=True)
def _ready(
    reduction: str,
    count: int,
    with_reference: tuple[bool, bool],
    reference_free: bool,
    numbers: tuple[float, float, float],
    *fields: Any,
) -> Any:
    """The native options of a plain call; None where the long way has more to do, or an error to raise."""
    o = pairs.options(*fields)
    complete = (
        reference_free or with_reference == (True, True) or not (o.needs_reference or any(with_reference))
    )
    if not (o.plain and complete) or o.needs_lengths:
        return None
    given_pairs(o, count, torch.float64, torch.device("cpu"), (None, None), *numbers, None)
    scale = 1.0 / count if reduction == "mean" else 1.0
    terms = [(pairs.CODES[name], scale * weight) for name, weight in o.weights.items()]
    return plain_pairs.options(terms, *numbers, o.divergence, o.alpha, o.delta, o.tau)


def parse(loss_type: Any, loss_weights: Any, *rest: Any) -> Options:
    """:func:`fastloss.pairs.options` of any sequence; remembered, but not where torch.compile traces."""
    names = loss_type if isinstance(loss_type, str) else tuple(loss_type)
    factors = None if loss_weights is None else tuple(loss_weights)
    function = pairs.options.__wrapped__ if torch.compiler.is_compiling() else pairs.options
    return function(names, factors, *rest)


def choose(function: str, backend: str, tensor: Tensor, *tensors: Tensor | None, **details: Any) -> Any:
    """The adapter of the backend, None for the definition (also where torch.compile traces: Inductor fuses it)."""
    from fastloss.engine.calls import is_traced

    if is_traced(tensor):
        return None
    choice = dispatch.choose(backend, tensor, unsupported=dispatch.tracing_reason(tensor, *tensors))
    dispatch.announce(function, choice, **({} if choice.name == "reference" else details))
    return choice.rows


def reference_logps(
    o: Options, reference_free: bool, ref_chosen: Tensor | None, ref_rejected: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if o.simpo_alpha and not reference_free and (ref_chosen is not None or ref_rejected is not None):
        raise ValueError(
            "simpo_alpha: expected 0 where there are reference log-probs (or reference_free=True)"
        )
    if reference_free:
        return None, None
    for name, value in (("ref_chosen_logps", ref_chosen), ("ref_rejected_logps", ref_rejected)):
        if value is None and (o.needs_reference or ref_chosen is not ref_rejected):
            which = ", ".join(repr(n) for n in o.weights if n not in pairs.WITHOUT_REFERENCE)
            raise ValueError(
                f"{name}: expected the reference's log-probs for loss_type {which or 'with one of them given'} "
                "(or reference_free=True), got None"
            )
    return ref_chosen, ref_rejected


def given_pairs(
    o: Options,
    count: int,
    acc: torch.dtype,
    device: torch.device,
    lengths: tuple[Tensor | None, Tensor | None],
    beta: Number,
    label_smoothing: Number,
    margin: Number | None,
    weights: Tensor | None,
) -> Pairs:
    """The checked constants of a batch, without the reference's log-probs."""
    lc = lr = None
    if o.needs_lengths:
        for name, value in zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True):
            if value is None and (
                name == "chosen_lengths" or set(o.weights) & (pairs.NEED_LENGTHS - {"sft"}) or o.per_token
            ):
                wanting = (
                    "length_normalized"
                    if o.length_normalized
                    else f"loss_type {', '.join(map(repr, o.weights))}"
                )
                raise ValueError(f"{name}: expected the number of tokens [B] for {wanting}, got None")
        lc = constant("chosen_lengths", lengths[0], count, acc, device)
        lr = constant("rejected_lengths", lengths[1], count, acc, device)
    beta = per_pair("beta", beta, count, acc, device, 0.0, math.inf, True)
    smoothing = per_pair("label_smoothing", label_smoothing, count, acc, device, 0.0, 1.0)
    margin = per_pair("margin", 0.0 if margin is None else margin, count, acc, device)
    weight = constant("weights", weights, count, acc, device)
    if o.has("robust") and _largest(smoothing) >= 0.5:
        raise ValueError(
            "label_smoothing: expected a number in [0, 0.5) for loss_type 'robust', got 0.5 or more"
        )
    if o.has("exo_pair") and (_largest(smoothing) >= 1.0 or _smallest(smoothing) <= 0.0):
        raise ValueError("label_smoothing: expected a number in (0, 1) for loss_type 'exo_pair', got 0 or 1")
    if o.has(*pairs.SORTED):
        each = {"beta": beta, "label_smoothing": smoothing, "margin": margin, "weights": weight}
        for name, one in each.items():
            if isinstance(one, Tensor):
                raise ValueError(
                    f"{name}: expected no value per pair with loss_type 'aot' or 'aot_unpaired', which sort the pairs apart"
                )
    return Pairs(None, None, lc, lr, beta, smoothing, margin, weight, count)


def constant(
    name: str, value: Tensor | None, count: int, acc: torch.dtype, device: torch.device
) -> Tensor | None:
    """``[count]`` in the accumulation dtype, detached."""
    if value is None:
        return None
    checks.is_tensor(name, value)
    checks.has_shape(name, value, (count,))
    checks.same_device(name, value, device)
    return value.detach().to(acc).contiguous()


_checked = functools.lru_cache(maxsize=512, typed=True)(checks.number)


def per_pair(
    name: str,
    value: Number,
    count: int,
    acc: torch.dtype,
    device: torch.device,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> Number:
    """A checked number, or ``[count]`` (on the CPU its values are checked too)."""
    if not isinstance(value, Tensor):
        check = checks.number if torch.compiler.is_compiling() else _checked
        return check(name, value, low=low, high=high, open_low=open_low)
    out = constant(name, value.expand(count) if value.dim() == 0 else value, count, acc, device)
    assert out is not None
    readable = count and device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and dispatch.tracing_reason(out) == "":
        for extreme in (float(out.min()), float(out.max())):
            checks.number(name, extreme, low=low, high=high, open_low=open_low)
    return out


def _known(value: Number, pick: Any) -> float | None:
    if not isinstance(value, Tensor):
        return value
    readable = value.numel() and value.device.type == "cpu" and not torch.compiler.is_compiling()
    return float(pick(value)) if readable else None


def _largest(value: Number) -> float:
    known = _known(value, torch.max)
    return 0.25 if known is None else known


def _smallest(value: Number) -> float:
    known = _known(value, torch.min)
    return 0.25 if known is None else known


def nll_logps(
    logps: Tensor,
    lengths: Tensor | None,
    given: Pairs,
    o: Options,
    count: int,
    acc: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What the sft term takes, scaled to its own count of tokens where that is not the response's."""
    if not o.has("sft"):
        raise ValueError("chosen_nll_logps: expected a loss_type with 'sft', got none")
    checks.is_floating("chosen_nll_logps", logps)
    checks.has_shape("chosen_nll_logps", logps, (count,))
    nll = logps.to(acc)
    if lengths is None:
        return nll
    tokens = constant("chosen_nll_lengths", lengths, count, acc, device)
    assert tokens is not None and given.lc is not None
    return nll * (given.lc.sum() / tokens.sum().clamp(min=1))


def _sides(
    c: Tensor,
    r: Tensor,
    chosen_mask: Tensor | None,
    rejected_mask: Tensor | None,
    chosen_cu_seqlens: Tensor | None,
    rejected_cu_seqlens: Tensor | None,
    chosen_lengths: Tensor | None,
    ld_alpha: float | None,
    acc: torch.dtype,
) -> tuple[segments.Segments, segments.Segments] | None:
    """The segments of token log-probs; None for log-probs of whole responses."""
    extra = (chosen_mask, rejected_mask, chosen_cu_seqlens, rejected_cu_seqlens)
    if c.dim() == 1 and chosen_cu_seqlens is None:
        names = ("chosen_mask", "rejected_mask", "chosen_cu_seqlens", "rejected_cu_seqlens")
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
        segments.of_tokens("chosen_", c, chosen_mask, chosen_cu_seqlens, acc),
        segments.of_tokens("rejected_", r, rejected_mask, rejected_cu_seqlens, acc),
    )


def _reference_sum(
    rows: Any,
    name: str,
    ref: Tensor | None,
    like: Tensor,
    side: segments.Segments,
    tails: Tensor | None,
    acc: torch.dtype,
) -> Tensor | None:
    if ref is None:
        return None
    if tuple(ref.shape) != tuple(like.shape) or (ref.dim() == 1 and side.offsets is None):
        if tails is not None:
            raise ShapeError(
                f"{name}: expected token log-probs of shape {list(like.shape)} for ld_alpha, got {list(ref.shape)}"
            )
        return constant(name, ref, side.sequences, acc, like.device)
    checks.same_device(name, ref, like.device)
    return side.sum(rows, ref.detach().to(acc), tails)
