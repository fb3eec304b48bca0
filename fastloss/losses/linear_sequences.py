"""Sequence log-probs from a linear head: which rows are read, in which order, and at how many GEMMs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks, head, linear, linear_sequences
from fastloss.engine import token_stats as ts
from fastloss.engine.checks import ShapeError
from fastloss.engine.head import Needs
from fastloss.engine.linear_sequences import Contrast
from fastloss.engine.native_rows import acc_dtype
from fastloss.engine.sequences import Segments, check_offsets
from fastloss.losses.preference import choose
from fastloss.losses.token_stats import _check_targets, _scale, linear_token_stats

METRIC_STATS = ("entropy", "mean_logit", "is_top1")


@dataclass(frozen=True)
class Layout:
    """The rows in the order in which the head reads them: group by group (a pair, or one sequence)."""

    order: Tensor  # int64 [rows], rows of the flattened input
    target: Tensor  # int64 [rows]
    segments: Segments  # of the sequences, in that order
    bounds: list[int] | None  # first row of each group, and the end; None where torch.compile traces
    width: int  # sequences per group

    @property
    def groups(self) -> int:
        return self.segments.sequences // self.width

    def offsets(self, first: int, last: int, start: int) -> Tensor:
        """Of the groups' sequences, within a chunk that begins at row ``start``."""
        assert self.segments.offsets is not None
        return self.segments.offsets[first * self.width : last * self.width + 1] - start


@dataclass(frozen=True)
class Operands:
    """A checked head and its rows."""

    input: Tensor  # [N, D], all rows
    weight: Tensor
    bias: Tensor | None
    layout: Layout
    ignore_index: int
    scale: float
    softcap: float
    chunk_size: int | None

    @property
    def hidden(self) -> Tensor:
        return self.input.index_select(0, self.layout.order)


def operands(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    width: int,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    chunk_size: int | None,
) -> Operands:
    """Every check of the head's arguments, and the order of the rows."""
    from fastloss.engine.calls import check_linear, is_traced

    checks.is_floating("input", input)
    checks.is_floating("linear_weight", linear_weight)
    dim = 2 if cu_seqlens is not None else 3
    if input.dim() != dim:
        expected = "[N, D] with cu_seqlens" if dim == 2 else f"[{'2B' if width == 2 else 'B'}, T, D]"
        raise ShapeError(f"input: expected shape {expected}, got {list(input.shape)}")
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ShapeError(
            f"linear_weight: expected shape [V, {input.shape[-1]}], got {list(linear_weight.shape)}"
        )
    rows = input.reshape(-1, input.shape[-1])
    check_linear(rows, linear_weight, linear_bias)
    checks.index_target("target", target, tuple(input.shape[:-1]), input.device)
    checks.chunk_size_value(chunk_size)
    scale, cap = _scale(temperature, logit_scale), checks.softcap_value(softcap)
    traced = is_traced(input)
    if not traced:
        _check_targets(target.reshape(-1), linear_weight.shape[0], ignore_index)
    acc = acc_dtype(input.dtype)
    layout = _layout(target, cu_seqlens, width, ignore_index, acc, traced)
    return Operands(rows, linear_weight, linear_bias, layout, ignore_index, scale, cap, chunk_size)


