"""Autograd of the chunked linear head: cross-entropy at 3 GEMMs, token statistics at 4 (2 with a frozen weight)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss import coefficients, head
from fastloss.head import Given, Grads, Head, Needs
from fastloss.ops import cross_entropy as ce
from fastloss.ops import token_stats as ts
from fastloss.ops import vocab_blocks
from fastloss.ops.once import once_differentiable
from fastloss.ops.scale import scale_in_place

# In place of a number of rows: the call goes over blocks of the vocabulary.
BY_VOCABULARY = 0


def chunk_of_rows(
    backend: str, dtype: torch.dtype, weight: Tensor, rows: int, needs: Needs, chunk_size: int | None
) -> int:
    """Rows per chunk of a call that computes ``rows``, or ``BY_VOCABULARY``: of statistics, or of a backward alone."""
    if vocab_blocks.why_not(backend, dtype, weight, rows, needs, chunk_size) == "":
        return BY_VOCABULARY
    chunk = chunk_size or head.default_chunk(rows, weight.shape[0], dtype, weight.device)
    return min(chunk, max(rows, 1))


def chunk_of_cross_entropy(
    backend: str,
    dtype: torch.dtype,
    weight: Tensor,
    rows: int,
    needs: Needs,
    chunk_size: int | None,
    per_row: bool,
    smooth: bool,
) -> int:
    """The same of cross-entropy."""
    if vocab_blocks.why_not_cross_entropy(rows, weight.shape[1], needs, per_row, smooth):
        chunk_size = chunk_size or head.default_chunk(rows, weight.shape[0], dtype, weight.device)
    return chunk_of_rows(backend, dtype, weight, rows, needs, chunk_size)


def plan(
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    chunk: int,
    rows: int,
    needs: Needs,
    recompute: bool,
) -> dict[str, Any]:
    """What ``explain`` tells. ``recompute``: the backward makes the logits again."""
    gemms = head.gemm_count(needs, recompute)
    if chunk == BY_VOCABULARY:
        return {
            "gemms": gemms if recompute else vocab_blocks.gemms(needs, rows, weight.shape[1]),
            "rows": rows,
            "chunk_rows": rows,
            "chunk_columns": min(
                vocab_blocks.block_width(*weight.shape), weight.shape[0]
            ),
            "buffer_bytes": vocab_blocks.buffer_bytes(rows, weight, needs),
        }
    return {
        "gemms": gemms,
        "rows": rows,
        "chunk_rows": min(chunk, rows),
        "buffer_bytes": Head(hidden, weight, None, dtype, min(chunk, rows)).buffer_bytes,
    }


def cross_entropy_rows(
    h: Head,
    needs: Needs,
    target: Tensor | None,
    w: Tensor | None,
    call: ce.CrossEntropyCall,
    factor: ce.Factor,
) -> tuple[dict[str, Tensor], Grads]:
    """Losses and statistics of all rows, and the gradients of their sum times ``factor`` (late for float16)."""
    keep = head.kept_rows(target, call.ignore_index)
    target = head.pick(target, keep)
    if h.by_vocabulary:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            out, grads = vocab_blocks.run(h, needs, keep, target, w, call, factor)
        return head.spread_all(out, keep, h.hidden.shape[0]), grads

    def row_function(z: Tensor, start: int, stop: int, overwrite: bool) -> dict[str, Tensor]:
        return ce.run(
            call,
            z,
            None if target is None else target[start:stop],
            w if w is None or w.dim() == 1 else w[start:stop],
            h.bias,
            z if overwrite else None,
            ce.Factor() if factor_is_late(h) else factor,
        )

    return head.run(h, needs, row_function, keep=keep)


def factor_is_late(h: Head) -> bool:
    return ce.factor_is_late(h.dtype)


def finish(
    grads: Grads, dtypes: tuple[torch.dtype, ...], scale: Any = None, rows: Any = None
) -> tuple[Tensor | None, ...]:
    """Gradients (exclusively ours) times a scalar, in their leaves' dtypes. ``rows``: the call's backend."""
    out = []
    for grad, dtype in zip(grads, dtypes, strict=True):
        if grad is not None and scale is not None:
            grad = scale_in_place(grad, scale, rows)
        out.append(grad if grad is None else grad.to(dtype))
    return tuple(out)


def _dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[torch.dtype, ...]:
    return hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunk: int) -> Head:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return Head(
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach().to(acc).contiguous(),
        dtype,
        chunk,
        chunk == BY_VOCABULARY,
    )


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, bias, target, w) -> loss and detached statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | None,
        w: Tensor | None,
        call: ce.CrossEntropyCall,
        factor: ce.Factor,
        dtype: torch.dtype,
        chunk: int,
        needs: Needs,
    ) -> Any:
        ctx.call, ctx.factor, ctx.dtype, ctx.chunk, ctx.needs = call, factor, dtype, chunk, needs
        h = _head(hidden, weight, bias, dtype, chunk)
        per_row = call.reduction == "none"
        # With a frozen weight a row's d hidden is its upstream gradient times a vector that can be made now.
        ctx.ahead = not per_row or not (ctx.needs.weight or ctx.needs.bias)
        out, grads = cross_entropy_rows(
            h,
            ctx.needs if ctx.ahead else Needs(False, False, False),
            target,
            w,
            call,
            ce.Factor() if per_row else factor,
        )
        ctx.late = factor_is_late(h) and not per_row
        ctx.grads = grads if ctx.late else Grads(*finish(grads, _dtypes(hidden, weight, bias)))
        ctx.save_for_backward(hidden, weight, bias, target, w, out["logsumexp"] if not ctx.ahead else None)
        loss = (
            out["loss"].to(call.loss_dtype) if per_row else ce.reduced(out["loss"], factor, call.loss_dtype)
        )
        if not call.want:
            return loss
        stats = [out[name] for name in call.want]
        ctx.mark_non_differentiable(*stats)
        return (loss, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        call: ce.CrossEntropyCall = ctx.call
        hidden, weight, bias, target, w, lse = ctx.saved_tensors
        h = _head(hidden, weight, bias, ctx.dtype, ctx.chunk)
        dtypes = _dtypes(hidden, weight, bias)
        rest = (None,) * 7
        if not ctx.ahead:
            k = coefficients.of_cross_entropy(
                upstream, lse, target, w, weight.shape[0], call.label_smoothing, call.z_loss
            )
            given = Given(target, lse, k, w, call.ignore_index, call.scale, call.softcap)
            recomputed = recompute(h, ctx.needs, call.rows, given)
            return (*finish(recomputed, dtypes), *rest)
        grads = ctx.grads
        ctx.grads = None
        if grads is None:  # retain_graph: the first backward gave the buffers away
            grads = cross_entropy_rows(
                h, ctx.needs, target, w, call, ce.Factor() if call.reduction == "none" else ctx.factor
            )[1]
        if call.reduction == "none":
            return (
                *finish(grads, dtypes, upstream.to(torch.promote_types(ctx.dtype, upstream.dtype))[:, None]),
                *rest,
            )
        scale = _scale(upstream, ctx.factor if ctx.late else None, hidden)
        return (*finish(grads, dtypes, scale, call.rows), *rest)


def _scale(upstream: Tensor, factor: ce.Factor | None, like: Tensor) -> Any:
    """The scalar that the gradients still need, None where it is known to be 1."""
    if like.device.type == "cpu":
        value = float(upstream)
        if factor is not None:
            value *= factor.value * (1.0 if factor.tensor is None else float(factor.tensor))
        return None if value == 1.0 else value
    scale = upstream.float() if upstream.dtype != torch.float64 else upstream
    if factor is not None:
        scale = scale * factor.value if factor.tensor is None else scale * factor.tensor
    return scale


def recompute(h: Head, needs: Needs, rows: Any, given: Given) -> Grads:
    """The gradients of rows whose coefficients became known after their forward: makes the logits again."""
    keep = head.kept_rows(given.target, given.ignore_index)
    given = given.pick(keep)
    if not h.by_vocabulary:
        return head.backward(h, needs, rows, given, keep)
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        return vocab_blocks.backward(h, needs, given, keep)


def token_stats_rows(
    h: Head, needs: Needs, target: Tensor | None, call: ts.StatsCall
) -> tuple[dict[str, Tensor], Grads]:
    """Statistics of all rows, and the gradients of the sum of their log-probabilities.

    Always in chunks of rows, as the preference and policy losses: a token's log-probability has the same bits in all of
    them, so that the first ratio of new to old is exactly 1."""
    keep = head.kept_rows(target, call.ignore_index)
    target = head.pick(target, keep)

    def row_function(z: Tensor, start: int, stop: int, overwrite: bool) -> dict[str, Tensor]:
        chunk_target = None if target is None else target[start:stop]
        part = ts.stats(call, z, chunk_target, h.bias)
        if overwrite:
            one = torch.ones_like(part["logsumexp"])
            call.rows.row_grad(
                z,
                chunk_target,
                ignore_index=call.ignore_index,
                bias=h.bias,
                scale=call.scale,
                softcap=call.softcap,
                lse=part["logsumexp"],
                a=one,
                b=-one,
                out=z,
            )
        return part

    return head.run(h, needs, row_function, keep=keep)


class LinearTokenStats(torch.autograd.Function):
    """(hidden, weight, bias, target) -> the wanted statistics; logprob, entropy and logsumexp carry gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | None,
        call: ts.StatsCall,
        dtype: torch.dtype,
        chunk: int,
        chunk_of_backward: int,
        needs: Needs,
    ) -> Any:
        ctx.call, ctx.dtype, ctx.needs, ctx.chunk_of_backward = call, dtype, needs, chunk_of_backward
        ctx.set_materialize_grads(False)
        h = _head(hidden, weight, bias, dtype, chunk)
        differentiable = [name for name in call.want if name in call.differentiable]
        # With a frozen weight, and only logprob to differentiate, its d hidden is made now: 2 GEMMs in place of 3.
        ctx.ahead = differentiable == ["logprob"] and ctx.needs == Needs(True, False, False)

        out, grads = token_stats_rows(h, ctx.needs if ctx.ahead else Needs(False, False, False), target, call)
        ctx.save_for_backward(
            hidden, weight, bias, target, out["logsumexp"], out.get("entropy"), grads.hidden
        )
        ctx.mark_non_differentiable(*[out[n] for n in call.want if n not in call.differentiable])
        return tuple(out[name] for name in call.want)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        call: ts.StatsCall = ctx.call
        hidden, weight, bias, target, lse, entropy, d_hidden = ctx.saved_tensors
        none = (None,) * 6
        if all(g is None for g in upstream):
            return (None, None, None, *none)
        if ctx.ahead:
            g = upstream[call.want.index("logprob")]
            assert g is not None
            return ((d_hidden * g[:, None]).to(hidden.dtype), None, None, *none)
        k = ts.row_coefficients(call, upstream, entropy, lse.dtype)
        h = _head(hidden, weight, bias, ctx.dtype, ctx.chunk_of_backward)
        given = Given(target, lse, k, None, call.ignore_index, call.scale, call.softcap)
        grads = recompute(h, ctx.needs, call.rows, given)
        return (*finish(grads, _dtypes(hidden, weight, bias)), *none)
