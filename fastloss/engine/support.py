"""The classes that a sampler kept, of each row: statistics of the distribution over these alone, and their gradients.

A row's set becomes a row of logits ``[rows, K]``, which the row kernels take as any other, with -inf for what is padding or stands
there twice. Sets of about one size go together, so that little is padding. From a head those logits are dot products with the named
rows of the weight (``gathered_dots`` and ``gathered_sums`` of a backend): K·D multiplications a row in place of V·D.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks, devices
from fastloss.engine import head as heads
from fastloss.engine.autograd import differentiable_again, new_gradient
from fastloss.engine.checks import ShapeError
from fastloss.engine.coefficients import Coefficients, of_upstream
from fastloss.engine.contract import Backend
from fastloss.engine.gather import segments_of
from fastloss.engine.head_types import Grads, Needs
from fastloss.engine.sequences import Sequences, packed_layout
from fastloss.engine.shards import Shards, exchange, needed, without_share
from fastloss.tables import ACC_DTYPES, LSE_PARTS, RowOptions

# A row's target as the row kernels see it, where it is no place in the row's set: left out, or bad.
LEFT_OUT, ABSENT = -100, 1 << 40
# Sets are padded to these widths, then to four times the last; a set is padded to at most 16 or four times its size.
FIRST_WIDTH, GROWTH = 16, 4
_PLAIN = RowOptions(LEFT_OUT)


class Sets(NamedTuple):
    """The sets of ``rows`` rows, one after the other. An id of -1 is padding; one that is named twice counts once."""

    ids: Tensor  # int64 [entries]
    offsets: Tensor | None  # int64 [rows + 1]; None: all have one size
    rows: int

    def bounds(self) -> Tensor:
        """int64 ``[rows + 1]``."""
        if self.offsets is not None:
            return self.offsets
        width = self.ids.shape[0] // max(1, self.rows)
        return torch.arange(self.rows + 1, dtype=torch.int64, device=self.ids.device) * width


def sets_of(support: Any, lead: torch.Size, device: torch.device) -> Sets:
    """The checked argument ``support`` of a function of positions ``lead``: (token_ids, offsets), or ids ``[*lead, K]``."""
    rows = lead.numel()
    if isinstance(support, Tensor):
        if not _is_index(support) or support.shape[:-1] != lead or support.device != device:
            raise ShapeError(
                f"support: expected int64 or int32 of shape {[*lead, 'K']} on {device}, got {support.dtype} of shape "
                f"{list(support.shape)} on {support.device}"
            )
        return Sets(support.reshape(-1).to(torch.int64).contiguous(), None, rows)
    if not isinstance(support, (tuple, list)) or len(support) != 2:
        raise TypeError(
            f"support: expected (token_ids, offsets), or padded token ids {[*lead, 'K']}, got {type(support).__name__}"
        )
    ids, offsets = support
    for name, x in (("token_ids", ids), ("offsets", offsets)):
        if not isinstance(x, Tensor) or not _is_index(x) or x.dim() != 1 or x.device != device:
            got = (
                f"{x.dtype} of shape {list(x.shape)} on {x.device}"
                if isinstance(x, Tensor)
                else type(x).__name__
            )
            raise ShapeError(
                f"support: expected {name} in int64 or int32, one-dimensional, on {device}, got {got}"
            )
    if offsets.shape[0] != rows + 1:
        raise ShapeError(f"support: expected {rows + 1} offsets for {rows} positions, got {offsets.shape[0]}")
    layout = packed_layout("support", offsets, ids.shape[0], device)
    return Sets(ids.to(torch.int64).contiguous(), layout.offsets, rows)


def _is_index(x: Tensor) -> bool:
    return x.dtype in (torch.int64, torch.int32)


class Group(NamedTuple):
    """Rows whose sets have about one size: the rows, and where their entries are, ``[rows, width]`` (past the end: padding). None: all
    rows, in order, with no padding."""

    rows: Tensor | None
    place: Tensor | None
    width: int


class Layout(NamedTuple):
    """What a pass needs to know of the sets, made once."""

    offsets: Tensor  # int64 [rows + 1]
    row: Tensor  # int64 [entries]
    classes: Tensor  # int64 [entries]: the class; -1 where an entry does not count
    order: Tensor | None  # int64 [entries]: the entries by their class, where it is known
    known: Tensor  # int64 [entries]: the class, V where it is none
    place: Tensor | None  # int64 [rows]: of the target in its set, LEFT_OUT or ABSENT
    bad: Tensor  # bool [rows]: an id that is no class, or a target that is not in its set
    groups: list[Group]


def lay_out(sets: Sets, target: Tensor | None, vocab: int, ignore_index: int) -> Layout:
    """Of the sets and the targets ``[rows]``. No host waits for a GPU, but for the sizes of ragged sets."""
    ids, offsets, device = sets.ids, sets.bounds(), sets.ids.device
    row = segments_of(offsets, ids.shape[0])
    known = torch.where((ids >= 0) & (ids < vocab), ids, vocab)
    counts, order = known < vocab, None
    if not _rises(ids, row):
        # By class, and within a class by row: an entry that follows its own double is the second.
        by_class, order = known.sort(stable=True)
        own_row = row[order]
        first = torch.ones_like(by_class, dtype=torch.bool)
        first[1:] = (by_class[1:] != by_class[:-1]) | (own_row[1:] != own_row[:-1])
        counts = counts & torch.empty_like(first).scatter_(0, order, first)
    wrong = (ids < -1) | (ids >= vocab)
    place = None
    if target is not None:
        left_out = target == ignore_index
        counts = counts & ~left_out[row]
        here = counts & (ids == target[row])
        entry = torch.arange(ids.shape[0], dtype=torch.int64, device=device) - offsets[row]
        place = torch.full((sets.rows,), -1, dtype=torch.int64, device=device)
        place = place.scatter_reduce(0, row, torch.where(here, entry, -1), "amax")
        wrong = wrong & ~left_out[row]
    bad = torch.zeros(sets.rows, dtype=torch.int64, device=device)
    bad = bad.scatter_reduce(0, row, wrong.to(torch.int64), "amax") > 0
    if place is not None:
        bad = (bad | (place < 0)) & ~left_out
        place = place.masked_fill(bad, ABSENT).masked_fill(left_out, LEFT_OUT)
    return Layout(offsets, row, torch.where(counts, ids, -1), order, known, place, bad, _groups(sets))


def _rises(ids: Tensor, row: Tensor) -> bool:
    """Whether the ids of each row rise, as engines hand them out: then none is there twice. On a GPU nobody asks."""
    return checks.host_reads(ids) and bool(((ids[1:] > ids[:-1]) | (row[1:] != row[:-1])).all())


def _groups(sets: Sets) -> list[Group]:
    entries, rows, device = sets.ids.shape[0], sets.rows, sets.ids.device
    if not rows:
        return []
    if sets.offsets is None:
        return [Group(None, None, entries // rows)]
    if not devices.may_wait(device):
        raise RuntimeError(
            "support: the sizes of ragged sets are read by the host, which cannot be while a CUDA graph is captured; give ids padded "
            "with -1 to one size, [..., K]"
        )
    sizes = sets.offsets.diff().cpu()
    smallest, largest = (int(x) for x in sizes.aminmax())
    if smallest == largest:
        return [Group(None, None, largest)]
    groups, low, width = [], -1, FIRST_WIDTH
    while low < largest:
        own = ((sizes > low) & (sizes <= width)).nonzero().view(-1)
        if own.numel():
            at = own.to(device)
            widest = max(1, int(sizes[own].max()))
            column = torch.arange(widest, dtype=torch.int64, device=device)
            place = sets.offsets[at][:, None] + column
            place = torch.where(place < sets.offsets[at + 1][:, None], place, entries)
            groups.append(Group(at, place, widest))
        low, width = width, width * GROWTH
    return groups


def first_bad(layout: Layout, target: Tensor | None, lead: torch.Size, vocab: int) -> IndexError | None:
    """What is wrong with the first bad row. The host reads the tensors."""
    if not bool(layout.bad.any()):
        return None
    row = int(layout.bad.nonzero()[0])
    position: list[int] = []
    left = row
    for size in reversed(lead):
        position.insert(0, left % size)
        left //= size
    where = f" at position {position}" if position else ""
    start, end = (int(layout.offsets[row + i]) for i in (0, 1))
    own = layout.known[start:end]
    if target is not None and not (0 <= int(target[row]) < vocab):
        return IndexError(
            f"Target {int(target[row])} is out of bounds{where}: expected a class in [0, {vocab})"
        )
    if target is not None and not bool((own == int(target[row])).any()):
        return IndexError(
            f"support: expected the target {int(target[row])}{where} among the {end - start} classes that were kept there"
        )
    return IndexError(f"support: expected classes in [0, {vocab}), or -1 for padding, got another id{where}")


# --- statistics and gradients of the kept logits ------------------------------------------------------------------------------


def _rows_of(z: Tensor, group: Group, rows: int, padding: float = -torch.inf) -> Tensor:
    """The entries of a group ``[rows, width]``."""
    if group.place is None:
        if group.width:
            return z.view(rows, group.width)
        return torch.full((rows, 1), padding, dtype=z.dtype, device=z.device)
    return torch.nn.functional.pad(z, (0, 1), value=padding)[group.place]


def _of_group(x: Tensor | None, group: Group) -> Tensor | None:
    return x if x is None or group.rows is None else x.index_select(0, group.rows)


def stats_of(backend: Backend, z: Tensor, layout: Layout, want: tuple[str, ...]) -> dict[str, Tensor]:
    """The statistics ``want`` of the kept logits ``z`` as the loss sees them (-inf where an entry does not count); NaN in a bad
    row."""
    rows = layout.bad.shape[0]
    asked = tuple(name for name in want if name != "mean_logits")
    out: dict[str, Tensor] = {}
    for group in layout.groups:
        own, place = _rows_of(z, group, rows), _of_group(layout.place, group)
        made = backend.row_stats(own, place, _PLAIN, want=asked)
        if "mean_logits" in want:
            inside = _rows_of((layout.classes >= 0).to(z.dtype), group, rows, 0.0)
            made["mean_logits"] = torch.where(inside > 0, own, 0.0).sum(1) / inside.sum(1)
            if place is not None:
                made["mean_logits"] = made["mean_logits"].masked_fill(place == LEFT_OUT, 0.0)
        for name, x in made.items():
            if group.rows is None:
                out[name] = x
                continue
            if name not in out:
                out[name] = x.new_zeros((rows, *x.shape[1:]))
            out[name].index_copy_(0, group.rows, x)
    if not layout.groups:
        for name in want:
            kind = torch.uint8 if name == "is_top1" else z.dtype
            out[name] = torch.zeros((0, 2) if name == LSE_PARTS else (0,), dtype=kind, device=z.device)
    for name, x in out.items():
        if x.is_floating_point():
            out[name] = x.masked_fill(layout.bad.view(-1, *[1] * (x.dim() - 1)), torch.nan)
    return out


def gradient_of(
    backend: Backend,
    z: Tensor,
    layout: Layout,
    options: RowOptions,
    lse_parts: Tensor,
    k: Coefficients,
) -> Tensor:
    """The gradient of the raw kept logits, acc ``[entries]``; 0 where an entry does not count."""
    rows, entries = layout.bad.shape[0], z.shape[0]
    out = torch.zeros(entries + 1, dtype=z.dtype, device=z.device)  # the last is padding's
    for group in layout.groups:
        own = _rows_of(z, group, rows)
        made = torch.empty_like(own, memory_format=torch.contiguous_format)
        backend.row_grad(
            own,
            _of_group(layout.place, group),
            _PLAIN,
            lse_parts=_of_group(lse_parts, group),  # type: ignore[arg-type]
            coefficients=Coefficients(*(_of_group(x, group) for x in k)),
            out=made,
        )
        if group.place is not None:
            out.scatter_(0, group.place.view(-1), made.view(-1))
        elif group.width:
            out[:entries] = made.view(-1)
    factor = _factor(layout, options)
    d_z = out[:entries] * factor
    if options.softcap:
        d_z = d_z * (1 - (z / (factor * options.softcap)) ** 2)
    return torch.where(layout.classes >= 0, d_z, 0.0)


def _factor(layout: Layout, options: RowOptions) -> float | Tensor:
    """What the entries' logits are multiplied by."""
    factor = options.factor
    return factor[layout.row] if isinstance(factor, Tensor) else factor


