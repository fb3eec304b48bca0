"""token_stats, linear_token_stats, selective_log_softmax, entropy_from_logits: numbers per token in one pass over the vocabulary."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks, compile_heads, compile_rows, compile_support, devices, invariance
from fastloss.engine import head as heads
from fastloss.engine.argmax import largest_class, row_statistics
from fastloss.engine.autograd import differentiable_again, new_gradient, refuse_inplace
from fastloss.engine.backend import (
    check_targets,
    resolve_call,
    resolves_views,
    targets_are_validated,
    tracing_reason,
)
from fastloss.engine.checks import ShapeError
from fastloss.engine.coefficients import of_upstream
from fastloss.engine.contract import Backend
from fastloss.engine.definition import REFERENCE
from fastloss.engine.dtensors import takes_dtensors
from fastloss.engine.head_shards import of_columns
from fastloss.engine.head_stats import LinearTokenStatistics, StatsRun
from fastloss.engine.head_types import NOTHING
from fastloss.engine.jagged import takes_jagged
from fastloss.engine.shards import Call as SharedCall
from fastloss.engine.shards import Shards, needed, of_group, whole
from fastloss.engine.support import (
    Layout,
    LinearSupportStatistics,
    Sets,
    SupportRun,
    SupportStatistics,
    first_bad,
    lay_out,
    sets_of,
)
from fastloss.tables import (
    ACC_DTYPES,
    ARGMAX,
    DIFFERENTIABLE_STATS,
    LSE_PARTS,
    STATS,
    STATS_WITHOUT_TARGET,
    Number,
    RowOptions,
)


class TokenStats(NamedTuple):
    """Statistics per token, float32 (float64 for float64 input) of shape ``[...]``; None where not asked for."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    argmax: Tensor | None = None  # int64
    log_mass: Tensor | None = None


def stats_from(out: dict[str, Tensor], want: tuple[str, ...]) -> TokenStats:
    """A TokenStats of the wanted statistics that a kernel wrote; is_top1 becomes bool."""
    return TokenStats(
        *[
            None
            if name not in want or name not in out
            else out[name].bool()
            if name == "is_top1"
            else out[name]
            for name in TokenStats._fields
        ]
    )


