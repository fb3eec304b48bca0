"""tools/kernel_report_loops.py against programs small enough to count by hand."""

from __future__ import annotations

import kernel_report_amdgcn
import kernel_report_loops as loops
import kernel_report_sass
import pytest


def sass(*lines: str) -> str:
    """A listing from "opcode operands | write barrier | barriers waited for | read barrier", the latter three as control bits."""
    text = []
    for at, line in enumerate(lines):
        code, *control = (part.strip() for part in line.split("|"))
        words = "/* 0x0000000000000000 */" if control else ""
        text.append(f"        /*{16 * at:04x}*/                   {code} ;   {words}")
        if control:
            write, waits, read = [*control, "", ""][:3]
            mask = sum(1 << int(b) for b in waits.split())
            bits = int(write or 7) << 5 | int(read or 7) << 8 | mask << 11
            text.append(f"                                          /* 0x{bits << 41:016x} */")
    return "\n".join(text)


def only_loop(*lines: str, element_bytes: float = 2) -> loops.Loop:
    found = loops.analyse(kernel_report_sass.parse(sass(*lines)), element_bytes)
    assert len(found) == 1
    return found[0]


# Two loads of 8 bfloat16 each, a conversion, an exponential and a sum of one of them; 0x10 is the loop's first instruction.
TWO_LOADS = (
    "S2R R0, SR_TID.X | 0",
    "LDG.E.EF.128 R4, desc[UR4][R2.64] | 1 | 0",
    "LDG.E.EF.128 R8, desc[UR4][R2.64+0x10] | 2 |",
    "IMAD.U32 R12, R4, 0x10000, RZ | | 1",
    "MUFU.EX2 R12, R12 | 3 |",
    "FADD R13, R8, R12 | | 2 3",
    "IADD3 R2, P0, R2, 0x20, RZ | |",
    "ISETP.GE.AND P1, PT, R2, R0, PT | |",
    "@!P1 BRA 0x10 | |",
    "EXIT | |",
)


def test_two_loads_are_in_flight() -> None:
    loop = only_loop(*TWO_LOADS)
    assert (loop.address, loop.moves, loop.elements, loop.slots) == (0x10, "global", 16, 8)
    assert loop.kinds == {"memory": 2, "convert": 1, "mufu": 1, "fp32": 1, "integer": 2, "branch": 1}
    assert loop.in_flight == {"global 16": 2} and loop.bytes_in_flight == 32 and loop.unwaited == 0
    assert loop.per_element() == 0.5 and loop.per_element("mufu") == 1 / 16


def test_a_wait_that_is_moved_up_leaves_one() -> None:
    lines = list(TWO_LOADS)
    lines[2] = "LDG.E.EF.128 R8, desc[UR4][R2.64+0x10] | 2 | 1"  # waits for the first load
    assert only_loop(*lines).in_flight == {"global 16": 1}
    lines[2:4] = [TWO_LOADS[3], TWO_LOADS[2]]  # and the same with the instruction that needs it
    assert only_loop(*lines).in_flight == {"global 16": 1}


def test_one_barrier_for_both_waits_for_both() -> None:
    lines = list(TWO_LOADS)
    lines[2] = lines[2].replace("| 2", "| 1")
    lines[5] = "FADD R13, R8, R12 | | 3"
    assert only_loop(*lines).in_flight == {"global 16": 2} and only_loop(*lines).unwaited == 0
    lines[3] = "IMAD.U32 R12, R4, 0x10000, RZ | |"  # nobody waits any more
    # Both are under way for good: R4 and R8 are read before they are there, in either iteration.
    assert only_loop(*lines).unwaited == 4


