"""The commonest policy loss, with the fewest Python calls around the kernel: padded float32 or float64 log-probs on the
CPU, nothing selected over the batch. One native call makes the loss, the metrics and the gradient, times the scale.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import dispatch
from fastloss.ops import cpu_rows
from fastloss.ops.once import once_differentiable
from fastloss.ops.policy import METRICS
from fastloss.ops.policy_batch import check_given
from fastloss.ops.policy_options import Spec, resolve

_native: Any = cpu_rows.native if hasattr(cpu_rows.native, "plain_policy_loss") else None
_CODES = {torch.float32: 0, torch.float64: 3}
_PLAIN = (Tensor, torch.nn.Parameter)
_BOOL = torch.bool
_is_compiling, _logs = torch.compiler.is_compiling, dispatch.log.isEnabledFor
_tracing = torch._C._get_tracing_state
_interpreter = torch._C._functorch.peek_interpreter_stack


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
        _native is None
        or _is_compiling()
        or type(logprobs) not in _PLAIN
        or type(advantages) is not Tensor
        or type(mask) is not Tensor
        or cu_seqlens is not None
    ):
        return False
    dtype, size = logprobs.dtype, logprobs.shape
    if (
        not logprobs.is_cpu
        or dtype not in _CODES
        or len(size) != 2
        or 0 in size
        or not logprobs.is_contiguous()
        or mask.dtype is not _BOOL
        or not mask.is_cpu
        or mask.shape != size
        or not mask.is_contiguous()
        or advantages.dtype is not dtype
        or not advantages.is_cpu
        or not advantages.is_contiguous()
        or not (advantages.shape == size[:1] or advantages.shape == size)
    ):
        return False
    for x in others:
        if x is not None and not (
            type(x) is Tensor and x.dtype is dtype and x.is_cpu and x.shape == size and x.is_contiguous()
        ):
            return False
    return (
        _interpreter() is None
        and _tracing() is None
        and dispatch.is_default(backend)
        and not _logs(logging.DEBUG)
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
    metrics = torch.empty(len(METRICS), dtype=logprobs.dtype)
    wanted = logprobs.requires_grad or (entropy is not None and entropy.requires_grad)
    arguments = (ready, normalizer, metrics, logprobs, entropy, old, advantages, mask, ref, sampler)
    if wanted and torch.is_grad_enabled():
        loss = _apply(logprobs, entropy, arguments)
    else:
        loss, _ = _run(*arguments)
    named = dict(zip(ready.names, metrics.unbind(), strict=True))
    named.pop("", None)
    return loss, named


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(
    ready: Ready,
    normalizer: float | Tensor | None,
    metrics: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None,
    sampler: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    dtype, (count, length) = logprobs.dtype, logprobs.shape
    loss, grad = torch.empty((), dtype=dtype), torch.empty((count, length), dtype=dtype)
    grad_entropy = torch.empty_like(grad) if ready.entropy_coef and entropy is not None else None
    number, place = (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
    _native.plain_policy_loss(
        _CODES[dtype], logprobs.data_ptr(), _address(old), advantages.data_ptr(), advantages.dim() == 1, mask.data_ptr(),
        _address(ref), _address(entropy), _address(sampler), length, count, ready.options, number, _address(place),
        grad.data_ptr(), _address(grad_entropy), loss.data_ptr(), metrics.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return loss, (grad, grad_entropy)


class _Plain(torch.autograd.Function):
    """(logprobs, entropy) -> loss; the gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor | None, arguments: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(*arguments[3:])
        loss, made = _run(*arguments)
        ctx.made = made, arguments[:3]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            return _once(ctx, upstream)
        return _gradient(ctx, upstream)


# Function.apply asks whether a torch.func transform is active; is_plain has.
_apply = super(torch.autograd.function._SingleLevelFunction, _Plain).apply


def _gradient(ctx: Any, upstream: Tensor) -> Any:
    made, given = ctx.made
    if made is None:  # retain_graph: the first backward gave the buffers away
        made = _run(given[0], given[1], torch.empty_like(given[2]), *ctx.saved_tensors)[1]
    ctx.made = None, given
    grad, grad_entropy = made
    scale = upstream.item()
    if scale != 1.0:
        grad.mul_(scale)
        if grad_entropy is not None:
            grad_entropy.mul_(scale)
    return grad, grad_entropy, None


_once = once_differentiable(_gradient)
