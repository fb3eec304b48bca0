"""token_stats and its kin: numbers per token from logits or from hidden states, in one pass over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import backend as dispatch
from fastloss.engine import checks, head, linear
from fastloss.engine import token_stats as ts
from fastloss.engine.calls import check_linear, compiled_backend, compute_dtype, is_traced, refuse_inplace
from fastloss.engine.checks import ShapeError
from fastloss.engine.head import Needs
from fastloss.engine.native_rows import STATS
from fastloss.losses.token_stats_type import ENGINE_NAMES, TokenStats, from_engine

NO_TARGET = ("entropy", "logsumexp", "log_sum_sq_probs", "mean_logits")


def token_stats(
    logits: Tensor,
    target: Tensor | None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logprobs",),
    inplace: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Statistics of each token's distribution, with gradients through logprobs, entropy and logsumexp.

    They are those of ``z = logit_scale · softcap · tanh(logits / softcap) / temperature``.

    Args:
        logits: ``[..., V]`` in float32, bfloat16, float16 or float64.
        target: int64 ``[...]``; None if no output needs it.
        temperature: > 0.
        ignore_index: tokens with this target give 0 and no gradient.
        outputs: of "logprobs" (log p of the target, nats), "entropy" (nats), "logsumexp", "log_sum_sq_probs"
            (log Σ p²), "mean_logits" (Σ z / V), "is_top1" (no logit is larger than the target's).
        inplace: the backward writes its gradient over ``logits``.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
        IndexError: on CPU, a bad target; see :func:`cross_entropy`.

    >>> import torch, fastloss
    >>> fastloss.token_stats(torch.zeros(1, 4), torch.tensor([2])).logprobs
    tensor([-1.3863])
    """
    checks.is_floating("logits", logits)
    if logits.dim() < 1:
        raise ShapeError("logits: expected at least 1 dimension, got a 0-d tensor")
    lead, vocab = logits.shape[:-1], logits.shape[-1]
    want = _check_outputs(outputs, target)
    if target is not None:
        checks.index_target("target", target, tuple(lead), logits.device)
    scale = _scale(temperature, logit_scale)
    cap = checks.softcap_value(softcap)
    rows = logits.reshape(-1, vocab)
    flat = None if target is None else target.reshape(-1).contiguous()
    traced = is_traced(logits)
    if traced:
        name, adapter = compiled_backend(backend, logits.device.type, logits.dtype), None
    else:
        name, adapter, _ = choice = dispatch.choose(
            backend, logits, unsupported=dispatch.tracing_reason(logits, target)
        )
        dispatch.announce("token_stats", choice, inplace=inplace)
        _check_targets(flat, vocab, ignore_index)
    if name == "reference":
        out = reference.token_stats(rows, flat, scale=scale, softcap=cap or None, ignore_index=ignore_index)
        return _select(out, outputs, lead)
    if vocab == 0:
        raise ShapeError("logits: expected at least one class, got 0")
    if rows.stride(1) != 1 and vocab > 1:
        rows = rows.contiguous()
    elif inplace and not traced:
        refuse_inplace(rows)
    if traced:
        from fastloss.engine import library

        values = library.token_stats(rows, flat, ignore_index, scale, cap, ",".join(want), name)
        stats = from_engine(dict(zip(STATS, values, strict=True)), want)
    else:
        call = ts.StatsCall(adapter, ignore_index, scale, cap, inplace, want)
        stats = from_engine(dict(zip(want, ts.TokenStatsFunction.apply(rows, flat, call), strict=True)), want)
    return TokenStats(*(None if s is None else s.reshape(lead) for s in stats))


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logprobs",),
    chunk_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """:func:`token_stats` of ``input @ linear_weight.T + linear_bias``, without holding those logits.

    1 GEMM without gradient; 2 with a frozen weight and logprobs alone; else the backward recomputes (4 GEMMs).

    Args:
        input: hidden states ``[..., D]``.
        linear_weight: ``[V, D]``. linear_bias: ``[V]``.
        target: int64 ``[...]``.
        chunk_size: rows of logits in memory at once; None chooses.

    >>> import torch, fastloss
    >>> fastloss.linear_token_stats(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([2])).logprobs
    tensor([-1.3863])
    """
    checks.is_floating("input", input)
    checks.is_floating("linear_weight", linear_weight)
    if input.dim() < 1 or linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ShapeError(
            f"linear_weight: expected shape [V, {input.shape[-1] if input.dim() else 'D'}], got {list(linear_weight.shape)}"
        )
    lead, vocab = input.shape[:-1], linear_weight.shape[0]
    hidden = input.reshape(-1, input.shape[-1])
    check_linear(hidden, linear_weight, linear_bias)
    want = _check_outputs(outputs, target)
    if target is not None:
        checks.index_target("target", target, tuple(lead), input.device)
    checks.chunk_size_value(chunk_size)
    scale = _scale(temperature, logit_scale)
    cap = checks.softcap_value(softcap)
    flat = None if target is None else target.reshape(-1).contiguous()
    dtype = compute_dtype(input)
    traced = is_traced(input)
    if traced:
        name, adapter = compiled_backend(backend, input.device.type, dtype), None
    else:
        name, adapter, _ = choice = dispatch.choose(
            backend, input, unsupported=dispatch.tracing_reason(input, linear_weight, linear_bias, target)
        )
        computed = head.count_kept(hidden.shape[0], flat, ignore_index)
        on = torch.is_grad_enabled()
        needs = Needs(
            on and input.requires_grad,
            on and linear_weight.requires_grad,
            linear_bias is not None and on and linear_bias.requires_grad,
        )
        chunk = min(chunk_size or head.default_chunk(computed, vocab, dtype, input.device), max(computed, 1))
        chunk_of_backward = linear.chunk_of_rows(name, dtype, linear_weight, computed, needs, chunk_size)
        ahead = needs == Needs(True, False, False) and not {"entropy", "logsumexp"} & set(want)
        dispatch.announce(
            "linear_token_stats",
            choice,
            **(
                {}
                if name == "reference"
                else linear.plan(
                    hidden, linear_weight, dtype, chunk, computed, needs, bool(needs) and not ahead
                )
            ),
        )
        _check_targets(flat, vocab, ignore_index)
    if name == "reference":
        out = reference.linear_token_stats(
            hidden,
            linear_weight,
            flat,
            linear_bias=linear_bias,
            scale=scale,
            softcap=cap or None,
            ignore_index=ignore_index,
        )
        return _select(out, outputs, lead)
    if traced:
        from fastloss.engine import library

        values = library.linear_token_stats(
            hidden,
            linear_weight,
            linear_bias,
            flat,
            ignore_index,
            scale,
            cap,
            ",".join(want),
            dtype,
            chunk_size or 0,
            name,
        )
        stats = from_engine(dict(zip(STATS, values, strict=True)), want)
    else:
        call = ts.StatsCall(adapter, ignore_index, scale, cap, False, want)
        result = linear.LinearTokenStats.apply(
            hidden, linear_weight, linear_bias, flat, call, dtype, chunk, chunk_of_backward, needs
        )
        stats = from_engine(dict(zip(want, result, strict=True)), want)
    return TokenStats(*(None if s is None else s.reshape(lead) for s in stats))


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """``log_softmax(logits / temperature)`` gathered at ``index``: TRL's name and meaning, without the softmax.

    Args:
        logits: ``[..., V]``. index: int64 ``[...]``, or ``[..., K]`` for K log-probabilities a position.

    Returns:
        float32 (float64 for float64 logits) of ``index``'s shape.

    >>> import torch, fastloss
    >>> fastloss.selective_log_softmax(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    """
    checks.is_floating("logits", logits)
    checks.is_tensor("index", index)
    if index.dim() == logits.dim() and index.shape[:-1] == logits.shape[:-1]:
        scale = _scale(temperature, 1.0)
        checks.index_target("index", index, tuple(index.shape), logits.device)
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            checks.reject_bad_targets(index, logits.shape[-1], 0)
        lse = token_stats(
            logits, None, temperature=temperature, outputs=("logsumexp",), backend=backend
        ).logsumexp
        assert lse is not None
        return logits.gather(-1, index).to(lse.dtype) * scale - lse.unsqueeze(-1)
    # No index is ignored here: one below every class can be none of them.
    out = token_stats(logits, index, temperature=temperature, ignore_index=-(2**63), backend=backend).logprobs
    assert out is not None
    return out


