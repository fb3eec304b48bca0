"""The cases of kernel_report_triton.py for scale_in_place and docs/sequences.md: which arguments and options are compiled.

A pointer is float32 but for those in POINTERS and those that a case gives a type; an argument that is an upper-case name is
a compile-time constant, and so is a number that a case gives; an integer that is given is a multiple of 16.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from kernel_report_compile import compile_kernel

from fastloss.tables import (
    AGGREGATIONS,
    CORRECTIONS,
    DISTILLATION_DIVERGENCES,
    DIVERGENCES,
    KL_KINDS,
    LEVELS,
    MAX_TERMS,
    PAIR_TERMS,
    SURROGATES,
    UNPAIRED_TERMS,
)

POINTERS = {
    "offsets_ptr": "*i64",
    "desirable_ptr": "*u8",
    "mask_ptr": "*u8",
    "select_ptr": "*u8",
    "target_ptr": "*i64",
}
INTEGERS = (
    "length",
    "count",
    "n",
    "pairs",
    "sequences",
    "chunks",
    "rows",
    "row_stride",
    "width",
    "vocab",
    "dim",
    "x_stride",
    "w_stride",
    "z_stride",
    "y_row_stride",
    "grad_row_stride",
    "ignore_index",
)

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
    *PAIR_ALWAYS,
)  # fmt: skip


def _pairs(terms: Sequence[int], divergence: int, full: bool) -> tuple[tuple[str, ...], dict[str, Any]]:
    return PAIR_ALL if full else PAIR_ALWAYS, {
        "TERMS": tuple(terms), "NEEDS_TOKENS": full and PAIR_TERMS.index("sft") in terms, "DIVERGENCE": divergence, "AVERAGE_REWARDS": full,
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
        **{name: _pairs([term], 0, False) for term, name in enumerate(PAIR_TERMS)},
        **{name: _pairs([0], divergence, True) for divergence, name in enumerate(DIVERGENCES)},
        # As many terms as one launch takes, with every divergence but the simplest in turn.
        **{
            f"terms from {first}": _pairs(
                range(len(PAIR_TERMS))[first : first + MAX_TERMS],
                len(DIVERGENCES) - 1 - first // MAX_TERMS % (len(DIVERGENCES) - 1),
                True,
            )
            for first in range(0, len(PAIR_TERMS), MAX_TERMS)
        },
    },
    ("pairs", "unpaired_loss_kernel"): {
        **{name: (UNPAIRED, {"CODE": term}) for term, name in enumerate(UNPAIRED_TERMS)},
        **{
            f"{name}, full": ((*UNPAIRED, "ref_ptr", "weight_ptr", "kl_ptr"), {"CODE": term})
            for term, name in enumerate(UNPAIRED_TERMS)
        },
    },
}


POLICY = ("logprobs_ptr", "advantages_ptr", "mask_ptr", "grad_ptr", "sums_ptr")
VALUE = ("values_ptr", "returns_ptr", "mask_ptr", "grad_ptr", "parts_ptr")
TOTAL = ("sums_ptr", "out_ptr", "loss_ptr")
POLICY_ALL = (
    *POLICY, "old_ptr", "ref_ptr", "entropy_ptr", "sampler_ptr", "token_weight_ptr", "select_ptr", "offsets_ptr",
    "grad_entropy_ptr",
)  # fmt: skip


def _policy(
    given: tuple[str, ...],
    *,
    surrogate: int = 0,
    level: int = 0,
    correction: int = 0,
    kl: int = 0,
    aggregation: int = 0,
    full: bool = False,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    return given, {
        "SURROGATE": surrogate, "LEVEL": level, "KL_KIND": kl, "KL_UNBIASED": full, "CORRECTION": correction,
        "AGGREGATION": aggregation, "OF_SEQUENCE": not full, "DUAL": full, "OFF_POLICY": full,
    }  # fmt: skip


RATIO = (*POLICY, "old_ptr")
MEAN_OF_SEQUENCES = AGGREGATIONS.index("seq-mean-token-mean")  # the one that asks for a sequence's length
CASES |= {
    ("policy", "policy_loss_kernel"): {
        **{name: _policy(RATIO, surrogate=code) for code, name in enumerate(SURROGATES)},
        **{name: _policy(RATIO, aggregation=code) for code, name in enumerate(AGGREGATIONS)},
        **{name: _policy((*RATIO, "ref_ptr"), kl=code) for code, name in enumerate(KL_KINDS)},
        **{
            name: _policy((*RATIO, "sampler_ptr"), correction=code)
            for code, name in enumerate(CORRECTIONS)
            if name != "none"
        },
        **{
            f"level {name}, full": _policy(
                POLICY_ALL,
                level=code,
                correction=1 + code % (len(CORRECTIONS) - 1),
                kl=(1 + code) % len(KL_KINDS),
                aggregation=MEAN_OF_SEQUENCES,
                full=True,
            )
            for code, name in enumerate(LEVELS)
        },
        **{
            f"{name}, full": _policy(
                POLICY_ALL,
                surrogate=code,
                level=LEVELS.index("geometric"),
                correction=CORRECTIONS.index("token_mask"),
                kl=KL_KINDS.index("low_var_kl"),
                aggregation=MEAN_OF_SEQUENCES,
                full=True,
            )
            for code, name in enumerate(SURROGATES)
        },
        "shares": _policy((*RATIO, "share_ptr")),
    },
    ("policy", "policy_total_kernel"): {
        **{
            name: (TOTAL, {"HAS_NORMALIZER": False, "HAS_SHARES": False, "AGGREGATION": code})
            for code, name in enumerate(AGGREGATIONS)
        },
        "shares": (TOTAL, {"HAS_NORMALIZER": False, "HAS_SHARES": True, "AGGREGATION": 0}),
        "normalizer": (
            (*TOTAL, "normalizer_ptr"),
            {"HAS_NORMALIZER": True, "HAS_SHARES": False, "AGGREGATION": 0},
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
    ("tokens", "value_loss_kernel"): {
        "plain": (VALUE, {"parts_ptr": "*fp64"}),
        "clip, shares": ((*VALUE, "old_ptr", "share_ptr"), {"parts_ptr": "*fp64"}),
    },
    ("tokens", "value_total_kernel"): {
        "tokens": (("parts_ptr", "out_ptr", "loss_ptr"), {"parts_ptr": "*fp64"}),
        "scale": (("parts_ptr", "scale_ptr", "out_ptr", "loss_ptr"), {"parts_ptr": "*fp64"}),
    },
    ("tokens", "kl_estimate_kernel"): {
        f"{name}{', backwards' if upstream else ''}": (
            ("logprobs_ptr", "ref_ptr", *upstream, "out_ptr"),
            {"KIND": code},
        )
        for code, name in enumerate(KL_KINDS)
        for upstream in ((), ("upstream_ptr",))
    },
}
# The usual gradient is one row that is aligned; a row apart from the next one need not be.
CASES[("scale", "scale_kernel")] = {
    f"{dtype} {layout}": (("x_ptr", "scale_ptr", *aligned), {"x_ptr": f"*{dtype}", **rows})
    for dtype in ("fp32", "bf16", "fp16")
    for layout, aligned, rows in (("whole", ("width", "row_stride"), {"rows": 1}), ("rows", (), {}))
}
CASES[("reduce", "sum_rows_kernel")] = {
    "factor on the host": (("values_ptr", "out_ptr"), {}),
    "factor on the device": (("values_ptr", "factor_ptr", "out_ptr"), {}),
}
CASES[("reduce", "reciprocal_count_kernel")] = {"": (("target_ptr", "out_ptr"), {})}
ROW_PAIR = ("x_ptr", "y_ptr", "lse_parts_ptr", "y_lse_parts_ptr")
CASES[("divergences", "divergence_kernel")] = {
    f"{name} {dtype}": (
        (*ROW_PAIR, *given),
        {**dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr"), f"*{dtype}"), "KIND": kind, "SAME": dtype == "fp32"},
    )
    for kind, name in enumerate(DISTILLATION_DIVERGENCES)
    for dtype, given in (
        (
            "fp32",
            (
                "sums_ptr",
                "grad_ptr",
                "factors_ptr",
                "target_ptr",
                "hard_lse_parts_ptr",
                "bias_ptr",
                "y_bias_ptr",
            ),
        ),
        ("bf16", ("slopes_ptr", "grad_ptr", "factors_ptr", "target_ptr", "hard_lse_parts_ptr")),
    )
}
CASES[("logits", "logits_kernel")] = {
    f"{dtype} {layout}": (("w_ptr", "z_ptr", *aligned), {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}"})
    for dtype in ("fp32", "bf16", "fp16")
    for layout, aligned in (
        ("aligned", ("x_ptr", "x_stride", "w_stride", "z_stride", "dim")),
        ("odd", ("x_ptr",)),
    )
}
# A vocabulary that 16 divides, and one of entries one by one.
CASES[("exponentials", "exponentials_kernel")] = {
    f"{options}, {vocab}": (
        ("x_ptr", "target_ptr", *outputs, *given, *(("vocab", "row_stride") if vocab % 16 == 0 else ())),
        {"x_ptr": "*bf16", "rough_ptr": "*u8", "RAW": options == "plain", "HAS_SOFTCAP": options == "full"},
    )
    for outputs in (("loss_ptr", "lse_parts_ptr", "multiplier_ptr", "residue_ptr", "rough_ptr"),)
    for options, given in (
        ("plain", ()),
        ("bias", ("bias_ptr",)),
        ("full", ("bias_ptr", "row_scale_ptr", "w_ptr", "factor_ptr")),
    )
    for vocab in (32768, 50257, 1000)
}
SHAPES = {  # keys of kernels/shapes.py
    "sum_rows_kernel": "reduce", "reciprocal_count_kernel": "reduce", "segment_sum_kernel": "segment",
    "segment_expand_kernel": "segment", "pair_loss_kernel": "pair", "unpaired_loss_kernel": "pair", "policy_loss_kernel": "policy",
    "policy_total_kernel": "policy_total", "scan_kernel": "scan", "value_loss_kernel": "value", "value_total_kernel": "value_total",
    "kl_estimate_kernel": "kl", "scale_kernel": "scale", "divergence_kernel": "divergence",
}  # fmt: skip


def _shape(kernel: str, options: str, target: str) -> dict[str, Any]:
    if kernel == "logits_kernel":
        logits = importlib.import_module("kernels.logits")
        tile: dict[str, Any] = logits.tile_of(
            4 if options.startswith("fp32") else 2, 64 if target.startswith("gfx") else 32
        )
        return tile
    if kernel == "exponentials_kernel":
        rows = importlib.import_module("kernels.rows")
        kind, vocab = options.split(", ")
        shape: dict[str, Any] = rows.launch_shape(
            int(vocab), kind == "full", 2, 64 if target.startswith("gfx") else 32
        )
        return shape
    of_all: dict[str, dict[str, Any]] = importlib.import_module("kernels.shapes").SHAPES
    return of_all[SHAPES[kernel]]


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
    launch = _shape(name, options, target)
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
    dtype = constants.get("x_ptr", "*fp32").removeprefix("*")
    size = 4 if dtype == "fp32" else 2
    per_element = {  # bytes of a logit and of what is read with it
        "scale_kernel": size,
        "exponentials_kernel": size + 4 * ("bias_ptr" in given),
        "divergence_kernel": 2 * size + 4 * ("bias_ptr" in given) + 4 * ("y_bias_ptr" in given),
    }.get(name)
    numbers = compile_kernel(kernel, signature, constexprs, attributes, shape, target, per_element)
    return {"kernel": name.removesuffix("_kernel"), "target": target, "dtype": dtype, "options": options,
            "block": launch.get("BLOCK", ""), "warps": shape["num_warps"]} | numbers  # fmt: skip
