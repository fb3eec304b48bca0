"""The commonest policy loss, with the fewest Python calls around the kernel: padded float32 or float64 log-probs on the
CPU, nothing selected over the batch. One native call makes the loss, the metrics and the gradient, times the scale.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.engine import cpu_rows, plain
from fastloss.engine.plain import address
from fastloss.engine.policy import METRICS
from fastloss.losses.policy_batch import check_given
from fastloss.losses.policy_options import Spec, resolve

_native: Any = cpu_rows.native if hasattr(cpu_rows.native, "plain_policy_loss") else None
_BOOL = torch.bool


class Ready(NamedTuple):
    """What a call's options become: remembered, a training step asks for the same again."""

    options: Any  # the native module's
    names: tuple[str, ...]
    entropy_coef: float


def is_plain(
    logprobs: Any,
    advantages: Any,
    mask: Any,
    others: tuple[Any, ...],
    cu_seqlens: Tensor | None,
    backend: str,
) -> bool:
    """Whether :func:`plain_policy_loss` takes the call; if not, the long way checks it and says what is wrong."""
    if (
        plain.is_compiling()
        or _native is None
        or cu_seqlens is not None
        or type(logprobs) not in plain.LEAVES
        or type(advantages) is not Tensor
        or type(mask) is not Tensor
    ):
        return False
    size = logprobs.shape
    return (
        logprobs.is_cpu
        and logprobs.dtype in plain.CODES
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
        and plain.are_like(logprobs, *others)
        and plain.is_eager(backend)
    )


@functools.lru_cache(maxsize=64, typed=True)
def ready(with_ref: bool, with_entropy: bool, with_sampler: bool, length: int, *fields: Any) -> Ready | None:
    """Of the fields of a :class:`Spec`; None where something is chosen over the whole batch, or missing."""
    spec = Spec(*fields)
    options = resolve(spec, with_sampler=with_sampler, default_length=length)
    check_given(options, spec, with_ref=with_ref)
    selects = spec.variant.selects or spec.top_entropy_quantile < 1
    if selects or spec.entropy_aggregation is not None or (spec.entropy_coef and not with_entropy):
        return None
    given = {"kl": with_ref, "entropy": with_entropy, "importance/cut_fraction": options.correction > 0}
    names = tuple(name if given.get(name, True) else "" for name in METRICS)
    return Ready(_native.PolicyOptions(options), names, options.entropy_coef)


def plain_policy_loss(
    ready: Ready,
    logprobs: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None,
    sampler: Tensor | None,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a call that :func:`is_plain`."""
    if mask.dtype is not _BOOL:
        mask = mask != 0
    metrics = logprobs.new_empty(len(METRICS))
    given, constants = (ready, normalizer, metrics), (old, advantages, mask, ref, sampler)
    wanted = logprobs.requires_grad or (entropy is not None and entropy.requires_grad)
    if wanted and torch.is_grad_enabled():
        loss = plain.made_in_forward(logprobs, entropy, _run, given, constants)
    else:
        loss, _ = _run(given, logprobs, entropy, *constants)
    named = dict(zip(ready.names, metrics.unbind(), strict=True))
    named.pop("", None)
    return loss, named


def _run(
    given: tuple[Ready, float | Tensor | None, Tensor],
    logprobs: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None,
    sampler: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    ready, normalizer, metrics = given
    count, length = logprobs.shape
    loss, grad = logprobs.new_empty(()), torch.empty_like(logprobs)
    grad_entropy = torch.empty_like(grad) if ready.entropy_coef and entropy is not None else None
    number, place = (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
    _native.plain_policy_loss(
        plain.CODES[logprobs.dtype], logprobs.data_ptr(), address(old), advantages.data_ptr(), advantages.dim() == 1,
        mask.data_ptr(), address(ref), address(entropy), address(sampler), length, count, ready.options, number,
        address(place), grad.data_ptr(), address(grad_entropy), loss.data_ptr(), metrics.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, (grad, grad_entropy)