def entropy_from_logits(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """Shannon entropy (nats) of ``softmax(logits [..., V])``, ``[...]``, with gradient; one pass, no softmax held.

    >>> import torch, fastloss
    >>> fastloss.entropy_from_logits(torch.zeros(1, 4))
    tensor([1.3863])
    """
    out = token_stats(logits, None, outputs=("entropy",), backend=backend).entropy
    assert out is not None
    return out


def _check_outputs(outputs: tuple[str, ...], target: Tensor | None) -> tuple[str, ...]:
    if isinstance(outputs, str) or not outputs:
        raise ValueError(f"outputs: expected a tuple of names, got {outputs!r}")
    for name in outputs:
        checks.is_one_of("outputs", name, TokenStats._fields)
        if target is None and name not in NO_TARGET:
            raise ValueError(f"target: expected a tensor for outputs={name!r}, got None")
    return tuple(dict.fromkeys(ENGINE_NAMES.get(name, name) for name in outputs))


def _scale(temperature: float, logit_scale: float) -> float:
    return checks.number("logit_scale", logit_scale) / checks.number(
        "temperature", temperature, low=0.0, open_low=True
    )


def _check_targets(target: Tensor | None, vocab: int, ignore_index: int) -> None:
    if target is not None and (target.device.type == "cpu" or dispatch.targets_are_validated()):
        if dispatch.tracing_reason(target) == "":
            checks.reject_bad_targets(target, vocab, ignore_index)


def _select(out: dict[str, Tensor], outputs: tuple[str, ...], lead: torch.Size) -> TokenStats:
    return TokenStats(**{name: out[name].reshape(lead) for name in outputs})
