"""Log-probs of whole sequences from a linear head: which rows are read, in which order, in which chunks, at how many GEMMs.

Rows are read group by group (a pair, or one response). Once every token of a group has been read the group's coefficients
are known, so that its gradient is made while its logits are still in the buffer: 3 GEMMs. Where a group needs more than
itself, or is longer than the buffer, the statistics of all rows come first and the backward makes the logits again: 4 GEMMs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks, devices
from fastloss.engine import head as heads
from fastloss.engine.autograd import differentiable_again, segment_sum, upstream_scale
from fastloss.engine.backend import Call, check_targets, is_traced, resolve_call
from fastloss.engine.checks import ShapeError
from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import Backend, Factor
from fastloss.engine.definition import REFERENCE
from fastloss.engine.head import NOTHING, Grads, Head, Limits, Needs, Schedule
from fastloss.engine.head_spans import Spans, spans_of
from fastloss.engine.head_stats import LinearTokenStatistics, StatsRun
from fastloss.engine.sequences import Sequences, Tokens, numbers_of, packed_layout
from fastloss.engine.shards import Shards, of_group, whole
from fastloss.tables import ACC_DTYPES, LATE_DTYPES, LSE_PARTS, RowOptions

METRIC_STATS = ("entropy", "mean_logits", "is_top1")
TOKEN_STATS = ("logprobs", "log_sum_sq_probs", *METRIC_STATS)


@dataclass(frozen=True)
class GroupedRows:
    """The rows in the order in which the head reads them."""

    order: Tensor  # int64 [rows], rows of the flattened input
    target: Tensor  # int64 [rows]
    tokens: Tokens  # of the sequences, in that order
    bounds: list[int] | None  # first row of each group, and the end; None where torch.compile traces
    width: int  # sequences per group

    @property
    def groups(self) -> int:
        return self.tokens.layout.count // self.width

    def part(self, first: int, last: int, start: int, stop: int) -> Sequences:
        """The sequences of the groups [first, last), within the rows [start, stop)."""
        layout = self.tokens.layout
        assert layout.offsets is not None
        offsets = layout.offsets[first * self.width : last * self.width + 1] - start
        return Sequences(offsets, 0, (last - first) * self.width, stop - start, layout.device)


@dataclass(frozen=True)
class GroupedHead:
    """A checked head and its rows."""

    input: Tensor  # [N, D], all rows
    weight: Tensor
    bias: Tensor | None
    rows: GroupedRows
    options: RowOptions
    limits: Limits

    @property
    def hidden(self) -> Tensor:
        return self.input.index_select(0, self.rows.order)


class GroupLoss(Protocol):
    """A loss of whole groups; those of all groups add up."""

    def of_groups(
        self,
        backend: Backend,
        logprobs: Tensor,
        stats: dict[str, Tensor],
        rows: tuple[int, int],
        groups: tuple[int, int],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, detached outputs per group) of the groups [first, last), whose tokens are the rows [start, stop)."""
        ...


def check_grouped_head(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    options: RowOptions,
    limits: Limits,
    *,
    width: int,
    lora: Any = None,
) -> GroupedHead:
    """Every check of the head's arguments, and the order of the rows; ``width`` sequences are a group."""
    checks.is_floating("input", input)
    dim = 2 if cu_seqlens is not None else 3
    if input.dim() != dim:
        expected = "[N, D] with cu_seqlens" if dim == 2 else f"[{'2B' if width == 2 else 'B'}, T, D]"
        raise ShapeError(f"input: expected shape {expected}, got {list(input.shape)}")
    heads.check_head(input, linear_weight, linear_bias)
    input, linear_bias = heads.with_lora(input, linear_weight, linear_bias, lora)
    rows = checks.as_rows(input)
    checks.index_target("target", target, tuple(input.shape[:-1]), input.device)
    traced = is_traced(input) or input.is_meta  # no number to read
    if not traced:
        check_targets(target.reshape(-1), heads.vocab_of(linear_weight, limits), options.ignore_index)
    grouped = _grouped(target, cu_seqlens, width, options.ignore_index, ACC_DTYPES[input.dtype], traced)
    options = options.of_rows(lambda x: x.index_select(0, grouped.order))
    return GroupedHead(rows, linear_weight, linear_bias, grouped, options, limits)