def _seen(z: Tensor, layout: Layout, options: RowOptions) -> Tensor:
    """Kept logits as the loss sees them, and -inf where an entry does not count: the row kernels, which would soft-cap that too,
    get them so."""
    if options.softcap:
        z = options.softcap * (z / options.softcap).tanh()
    return (z * _factor(layout, options)).masked_fill(layout.classes < 0, -torch.inf)


# --- from logits ---------------------------------------------------------------------------------------------------------


def kept_of_logits(logits: Tensor, layout: Layout, options: RowOptions) -> Tensor:
    """The kept of ``logits [rows, V]``, acc ``[entries]``."""
    place = layout.row * logits.shape[1] + layout.classes.clamp(min=0)
    if not logits.shape[1]:
        z = torch.zeros(place.shape, dtype=logits.dtype, device=logits.device)
    elif logits.is_contiguous():
        z = logits.view(-1).index_select(0, place)
    else:
        z = logits[layout.row, layout.classes.clamp(min=0)]
    return _seen(z.to(ACC_DTYPES[logits.dtype]), layout, options)


def spread(d_z: Tensor, layout: Layout, out: Tensor) -> None:
    """``d_z`` to ``out [rows, V]``, contiguous, 0 elsewhere. An entry that does not count adds 0: no order matters."""
    if not out.shape[1]:
        return
    place = layout.row * out.shape[1] + layout.classes.clamp(min=0)
    out.zero_().view(-1).scatter_add_(0, place, d_z.to(out.dtype))
    out.masked_fill_(layout.bad[:, None], torch.nan)


