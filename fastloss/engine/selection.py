"""A few given classes of each row: their logits taken out of the row, and a gradient of its own for each of them.

The row kernel then sees the other classes alone. So their sum keeps its digits however little it is, and a row's gradient is
``b·p_v`` but for what is given. What is computed on ``[rows, K]`` here is PyTorch's, on every backend: K is small beside the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.engine.coefficients import Coefficients
from fastloss.engine.contract import Backend
from fastloss.tables import ACC_DTYPES, LSE_PARTS, Number, RowOptions

# What a row's mark says to the row kernels in place of a target: left out, or (a class that exists) not.
LEFT_OUT, COUNTS = -100, 0


class Selection(NamedTuple):
    """The classes of each row ``[rows, K]``, ascending, the padding (the size of the vocabulary) last."""

    ids: Tensor  # int64
    first: Tensor  # bool: a class, and the first entry that names it
    leader: Tensor  # int64: where the first entry of the same class is
    order: Tensor  # int64: where an entry came from

    def of(self, part: Callable[[Tensor], Tensor | None]) -> Selection:
        return Selection(*(part(x) for x in self))  # type: ignore[arg-type]

    def sorted(self, given: Tensor) -> Tensor:
        """``[rows, K]`` in the order of ``ids``."""
        return given.gather(1, self.order)

    def spread(self, of_classes: Tensor) -> Tensor:
        """What the first entries of the classes have, in the given order."""
        return torch.empty_like(of_classes).scatter_(1, self.order, of_classes.gather(1, self.leader))

    def fold(
        self, x: Tensor, together: Callable[[Tensor, Tensor], Tensor] = torch.add, nothing: float = 0.0
    ) -> Tensor:
        """``x``, sorted, of the entries that name a class together, at the first of them; the others have ``nothing``. The same
        bits in every run: a sum of log2 K steps."""
        step, ids = 1, self.ids
        while step < ids.shape[1]:
            more = torch.where(ids[:, step:] == ids[:, :-step], x[:, step:], nothing)
            x = torch.cat([together(x[:, :-step], more), x[:, -step:]], 1)
            step *= 2
        return torch.where(self.first, x, nothing)


def select(ids: Tensor, vocab: int) -> Selection:
    """Of ``ids [rows, K]``; what is no class is padding."""
    known = torch.where((ids >= 0) & (ids < vocab), ids, vocab)
    return _selection(*known.sort(dim=1, stable=True), vocab)


def _selection(ordered: Tensor, order: Tensor, vocab: int) -> Selection:
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = torch.arange(ordered.shape[1], dtype=torch.int64, device=ordered.device).expand(ordered.shape)
    leader = torch.where(fresh, places, 0).cummax(1).values
    return Selection(ordered, fresh & (ordered < vocab), leader, order)


class Ranked(NamedTuple):
    """The selections of many rows, in little memory."""

    ids: Tensor  # int32, Selection's
    order: Tensor  # int16, Selection's
    vocab: int

    def of(self, rows: slice) -> Selection:
        return _selection(self.ids[rows].long(), self.order[rows].long(), self.vocab)


def rank(ids_of: Callable[[slice], Tensor], rows: int, vocab: int, piece: int) -> Ranked:
    """The selections of ``ids_of(rows) [.., K]``, made ``piece`` rows at a time."""
    first = select(ids_of(slice(0, min(rows, piece))), vocab)
    if rows <= piece:
        return Ranked(first.ids.to(torch.int32), first.order.to(torch.int16), vocab)
    shape, device = (rows, first.ids.shape[1]), first.ids.device
    ids = torch.empty(shape, dtype=torch.int32, device=device)
    order = torch.empty(shape, dtype=torch.int16, device=device)
    for start in range(0, rows, piece):
        own = slice(start, min(rows, start + piece))
        selection = first if start == 0 else select(ids_of(own), vocab)
        ids[own], order[own] = selection.ids, selection.order
    return Ranked(ids, order, vocab)


def marks(ids: Tensor, target: Tensor | None, vocab: int, ignore_index: int) -> Tensor:
    """int64 ``[rows]``, for the row kernels: a row counts, is left out, or is bad (an id, or the target, that is no class)."""
    counts = (ids >= 0).any(1) if target is None else target != ignore_index
    bad = ((ids < -1) | (ids >= vocab)).any(1)
    if target is not None:
        bad = bad | (target < 0) | (target >= vocab)
    if target is None:
        counts = counts | bad
    mark = torch.full(ids.shape[:1], COUNTS, dtype=torch.int64, device=ids.device)
    return mark.masked_fill(bad, vocab).masked_fill(~counts, LEFT_OUT)


class Taken(NamedTuple):
    """Of rows: the selected logits as the loss sees them, acc ``[rows, K]``, and the lse_parts of the others (the second -inf
    where there are none). With ``log_p``, their log-probabilities, the lse_parts are those of all classes."""

    z: Tensor
    rest: Tensor
    log_p: Tensor | None = None


class Outcomes(NamedTuple):
    """Of rows, acc: ``log_p [rows, K]`` of each class at its first entry, -inf elsewhere; ``log_rest [rows]`` of all other classes
    together; ``parts [rows, 2]``, the lse_parts of all; ``largest [rows]`` logit of all."""

    log_p: Tensor
    log_rest: Tensor
    parts: Tensor
    largest: Tensor


def outcomes(taken: Taken, selection: Selection) -> Outcomes:
    """Without ``log_p``."""
    z = torch.where(selection.first, taken.z, -torch.inf)
    rest_max, rest_log = taken.rest[:, 0], taken.rest[:, 1]
    largest = torch.maximum(torch.where(rest_log == -torch.inf, -torch.inf, rest_max), z.amax(1))
    # A row of -inf alone has no distribution: NaN, as PyTorch's softmax.
    below, rest_below = z - largest[:, None], (rest_max - largest) + rest_log
    rest_below = torch.where(rest_log == -torch.inf, rest_log, rest_below)
    log_sum = torch.cat([below, rest_below[:, None]], 1).double().logsumexp(1).to(z.dtype)
    parts = torch.stack([largest, log_sum], 1)
    return Outcomes(below - log_sum[:, None], rest_below - log_sum, parts, largest)


def _of_classes(options: RowOptions) -> Number:
    """The factor of logits, that of each row as ``[rows, 1]``."""
    factor = options.factor
    return factor.unsqueeze(1) if isinstance(factor, Tensor) else factor


def _is_one(factor: Number) -> bool:
    return not isinstance(factor, Tensor) and factor == 1.0


def raw_gradient(z: Tensor, d_z: Tensor, options: RowOptions) -> Tensor:
    """The gradient of raw logits from that of the logits ``z`` that the loss sees."""
    factor = _of_classes(options)
    if options.softcap:
        d_z = d_z * (1 - (z / (factor * options.softcap)) ** 2)
    return d_z if _is_one(factor) else d_z * factor


def gather(
    logits: Tensor, selection: Selection, options: RowOptions, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The selected of ``logits [rows, V]`` as the loss sees them, acc, and their classes (padding: the row's first)."""
    place = _places(selection)
    z = logits.gather(1, place).to(ACC_DTYPES[logits.dtype])
    if bias is not None:
        z = z + bias[place]
    if options.softcap:
        z = options.softcap * (z / options.softcap).tanh()
    factor = _of_classes(options)
    return (z if _is_one(factor) else z * factor), place