def _grouped(
    target: Tensor, cu_seqlens: Tensor | None, width: int, ignore_index: int, acc: torch.dtype, traced: bool
) -> GroupedRows:
    device, n = target.device, target.numel()
    flat = target.reshape(-1)
    if cu_seqlens is None:
        count, length = target.shape
        starts = torch.arange(count, device=device, dtype=torch.int64) * length
        lengths = torch.full((count,), length, device=device, dtype=torch.int64)
    else:
        layout = packed_layout("cu_seqlens", cu_seqlens, n, device)
        assert layout.offsets is not None
        count, starts, lengths = layout.count, layout.offsets[:-1], layout.offsets.diff()
    if count % width:
        raise ShapeError(
            f"input: expected an even number of sequences, the chosen and then the rejected, got {count}"
        )
    if width == 2:  # chosen 0, rejected 0, chosen 1, …
        order = torch.arange(count, device=device, dtype=torch.int64).reshape(2, -1).t().reshape(-1)
        starts, lengths = starts[order], lengths[order]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    sequence = torch.repeat_interleave(lengths, output_size=n)
    position = torch.arange(n, device=device, dtype=torch.int64)
    index = starts[sequence] + position - offsets[sequence]
    target = flat[index]
    kept = target != ignore_index
    so_far = torch.cat([offsets.new_zeros(1), kept.cumsum(0)])
    tokens = so_far[offsets].diff().to(acc)
    mask: Tensor | None = kept.to(acc)
    # Prompts need no GEMM; packed rows have made a GPU wait already.
    if not traced and (devices.may_wait(device) or cu_seqlens is not None):
        places = kept.nonzero().view(-1)
        index, target, offsets, mask = index[places], target[places], so_far[offsets], None
    bounds = None
    if not traced:
        steps = range(0, count + 1, width)
        bounds = (
            [int(target.numel() // max(count, 1)) * s for s in steps]
            if mask is not None and cu_seqlens is None
            else numbers_of(offsets[::width])
        )
    layout = Sequences(offsets, 0, count, target.numel(), device)
    return GroupedRows(index, target, Tokens(layout, mask, tokens), bounds, width)


def token_weights(x: GroupedHead, token_weight: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
    """A factor of the log-prob of each row, acc ``[rows]``, from one of each token ``lead``; 0 where the target is ignored."""
    if token_weight is None:
        return None
    checks.token_weight("token_weight", token_weight, lead, x.input.device)
    return x.rows.tokens.weighted(token_weight.detach().reshape(-1).index_select(0, x.rows.order))


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


def reference_sums(
    call: Call,
    x: GroupedHead,
    ref_input: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    tails: Tensor | None,
) -> Tensor:
    """Σ log p of every sequence under the reference model: 1 GEMM over the same rows, no gradient."""
    rows, options = x.rows, x.options
    with torch.no_grad():
        hidden = checks.as_rows(ref_input.detach()).index_select(0, rows.order)
        heads.check_linear(hidden, ref_weight, ref_bias)
        shards = x.limits.shards
        if shards is not None:  # the reference's vocabulary is cut over the same processes
            shards = of_group(shards.group, ref_weight.shape[0], ref_weight.device)
        if call.by_definition:
            all_weight = whole(ref_weight, shards)
            assert all_weight is not None
            logprobs = reference.linear_token_stats(
                hidden, all_weight, rows.target, linear_bias=whole(ref_bias, shards), **_transform(options)
            )["logprobs"]
        else:
            dtype = heads.compute_dtype(hidden, ref_weight)
            head = heads.make_head(call.backend, hidden, ref_weight, ref_bias, dtype, shards)
            schedule = heads.schedule_of(head, hidden.shape[0], NOTHING, x.limits)
            logprobs = heads.stats(head, rows.target, options, ("logprobs",), schedule, None)[0]["logprobs"]
        return sum_tokens(call.backend, rows.tokens, logprobs.to(rows.tokens.lengths.dtype), tails)


def sum_tokens(backend: Backend, tokens: Tokens, values: Tensor, tails: Tensor | None = None) -> Tensor:
    """Σ over each sequence; ``tails`` (acc ``[N]``) are weights in place of the mask."""
    weights = tokens.mask if tails is None else tails
    return segment_sum(backend, values.reshape(-1), weights, tokens.layout)


def _transform(options: RowOptions) -> dict[str, Any]:
    return {
        "scale": options.factor,
        "softcap": options.softcap or None,
        "ignore_index": options.ignore_index,
    }


@dataclass(frozen=True)
class GroupPlan:
    """How a call is computed."""

    call: Call
    spans: (
        Spans | None
    )  # of the parts whose gradients follow on their statistics; None: a backward of its own makes them
    schedule: Schedule
    needs: Needs
    dtype: torch.dtype


def plan_groups(
    function: str,
    x: GroupedHead,
    backend: str,
    constants: tuple[Any, ...],
    *,
    coupled: bool,
    per_group: bool,
    ref: bool,
) -> GroupPlan:
    """Chooses backend and chunks, and announces them. ``constants``: the loss's other tensors. ``coupled``: a group's coefficients depend on other groups.
    ``per_group``: a loss of each group is returned, whose upstream gradient is not known yet."""
    needs = heads.needs_of(x.input, x.weight, x.bias)
    dtype = heads.compute_dtype(x.input, x.weight)
    operands = x.input, x.weight, x.bias, x.rows.target
    call = resolve_call(function, backend, *operands, *constants, has_operators=False, dtype=dtype)
    head = Head(call.backend, x.input, x.weight, None, dtype, x.limits.shards)
    bounds = x.rows.bounds
    if call.by_definition or bounds is None:
        schedule, spans = heads.chunked(head, 1, needs, x.limits), None
    else:
        schedule, spans = spans_of(head, needs, x.limits, bounds, coupled=coupled, late=per_group)
    if call.by_definition:
        call.announce()
        return GroupPlan(call, None, schedule, needs, dtype)
    ahead = spans is not None or needs == Needs(True, False, False)
    details = schedule.details(head, (bounds or [0])[-1], needs, bool(needs) and not ahead)
    chunks = len(spans[0]) if spans is not None else -(-details["rows"] // max(1, details["chunk_rows"]))
    call.announce(**details, ref_gemms=int(ref), chunks=chunks)
    return GroupPlan(call, spans, schedule, needs, dtype)


def evaluate(
    x: GroupedHead,
    plan: GroupPlan,
    loss: GroupLoss,
    want: tuple[str, ...],
    outputs: tuple[str, ...],
    total: int,
    keep: tuple[str, ...] = METRIC_STATS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, outputs) of all groups. Statistics of ``keep`` that are wanted come with the outputs; the loss is divided by
    ``total`` (float16's coefficients are kept undivided until the end)."""
    kept = tuple(name for name in want if name in keep)
    if plan.spans is not None:
        names = (*outputs, *kept)
        run = _Run(plan, x.rows, x.options, loss, want, names, total, x.limits.shards)
        value, *rest = _FusedGroups.apply(x.hidden, x.weight, x.bias, run)
        return value, dict(zip(names, rest, strict=True))
    rows, backend = x.rows, plan.call.backend
    if plan.call.by_definition:
        all_weight, shards = whole(x.weight, x.limits.shards), x.limits.shards
        assert all_weight is not None
        all_bias = whole(x.bias, shards)
        with heads.float_operands(x.limits.float_logits, x.hidden, all_weight, all_bias) as (hidden, w, bias):
            stats = reference.linear_token_stats(
                hidden, w, rows.target, linear_bias=bias, **_transform(x.options)
            )
    else:
        shards, differentiable = x.limits.shards, ("logprobs",)
        once = StatsRun(
            backend, x.options, want, plan.dtype, plan.schedule, plan.needs, None, shards, differentiable
        )
        values = LinearTokenStatistics.apply(x.hidden, x.weight, x.bias, rows.target, once)
        stats = dict(zip(want, values, strict=True))
    logprobs = stats["logprobs"].to(rows.tokens.lengths.dtype)
    value, out = loss.of_groups(backend, logprobs, stats, (0, rows.target.numel()), (0, rows.groups))
    return value, {**out, **{name: stats[name].detach() for name in kept}}


@dataclass(frozen=True)
class _Run:
    """What forward and backward of a fused call need beside the tensors with gradients."""

    plan: GroupPlan
    rows: GroupedRows
    options: RowOptions
    loss: GroupLoss
    want: tuple[str, ...]
    outputs: tuple[str, ...]
    total: int
    shards: Shards | None


def _again(ctx: Any) -> Any:
    run: _Run = ctx.run
    heads.again_only_whole(run.shards)
    hidden, weight, bias = ctx.saved_tensors
    target, layout = run.rows.target, run.rows.tokens.layout
    logits = heads.defined_logits(hidden, weight, bias, run.plan.dtype, run.plan.schedule.float_logits)
    stats = REFERENCE.row_stats(logits, target, run.options, want=heads.with_lse_parts(run.want))
    span, groups = (0, layout.n), (0, run.rows.groups)
    loss, _ = run.loss.of_groups(REFERENCE, stats["logprobs"], stats, span, groups)
    return [loss, *[None] * len(run.outputs)], [hidden, weight, bias]


class _FusedGroups(torch.autograd.Function):
    """(hidden, weight, bias) -> loss, and the outputs, which are detached. The gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, run: _Run) -> Any:
        ctx.run = run
        plan = run.plan
        head = heads.make_head(plan.call.backend, hidden, weight, bias, plan.dtype, run.shards)
        out, grads = _one_pass(head, run)
        ctx.late = plan.dtype in LATE_DTYPES
        dtypes = heads.leaf_dtypes(hidden, weight, bias)
        ctx.grads = grads if ctx.late else heads.finish(grads, dtypes, head.backend)
        ctx.save_for_backward(hidden, weight, bias)
        rest = tuple(out[name] for name in run.outputs)
        ctx.mark_non_differentiable(*rest)
        return (out["loss"].sum(), *rest)

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        run: _Run = ctx.run
        backend, dtype = run.plan.call.backend, run.plan.dtype
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # retain_graph: the first backward gave the buffers away
            grads = _one_pass(heads.make_head(backend, hidden, weight, bias, dtype, run.shards), run)[1]
        late = Factor(1.0 / run.total) if ctx.late else None
        scale = upstream_scale(backend, upstream, late)
        return (*heads.finish(grads, heads.leaf_dtypes(hidden, weight, bias), backend, scale), None)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _one_pass(head: Head, run: _Run) -> tuple[dict[str, Tensor], Grads]:
    """Chunk by chunk: statistics, the loss of the chunk's groups, its coefficients, the gradients."""
    plan, options = run.plan, run.options
    assert plan.spans is not None
    chunks, groups = plan.spans
    outs: list[dict[str, Tensor]] = []
    with heads.begin(head, plan.needs, None, plan.schedule, chunks, logprobs_only=True) as pass_:
        for part, rows, group in zip(pass_.parts(), chunks, groups, strict=True):
            target = part.of(run.rows.target)
            stats = part.stats(target, options, heads.with_lse_parts(run.want))
            # The graph of this loss is its own: hooks of an outer checkpoint have nothing to save or make again in it.
            own_graph = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
            with torch.enable_grad(), own_graph:
                logprobs = stats["logprobs"].detach().requires_grad_()
                loss, out = run.loss.of_groups(head.backend, logprobs, stats, rows, group)
            (a,) = torch.autograd.grad(loss, logprobs)
            if head.dtype in LATE_DTYPES:
                a = a * run.total
            part.gradients(target, options, stats[LSE_PARTS], Coefficients(a=a, b=-a))
            kept = {name: value for name, value in stats.items() if name in run.outputs}
            outs.append({"loss": loss.detach().reshape(1), **out, **kept})
        return pass_.collect(outs), pass_.grads()


def in_place_of_targets(out: dict[str, Tensor], x: GroupedHead, target: Tensor) -> dict[str, Tensor]:
    """Statistics per row, in the order in which rows were read, as those of ``target``; 0 where that is ignored."""

    def placed(value: Tensor) -> Tensor:
        zeros = value.new_zeros(target.numel())
        return zeros.index_copy_(0, x.rows.order, value.reshape(-1)).view(target.shape)

    return {name: placed(out[name]) for name in TOKEN_STATS if name in out}


def token_metrics(
    out: dict[str, Tensor], x: GroupedHead, backend: Backend, chosen: Tensor
) -> dict[str, Tensor]:
    """TRL's metrics of the head, means over tokens; ``chosen`` is acc [sequences], 1 for a good response."""
    tokens = x.rows.tokens
    lengths = tokens.lengths
    acc = lengths.dtype
    with torch.no_grad():
        count, good = lengths.sum().clamp(min=1), (lengths * chosen).sum()
        logits = sum_tokens(backend, tokens, out["mean_logits"].to(acc))
        right = sum_tokens(backend, tokens, out["is_top1"].to(acc))
        bad = lengths.sum() - good
        return {
            "entropy": out["entropy"].sum() / count,
            "mean_token_accuracy": (right * chosen).sum() / good.clamp(min=1),
            "logits/chosen": (logits * chosen).sum() / good.clamp(min=1),
            "logits/rejected": (logits * (1 - chosen)).sum() / bad.clamp(min=1),
        }
