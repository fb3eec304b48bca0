"""Log-probabilities of a few classes of each row, and the divergence from a teacher that named a few: from logits, and from a head.

A pass takes the selected logits out (engine/selection.py), makes of them and of the sum of the others what a loss needs, ``[rows, K]`` in
float64 by PyTorch, and hands back the gradient of each selected logit and one coefficient ``b`` for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastloss.engine import head as heads
from fastloss.engine.contract import Backend
from fastloss.engine.head import Schedule
from fastloss.engine.head_blocks import BlockPart
from fastloss.engine.head_shards import COPIED, of_columns
from fastloss.engine.head_types import Grads, Head, Limits, Needs
from fastloss.engine.selection import (
    COUNTS,
    LEFT_OUT,
    Outcomes,
    Selection,
    Taken,
    gather,
    marks,
    outcomes,
    rank,
    raw_gradient,
    select,
    take,
    write_gradient,
)
from fastloss.engine.shards import Shards
from fastloss.tables import (
    ACC_DTYPES,
    DISTILLATION_DIVERGENCES,
    LSE_PARTS,
    TAILS,
    Number,
    RowOptions,
    TopKOptions,
)

# Rows whose ``[rows, K]`` PyTorch computes with at a time in blocks of the vocabulary: a dozen tensors of that size, in float64, stay
# small.
PIECE = 64


class Chosen(NamedTuple):
    """Of each row: its mark, its classes, the upstream gradient of their log-probabilities (None: only the values), and what is its
    own of the options (RowOptions.row_scale)."""

    mark: Tensor
    ids: Tensor
    upstream: Tensor | None
    row_scale: Tensor | None = None

    def options(self, options: RowOptions) -> RowOptions:
        """A call's, of these rows."""
        return options.of_rows(lambda _: self.row_scale)  # type: ignore[arg-type, return-value]


class Teacher(NamedTuple):
    """Of each row: its mark, the classes that the teacher named and their log-probabilities, ``[rows, K]``; the hard loss's class
    (None: no hard loss); what the loss's gradient is multiplied by (None: it is not made); and what is its own of the options
    (TopKOptions.row_scale, row_factor)."""

    mark: Tensor
    ids: Tensor
    logprobs: Tensor
    target: Tensor | None
    factors: Tensor | None
    row_scale: Tensor | None = None
    row_factor: Tensor | None = None

    def options(self, o: TopKOptions) -> RowOptions:
        """A call's, of these rows."""
        return o.row_options().of_rows(lambda _: self.row_scale)  # type: ignore[arg-type, return-value]


class Made(NamedTuple):
    """Of rows: ``out [rows, ..]``, and the gradient: ``given [rows, K]`` of the raw selected logits, ``b`` of the others."""

    out: Tensor
    parts: Tensor
    b: Tensor | None = None
    given: Tensor | None = None


def _masked(x: Tensor, mark: Tensor) -> Tensor:
    """0 in a row that is left out, NaN in a bad one."""
    shape = (-1, *(1 for _ in x.shape[1:]))
    bad, out = (mark > COUNTS).view(shape), (mark == LEFT_OUT).view(shape)
    return x.masked_fill(bad, torch.nan).masked_fill(out, 0.0)


_Rows = TypeVar("_Rows", Chosen, Teacher)


# --- log-probabilities ---------------------------------------------------------------------------------------------------


def _logprobs(o: Outcomes, z: Tensor, selection: Selection, own: Chosen, options: RowOptions) -> Made:
    out = selection.spread(o.log_p).masked_fill(own.ids < 0, 0.0)
    out = _masked(out, own.mark)
    if own.upstream is None:
        return Made(out, o.parts)
    c = selection.fold(selection.sorted(own.upstream.masked_fill(own.ids < 0, 0.0)))
    total = c.sum(1)
    given = c - o.log_p.exp() * total[:, None]
    given = _masked(raw_gradient(z, given, own.options(options)), own.mark)
    return Made(out, o.parts, -_masked(total, own.mark), given)