# --- a vocabulary that is cut --------------------------------------------------------------------------------------------


def of_shard(layout: Layout, target: Tensor | None, shards: Shards) -> Layout:
    """The entries whose classes this process has; of a target that another one has the place does not matter."""
    classes = shards.local_ids(layout.classes)
    place = layout.place
    if place is not None and target is not None:
        place = torch.where((place >= 0) & (place < ABSENT) & ~shards.has(target), 0, place)
    known = classes.masked_fill(classes < 0, shards.own)
    return layout._replace(classes=classes, order=None, known=known, place=place)


def _kept_of_each(layout: Layout, shards: Shards) -> Tensor:
    """How many classes of each row's set each process has, int64 ``[processes, rows]``."""
    rows, device = layout.bad.shape[0], layout.bad.device
    out = torch.zeros(shards.world * rows, dtype=torch.int64, device=device)
    place = shards.owner(layout.classes.clamp(min=0)) * rows + layout.row
    return out.scatter_add_(0, place, (layout.classes >= 0).to(torch.int64)).view(shards.world, rows)


def _whole_stats(run: SupportRun, z: Tensor, target: Tensor | None) -> dict[str, Tensor]:
    """The statistics of whole sets, from this process's kept logits ``z`` and those of the others."""
    want = heads.with_lse_parts(run.want)
    shards = run.shards
    if shards is None:
        return stats_of(run.backend, z, run.layout, want)
    layout = of_shard(run.layout, target, shards)
    own = stats_of(run.backend, z, layout, needed(want))
    own[LSE_PARTS] = without_share(own[LSE_PARTS], lambda: _masked(z, layout) & ~layout.bad)
    sizes = _kept_of_each(run.layout, shards) if "mean_logits" in want else None
    whole = exchange(shards, own, target, run.options.ignore_index, sizes=sizes)
    return {name: whole[name] for name in want}