@takes_jagged(TokenStats)
@takes_dtensors("logits")
@resolves_views
def token_stats(
    logits: Tensor,
    target: Tensor | None,
    *,
    temperature: Number = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logprobs",),
    detach: tuple[str, ...] | None = None,
    inplace: bool = False,
    group: Any = None,
    support: Any = None,
    backend: str = "auto",
) -> TokenStats:
    """Statistics of each token's distribution, with gradients through logprobs, entropy and logsumexp.

    They are those of ``z = logit_scale · softcap · tanh(logits / softcap) / temperature``.

    Args:
        logits: ``[..., V]`` in float32, bfloat16, float16 or float64.
        target: int64 ``[...]``; None if no output needs it.
        temperature: > 0: a number, or one per token, ``[...]`` or what broadcasts to it, in any float dtype.
        ignore_index: tokens with this target give 0 and no gradient.
        outputs: of "logprobs" (log p of the target, nats), "entropy" (nats), "logsumexp", "log_sum_sq_probs"
            (log Σ p²), "mean_logits" (Σ z / V), "is_top1" (no logit is larger than the target's), "argmax" (the class of the
            largest logit, the first of several; another reading of the logits but in the CPU's blocks of the vocabulary; not with
            ``support``); with ``support`` also "log_mass".
        detach: of the outputs, those that nobody differentiates (a metric); they come without a gradient. () says that all
            are differentiated, None that it is not known: see :func:`linear_token_stats`.
        inplace: the backward writes its gradient over ``logits``.
        group: a ProcessGroup, or a DeviceMesh of one dimension, whose processes each have some columns of the logits, one after
            the other; targets and results are the same on each, and all must call.
        support: the classes that a sampler kept at each position (top-k, top-p, min-p): every statistic is that of the
            distribution over them alone (docs/policy_gradient.md). ``(token_ids, offsets)`` as vLLM's SamplingMask has them: ids
            ``[entries]`` and the bounds ``[N + 1]`` of the N positions, flattened; or ids ``[..., K]`` padded with -1. int64 or int32; an
            id that repeats counts once. "log_mass" is the log of what the kept classes had in the whole distribution, without a
            gradient. See :func:`sampler_support`, :func:`support_from_mask`.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
        IndexError: on CPU, a bad target (see :func:`cross_entropy`), or one that is not in its set; on a GPU that row is NaN.

    >>> import torch, fastloss
    >>> fastloss.token_stats(torch.zeros(1, 4), torch.tensor([2])).logprobs
    tensor([-1.3863])
    >>> fastloss.token_stats(torch.zeros(1, 4), torch.tensor([2]), support=torch.tensor([[0, 2]])).logprobs
    tensor([-0.6931])
    """
    checks.is_floating("logits", logits)
    if logits.dim() < 1:
        raise ShapeError("logits: expected at least 1 dimension, got a 0-d tensor")
    lead, vocab = logits.shape[:-1], logits.shape[-1]
    shards = None
    if group is not None:
        together = SharedCall(math.prod(lead), 0, logits.dtype, target, ignore_index)
        shards = of_group(group, vocab, logits.device, together)
    all_vocab = vocab if shards is None else shards.vocab
    if all_vocab == 0:
        raise ShapeError("logits: expected at least one class, got 0")
    want = _wanted(outputs, target, support)
    kept = _differentiable(want, detach)
    if target is not None:
        checks.index_target("target", target, tuple(lead), logits.device)
    options = row_options(temperature, logit_scale, softcap, ignore_index, lead, logits)
    if support is not None:
        raw = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        given = Given(target, options, raw, want, detach, backend, shards)
        return _shaped(_of_kept_logits(logits, support, inplace, given), want, lead)
    rows = logits.reshape(-1 if shards is None else math.prod(lead), vocab)
    flat = None if target is None else target.reshape(-1).contiguous()
    call = resolve_call(
        "token_stats", backend, logits, target, options.row_scale, has_operators=shards is None
    )
    call.announce(
        inplace=inplace,
        **({} if shards is None else shards.details(rows.shape[0], want, ACC_DTYPES[rows.dtype])),
    )
    check_targets(flat, all_vocab, ignore_index)
    if call.by_definition:
        if shards is not None:
            columns = whole(rows.t(), shards)
            assert columns is not None
            rows = columns.t()
        out = reference.token_stats(rows, flat, **_transform(options))
        if ARGMAX in want:
            out[ARGMAX] = largest_class(rows, flat, options)
        return _shaped(_cut_off({name: out[name] for name in want}, detach), want, lead)
    if rows.stride(1) != 1 and vocab > 1:
        rows = rows.contiguous()
    elif inplace and not call.traced:
        refuse_inplace(rows)
    if call.traced:
        values = compile_rows.token_stats(rows, flat, options, want, call.backend.name)
        named = dict(zip(STATS, values, strict=True))
        if ARGMAX in want:
            named[ARGMAX] = largest_class(rows, flat, options)
        return _shaped(_cut_off(named, detach), want, lead)
    values = TokenStatistics.apply(rows, flat, call.backend, options, want, inplace, shards, kept)
    return _shaped(dict(zip(want, values, strict=True)), want, lead)