def test_a_read_barrier_is_no_load() -> None:
    """It frees the registers of an address: a load is done with its write barrier, whoever waits for the other."""
    lines = list(TWO_LOADS)
    lines[1] = "LDG.E.EF.128 R4, desc[UR4][R2.64] | 1 | 0 | 5"
    lines[3] = "IMAD.U32 R12, R4, 0x10000, RZ | | 1"
    loop = only_loop(*lines)
    assert loop.in_flight == {"global 16": 2} and loop.unwaited == 0
    lines[2] = "LDG.E.EF.128 R8, desc[UR4][R2.64+0x10] | 2 | 5"  # waits for the address alone
    assert only_loop(*lines).in_flight == {"global 16": 2}


def test_depbar_leaves_the_youngest() -> None:
    lines = list(TWO_LOADS)
    lines[2] = lines[2].replace("| 2", "| 1")
    lines[3:4] = ["DEPBAR.LE SB1, 0x1 | |", "IMAD.U32 R12, R4, 0x10000, RZ | |"]
    lines[6] = "FADD R13, R8, R12 | | 1 3"
    lines.insert(4, "LDG.E.EF.128 R16, desc[UR4][R2.64+0x20] | 4 |")  # two again, not three
    loop = only_loop(*lines)
    assert (
        loop.in_flight == {"global 16": 3} and loop.unwaited == 0
    )  # R16 is not waited for: in flight with the next two
    lines[7] = "FADD R13, R8, R12 | | 1 3 4"
    assert only_loop(*lines).in_flight == {"global 16": 2}


def test_without_control_bits_a_use_is_a_wait() -> None:
    plain = [line.split("|")[0] for line in TWO_LOADS]
    assert only_loop(*plain).in_flight == {"global 16": 2}
    plain[2:4] = [plain[3], plain[2]]
    assert only_loop(*plain).in_flight == {"global 16": 1}


def test_loads_of_the_next_iteration_count_too() -> None:
    """A loop that begins with the use and loads for the next time at its end, one load ahead."""
    loop = only_loop(
        "S2R R0, SR_TID.X | 0",
        "LDG.E.128 R8, desc[UR4][R2.64+0x10] | 2 |",
        "FADD R13, R4, R13 | | 1",
        "LDG.E.128 R4, desc[UR4][R2.64+0x20] | 1 | 2",
        "FADD R13, R8, R13 | |",
        "@!P1 BRA 0x10 | |",
        "EXIT | |",
        element_bytes=4,
    )
    assert loop.in_flight == {"global 16": 2} and loop.elements == 8


def test_the_path_is_the_aligned_one_without_the_target() -> None:
    loop = only_loop(
        "S2R R0, SR_TID.X | 0",
        "@P0 BRA 0x60 | |",
        "LDG.E.U16 R4, desc[UR4][R2.64] | 1 |",  # an unaligned row
        "LDG.E.U16 R5, desc[UR4][R2.64+0x2] | 1 |",
        "PRMT R4, R4, 0x5410, R5 | | 1",
        "BRA 0x70 | |",
        "LDG.E.128 R4, desc[UR4][R2.64] | 1 |",
        "@P1 BRA 0xa0 | | 1",
        "FSEL R4, R4, R6, P2 | |",  # the target's entry
        "FADD R4, R4, R6 | |",
        "MUFU.EX2 R4, R4 | 2 |",
        "STG.E.128 desc[UR4][R2.64], R4 | | 2",
        "@P3 BRA 0x10 | |",
        "EXIT | |",
    )
    assert (loop.moves, loop.elements, loop.slots) == ("global>global", 8, 6)