def logprobs_of_logits(
    backend: Backend, logits: Tensor, ids: Tensor, mark: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """``[rows, K]``, and the lse_parts of the rows."""
    selection = select(ids, logits.shape[1])
    z, _ = gather(logits, selection, options, None)
    parts = backend.row_stats(logits, mark, options, want=(LSE_PARTS,))[LSE_PARTS]
    own = Chosen(mark, ids, None, options.row_scale)
    return _of_parts(z, parts, selection, own, options).out, parts


def _of_parts(z: Tensor, parts: Tensor, selection: Selection, own: Chosen, options: RowOptions) -> Made:
    log_p = torch.where(selection.first, (z - parts[:, :1]) - parts[:, 1:], -torch.inf)
    unknown = parts[:, 0]
    return _logprobs(Outcomes(log_p, unknown, parts, unknown), z, selection, own, options)


def logprobs_gradient(
    backend: Backend, logits: Tensor, own: Chosen, parts: Tensor, options: RowOptions, out: Tensor
) -> None:
    """The gradient of :func:`logprobs_of_logits`, to ``out [rows, V]``."""
    selection = select(own.ids, logits.shape[1])
    z, _ = gather(logits, selection, options, None)
    made = _of_parts(z, parts, selection, own, options)
    assert made.b is not None and made.given is not None
    write_gradient(backend, logits, own.mark, options, parts, made.b, selection, made.given, out, None)


def logprobs_of_head(
    head: Head, needs: Needs, own: Chosen, options: RowOptions, schedule: Schedule, keep: Tensor | None
) -> tuple[Tensor, Grads]:
    """``[rows, K]`` of all rows, and the gradients of the products with ``own.upstream``."""

    def function(taken: Taken, selection: Selection, own: Chosen) -> Made:
        if taken.log_p is None:
            made = outcomes(taken, selection)
        else:
            log_p, unknown = torch.where(selection.first, taken.log_p, -torch.inf), taken.rest[:, 0]
            made = Outcomes(log_p, unknown, taken.rest, unknown)
        return _logprobs(made, taken.z, selection, own, options)

    return _run(head, needs, own, options, schedule, keep, lambda own: own.ids, function, logprobs=True)


def _run(
    head: Head,
    needs: Needs,
    rows: _Rows,
    options: RowOptions,
    schedule: Schedule,
    keep: Tensor | None,
    ids_of: Callable[[_Rows], Tensor],
    function: Callable[[Taken, Selection, _Rows], Made],
    logprobs: bool = False,
) -> tuple[Tensor, Grads]:
    """``logprobs``: those of the selected classes are enough, where the schedule has them at no cost."""
    marks_of_kept, outs = heads.pick(rows.mark, keep), []
    with heads.begin(head, needs, keep, schedule) as run:
        for part in run.parts():
            own = _rows_of(part, rows, keep)
            if isinstance(part, BlockPart):
                outs.append(
                    {
                        "out": _of_blocks(
                            part, part.of(marks_of_kept), own, options, ids_of, function, logprobs
                        )
                    }
                )
                continue
            chunk = own(slice(None))
            selection = select(ids_of(chunk), heads.classes_of(head))
            made = function(part.take(chunk.mark, options, selection), selection, chunk)
            if made.b is not None and made.given is not None:
                part.selected_gradients(chunk.mark, options, made.parts, made.b, selection, made.given)
            outs.append({"out": made.out})
        return run.collect(outs)["out"], run.grads()


def _of_blocks(
    part: BlockPart,
    mark: Tensor | None,
    own: Callable[[slice], _Rows],
    options: RowOptions,
    ids_of: Callable[[_Rows], Tensor],
    function: Callable[[Taken, Selection, _Rows], Made],
    logprobs: bool,
) -> Tensor:
    assert mark is not None
    count = mark.shape[0]
    ranked = rank(lambda some: ids_of(own(some)), count, part.head.weight.shape[0], PIECE)
    taken, made = part.take(mark, options, ranked, logprobs), []
    for start in range(0, max(1, count), PIECE):
        some = slice(start, start + PIECE)
        of_some = Taken(*(None if x is None else x[some] for x in taken))  # type: ignore[arg-type]
        here = function(of_some, ranked.of(some), own(some))
        if here.given is not None:
            of_some.z.copy_(here.given)  # which is all that is needed of them from here on
        made.append(here._replace(given=None))
    b = [x.b for x in made if x.b is not None]
    if b:
        parts = torch.cat([x.parts for x in made])
        part.selected_gradients(mark, options, parts, torch.cat(b), ranked, taken.z)
    return torch.cat([x.out for x in made])


def _rows_of(part: Any, rows: _Rows, keep: Tensor | None) -> Callable[[slice], _Rows]:
    """Some of a part's rows, by their places in it, out of all: no copy of all that are kept is made."""
    place = part.of(keep)

    def of(some: slice) -> _Rows:
        def pick(x: Tensor) -> Tensor | None:
            if place is not None:
                return x.index_select(0, place[some])
            own = part.of(x)
            return None if own is None else own[some]

        return _each(rows, pick)

    return of


def _each(rows: _Rows, f: Callable[[Tensor], Tensor | None]) -> _Rows:
    return type(rows)(*(None if x is None else f(x) for x in rows))  # type: ignore[arg-type]


def schedule_of(head: Head, rows: int, needs: Needs, limits: Limits) -> Schedule:
    """The schedule of a pass that selects classes: chunks of rows where the vocabulary is cut over processes, and on a GPU."""
    if head.shards is not None or not heads.goes_by_vocabulary(head):
        return heads.chunked(head, rows, needs, limits)
    return heads.schedule_of_one_pass(head, rows, needs, limits)


def details(
    head: Head, rows: int, needs: Needs, again: bool, schedule: Schedule, width: int, want: str
) -> dict[str, Any]:
    """What ``explain`` tells of a pass that selects ``width`` classes of each row; ``want``: what is PyTorch's. ``again``: the
    backward is another pass."""
    told = schedule.details(head, rows, needs, again)
    if head.shards is not None:
        hidden = head.hidden if needs.hidden else None
        told.update(sent(head.shards, rows, width, ACC_DTYPES[head.dtype], 1 + again, hidden))
    return {**told, want: "PyTorch's operations on [rows, K] beside the head"}


def sent(
    shards: Shards, rows: int, width: int, acc: torch.dtype, passes: int = 1, hidden: Tensor | None = None
) -> dict[str, Any]:
    """The bytes of it that ``explain`` tells: each pass gathers 2 numbers a token and sums ``width``."""
    numbers = passes * rows * acc.itemsize
    return shards.told(2 * numbers, width * numbers, hidden)


# --- columns of given logits, of a vocabulary that is cut ---------------------------------------------------------------


def taken_of_columns(
    shards: Shards, backend: Backend, logits: Tensor, mark: Tensor, ids: Tensor, options: RowOptions
) -> Taken:
    """What the processes exchange of their columns ``logits [rows, V_r]``; a backward needs no more."""
    return of_columns(shards, logits, backend).take(mark, options, select(ids, shards.vocab))


def logprobs_of_columns(
    shards: Shards,
    backend: Backend,
    logits: Tensor,
    taken: Taken,
    own: Chosen,
    options: RowOptions,
    out: Tensor | None = None,
) -> Tensor:
    """``[rows, K]``, and the gradient of the products with ``own.upstream`` to ``out``."""
    selection = select(own.ids, shards.vocab)
    made = _logprobs(outcomes(taken, selection), taken.z, selection, own, options)
    return _finish(shards, backend, logits, own.mark, options, selection, made, out)


def rows_of_columns(
    shards: Shards,
    backend: Backend,
    logits: Tensor,
    taken: Taken,
    teacher: Teacher,
    o: TopKOptions,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`rows_of_logits` of this process's columns."""
    selection = select(selected_by(teacher), shards.vocab)
    made = _divergence(taken, selection, teacher, o)
    return _finish(shards, backend, logits, teacher.mark, o.row_options(), selection, made, out)


def _finish(
    shards: Shards,
    backend: Backend,
    logits: Tensor,
    mark: Tensor,
    options: RowOptions,
    selection: Selection,
    made: Made,
    out: Tensor | None,
) -> Tensor:
    if out is not None:
        assert made.b is not None and made.given is not None
        part = of_columns(shards, logits, backend, out)
        part.selected_gradients(mark, options, made.parts, made.b, selection, made.given)
    return made.out


# --- a teacher of K classes ----------------------------------------------------------------------------------------------


def teacher_of(
    ids: Tensor,
    logprobs: Tensor,
    target: Tensor | None,
    factors: Tensor | None,
    vocab: int,
    o: TopKOptions,
    acc: torch.dtype,
) -> Teacher:
    mark = marks(ids, target, vocab, o.ignore_index)
    return Teacher(
        mark, ids.contiguous(), logprobs.to(acc).contiguous(), target if o.hard_loss_coef else None, factors,
        o.row_scale, o.row_factor,
    )  # fmt: skip


def selected_by(own: Teacher) -> Tensor:
    """The teacher's classes, and the hard loss's after them."""
    if own.target is None:
        return own.ids
    return torch.cat([own.ids, own.target.masked_fill(own.mark != COUNTS, -1)[:, None]], 1)


def rows_of_head(
    head: Head, needs: Needs, teacher: Teacher, o: TopKOptions, schedule: Schedule, keep: Tensor | None
) -> tuple[Tensor, Grads]:
    """The sums ``[rows, 7]`` (fastloss.tables.TOPK_SUMS), and the gradients of Σ factors · loss."""
    options = o.row_options()

    def function(taken: Taken, selection: Selection, own: Teacher) -> Made:
        return _divergence(taken, selection, own, o)

    return _run(head, needs, teacher, options, schedule, keep, selected_by, function)


def rows_of_logits(
    backend: Backend, logits: Tensor, teacher: Teacher, o: TopKOptions, out: Tensor | None = None
) -> Tensor:
    """The sums of ``logits [rows, V]``, and the gradient of Σ factors · loss to ``out``. The logits are copied a few rows at a time."""
    sums = []
    for start in range(0, max(1, logits.shape[0]), COPIED):
        own = Teacher(*(None if x is None else x[start : start + COPIED] for x in teacher))  # type: ignore[arg-type]
        options = own.options(o)
        selection = select(selected_by(own), logits.shape[1])
        z = logits[start : start + COPIED].clone(memory_format=torch.contiguous_format)
        made = _divergence(take(backend, z, own.mark, options, selection, None), selection, own, o)
        if out is not None:
            assert made.b is not None and made.given is not None
            write_gradient(
                backend, z, own.mark, options, made.parts, made.b, selection, made.given,
                out[start : start + COPIED], None,
            )  # fmt: skip
        sums.append(made.out)
    return torch.cat(sums)


def _divergence(taken: Taken, selection: Selection, own: Teacher, o: TopKOptions) -> Made:
    """Row by row, with the gradient times ``own.factors``."""
    acc, tail = taken.z.dtype, TAILS[o.tail]
    made = outcomes(taken, selection)
    log_all, log_rest = made.log_p.double(), made.log_rest.double()
    named = own.ids >= 0
    log_p = torch.where(named, own.logprobs.double(), -torch.inf)
    if own.target is not None:
        log_p = torch.nn.functional.pad(log_p, (0, 1), value=-torch.inf)
        named = torch.nn.functional.pad(named, (0, 1))
    log_p = selection.fold(selection.sorted(log_p), torch.logaddexp, -torch.inf)
    named = selection.fold(selection.sorted(named.double()), torch.maximum) > 0
    log_q = torch.where(named, log_all, -torch.inf)
    if own.target is not None:  # a class of the hard loss alone is one of the others
        log_rest = torch.logaddexp(log_rest, torch.where(named, -torch.inf, log_all).amax(1))
    q_all = log_all.exp()
    teacher_mass, mass = log_p.exp().sum(1), log_q.exp().sum(1)
    best = torch.where(named, log_p, -torch.inf).argmax(1, keepdim=True)
    agreement = named.any(1) & (taken.z.gather(1, best).squeeze(1) >= made.largest)

    if tail == "renormalize":
        log_p, log_q = (x - _finite(x.logsumexp(1, keepdim=True)) for x in (log_p, log_q))
    if tail == "bin":
        rest = (1 - teacher_mass).clamp(min=0)
        # The rounding of log-probabilities that cover the vocabulary is no mass that the student could miss.
        rest = torch.where((log_rest == -torch.inf) & (rest <= 1e-4), 0.0, rest)
        rest = torch.where(named.any(1), rest, log_rest.exp())
        log_p, log_q = torch.cat([log_p, rest.log()[:, None]], 1), torch.cat([log_q, log_rest[:, None]], 1)
    p, q = log_p.exp(), log_q.exp()

    def sums(name: str) -> tuple[Tensor, Tensor]:
        return divergence_terms(name, p, q, o.interpolation, tail != "none")

    f, h = sums(DISTILLATION_DIVERGENCES[o.divergence])
    kl, reverse_kl = sums("forward_kl")[0].sum(1), sums("reverse_kl")[0].sum(1)
    factor: Number = o.factor
    if own.row_factor is not None:
        factor = own.row_factor.double() * o.factor
    loss, slope = f.sum(1) * factor, h.sum(1)
    hard, label = torch.zeros_like(loss), None
    if own.target is not None:
        last = (selection.order == own.ids.shape[1]).int().argmax(1, keepdim=True)
        label = selection.leader.gather(1, last)
        hard = -log_all.gather(1, label).squeeze(1)
        hard = torch.where(selection.first.gather(1, label).squeeze(1), hard, 0.0)
        loss = loss + o.hard_loss_coef * hard
    columns = (loss, kl, reverse_kl, agreement.to(loss), mass, teacher_mass, hard)
    out = _masked(torch.stack(columns, 1), own.mark).to(acc)
    if own.factors is None:
        return Made(out, made.parts)

    k = q.shape[1] - (tail == "bin")
    given = h[:, :k] - q[:, :k] * slope[:, None]
    b = torch.zeros_like(slope) if tail == "renormalize" else -slope
    if tail == "bin":
        ratio = torch.where(q[:, -1] > 0, h[:, -1] / q[:, -1], 0.0)
        b = b + ratio.clamp(-1e30, 1e30)
    given, b = torch.where(named, given, b[:, None] * q_all), b * factor
    given = given * (factor[:, None] if isinstance(factor, Tensor) else factor)
    if label is not None:
        own_class = torch.zeros_like(q_all).scatter_(1, label, 1.0)
        given, b = given + o.hard_loss_coef * (q_all - own_class), b + o.hard_loss_coef
    factors = own.factors.double()
    given = raw_gradient(taken.z, (given * factors[:, None]).to(acc), own.options(o))
    given = given.masked_fill(~selection.first, 0.0)
    return Made(out, made.parts, _masked(b * factors, own.mark).to(acc), _masked(given, own.mark))


def _finite(log_mass: Tensor) -> Tensor:
    return torch.where(log_mass == -torch.inf, 0.0, log_mass)


def divergence_terms(name: str, p: Tensor, q: Tensor, w: float, complete: bool) -> tuple[Tensor, Tensor]:
    """Each outcome's f(p, q) and q ∂f/∂q, float64. ``complete``: the outcomes are all, so that what is 0 in their sum may be added:
    each term is then 0 with slope 0 at p = q."""

    def x_log(x: Tensor, y: Tensor) -> Tensor:
        """x log(x / y), 0 at x = 0."""
        return torch.xlogy(x, torch.where(x > 0, x / y, 1.0))

    def quotient(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(x > 0, x / y, 0.0)

    added = (q - p) if complete else torch.zeros_like(p)
    slope_added = q if complete else torch.zeros_like(p)
    if name == "forward_kl":
        f, h = x_log(p, q) + added, slope_added - p
        h = torch.where(q > 0, h, 0.0)  # where the loss is infinite, its gradient has no value
    elif name == "reverse_kl":
        f, h = x_log(q, p) - added, x_log(q, p) + q - slope_added
        h = torch.where(p > 0, h, 0.0)
    elif name == "tvd":
        f, h = (p - q).abs() / 2, (q - p).sign() * q / 2
    elif name == "jsd":
        m = w * p + (1 - w) * q
        h = (1 - w) * x_log(q, m)
        f = w * x_log(p, m) + h
    elif name == "skewed_forward_kl":
        m = w * p + (1 - w) * q
        f = x_log(p, m) + (1 - w) * added
        h = (1 - w) * (slope_added - q * quotient(p, m))
    elif name == "skewed_reverse_kl":
        m = (1 - w) * p + w * q
        f = x_log(q, m) - (1 - w) * added
        h = x_log(q, m) + q - w * q * quotient(q, m) - (1 - w) * slope_added
    elif name == "alpha":
        mixed = p**w * q ** (1 - w)
        f, h = (w * p + (1 - w) * q - mixed) / (w * (1 - w)), (q - mixed) / w
    else:
        raise ValueError(f"divergence: no formula for {name!r}")
    return f, h