@takes_jagged(TokenStats)
@takes_dtensors("linear_weight")
@resolves_views
def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    temperature: Number = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logprobs",),
    detach: tuple[str, ...] | None = None,
    chunk_size: int | None = None,
    memory: str = "auto",
    group: Any = None,
    logits_dtype: torch.dtype | None = None,
    support: Any = None,
    lora: Any = None,
    backend: str = "auto",
) -> TokenStats:
    """:func:`token_stats` of ``input @ linear_weight.T + linear_bias``, without holding those logits.

    1 GEMM without gradient; 2 with a frozen weight, unless a gradient of entropy or logsumexp comes too: then the backward
    recomputes (4 GEMMs; 3 if ``detach=()`` said so), as it does for the weight's gradient (4 GEMMs). With ``support`` no GEMM: the kept
    rows of the weight alone are multiplied, K·D multiplications a token in place of V·D, and their logits are float32 whatever the
    operands' dtype; "log_mass" costs the whole head once.

    Args:
        input: hidden states ``[..., D]``.
        linear_weight: ``[V, D]``. linear_bias: ``[V]``.
        target: int64 ``[...]``.
        temperature, logit_scale, softcap, ignore_index, outputs, detach: as in :func:`token_stats`.
        chunk_size: rows that go together at most; None chooses. memory, group, logits_dtype: as in :func:`linear_cross_entropy`.
        support: as in :func:`token_stats`.
        lora: as in :func:`linear_cross_entropy`. Not with ``support``.

    >>> import torch, fastloss
    >>> fastloss.linear_token_stats(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([2])).logprobs
    tensor([-1.3863])
    """
    hidden = heads.check_head(input, linear_weight, linear_bias)
    if lora is not None:
        if support is not None:
            raise ValueError("lora: expected None beside support, got an adapter")
        input, linear_bias = heads.with_lora(input, linear_weight, linear_bias, lora)
        hidden = checks.as_rows(input)
    lead = input.shape[:-1]
    want = _wanted(outputs, target, support)
    kept = _differentiable(want, detach)
    if target is not None:
        checks.index_target("target", target, tuple(lead), input.device)
    limits = heads.limits_of(
        chunk_size, memory, group, input, linear_weight, target, ignore_index, logits_dtype
    )
    vocab, shards = heads.vocab_of(linear_weight, limits), limits.shards
    if vocab == 0:
        raise ShapeError("linear_weight: expected at least one class, got 0")
    options = row_options(temperature, logit_scale, softcap, ignore_index, lead, input)
    flat = None if target is None else target.reshape(-1).contiguous()
    dtype = heads.compute_dtype(input, linear_weight)
    if support is not None:
        raw = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        given = Given(target, options, raw, want, detach, backend, shards)
        how = {"chunk_size": chunk_size, "memory": memory}
        return _shaped(
            _of_kept_rows(input, linear_weight, linear_bias, support, dtype, how, given), want, lead
        )
    call = resolve_call(
        "linear_token_stats",
        backend,
        input,
        linear_weight,
        linear_bias,
        target,
        options.row_scale,
        dtype=dtype,
    )
    if call.traced and not call.by_definition:
        values = compile_heads.linear_token_stats(
            hidden, linear_weight, linear_bias, flat, options, want, dtype, limits, call.backend.name
        )
        return _shaped(_cut_off(dict(zip((*STATS, ARGMAX), values, strict=True)), detach), want, lead)
    if call.by_definition:
        call.announce()
        check_targets(flat, vocab, ignore_index)
        all_weight, all_bias = whole(linear_weight, shards), whole(linear_bias, shards)
        assert all_weight is not None
        with heads.float_operands(limits.float_logits, hidden, all_weight, all_bias) as (x, w, bias):
            out = reference.linear_token_stats(x, w, flat, linear_bias=bias, **_transform(options))
            if ARGMAX in want:
                out[ARGMAX] = largest_class(heads.products(x, w, bias), flat, options)
        return _shaped(_cut_off({name: out[name] for name in want}, detach), want, lead)
    head = heads.make_head(call.backend, hidden, linear_weight, linear_bias, dtype, shards)
    needs = heads.needs_of(input, linear_weight, linear_bias)
    keep = heads.kept_rows(flat, ignore_index)
    rows = heads.count_kept(hidden.shape[0], keep)
    schedule = heads.schedule_of(head, rows, needs, limits)
    all_come = detach is not None
    run = StatsRun(call.backend, options, want, dtype, schedule, needs, keep, shards, kept, all_come)
    # Over blocks, a shard's d hidden waits for the sums of the whole row, and the logits are made again.
    again = bool(needs) and not (run.ahead and (shards is None or not schedule.by_vocabulary))
    call.announce(**schedule.details(head, rows, needs, again, want))
    check_targets(flat, vocab, ignore_index)
    values = LinearTokenStatistics.apply(hidden, linear_weight, linear_bias, flat, run)
    return _shaped(dict(zip(want, values, strict=True)), want, lead)