@pytest.mark.parametrize(
    ("straight", "aside", "takes"),
    [
        (["MUFU.EX2 R6, R4 | |", "MUFU.RCP R6, R6 | |"], ["FADD R7, R7, R4 | |"], "straight"),  # a soft-cap
        (["FADD R7, R7, R4 | |"], ["MUFU.EX2 R6, R4 | |"] * 3, "aside"),
        (["MUFU.EX2 R6, R4 | |", "FADD R7, R7, R6 | |"], ["FADD R7, R7, R4 | |"], "aside"),  # a new maximum
        (["LDG.E.U16 R6, desc[UR4][R2.64] | |"], ["FADD R7, R7, R4 | |"] * 3, "aside"),  # an unaligned bias
        (["FADD R7, R7, R4 | |"], ["FADD R7, R7, R4 | |"] * 3, "straight"),  # the target's entry
        (["FADD R7, R7, R4 | |"] * 4, ["FADD R7, R7, R4 | |"], "aside"),
        (["EXIT | |", "LDG.E.128 R8, desc[UR4][R2.64] | 1 |"], ["FADD R7, R7, R4 | |"], "aside"),  # nobody comes behind EXIT
    ],
)  # fmt: skip
def test_which_way_is_taken(straight: list[str], aside: list[str], takes: str) -> None:
    """Two ways from a branch to the loop's end."""
    behind = 16 * (3 + len(straight) + 1)
    lines = [
        "S2R R0, SR_TID.X | 0",
        "LDG.E.128 R4, desc[UR4][R2.64] | 1 |",
        f"@P0 BRA 0x{behind:x} | | 1",
        *straight,
        f"BRA 0x{behind + 16 * len(aside):x} | |",
        *aside,
        "@P1 BRA 0x10 | |",
        "EXIT | |",
    ]
    assert only_loop(*lines).slots == 3 + (len(straight) + 1 if takes == "straight" else len(aside))


def test_a_switch_leads_to_its_cases() -> None:
    loop = only_loop(
        "S2R R0, SR_TID.X | 0",
        "LDG.E.128 R4, desc[UR4][R2.64] | 1 |",
        "BRX R6 -0x30 | | 1",
        "FADD R7, R7, R4 | |",
        "BRA 0x80 | |",
        "MUFU.EX2 R7, R4 | |",
        "MUFU.RCP R7, R7 | |",
        "BRA 0x80 | |",
        "@P1 BRA 0x10 | |",
        "EXIT | |",
    )
    assert (loop.slots, loop.kinds["mufu"]) == (6, 2)


def test_narrow_loads_beside_wide_ones_bring_nothing() -> None:
    """An unaligned row's loads, under a predicate or behind a branch: slots in the one case, not on the path in the other."""
    predicated = only_loop(
        "S2R R0, SR_TID.X | 0",
        "@P2 LDG.E.U16 R20, desc[UR4][R2.64] | 1 |",
        "@P2 PRMT R4, R20, 0x5410, R20 | | 1",
        "@!P2 LDG.E.128 R4, desc[UR4][R2.64] | 1 |",
        "FADD R13, R4, R13 | | 1",
        "@!P1 BRA 0x10 | |",
        "EXIT | |",
    )
    assert (predicated.elements, predicated.slots) == (8, 5)
    branched = only_loop(
        "S2R R0, SR_TID.X | 0",
        "@!P2 LDG.E.128 R4, desc[UR4][R2.64] | 1 |",
        "@!P2 BRA 0x40 | |",
        "LDG.E.U16 R4, desc[UR4][R2.64] | 1 |",
        "FADD R13, R4, R13 | | 1",
        "@!P1 BRA 0x10 | |",
        "EXIT | |",
    )
    assert (branched.elements, branched.slots) == (8, 4)


def test_loads_under_opposite_predicates_are_one() -> None:
    lines = list(TWO_LOADS)
    lines[1:2] = [
        "@P2 LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64] | 1 | 0",
        "@!P2 LDG.E.EF.128 R4, desc[UR4][R2.64] | 1 |",
    ]
    lines[-2] = "@!P1 BRA 0x10 | |"
    loop = only_loop(*lines)
    assert (loop.elements, loop.slots, loop.in_flight) == (16, 9, {"global 16": 2})
    lines[2] = "@!P2 LDG.E.U16 R4, desc[UR4][R2.64] | 1 |"
    assert only_loop(*lines).elements == 16