def _masked(z: Tensor, layout: Layout) -> Tensor:
    """Whether a row has no logit but -inf, bool ``[rows]``."""
    there = torch.zeros(layout.bad.shape, dtype=torch.int64, device=z.device)
    return there.scatter_reduce(0, layout.row, (z != -torch.inf).to(torch.int64), "amax") == 0


class SupportRun(NamedTuple):
    """What forward and backward need beside the tensors."""

    backend: Backend
    options: RowOptions
    want: tuple[str, ...]
    sets: Sets
    layout: Layout
    kept: tuple[str, ...]  # the statistics that carry a gradient
    dtype: torch.dtype
    needs: Needs
    inplace: bool = False
    shards: Shards | None = None  # ``layout`` has the classes of all

    def own_layout(self, target: Tensor | None) -> Layout:
        """That of this process's columns."""
        return self.layout if self.shards is None else of_shard(self.layout, target, self.shards)


def _defined(logits: Tensor, target: Tensor | None, run: SupportRun) -> list[Tensor | None]:
    o = run.options
    out = reference.token_stats(
        logits,
        target,
        scale=o.factor,
        softcap=o.softcap or None,
        ignore_index=o.ignore_index,
        support=(run.sets.ids, run.sets.bounds()),
    )
    return [out[name] if name in run.kept else None for name in run.want]