class Given(NamedTuple):
    """The checked arguments that both functions over a support share."""

    target: Tensor | None
    options: RowOptions
    raw: dict[str, Any]  # what the options were made of
    want: tuple[str, ...]
    detach: tuple[str, ...] | None
    backend: str
    shards: Shards | None

    def transform(self) -> dict[str, Any]:
        return {**self.raw, "ignore_index": self.options.ignore_index}

    def over_kept(self) -> tuple[str, ...]:
        """What is asked of the kept classes; "log_mass" is a difference of two logsumexps. (torch 2.8 traces no property of a NamedTuple.)"""
        names = [name for name in self.want if name != "log_mass"]
        if "log_mass" in self.want and "logsumexp" not in names:
            names.append("logsumexp")
        return tuple(names)

    def flat(self) -> Tensor | None:
        return None if self.target is None else self.target.reshape(-1).contiguous()


def _of_kept_logits(logits: Tensor, support: Any, inplace: bool, given: Given) -> dict[str, Tensor]:
    lead, options, want, shards = logits.shape[:-1], given.options, given.over_kept(), given.shards
    vocab = logits.shape[-1] if shards is None else shards.vocab
    sets = sets_of(support, lead, logits.device)
    rows, flat = logits.reshape(lead.numel(), logits.shape[-1]), given.flat()
    call = resolve_call(
        "token_stats", given.backend, logits, given.target, options.row_scale, sets.ids, sets.offsets,
        has_operators=shards is None,
    )  # fmt: skip
    told = support_sent(shards, sets, given.want, flat, options.ignore_index, ACC_DTYPES[logits.dtype], None)
    call.announce(inplace=inplace, kept=sets.ids.shape[0], **told)
    whole_lse = None
    if "log_mass" in given.want:  # before anything is written in place
        with torch.no_grad():
            whole_lse = token_stats(
                logits.detach(),
                given.target,
                outputs=("logsumexp",),
                group=shards,
                backend=given.backend,
                **given.transform(),
            ).logsumexp
    if call.by_definition:
        reject_bad_support(sets, flat, lead, vocab, options)
        kept_there = sets.ids, sets.bounds()
        columns = None if shards is None else whole(rows.t(), shards)
        rows = rows if columns is None else columns.t()
        out = reference.token_stats(rows, flat, **_transform(options), support=kept_there)
    elif call.traced:
        values = compile_support.support_stats(rows, flat, sets, options, want, call.backend.name)
        out = dict(zip(STATS, values, strict=True))
    else:
        if inplace:
            refuse_inplace(rows)
        layout = checked_layout(sets, flat, lead, vocab, options)
        kept = _differentiable(want, given.detach)
        run = SupportRun(
            call.backend, options, want, sets, layout, kept, logits.dtype, NOTHING, inplace, shards
        )
        out = dict(zip(want, SupportStatistics.apply(rows, flat, run), strict=True))
    return _with_mass(out, whole_lse, given)


def _of_kept_rows(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    support: Any,
    dtype: torch.dtype,
    how: dict[str, Any],
    given: Given,
) -> dict[str, Tensor]:
    lead, options, want, shards = input.shape[:-1], given.options, given.over_kept(), given.shards
    vocab = linear_weight.shape[0] if shards is None else shards.vocab
    sets = sets_of(support, lead, input.device)
    hidden, flat = checks.as_rows(input), given.flat()
    call = resolve_call(
        "linear_token_stats", given.backend, input, linear_weight, linear_bias, given.target, options.row_scale,
        sets.ids, sets.offsets, dtype=dtype, has_operators=shards is None,
    )  # fmt: skip
    needs = heads.needs_of(input, linear_weight, linear_bias)
    if hidden.shape[1] == 0:  # no memory that a kernel could gather from
        call = call.without_kernels("hidden states of width 0")
    if call.by_definition:
        call.announce()
    else:
        whose = hidden if needs.hidden else None
        told = support_sent(
            shards, sets, given.want, flat, options.ignore_index, ACC_DTYPES[dtype], whose, True
        )
        call.announce(**support_details(sets, dtype, "log_mass" in given.want), **told)
    whole_lse = None
    if "log_mass" in given.want:
        with torch.no_grad():
            whole_lse = linear_token_stats(
                input.detach(), linear_weight.detach(), given.target, outputs=("logsumexp",), backend=given.backend,
                linear_bias=None if linear_bias is None else linear_bias.detach(), **given.transform(), **how,
                logits_dtype=torch.float32, group=shards,
            ).logsumexp  # fmt: skip
    if call.by_definition:
        reject_bad_support(sets, flat, lead, vocab, options)
        kept_there = sets.ids, sets.bounds()
        all_weight, all_bias = whole(linear_weight, shards), whole(linear_bias, shards)
        assert all_weight is not None
        with heads.float_operands(True, hidden, all_weight, all_bias) as (x, w, bias):
            out = reference.linear_token_stats(
                x, w, flat, linear_bias=bias, **_transform(options), support=kept_there
            )
    elif call.traced:
        values = compile_support.linear_support_stats(
            hidden, linear_weight, linear_bias, flat, sets, options, want, dtype, call.backend.name
        )
        out = dict(zip(STATS, values, strict=True))
    else:
        layout = checked_layout(sets, flat, lead, vocab, options)
        kept = _differentiable(want, given.detach)
        run = SupportRun(
            call.backend, options, want, sets, layout, kept, dtype, needs, inplace=False, shards=shards
        )
        values = LinearSupportStatistics.apply(hidden, linear_weight, linear_bias, flat, run)
        out = dict(zip(want, values, strict=True))
    return _with_mass(out, whole_lse, given)


