"""Old-name adapter of :class:`fastloss.engine.triton.TritonBackend`, for callers that are not on the contract yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import Factor, PolicyInputs
from fastloss.engine.pair_call import PairCall
from fastloss.engine.sequences import Sequences
from fastloss.engine.triton import TritonBackend
from fastloss.tables import (
    CrossEntropyOptions,
    PairConstants,
    PairOptions,
    PolicyOptions,
    RowOptions,
    UnpairedConstants,
    UnpairedOptions,
)

_backend = TritonBackend()
why_not, why_not_for, scale_in_place = _backend.why_not, _backend.why_not_for, _backend.scale_in_place
_NEW = {"logprob": "logprobs", "mean_logit": "mean_logits"}
_OLD = {new: old for old, new in _NEW.items()}


def _new(want: Sequence[str]) -> list[str]:
    return [_NEW.get(name, name) for name in want]


def _old(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_OLD.get(name, name): value for name, value in stats.items()}


def row_stats(logits, target, *, ignore_index, bias, scale, softcap, want):
    options = RowOptions(ignore_index, scale, softcap)
    return _old(_backend.row_stats(logits, target, options, want=_new(want), bias=bias))


def row_grad(
    logits, target, *, ignore_index, bias, scale, softcap, lse, a=None, b=None, c=None, d=None, w=None, out
):
    _backend.row_grad(
        logits, target, RowOptions(ignore_index, scale, softcap), logsumexp=lse, coefficients=Coefficients(a, b, c, d),
        out=out, bias=bias, w=w,
    )  # fmt: skip


def row_cross_entropy(
    logits, target, *, ignore_index, bias, scale, softcap, w, label_smoothing, z_loss, grad_scale=1.0,
    grad_scale_tensor=None, grad=None, want=(),
):  # fmt: skip
    options = CrossEntropyOptions(ignore_index, scale, softcap, label_smoothing, z_loss)
    factor = Factor(grad_scale, grad_scale_tensor)
    return _old(
        _backend.row_cross_entropy(
            logits, target, options, factor=factor, grad=grad, want=_new(want), bias=bias, w=w
        )
    )


def segment_sum(values, weights, offsets, length, count):
    return _backend.segment_sum(
        values, weights, Sequences(offsets, length, count, values.numel(), values.device)
    )


def segment_expand(upstream, weights, offsets, length, n):
    layout = Sequences(offsets, length, upstream.numel(), n, upstream.device)
    return _backend.segment_expand(upstream, weights, layout)


def pair_loss(c: Tensor, r: Tensor, nll: Tensor | None, call: PairCall) -> dict[str, Any]:
    constants = PairConstants(call.rc, call.rr, call.lc, call.lr, call.weight)
    options = PairOptions(
        tuple(call.terms), call.divergence, call.alpha, call.beta, call.smoothing, call.margin, float(call.delta),
        call.tau, call.average_rewards,
    )  # fmt: skip
    out = _backend.pair_loss(c, r, nll, constants, options)._asdict()
    return {{"d_chosen": "d_c", "d_rejected": "d_r"}.get(name, name): value for name, value in out.items()}


def unpaired_loss(
    logps, *, ref=None, desirable, weight=None, kl=None, code=0, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
):  # fmt: skip
    options = UnpairedOptions(code, beta, desirable_weight, undesirable_weight)
    out = _backend.unpaired_loss(logps, UnpairedConstants(desirable, ref, weight, kl), options)
    return {"loss": out.loss, "d": out.d_logps, "reward": out.reward, "sums": out.sums}


def policy_loss(
    logprobs, *, old, advantages, mask, ref=None, entropy=None, sampler=None, token_weight=None, select=None, agg=None,
    offsets=None, length, count, options, normalizer=None,
):  # fmt: skip
    layout = Sequences(offsets, length, count, logprobs.numel(), logprobs.device)
    inputs = PolicyInputs(layout, advantages, mask, old, ref, sampler, token_weight, select, agg, normalizer)
    known = {field.name for field in dataclasses.fields(PolicyOptions)}
    given = {name: value for name, value in options._asdict().items() if name in known}
    out = _backend.policy_loss(logprobs, entropy, inputs, PolicyOptions(**given))
    return {"grad": out.d_logprobs, "grad_entropy": out.d_entropy, "out": out.out}


def gae(rewards, values, mask, offsets, length, count, gamma, lam):
    layout = Sequences(offsets, length, count, rewards.numel(), rewards.device)
    return _backend.gae(rewards, values, mask, layout, gamma, lam)


def discounted_returns(rewards, mask, offsets, length, count, gamma):
    layout = Sequences(offsets, length, count, rewards.numel(), rewards.device)
    return _backend.discounted_returns(rewards, mask, layout, gamma)