def _logits_again(ctx: Any) -> Any:
    run: SupportRun = ctx.run
    heads.again_only_whole(run.shards)
    if run.inplace:
        raise RuntimeError("inplace: expected False where the gradient is differentiated again, got True")
    logits, target, *_ = ctx.saved_tensors
    return _defined(logits, target, run), [logits]


class SupportStatistics(torch.autograd.Function):
    """(logits ``[rows, V]``, target) -> the wanted statistics over the kept classes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor | None, run: SupportRun) -> Any:
        z = kept_of_logits(logits.detach(), run.own_layout(target), run.options)
        out = _whole_stats(run, z, target)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, z, out[LSE_PARTS], _own(out.get("entropy")))
        ctx.mark_non_differentiable(*[out[n] for n in run.want if n not in run.kept])
        return tuple(out[name] for name in run.want)

    @staticmethod
    @differentiable_again(_logits_again)
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        run: SupportRun = ctx.run
        logits, target, z, lse_parts, entropy = ctx.saved_tensors
        if all(g is None for g in upstream):
            return None, None, None
        layout = run.own_layout(target)
        k = _of_own_targets(run, target, of_upstream(run.want, upstream, entropy, lse_parts.dtype))
        d_z = gradient_of(run.backend, z, layout, run.options, lse_parts, k)
        out = logits.detach() if run.inplace else new_gradient(logits.shape, logits.dtype, logits.device)
        if out.is_contiguous():
            spread(d_z, layout, out)
        else:
            dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            spread(d_z, layout, dense)
            out.copy_(dense)
        if run.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, None, None


def _of_own_targets(run: SupportRun, target: Tensor | None, k: Coefficients) -> Coefficients:
    """The log-prob's own class is another process's, where that has it."""
    if run.shards is None or target is None or k.a is None:
        return k
    return k._replace(a=torch.where(run.shards.has(target), k.a, 0.0))


def _own(entropy: Tensor | None) -> Tensor | None:
    """For the backward: the caller may change what is returned in place."""
    return None if entropy is None else entropy.clone()


# --- from a head ---------------------------------------------------------------------------------------------------------


def kept_of_head(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    options: RowOptions,
    dtype: torch.dtype,
) -> Tensor:
    """The kept of ``hidden @ weight.T + bias``, acc ``[entries]``, never rounded to the operands' dtype."""
    x, m = _operand(hidden, dtype), _operand(weight, dtype)
    if not m.shape[0]:  # a shard without classes
        return torch.full(layout.classes.shape, -torch.inf, dtype=ACC_DTYPES[dtype], device=m.device)
    z = backend.gathered_dots(x, m, layout.classes, layout.offsets)
    if bias is not None:
        z = z + bias.detach().to(z.dtype)[layout.classes.clamp(min=0)]
    return _seen(z, layout, options)