def _layout(
    target: Tensor, cu_seqlens: Tensor | None, width: int, ignore_index: int, acc: torch.dtype, traced: bool
) -> Layout:
    device = target.device
    flat = target.reshape(-1)
    if cu_seqlens is None:
        count, length = target.shape
        starts = torch.arange(count, device=device) * length
        lengths = torch.full((count,), length, device=device, dtype=torch.int64)
    else:
        checks.is_tensor("cu_seqlens", cu_seqlens)
        checks.same_device("cu_seqlens", cu_seqlens, device)
        if (
            cu_seqlens.dim() != 1
            or cu_seqlens.dtype not in (torch.int32, torch.int64)
            or not cu_seqlens.numel()
        ):
            raise ShapeError(
                f"cu_seqlens: expected int32 or int64 of shape [{'2B' if width == 2 else 'B'} + 1], got "
                f"{cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
            )
        check_offsets("cu_seqlens", cu_seqlens, flat.numel())
        offsets = cu_seqlens.to(torch.int64)
        count, starts, lengths = offsets.numel() - 1, offsets[:-1], offsets.diff()
    if count % width:
        raise ShapeError(
            f"input: expected an even number of sequences, the chosen and then the rejected, got {count}"
        )
    if width == 2:  # chosen 0, rejected 0, chosen 1, …
        order = torch.arange(count, device=device).reshape(2, -1).t().reshape(-1)
        starts, lengths = starts[order], lengths[order]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    sequence = torch.repeat_interleave(lengths, output_size=flat.numel())
    index = starts[sequence] + torch.arange(flat.numel(), device=device) - offsets[sequence]
    target = flat[index]
    kept = target != ignore_index
    so_far = torch.cat([offsets.new_zeros(1), kept.cumsum(0)])
    tokens = so_far[offsets].diff().to(acc)
    mask: Tensor | None = kept.to(acc)
    # Prompts need no GEMM. On a GPU counting them would wait for the device; packed rows have made it wait already.
    if not traced and (device.type == "cpu" or cu_seqlens is not None):
        index, target, offsets, mask = index[kept], target[kept], so_far[offsets], None
    bounds = None
    if not traced:
        steps = range(0, count + 1, width)
        bounds = (
            [int(target.numel() // max(count, 1)) * s for s in steps]
            if mask is not None and cu_seqlens is None
            else offsets[::width].tolist()
        )
    return Layout(index, target, Segments(mask, offsets, 0, count, tokens), bounds, width)


def reference_sums(
    policy: Operands,
    ref_input: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    rows: Any,
    tails: Tensor | None,
    backend: str,
) -> Tensor:
    """Σ log p of every sequence under the reference model: 1 GEMM over the same rows, no gradient."""
    with torch.no_grad():
        hidden = ref_input.detach().reshape(-1, ref_input.shape[-1]).index_select(0, policy.layout.order)
        stats = linear_token_stats(
            hidden,
            ref_weight.detach(),
            policy.layout.target,
            linear_bias=None if ref_bias is None else ref_bias.detach(),
            temperature=1.0,
            logit_scale=policy.scale,
            softcap=policy.softcap or None,
            ignore_index=policy.ignore_index,
            chunk_size=policy.chunk_size,
            backend=backend if rows is not None else "reference",
        )
        assert stats.logprobs is not None
        acc = policy.layout.segments.lengths.dtype
        return policy.layout.segments.sum(rows, stats.logprobs.to(acc), tails)


def check_reference(
    input: Tensor, ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> None:
    if ref_input is None:
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name}: expected None without ref_input, got a tensor")
        return
    checks.is_floating("ref_input", ref_input)
    if ref_weight is None:
        raise ValueError("ref_weight: expected the reference's vocabulary matrix [V, D], got None")
    checks.is_floating("ref_weight", ref_weight)
    if (
        ref_input.shape[:-1] != input.shape[:-1]
        or ref_weight.dim() != 2
        or ref_weight.shape[1] != ref_input.shape[-1]
    ):
        raise ShapeError(
            f"ref_input: expected shape {[*input.shape[:-1], 'D']} and ref_weight [V, D], got {list(ref_input.shape)} "
            f"and {list(ref_weight.shape)}"
        )
    checks.same_device("ref_input", ref_input, input.device)


class Route(NamedTuple):
    """How a call is computed."""

    rows: Any  # the backend's adapter, None for the definition
    fused: bool  # 3 GEMMs, chunked by whole groups
    chunk: int
    needs: Needs
    dtype: torch.dtype


def route(function: str, x: Operands, backend: str, *, coupled: bool, ref: bool) -> Route:
    """Chooses and announces. ``coupled``: a group's coefficients need more than the group."""
    from fastloss.engine.calls import compute_dtype

    on = torch.is_grad_enabled()
    bias = x.bias is not None and on and x.bias.requires_grad
    needs = Needs(on and x.input.requires_grad, on and x.weight.requires_grad, bias)
    dtype = compute_dtype(x.input)
    bounds = x.layout.bounds
    fused, chunk, groups = False, 1, 0
    if bounds is not None:
        longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
        usual = x.chunk_size or head.default_chunk(bounds[-1], x.weight.shape[0], dtype, x.input.device)
        # A chosen size is a limit; else a group may take as much as the weight and its gradient.
        limit = x.chunk_size or max(usual, _affordable(x, dtype))
        fused = bool((needs.weight or needs.bias) and not coupled and 0 < longest <= limit)
        chunk = max(usual, longest) if fused else max(1, min(usual, bounds[-1]))
        groups = len(_packed(bounds, chunk)[1]) if fused else 0
        if fused:
            chunk = max(stop - start for start, stop in _packed(bounds, chunk)[0])
    one = needs == Needs(True, False, False)
    rows = choose(
        function,
        backend,
        x.input,
        x.weight,
        x.bias,
        gemms=head.gemm_count(needs, bool(needs) and not fused and not one),
        ref_gemms=int(ref),
        chunk_rows=chunk,
        chunks=groups if fused else -(-(bounds or [0])[-1] // chunk),
        rows=(bounds or [0])[-1],
        buffer_bytes=head.Head(x.input, x.weight, None, dtype, chunk).buffer_bytes,
    )
    return Route(rows, fused and rows is not None, chunk, needs, dtype)


def _affordable(x: Operands, dtype: torch.dtype) -> int:
    """Rows whose logits take no more memory than the weight and its gradient in the accumulation dtype."""
    buffer = head.Head(x.input, x.weight, None, dtype, 1).buffer_dtype
    return x.weight.shape[1] * (x.weight.element_size() + acc_dtype(dtype).itemsize) // buffer.itemsize


def _packed(bounds: list[int], chunk: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(rows, groups) of chunks of whole groups, each as many as fit."""
    rows, groups, first = [], [], 0
    last = len(bounds) - 1
    while first < last:
        stop = first + 1
        while stop < last and bounds[stop + 1] - bounds[first] <= chunk:
            stop += 1
        rows.append((bounds[first], bounds[stop]))
        groups.append((first, stop))
        first = stop
    return rows, groups


def evaluate(
    x: Operands, how: Route, contrast: Contrast, want: tuple[str, ...], outputs: tuple[str, ...], total: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, outputs): the contrast of all groups; statistics in ``want`` (engine names) come with the outputs."""
    layout = x.layout
    kept = tuple(name for name in want if name in METRIC_STATS)
    if how.fused:
        assert layout.bounds is not None
        rows, groups = _packed(layout.bounds, how.chunk)
        call = ts.StatsCall(how.rows, x.ignore_index, x.scale, x.softcap, False, want)
        names = (*outputs, *kept)
        plan = linear_sequences.Plan(
            layout.target, call, contrast, rows, groups, total, how.dtype, how.chunk, how.needs, names
        )
        loss, *rest = linear_sequences.LinearContrast.apply(x.hidden, x.weight, x.bias, plan)
        return loss, dict(zip(names, rest, strict=True))
    if how.rows is None:
        stats = reference.linear_token_stats(
            x.hidden,
            x.weight,
            layout.target,
            linear_bias=x.bias,
            scale=x.scale,
            softcap=x.softcap or None,
            ignore_index=x.ignore_index,
        )
        values = {**stats, "logprob": stats["logprobs"], "mean_logit": stats["mean_logits"]}
    else:
        call = ts.StatsCall(how.rows, x.ignore_index, x.scale, x.softcap, False, want, ("logprob",))
        result = linear.LinearTokenStats.apply(
            x.hidden, x.weight, x.bias, layout.target, call, how.dtype, how.chunk, how.chunk, how.needs
        )
        values = dict(zip(want, result, strict=True))
    logprob = values["logprob"].to(layout.segments.lengths.dtype)
    loss, out = contrast(logprob, values, (0, layout.target.numel()), (0, layout.groups))
    return loss, {**out, **{name: values[name].detach() for name in kept}}


def token_metrics(out: dict[str, Tensor], x: Operands, rows: Any, chosen: Tensor) -> dict[str, Tensor]:
    """TRL's metrics of the head, means over tokens; ``chosen`` is acc [sequences], 1 for a good response."""
    s = x.layout.segments
    acc = s.lengths.dtype
    with torch.no_grad():
        tokens, good = s.lengths.sum().clamp(min=1), (s.lengths * chosen).sum()
        logits, right = s.sum(rows, out["mean_logit"].to(acc)), s.sum(rows, out["is_top1"].to(acc))
        bad = s.lengths.sum() - good
        return {
            "entropy": out["entropy"].sum() / tokens,
            "mean_token_accuracy": (right * chosen).sum() / good.clamp(min=1),
            "logits/chosen": (logits * chosen).sum() / good.clamp(min=1),
            "logits/rejected": (logits * (1 - chosen)).sum() / bad.clamp(min=1),
        }
