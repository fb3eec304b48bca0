"""The loops of a GPU kernel's machine code: loads in flight and issue slots per element, counted, not measured.

kernel_report_sass.py (NVIDIA) and kernel_report_amdgcn.py (AMD) make instructions of a program's text. Here is what is
counted from them, the same for both:

- A **loop** is a natural one: all blocks from which a backward branch to a block that dominates them can be reached. Only those
  without a loop inside are looked at, and only those that load from global or shared memory. An indirect jump (a switch) leads to the
  blocks behind it, up to the next such jump, that nothing else enters.
- An iteration is **one path** from the loop's first block to a branch back to it: of all paths that with the most accesses of 16 bytes,
  then with the most special functions (a block with one alone is left out: there a sum is brought to a new maximum, which is rare), with the fewest narrower accesses and with the fewest instructions. So rows are aligned, no step is a last one,
  there are a bias and a soft-cap where the kernel knows them, and what concerns the target's entry alone is left out. A loop that reads either kind of memory is followed twice, with global loads and without.
- **Slots** are the instructions of that path, each one issue of one warp. An instruction whose predicate is off takes its slot as well.
- **Elements** are the bytes that its loads bring (those of 16 bytes if there are any; global ones if there are any, else shared ones) over the bytes of an
  element. Of NVIDIA's, loads through the read-only path (``.CONSTANT``: a bias, weights) and of one address by all threads bring no elements. Two loads into the same register of which
  nobody waited for the first are alternatives, under opposite predicates: one load, the wider one, and two slots.
- **In flight** is the largest number of loads that were issued and not yet waited for, at any instruction of two iterations in a row.
  A wait is what the hardware waits by: NVIDIA's scoreboards (write barrier and wait mask of each instruction's control bits, ``DEPBAR``),
  AMD's ``s_waitcnt``. Loads that bring no elements are counted by themselves, as ``beside``. Text without control bits: the first use of a load's registers. Copies by the bulk unit (``UBLKCP``) are no loads.
- **unwaited** counts instructions that read a register whose load, by these counters, is still under way: 0, or the counting is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

KINDS = ("mufu", "fp32", "convert", "integer", "memory", "branch")
WIDE = 16  # bytes of the widest load


class Access(NamedTuple):
    space: str  # global, shared, or another
    load: bool
    size: int  # bytes of one thread
    beside: bool = False  # read-only data beside the elements


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    text: str
    kind: str  # of KINDS
    target: int | None = None  # of a branch
    falls_through: bool = True
    access: Access | None = None
    writes: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    starts: tuple[str, ...] = ()  # counters that it adds one to until it is done
    waits: tuple[tuple[str, int], ...] = ()  # (counter, at most so many left)
    has_counters: bool = True
    indirect: bool = False  # a jump to an address in a register


@dataclass
class Block:
    instructions: list[Instruction]
    following: list[int] = field(default_factory=list)  # first addresses


@dataclass(frozen=True)
class Loop:
    address: int
    reads: str
    writes: str  # "" where nothing is stored
    elements: float  # 0 where the size of one is not known
    slots: int
    kinds: dict[str, int]
    in_flight: dict[str, int]  # memory and bytes of one load, "global 16" -> how many
    bytes_in_flight: int  # of elements, from global memory
    unwaited: int

    @property
    def moves(self) -> str:
        return f"{self.reads}>{self.writes}" if self.writes else self.reads

    def per_element(self, kind: str | None = None) -> float:
        """Issue slots of all kinds, or of one."""
        count = self.slots if kind is None else self.kinds.get(kind, 0)
        return count / self.elements if self.elements else float("nan")

    def row(self) -> dict[str, Any]:
        loads = {f"in_flight {name}": count for name, count in sorted(self.in_flight.items())}
        shares = {kind: round(self.per_element(kind), 2) for kind in KINDS} if self.elements else {}
        return {
            "moves": self.moves, "elements": round(self.elements, 2), "slots": self.slots,
            "per_element": round(self.per_element(), 2) if self.elements else "",
            **shares, **loads, "bytes_in_flight": self.bytes_in_flight, "unwaited": self.unwaited,
        }  # fmt: skip


def blocks_of(program: Sequence[Instruction]) -> dict[int, Block]:
    """Basic blocks by the address of their first instruction; a branch to nowhere in the program is no edge."""
    known = {instruction.address for instruction in program}
    starts = {i.target for i in program if i.target in known} | {program[0].address}
    blocks: dict[int, Block] = {}
    block: Block | None = None
    for at, instruction in enumerate(program):
        if block is None or instruction.address in starts:
            if block is not None and not block.following and block.instructions[-1].falls_through:
                block.following.append(instruction.address)
            block = blocks[instruction.address] = Block([])
        block.instructions.append(instruction)
        ends = instruction.target is not None or not instruction.falls_through
        if ends:
            if instruction.target in known:
                block.following.append(int(instruction.target or 0))
            if instruction.falls_through and at + 1 < len(program):
                block.following.append(program[at + 1].address)
            block = None
    _follow_indirect(blocks)
    return blocks


def _follow_indirect(blocks: dict[int, Block]) -> None:
    entered = {following for block in blocks.values() for following in block.following}
    jumps = [address for address, block in blocks.items() if block.instructions[-1].indirect]
    for at, jump in enumerate(jumps):
        end = jumps[at + 1] if at + 1 < len(jumps) else max(blocks)
        blocks[jump].following += [a for a in blocks if jump < a <= end and a not in entered]


def _order(blocks: dict[int, Block], first: int) -> list[int]:
    """Reverse postorder of what can be reached."""
    seen, out, stack = {first}, [], [(first, iter(blocks[first].following))]
    while stack:
        address, left = stack[-1]
        for following in left:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(blocks[following].following)))
                break
        else:
            out.append(address)
            stack.pop()
    return out[::-1]


def loops_of(blocks: dict[int, Block]) -> dict[int, set[int]]:
    """Natural loops, header to blocks: those with one header are one loop."""
    order = _order(blocks, next(iter(blocks)))
    rank = {address: i for i, address in enumerate(order)}
    before: dict[int, list[int]] = {address: [] for address in order}
    for address in order:
        for following in blocks[address].following:
            before[following].append(address)
    parent = {order[0]: order[0]}  # the immediate dominator (Cooper, Harvey and Kennedy 2001)
    changed = True
    while changed:
        changed = False
        for address in order[1:]:
            found: int | None = None
            for other in before[address]:
                if other in parent:
                    found = other if found is None else _meet(parent, rank, found, other)
            if found is not None and parent.get(address) != found:
                parent[address], changed = found, True
    loops: dict[int, set[int]] = {}
    for address in order:
        for header in blocks[address].following:
            if _dominates(parent, header, address):
                body, todo = loops.setdefault(header, {header}), [address]
                while todo:
                    inside = todo.pop()
                    if inside not in body:
                        body.add(inside)
                        todo += before[inside]
    return loops


def _meet(parent: dict[int, int], rank: dict[int, int], a: int, b: int) -> int:
    while a != b:
        while rank[a] > rank[b]:
            a = parent[a]
        while rank[b] > rank[a]:
            b = parent[b]
    return a


def _dominates(parent: dict[int, int], a: int, b: int) -> bool:
    while b != a and parent[b] != b:
        b = parent[b]
    return a == b


def innermost(loops: dict[int, set[int]]) -> dict[int, set[int]]:
    return {h: body for h, body in loops.items() if not any(o != h and o in body for o in loops)}


def _score(block: Block, has_wide: bool, shared_alone: bool) -> tuple[int, ...]:
    wide, wide_global, narrow, special = 0, 0, 0, 0
    for instruction in block.instructions:
        special += instruction.kind == "mufu"
        if (a := instruction.access) and a.space in ("global", "shared"):
            wide += a.size == WIDE
            wide_global += a.size == WIDE and a.space == "global" and a.load and not a.beside
            narrow += a.size < WIDE
    length = len(block.instructions)
    special = 0 if special == 1 else special  # see above
    return (-wide_global if shared_alone else 0, wide, special, -narrow if has_wide else narrow, -length)


def path_of(
    blocks: dict[int, Block], header: int, body: set[int], shared_alone: bool
) -> list[Instruction] | None:
    """The instructions of one iteration: see the file's docstring. ``body`` has no loop but its own."""
    best: dict[int, tuple[tuple[int, ...], list[int]] | None] = {}
    has_wide = _wide(i for address in body for i in blocks[address].instructions)

    def of(address: int) -> tuple[tuple[int, ...], list[int]] | None:
        if address not in best:
            best[address] = None  # a cycle that is no natural loop leads nowhere
            mine, found = _score(blocks[address], has_wide, shared_alone), None
            for following in blocks[address].following:
                rest: tuple[tuple[int, ...], list[int]] | None = None
                if following == header:
                    rest = ((0,) * len(mine), [])
                elif following in body:
                    rest = of(following)
                if rest is not None:
                    total = tuple(a + b for a, b in zip(mine, rest[0], strict=True))
                    if found is None or total > found[0]:
                        found = (total, [address, *rest[1]])
            best[address] = found
        return best[address]

    found = of(header)
    return None if found is None else [i for address in found[1] for i in blocks[address].instructions]