def _with_mass(out: dict[str, Tensor], whole: Tensor | None, given: Given) -> dict[str, Tensor]:
    """The wanted statistics; of what was kept no more than 1."""
    if whole is not None:
        out = {**out, "log_mass": (out["logsumexp"].detach() - whole.reshape(-1)).clamp(max=0)}
    return _cut_off({name: out[name] for name in given.want}, given.detach)


def support_sent(
    shards: Shards | None,
    sets: Sets,
    want: tuple[str, ...],
    target: Tensor | None,
    ignore_index: int,
    acc: torch.dtype,
    hidden: Tensor | None,
    of_head: bool = False,
) -> dict[str, Any]:
    """What ``explain`` tells of a vocabulary that is cut: the bytes. "log_mass" is another message, of the lse_parts of all classes,
    in float32 at least; ``of_head``: without the tokens that are ignored."""
    if shards is None:
        return {}
    over_kept = {*want, "logsumexp"} - {"log_mass"}
    numbers = sets.rows * (1 + len(needed(tuple(over_kept))))
    if "log_mass" in want:
        keep = heads.kept_rows(target, ignore_index) if of_head else None
        numbers += 2 * heads.count_kept(sets.rows, keep)
    return shards.told(numbers * acc.itemsize, 0, hidden)


def support_details(sets: Sets, dtype: torch.dtype, with_mass: bool) -> dict[str, Any]:
    """What ``explain`` tells of a head over a support."""
    if devices.is_gpu(sets.ids.device):
        invariance.refuse("the logits of a support are PyTorch's sums")
    return {
        "schedule": "kept rows of the weight",
        "gemms": 1 if with_mass else 0,
        "rows": sets.rows,
        "kept": sets.ids.shape[0],
        "logits_dtype": str(ACC_DTYPES[dtype]),
        "buffer_bytes": sets.ids.shape[0] * ACC_DTYPES[dtype].itemsize,
    }


def checked_layout(
    sets: Sets, target: Tensor | None, lead: torch.Size, vocab: int, options: RowOptions
) -> Layout:
    layout = lay_out(sets, target, vocab, options.ignore_index)
    if sets.ids.device.type == "cpu" or targets_are_validated():
        if error := first_bad(layout, target, lead, vocab):
            raise error
    return layout


def reject_bad_support(
    sets: Sets, target: Tensor | None, lead: torch.Size, vocab: int, options: RowOptions
) -> None:
    """Where the host may look at the values: the definition is also traced and transformed."""
    seen = [x for x in (*sets[:2], target) if x is not None]
    if all(checks.host_reads(x) for x in seen) and not tracing_reason(*seen):
        checked_layout(sets, target, lead, vocab, options)