def gradients_of_head(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d_z: Tensor,
    layout: Layout,
    dtype: torch.dtype,
    needs: Needs,
) -> Grads:
    """Of the raw kept logits' gradient, in the operands' dtype."""
    d_hidden = d_weight = d_bias = None
    if not weight.shape[0]:
        acc = ACC_DTYPES[dtype]
        return Grads(
            torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs.hidden else None,
            torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs.weight else None,
            torch.zeros(0, dtype=acc, device=weight.device) if needs.bias else None,
        )
    if needs.hidden:
        d_hidden = new_gradient(hidden.shape, dtype, hidden.device)
        backend.gathered_sums(_operand(weight, dtype), layout.classes, d_z, layout.offsets, d_hidden)
        if not backend.host_reads:
            d_hidden.masked_fill_(layout.bad[:, None], torch.nan)
    if needs.weight or needs.bias:
        vocab = weight.shape[0]
        per_class = torch.zeros(vocab + 2, dtype=torch.int64, device=weight.device)
        per_class.scatter_add_(0, layout.known + 1, torch.ones_like(layout.known))
        bounds = per_class.cumsum(0)[: vocab + 1].contiguous()
        order = layout.known.sort(stable=True).indices if layout.order is None else layout.order
        by_class = d_z[order]
        if needs.weight:
            d_weight = new_gradient(weight.shape, dtype, weight.device)
            rows = layout.row[order]
            backend.gathered_sums(_operand(hidden, dtype), rows, by_class, bounds, d_weight)
        if needs.bias:
            packed = Sequences(bounds, 0, vocab, by_class.shape[0], weight.device)
            d_bias = backend.segment_sum(by_class, None, packed)
    return Grads(d_hidden, d_weight, d_bias)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.detach().to(dtype)
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _head_again(ctx: Any) -> Any:
    run: SupportRun = ctx.run
    heads.again_only_whole(run.shards)
    hidden, weight, bias, target, *_ = ctx.saved_tensors
    logits = heads.defined_logits(hidden, weight, bias, run.dtype, float_logits=True)
    return _defined(logits, target, run), [hidden, weight, bias]


class LinearSupportStatistics(torch.autograd.Function):
    """(hidden, weight, bias, target) -> the wanted statistics over the kept classes."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None, run: SupportRun
    ) -> Any:
        layout = run.own_layout(target)
        z = kept_of_head(run.backend, hidden, weight, bias, layout, run.options, run.dtype)
        out = _whole_stats(run, z, target)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target, z, out[LSE_PARTS], _own(out.get("entropy")))
        ctx.mark_non_differentiable(*[out[n] for n in run.want if n not in run.kept])
        return tuple(out[name] for name in run.want)

    @staticmethod
    @differentiable_again(_head_again)
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        run: SupportRun = ctx.run
        hidden, weight, bias, target, z, lse_parts, entropy = ctx.saved_tensors
        if all(g is None for g in upstream):
            return None, None, None, None, None
        layout = run.own_layout(target)
        k = _of_own_targets(run, target, of_upstream(run.want, upstream, entropy, lse_parts.dtype))
        d_z = gradient_of(run.backend, z, layout, run.options, lse_parts, k)
        grads = gradients_of_head(run.backend, hidden, weight, bias, d_z, layout, run.dtype, run.needs)
        if run.shards is not None and run.shards.reduce_hidden and grads.hidden is not None:
            grads = grads._replace(hidden=run.shards.add_up(grads.hidden.to(hidden.dtype)))
        return (*heads.finish(grads, heads.leaf_dtypes(hidden, weight, bias), run.backend), None, None)