def take(
    backend: Backend,
    logits: Tensor,
    mark: Tensor,
    options: RowOptions,
    selection: Selection,
    bias: Tensor | None,
) -> Taken:
    """From ``logits [rows, V]``, where the least finite number stays in their place."""
    z, place = gather(logits, selection, options, bias)
    least = torch.finfo(logits.dtype).min
    _put(logits, place, selection, torch.full_like(z, least))
    parts = backend.row_stats(logits, mark, options, want=(LSE_PARTS,), bias=bias)[LSE_PARTS]
    largest, log_sum = parts[:, 0], parts[:, 1]
    if not options.softcap:
        none = largest <= 0.5 * options.factor * least
    else:
        # Soft-capped, the least number is -softcap: their e^z is known, and no more than that of any other class.
        count = selection.first.sum(1)
        theirs = count * (-options.softcap * options.factor - largest).exp()
        left = (log_sum.double().exp() - theirs).to(log_sum.dtype)
        none, log_sum = (count == logits.shape[1]) | (left <= 0), left.clamp(min=0).log()
    return Taken(z, torch.stack([largest, torch.where(none, -torch.inf, log_sum)], 1))


def write_gradient(
    backend: Backend,
    logits: Tensor,
    mark: Tensor,
    options: RowOptions,
    parts: Tensor,
    b: Tensor,
    selection: Selection,
    given: Tensor,
    out: Tensor,
    bias: Tensor | None,
) -> None:
    """``b·p_v`` through scale and soft-cap to ``out [rows, V]``, which may be ``logits``; and ``given [rows, K]``, of raw logits,
    at the selected classes."""
    backend.row_grad(
        logits,
        mark,
        options,
        lse_parts=parts,
        coefficients=Coefficients(b=b.contiguous()),
        out=out,
        bias=bias,
    )
    _put(out, _places(selection), selection, given)


def _places(selection: Selection) -> Tensor:
    """The classes, in place of padding the row's first; 0 in a row without any."""
    some = torch.where(selection.first[:, :1], selection.ids[:, :1], 0)
    return torch.where(selection.first.gather(1, selection.leader), selection.ids, some)


def _put(out: Tensor, place: Tensor, selection: Selection, values: Tensor) -> None:
    """Entries that share a place write the same value, so that their order does not matter."""
    known = selection.first.gather(1, selection.leader)
    values = values.gather(1, torch.where(known, selection.leader, 0)).to(out.dtype)
    out.scatter_(1, place, torch.where(selection.first[:, :1], values, out.gather(1, place)))