def test_shared_and_global_reading_are_two_ways_and_a_bias_is_beside() -> None:
    program = sass(
        "S2R R0, SR_TID.X | 0",
        "@!P0 LDS.128 R4, [R3] | 1 |",
        "@!P0 BRA 0x40 | |",
        "LDG.E.EF.128 R4, desc[UR4][R2.64] | 1 |",
        "LDG.E.128.CONSTANT R8, desc[UR4][R12.64] | 2 |",
        "FADD R4, R4, R8 | | 1 2",
        "STG.E.EF.128 desc[UR4][R2.64], R4 | |",
        "@P3 BRA 0x10 | |",
        "EXIT | |",
    )
    found = {loop.moves: loop for loop in loops.analyse(kernel_report_sass.parse(program), 4)}
    assert found.keys() == {"global>global", "shared>global"}
    assert found["global>global"].slots == 7 and found["shared>global"].slots == 6
    assert found["global>global"].elements == found["shared>global"].elements == 4
    assert found["global>global"].in_flight == {"shared 16": 1, "global 16": 1, "beside 16": 1}
    assert found["shared>global"].in_flight == {"shared 16": 1, "beside 16": 1}


def test_outer_loops_and_loops_that_load_nothing_are_left_out() -> None:
    lines = list(TWO_LOADS)
    lines[-1:] = ["@P4 BRA 0x0 | |", "FADD R1, R1, R2 | |", "@P5 BRA 0xa0 | |", "EXIT | |"]
    assert only_loop(*lines).address == 0x10


GCN = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	s_waitcnt lgkmcnt(0)
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[8:11], v[2:3], off
	global_load_dwordx4 v[12:15], v[2:3], off offset:16
	v_lshl_add_u64 v[2:3], v[2:3], 0, s[0:1]
	s_waitcnt vmcnt(1)
	v_lshlrev_b32_e32 v4, 16, v8
	v_exp_f32_e32 v4, v4
	s_waitcnt vmcnt(0)
	v_pk_add_f32 v[6:7], v[12:13], v[4:5]
	global_store_dwordx4 v[2:3], v[8:11], off
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	s_endpgm
"""


def amd(text: str) -> loops.Loop:
    (loop,) = loops.analyse(kernel_report_amdgcn.parse(text), 2)
    return loop


def test_amd_counts_what_waitcnt_leaves() -> None:
    loop = amd(GCN)
    assert (loop.moves, loop.elements, loop.slots, loop.unwaited) == ("global>global", 16, 10, 0)
    assert loop.kinds == {"memory": 3, "integer": 1, "branch": 3, "convert": 1, "mufu": 1, "fp32": 1}
    assert loop.in_flight == {"global 16": 2}
    first = "	s_waitcnt vmcnt(1)\n"
    load = "	global_load_dwordx4 v[12:15], v[2:3], off offset:16\n"
    early = GCN.replace(first, "").replace(load, "	s_waitcnt vmcnt(0)\n" + load)
    assert amd(early).in_flight == {"global 16": 1}
    assert (
        amd(GCN.replace("vmcnt(1)", "vmcnt(2)")).unwaited == 2
    )  # v8 is read while it is under way, in both iterations


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("LOP3.LUT R1, R2, 0xffff0000, RZ, 0xc0, !PT", "convert"),
        ("LOP3.LUT R1, R2, 0xff, RZ, 0xc0, !PT", "integer"),
        ("HADD2.F32 R1, -RZ, R2.H0_H0", "convert"),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "convert"),
        ("FFMA R1, R2, R3, R4", "fp32"),
        ("FMNMX R1, R2, R3, !PT", "fp32"),
        ("ULDC.64 UR4, c[0x0][0x208]", "memory"),
        ("BSYNC B1", "branch"),
        ("LEA.HI.X R1, R2, R3, R4, 0x1, P0", "integer"),
    ],
)
def test_kinds(line: str, kind: str) -> None:
    (instruction,) = kernel_report_sass.parse(sass(line))
    assert instruction.kind == kind
