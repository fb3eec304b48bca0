"""AMD assembly, as Triton keeps it (``asm["amdgcn"]``, gfx9), as the instructions of kernel_report_loops.py.

Loads from memory, stores and atomics count up vmcnt and end in order; LDS and scalar loads count up lgkmcnt; ``s_waitcnt vmcnt(N)`` waits until N are left.

Kinds: ``mufu`` v_exp, v_log, v_rcp, v_rsq, v_sqrt, v_sin and v_cos; ``fp32`` float arithmetic, comparisons and v_ldexp, packed ones (two elements) too;
``convert`` v_cvt, v_perm, v_bfe, sub-word operands (sdwa) and what takes a bfloat16 out of a word; ``memory`` loads and stores; ``branch`` with waits and
barriers; ``integer`` all else, scalar instructions too, which issue beside other waves' vector instructions.
"""

from __future__ import annotations

import re

from kernel_report_loops import Access, Instruction

_LABEL = re.compile(r"^(\.L\w+|\w+):")
_SIZES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12,
          "dwordx4": 16, "u8": 1, "i8": 1, "b8": 1, "u16": 2, "i16": 2, "b16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16}  # fmt: skip
_FLOAT = re.compile(
    r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|fmamk|fmaak|mac|mad|max|min|max3|min3|med3|ldexp|cmpx?_\w+|floor|rndne|div_\w+)_f(16|32|64)"
)


def _registers(operands: str) -> frozenset[str]:
    found: set[str] = set()
    for kind, first, last, single in re.findall(r"\b([av])(?:\[(\d+):(\d+)\]|(\d+)\b)", operands):
        numbers = range(int(first), int(last) + 1) if first else (int(single),)
        found |= {f"{kind}{number}" for number in numbers}
    return frozenset(found)


def _kind(name: str, operands: str) -> str:
    if re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", name):
        return "mufu"
    if re.match(r"(global|buffer|flat|scratch|ds)_|s_load|s_buffer_load", name):
        return "memory"
    if re.match(r"s_(waitcnt|nop|barrier|branch|cbranch|endpgm|setprio|sleep)", name):
        return "branch"
    unpacks = re.match(r"v_(lshlrev_b32\w* .*, 16,|and_b32\w* .*0xffff0000)", f"{name} {operands}")
    if unpacks or re.match(r"v_(cvt|perm|bfe|pack)_", name) or name.endswith("sdwa"):
        return "convert"
    return "fp32" if _FLOAT.match(name) else "integer"


def _access(name: str) -> Access | None:
    found = re.match(r"(global|buffer|flat|scratch|ds)_(load|store|read2?|write2?)_(\w+)", name)
    if not found:
        return None
    space = {"ds": "shared", "buffer": "global", "flat": "generic", "scratch": "local"}.get(
        found[1], found[1]
    )
    size = _SIZES.get(re.sub(r"_(d16|lds).*|st64_", "", found[3]).removesuffix("_e32"), 4)
    return Access(space, found[2].startswith(("load", "read")), size * (2 if found[2].endswith("2") else 1))


def _waits(name: str, operands: str) -> tuple[tuple[str, int], ...]:
    if name != "s_waitcnt":
        return ()
    return tuple((counter, int(left)) for counter, left in re.findall(r"(vmcnt|lgkmcnt)\((\d+)\)", operands))


def parse(assembly: str) -> list[Instruction]:
    """The instructions of the one kernel of a module, numbered from 0."""
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        code = line.split(";")[0].rstrip()
        if label := _LABEL.match(code):
            labels[label[1]] = len(lines)
        elif code.startswith("\t") and (found := re.match(r"\s+([a-z]\w+)(?:\s+(.*))?$", code)):
            if re.match(r"(v|s|ds|global|buffer|flat|scratch)_", found[1]):
                lines.append((found[1], found[2] or ""))
    program = []
    for address, (name, operands) in enumerate(lines):
        access, first, _, rest = _access(name), *operands.partition(",")
        target = labels.get(operands.strip()) if name.startswith(("s_branch", "s_cbranch")) else None
        stores = access is not None and not access.load
        counter = "lgkmcnt" if re.match(r"ds_|s_load|s_buffer_load", name) else "vmcnt"
        counts = re.match(r"(global|buffer|flat|scratch|ds)_|s_load|s_buffer_load", name)
        program.append(
            Instruction(
                address,
                name,
                f"{name} {operands}".strip(),
                _kind(name, operands),
                target,
                name not in ("s_branch", "s_endpgm"),
                access,
                frozenset() if stores else _registers(first),
                _registers(operands if stores else rest),
                (counter,) if counts else (),
                _waits(name, operands),
                True,
            )
        )
    return program