def _loads(path: Sequence[Instruction]) -> tuple[list[Access], Counter[str], int, int]:
    """What one iteration loads; the most loads in flight, by memory and bytes; the most bytes from global memory; unwaited."""
    done: list[Access] = []
    most: Counter[str] = Counter()
    most_bytes = unwaited = 0
    under_way: list[tuple[Instruction, set[str]]] = []  # with the counters that are not waited for
    for turn in range(2):
        for now in path:
            for counter, left in now.waits:
                mine = [entry for entry in under_way if counter in entry[1]]
                for entry in mine[: len(mine) - left]:
                    entry[1].discard(counter)
            if now.has_counters:
                under_way = [entry for entry in under_way if entry[1]]
                unwaited += any(of.access and of.access.load and of.writes & now.reads for of, _ in under_way)
            else:
                under_way = [(of, _c) for of, _c in under_way if not of.writes & (now.reads | now.writes)]
            a = now.access
            if now.starts or (a and not now.has_counters):  # something that is under way from here on
                again = [e for e in under_way if a and a.load and e[0].access and e[0].writes & now.writes]
                if wider := [e for e in again if e[0].access.size > a.size]:  # type: ignore[union-attr]
                    wider[0][1].update(now.starts)
                    continue
                under_way = [e for e in under_way if all(e is not other for other in again)]
                if turn == 0 and a and a.load:
                    for other in again:
                        done.remove(other[0].access)  # type: ignore[arg-type]
                    done.append(a)
                under_way.append((now, set(now.starts) or {"registers"}))
            live = [of.access for of, _ in under_way if of.access and of.access.load]
            most |= Counter(f"{'beside' if a.beside else a.space} {a.size}" for a in live)
            most_bytes = max(most_bytes, sum(a.size for a in live if a.space == "global" and not a.beside))
    return done, most, most_bytes, unwaited


