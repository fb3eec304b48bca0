"""The cases of kernel_report_triton.py for scale_in_place and docs/sequences.md: which arguments and options are compiled.

A pointer is float32 but for those in POINTERS and those that a case gives a type; an argument that is an upper-case name is
a compile-time constant, and so is a number that a case gives; an integer that is given is a multiple of 16.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from kernel_report_compile import compile_kernel

POINTERS = {"offsets_ptr": "*i64", "desirable_ptr": "*u8", "mask_ptr": "*u8", "select_ptr": "*u8"}
INTEGERS = ("length", "count", "n", "pairs", "sequences", "chunks", "rows", "row_stride", "width")

PAIR_ALWAYS = (
    "c_ptr",
    "r_ptr",
    "loss_ptr",
    "d_c_ptr",
    "d_r_ptr",
    "chosen_reward_ptr",
    "rejected_reward_ptr",
    "sums_ptr",
)
PAIR_ALL = (
    "rc_ptr", "rr_ptr", "lc_ptr", "lr_ptr", "nll_ptr", "d_nll_ptr", "beta_ptr", "smoothing_ptr", "margin_ptr", "weight_ptr",
    "delta_ptr", *PAIR_ALWAYS,
)  # fmt: skip


def _pairs(terms: Sequence[int], divergence: int, full: bool) -> tuple[tuple[str, ...], dict[str, Any]]:
    return PAIR_ALL if full else PAIR_ALWAYS, {
        "TERMS": tuple(terms), "NEEDS_TOKENS": full and 11 in terms, "DIVERGENCE": divergence, "AVERAGE_REWARDS": full,
    }  # fmt: skip


UNPAIRED = ("logps_ptr", "desirable_ptr", "loss_ptr", "d_ptr", "reward_ptr", "sums_ptr")
# (module, kernel) -> option set -> pointers that are given, and constants.
CASES: dict[tuple[str, str], dict[str, tuple[tuple[str, ...], dict[str, Any]]]] = {
    ("pairs", "segment_sum_kernel"): {
        "plain": (("values_ptr", "out_ptr"), {}),
        "full": (("values_ptr", "weights_ptr", "offsets_ptr", "out_ptr"), {}),
    },
    ("pairs", "segment_expand_kernel"): {
        "plain": (("upstream_ptr", "out_ptr"), {}),
        "full": (("upstream_ptr", "weights_ptr", "offsets_ptr", "out_ptr"), {}),
    },
    ("pairs", "pair_loss_kernel"): {
        **{f"term {code}": _pairs([code], 0, False) for code in range(16)},
        **{f"divergence {kind}": _pairs([0], kind, True) for kind in range(4)},
        "terms 0-7": _pairs(range(8), 3, True),
        "terms 8-15": _pairs(range(8, 16), 1, True),
    },
    ("pairs", "unpaired_loss_kernel"): {
        **{f"term {code}": (UNPAIRED, {"CODE": code}) for code in range(3)},
        "full": ((*UNPAIRED, "ref_ptr", "weight_ptr", "kl_ptr"), {"CODE": 2}),
    },
}


POLICY = ("logprobs_ptr", "advantages_ptr", "mask_ptr", "grad_ptr", "sums_ptr")
POLICY_ALL = (
    *POLICY, "old_ptr", "ref_ptr", "entropy_ptr", "sampler_ptr", "token_weight_ptr", "select_ptr", "offsets_ptr",
    "grad_entropy_ptr",
)  # fmt: skip


def _policy(
    given: tuple[str, ...], surrogate: int, level: int, correction: int = 0, kl: int = 2, full: bool = False
) -> tuple[tuple[str, ...], dict[str, Any]]:
    return given, {
        "SURROGATE": surrogate, "LEVEL": level, "KL_KIND": kl, "KL_UNBIASED": full, "CORRECTION": correction,
        "SEQ_MEAN": full, "OF_SEQUENCE": not full, "DUAL": full, "OFF_POLICY": full,
    }  # fmt: skip


CASES |= {
    ("policy", "policy_loss_kernel"): {
        **{f"surrogate {code}": _policy((*POLICY, "old_ptr"), code, 0) for code in range(6)},
        **{
            f"level {level}, full": _policy(POLICY_ALL, 0, level, 1 + level, 1 + level, True)
            for level in range(4)
        },
        **{f"surrogate {code}, full": _policy(POLICY_ALL, code, 3, 2, 4, True) for code in range(1, 6)},
        "shares": _policy((*POLICY, "old_ptr", "agg_ptr"), 0, 0),
    },
    ("policy", "policy_total_kernel"): {
        "tokens": (("sums_ptr", "out_ptr"), {"HAS_NORMALIZER": False, "BY_TOKENS": True}),
        "normalizer": (
            ("sums_ptr", "normalizer_ptr", "out_ptr"),
            {"HAS_NORMALIZER": True, "BY_TOKENS": False},
        ),
    },
    ("scan", "scan_kernel"): {
        "gae": (("rewards_ptr", "values_ptr", "mask_ptr", "advantages_ptr", "returns_ptr"), {}),
        "packed": (
            ("rewards_ptr", "values_ptr", "mask_ptr", "offsets_ptr", "advantages_ptr", "returns_ptr"),
            {},
        ),
        "returns": (("rewards_ptr", "mask_ptr", "returns_ptr"), {}),
    },
}
# The usual gradient is one row that is aligned; a row apart from the next one need not be.
CASES[("scale", "scale_kernel")] = {
    f"{dtype} {layout}": (("x_ptr", "scale_ptr", *aligned), {"x_ptr": f"*{dtype}", **rows})
    for dtype in ("fp32", "bf16", "fp16")
    for layout, aligned, rows in (("whole", ("width",), {"rows": 1}), ("rows", (), {}))
}
SHAPES = {
    "policy_loss_kernel": ("launch_policy", "POLICY_SHAPE"), "policy_total_kernel": ("launch_policy", "TOTAL_SHAPE"),
    "scan_kernel": ("launch_policy", "SCAN_SHAPE"), "scale_kernel": ("launch", "SCALE_SHAPE"),
}  # fmt: skip


def _shape(module: str, kernel: str) -> dict[str, Any]:
    usual = (f"launch_{module}", "SUM_SHAPE" if kernel.startswith("segment") else "PAIR_SHAPE")
    family, name = SHAPES.get(kernel, usual)
    return getattr(importlib.import_module(f"kernels.{family}"), name)


def cases(targets: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    for target in targets:
        for (module, kernel), option_sets in CASES.items():
            for options in option_sets:
                yield target, module, kernel, options


def compile_case(case: tuple[str, str, str, str]) -> dict[str, Any]:
    """Compile (target, module, kernel, options) and return its row of the report."""
    target, module, name, options = case
    kernel = getattr(importlib.import_module(f"kernels.{module}"), name)
    given, constants = CASES[module, name][options]
    launch = _shape(module, name)
    constants = {**constants, **{key: value for key, value in launch.items() if key.isupper()}}
    shape = {key: value for key, value in launch.items() if not key.isupper()}
    signature: dict[str, str] = {}
    constexprs: dict[Any, Any] = {}
    attributes = {}
    for i, arg in enumerate(kernel.arg_names):
        pointer = arg.endswith("_ptr")
        if arg.isupper() or (pointer and arg not in given) or (not pointer and arg in constants):
            signature[arg], constexprs[arg] = "constexpr", constants.get(arg)
            continue
        if pointer:
            signature[arg] = constants.get(arg, POINTERS.get(arg, "*fp32"))
        else:
            signature[arg] = "i32" if arg in INTEGERS else "fp32"
        if arg in given:
            attributes[(i,)] = [["tt.divisibility", 16]]
    numbers = compile_kernel(kernel, signature, constexprs, attributes, shape, target)
    dtype = constants.get("x_ptr", "*fp32").removeprefix("*")
    return {"kernel": name.removesuffix("_kernel"), "target": target, "dtype": dtype, "options": options,
            "block": launch.get("BLOCK", ""), "warps": shape["num_warps"]} | numbers  # fmt: skip