# No index is ignored that is a class: one below every class can be none of them.
_NONE = -(2**63)


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: Number = 1.0,
    row_mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``log_softmax(logits / temperature)`` gathered at ``index``: TRL's name and meaning, without the softmax.

    Args:
        logits: ``[..., V]``. index: int64 ``[...]``, or ``[..., K]`` for K log-probabilities a position.
        row_mask: bool or 0/1 ``[...]``: rows where it is 0 give 0 and take no gradient, whatever they hold.

    Returns:
        float32 (float64 for float64 logits) of ``index``'s shape.

    >>> import torch, fastloss
    >>> fastloss.selective_log_softmax(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    """
    checks.is_floating("logits", logits)
    checks.is_tensor("index", index)
    if index.dim() == logits.dim() and index.shape[:-1] == logits.shape[:-1]:
        return _of_several(logits, index, temperature, row_mask, backend)
    index = _masked(index, row_mask)
    out = token_stats(logits, index, temperature=temperature, ignore_index=_NONE, backend=backend).logprobs
    assert out is not None
    return out


def _masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    if row_mask is None:
        return index
    checks.is_tensor("row_mask", row_mask)
    checks.has_shape("row_mask", row_mask, tuple(index.shape))
    return index.masked_fill(row_mask == 0, _NONE)


def _of_several(
    logits: Tensor, index: Tensor, temperature: Number, row_mask: Tensor | None, backend: str
) -> Tensor:
    """``[..., K]``: the likeliest of a row's K, from the kernel, and the others by their distance to it, in which an offset of
    all logits is no part."""
    scale: Number = row_options(temperature, 1.0, None, 0, index.shape[:-1], logits).factor
    if isinstance(scale, Tensor):
        scale = scale.view(*index.shape[:-1], 1)
    checks.index_target("index", index, tuple(index.shape), logits.device)
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.reject_bad_targets(index, logits.shape[-1], _NONE)
    if not index.shape[-1]:
        return logits.new_zeros(index.shape, dtype=ACC_DTYPES[logits.dtype])
    z = logits.gather(-1, index).to(ACC_DTYPES[logits.dtype])  # [..., K]
    best = z.detach().argmax(-1, keepdim=True)
    pivot = _masked(index.gather(-1, best).squeeze(-1), row_mask)
    top = token_stats(logits, pivot, temperature=temperature, ignore_index=_NONE, backend=backend).logprobs
    assert top is not None
    out = top.unsqueeze(-1) + (z - z.gather(-1, best)) * scale
    out = torch.where(z == -math.inf, -math.inf, out)  # where all are, their distance is NaN
    return out if row_mask is None else torch.where((row_mask == 0).unsqueeze(-1), 0.0, out)


@takes_jagged(TokenStats)
def entropy_from_logits(logits: Tensor, chunk_size: int | None = None, *, backend: str = "auto") -> Tensor:
    """Shannon entropy (nats) of ``softmax(logits [..., V])``, ``[...]``, with gradient; one pass, no softmax held.

    Args:
        chunk_size: TRL's rows at a time; accepted, and without effect, for no more than a row is ever held.

    >>> import torch, fastloss
    >>> fastloss.entropy_from_logits(torch.zeros(1, 4))
    tensor([1.3863])
    """
    checks.chunk_size_value(chunk_size)
    out = token_stats(logits, None, outputs=("entropy",), backend=backend).entropy
    assert out is not None
    return out


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: Number = 1.0,
    row_mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(:func:`selective_log_softmax`, entropy of ``softmax(logits / temperature)`` in nats), both ``[...]``, in one pass over the
    logits: TRL's name and meaning. ``entropy_requires_grad=False``: the entropy is detached.

    >>> import torch, fastloss
    >>> logp, entropy = fastloss.selective_log_softmax_and_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> entropy
    tensor([1.3863, 1.3863])
    """
    checks.is_tensor("index", index)
    out = token_stats(
        logits,
        _masked(index, row_mask),
        temperature=temperature,
        ignore_index=_NONE,
        outputs=("logprobs", "entropy"),
        detach=() if entropy_requires_grad else ("entropy",),
        backend=backend,
    )
    assert out.logprobs is not None and out.entropy is not None
    return out.logprobs, out.entropy


def row_options(
    temperature: Number,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    lead: tuple[int, ...] | None = None,
    like: Tensor | None = None,
) -> RowOptions:
    """The checked record of what happens to raw logits: temperature, scale, soft-cap, ignore_index. ``lead``: the shape of the
    tokens that may have a temperature each; ``like``: the logits or hidden states."""
    if isinstance(temperature, Tensor) and lead is not None:
        assert like is not None
        return RowOptions(
            ignore_index=ignore_index,
            scale=checks.number("logit_scale", logit_scale),
            softcap=checks.softcap_value(softcap),
            row_scale=checks.row_scale(temperature, lead, like),
        )
    scale = checks.number("logit_scale", logit_scale) / checks.number(
        "temperature", temperature, low=0.0, open_low=True
    )
    return RowOptions(ignore_index=ignore_index, scale=scale, softcap=checks.softcap_value(softcap))


def _transform(options: RowOptions) -> dict[str, Any]:
    return {
        "scale": options.factor,
        "softcap": options.softcap or None,
        "ignore_index": options.ignore_index,
    }


def _wanted(outputs: tuple[str, ...], target: Tensor | None, support: Any = None) -> tuple[str, ...]:
    if isinstance(outputs, str) or not outputs:
        raise ValueError(f"outputs: expected a tuple of names, got {outputs!r}")
    for name in outputs:
        checks.is_one_of("outputs", name, TokenStats._fields)
        if name == "log_mass" and support is None:
            raise ValueError("support: expected the kept classes for outputs='log_mass', got None")
        if name == ARGMAX and support is not None:
            raise ValueError("support: expected None for outputs='argmax', got a support")
        if target is None and name not in (*STATS_WITHOUT_TARGET, ARGMAX, "log_mass"):
            raise ValueError(f"target: expected a tensor for outputs={name!r}, got None")
    return tuple(dict.fromkeys(outputs))


def _differentiable(want: tuple[str, ...], detach: tuple[str, ...] | None) -> tuple[str, ...]:
    """The wanted statistics that carry a gradient."""
    detach = () if detach is None else detach
    if isinstance(detach, str) or not set(detach) <= set(want):
        raise ValueError(f"detach: expected a tuple of names that are in outputs, got {detach!r}")
    return tuple(name for name in want if name in DIFFERENTIABLE_STATS and name not in detach)


def _cut_off(out: dict[str, Tensor], detach: tuple[str, ...] | None) -> dict[str, Tensor]:
    return {name: x.detach() if name in detach else x for name, x in out.items()} if detach else out


def _shaped(out: dict[str, Tensor], want: tuple[str, ...], lead: torch.Size) -> TokenStats:
    return TokenStats(*(None if s is None else s.reshape(lead) for s in stats_from(out, want)))


def _again(ctx: Any) -> Any:
    _, options, want, inplace, shards, kept = ctx.call
    heads.again_only_whole(shards)
    if inplace:
        raise RuntimeError("inplace: expected False where the gradient is differentiated again, got True")
    logits, target, *_ = ctx.saved_tensors
    out = REFERENCE.row_stats(logits, target, options, want=kept)
    return [out[n] if n in kept else None for n in want], [logits]


def _kept(entropy: Tensor | None) -> Tensor | None:
    """For the backward: the caller may change what is returned in place."""
    return None if entropy is None else entropy.clone()


class TokenStatistics(torch.autograd.Function):
    """(logits, target) -> the wanted statistics; logprobs, entropy and logsumexp carry gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor | None,
        backend: Backend,
        options: RowOptions,
        want: tuple[str, ...],
        inplace: bool,
        shards: Shards | None,
        kept: tuple[str, ...],
    ) -> Any:
        every = heads.with_lse_parts(want)
        if shards is None:
            out = row_statistics(backend, logits.detach(), target, options, every)
        else:
            out = of_columns(shards, logits.detach(), backend).stats(target, options, every)
        ctx.call = backend, options, want, inplace, shards, kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, out[LSE_PARTS], _kept(out.get("entropy")))
        ctx.mark_non_differentiable(*[out[n] for n in want if n not in kept])
        return tuple(out[name] for name in want)

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        backend, options, want, inplace, shards, _ = ctx.call
        logits, target, lse_parts, entropy = ctx.saved_tensors
        none = (None,) * 7
        if all(g is None for g in upstream):
            return (None, *none)
        k = of_upstream(want, upstream, entropy, lse_parts.dtype)
        out = logits.detach() if inplace else new_gradient(logits.shape, logits.dtype, logits.device)
        if shards is None:
            backend.row_grad(logits, target, options, lse_parts=lse_parts, coefficients=k, out=out)
        else:
            of_columns(shards, logits.detach(), backend, out).gradients(target, options, lse_parts, k)
        if inplace:
            torch.autograd.graph.increment_version(logits)
        return (out, *none)