def loop_of(path: Sequence[Instruction], element_bytes: float | None) -> Loop | None:
    """What a path counts for; None where it loads nothing from global or shared memory."""
    done, in_flight, bytes_in_flight, unwaited = _loads(path)
    own = [a for a in done if not a.beside and a.space in ("global", "shared")]
    own = [a for a in own if a.size == WIDE] or own
    from_global = [a for a in own if a.space == "global"]
    if not own:
        return None
    stored = {i.access.space for i in path if i.access and not i.access.load}
    brought = sum(a.size for a in from_global or own)
    return Loop(
        path[0].address,
        "global" if from_global else "shared",
        next((space for space in ("global", "shared") if space in stored), ""),
        brought / element_bytes if element_bytes else 0.0,
        len(path),
        dict(Counter(i.kind for i in path)),
        {
            name: count
            for name, count in in_flight.items()
            if name.split()[0] in ("global", "shared", "beside")
        },
        bytes_in_flight,
        unwaited,
    )


def brief(rows: Sequence[dict[str, Any]]) -> str:
    """Loops, as ``Loop.row`` gives them, in a cell of a table."""
    return "; ".join(
        f"{row['moves']}: "
        + ", ".join(f"{row[k]} x {k.split(' ', 1)[1]}" for k in row if k.startswith("in_flight"))
        + (
            f", {row['per_element']} slots ({', '.join(f'{kind} {row[kind]}' for kind in KINDS)})"
            if row["elements"]
            else f", {row['slots']} slots an iteration"
        )
        for row in rows
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a report, a line each."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.sort(key=lambda name: any(isinstance(row.get(name), list) for row in rows))  # loops last
    lines = [[brief(v) if isinstance(v := row.get(n, ""), list) else str(v) for n in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *lines]) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [names, *lines]
    )


def _wide(path: Iterable[Instruction]) -> bool:
    return any(i.access and i.access.load and i.access.size == WIDE and not i.access.beside for i in path)


def analyse(program: Sequence[Instruction], element_bytes: float | None = None) -> list[Loop]:
    """The innermost loops that load: for each way of moving data (from where, to where) the one that takes the most at a time.

    Loops with 16-byte loads if the kernel has any; the others then take a row's edges.
    """
    if not program:
        return []
    blocks = blocks_of(program)
    paths = list(_paths(blocks))
    chosen = [path for path in paths if _wide(path)] or paths
    found: dict[str, tuple[int, Loop]] = {}
    for path in chosen:
        loop = loop_of(path, element_bytes)
        if loop is None:
            continue
        size = sum(i.access.size for i in path if i.access and i.access.load)
        if loop.moves not in found or (size, loop.slots) > (found[loop.moves][0], found[loop.moves][1].slots):
            found[loop.moves] = (size, loop)
    return sorted((loop for _, loop in found.values()), key=lambda loop: loop.address)


def _paths(blocks: dict[int, Block]) -> Iterator[list[Instruction]]:
    for header, body in innermost(loops_of(blocks)).items():
        usual = path_of(blocks, header, body, shared_alone=False)
        if usual is None:
            continue
        yield usual
        other = path_of(blocks, header, body, shared_alone=True)
        if other and other != usual and not any(_is_global_load(i) for i in other):
            yield other


def _is_global_load(i: Instruction) -> bool:
    return bool(i.access and i.access.load and i.access.space == "global" and not i.access.beside)
