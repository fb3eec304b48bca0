"""SASS, as ``cuobjdump -sass`` prints it, as the instructions of kernel_report_loops.py. sm_80 to sm_120.

Of each instruction's 128 bits, printed as two words, the upper word has the control bits from bit 41 on (Jia et al. 2018, arXiv:1804.06826): 4 of
stall, 1 of yield, 3 of the write barrier (7: none), 3 of the read barrier, 6 of the wait mask.

Kinds: ``mufu`` the special-function unit; ``fp32`` FFMA, FADD, FMUL, FMNMX, FSETP, FSEL and packed ones; ``convert`` F2F, F2FP, HADD2.F32, I2F, F2I, PRMT, and what
takes a bfloat16 out of a word (IMAD.U32 or SHL by 2^16, LOP3 with 0xffff0000); ``memory`` loads and stores, of constants too; ``branch`` with
barriers and convergence; ``integer`` all else: addresses, indices, moves, predicates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from kernel_report_loops import Access, Instruction

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+?)(?:\s+(.*?))?\s*;\s*(?:/\* 0x([0-9a-f]{16}) \*/)?\s*$"
)
_UPPER = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_REGISTER = re.compile(r"\bR(\d+)\b(\.64)?")
SPACES = {"LDG": "global", "STG": "global", "LDS": "shared", "STS": "shared", "LDL": "local", "STL": "local",
          "LD": "generic", "ST": "generic", "LDC": "constant", "ULDC": "constant", "LDCU": "constant", "LDSM": "shared",
          "STSM": "shared", "LDGSTS": "asynchronous", "ATOMG": "atomic", "ATOMS": "atomic", "RED": "atomic", "REDG": "atomic"}  # fmt: skip
FP32 = (
    "FFMA",
    "FADD",
    "FMUL",
    "FMNMX",
    "FSETP",
    "FSEL",
    "FSET",
    "FMNMX3",
    "FFMA2",
    "FADD2",
    "FMUL2",
    "FSWZADD",
)
CONVERT = ("F2F", "F2FP", "I2F", "F2I", "I2FP", "PRMT", "FRND", "I2I", "I2IP", "UPRMT")
BRANCH = ("BRA", "BSSY", "BSYNC", "BREAK", "BMOV", "EXIT", "CALL", "RET", "BRX", "JMP", "WARPSYNC", "BAR", "YIELD", "BPT", "NOP",
          "DEPBAR", "MEMBAR", "ERRBAR", "CCTL", "SYNCS", "NANOSLEEP", "ELECT", "BRXU", "UCGABAR_ARV", "UCGABAR_WAIT")  # fmt: skip
INDIRECT = ("BRX", "BRXU", "JMX")
LEAVE = ("EXIT", "RET", "BPT", *INDIRECT)


def _kind(name: str, opcode: str, operands: str) -> str:
    if name == "MUFU":
        return "mufu"
    if name in FP32:
        return "fp32"
    unpacks = (name in ("IMAD", "SHL") and "0x10000," in operands) or (
        name in ("LOP3", "ULOP3") and "0xffff0000" in operands
    )
    unpacks = unpacks or (name in ("SHL", "SHF", "USHF") and re.search(r", 0x10(,|$)", operands) is not None)
    if name in CONVERT or unpacks or (name in ("HADD2", "HMUL2", "HFMA2") and ".F32" in opcode):
        return "convert"
    if name in SPACES or name in ("UBLKCP", "UTMALDG", "UTMASTG"):
        return "memory"
    return "branch" if name in BRANCH else "integer"


def _width(opcode: str) -> int:
    for part in opcode.split(".")[1:]:
        if part in ("256", "128", "64", "U16", "S16", "U8", "S8"):
            return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(part) or int(part) // 8
    return 4


def _is_beside(opcode: str, operands: str) -> bool:
    """No element: read-only data, or an address that all threads have."""
    uniform = opcode.startswith("LDS") and not re.search(r"\[[^\]]*\bR\d", operands)
    return ".CONSTANT" in opcode or uniform


def _span(first: int, size: int) -> Iterable[str]:
    return (f"R{first + k}" for k in range(max(1, size // 4)))


def _registers(operands: str) -> set[str]:
    found: set[str] = set()
    for number, pair in _REGISTER.findall(operands):
        found |= set(_span(int(number), 8 if pair else 4))
    return found


def _instruction(address: int, predicate: str, opcode: str, operands: str, upper: int | None) -> Instruction:
    name = opcode.split(".")[0]
    access = None
    writes: set[str] = set()
    if name in SPACES:
        load = name.startswith(("LD", "UL")) and name != "LDGSTS"
        access = Access(SPACES[name], load, _width(opcode), _is_beside(opcode, operands))
    # SHFL and MATCH write a predicate first, then a register.
    first, _, rest = (operands.partition(",")[2] if name in ("SHFL", "MATCH") else operands).partition(",")
    destination = re.fullmatch(r"R(\d+)", first.strip().removesuffix(".reuse"))
    stores = name in SPACES and not (access and access.load)
    if destination and not stores:
        writes = set(_span(int(destination[1]), access.size if access else 4))
        reads = _registers(rest)
    else:
        reads = _registers(operands)
        if stores and access:  # the number stored is as wide as the access
            for number in re.findall(r",\s*R(\d+)\b", operands):
                reads |= set(_span(int(number), access.size))
    target = None
    falls = True
    if name in ("BRA", "JMP"):
        # BRA.DIV leaves where the warp is not together: hardly ever, and it comes back.
        address_of = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if address_of and ".DIV" not in opcode:
            target = int(address_of[1], 16)
            falls = bool(predicate) or "," in operands
    elif name in LEAVE:
        falls = bool(predicate)
    starts: list[str] = []
    waits: list[tuple[str, int]] = []
    if upper is not None:
        control = upper >> 41
        # A load is done when what it writes is there; its read barrier is about the registers of its address.
        barriers = ((control >> 5) & 7, (control >> 8) & 7)[: 1 if access and access.load else 2]
        starts += [f"SB{b}" for b in barriers if b != 7]
        waits += [(f"SB{b}", 0) for b in range(6) if control >> 11 & 1 << b]
    if name == "DEPBAR":
        if left := re.match(r"SB(\d), 0x([0-9a-f]+)", operands):
            waits.append((f"SB{left[1]}", int(left[2], 16)))
        starts = []
    return Instruction(
        address, opcode, f"{predicate} {opcode} {operands}".strip(), _kind(name, opcode, operands), target, falls, access,
        frozenset(writes), frozenset(reads), tuple(starts), tuple(waits), upper is not None, name in INDIRECT,
    )  # fmt: skip


def parse(text: str) -> list[Instruction]:
    """One function's instructions; padding behind its last branch is left out."""
    program: list[Instruction] = []
    parts: tuple[int, str, str, str] | None = None
    has_word = False
    for line in text.splitlines():
        if found := _LINE.match(line):
            if parts:
                program.append(_instruction(*parts, None))
            parts = (int(found[1], 16), found[2] or "", found[3], found[4] or "")
            has_word = found[5] is not None
        elif parts and has_word and (word := _UPPER.match(line)):
            program.append(_instruction(*parts, int(word[1], 16)))
            parts = None
    if parts:
        program.append(_instruction(*parts, None))
    while program and program[-1].opcode == "NOP":
        program.pop()
    return program
