"""Calls of preference and unpaired losses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from arguments import (
    Arguments,
    Case,
    borders,
    combined,
    joined,
    leaf,
    lengths_of,
    normal,
    padding,
    targets,
    uniform,
)
from vocabulary_calls import HEAD, explained, head_operands

PAIR_TYPES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "simpo",
    "orpo",
]
PREFERENCE: dict[str, list[Any]] = {
    "beta": [0.3, "beta"],
    "label_smoothing": [0.1, "smoothing"],
    "margin": [0.4, "margin"],
    "weights": ["weights"],
    "reduction": ["none", "sum"],
    "reference_free": [True],
    "length_normalized": [True],
    "average_rewards": [True, False],
    "f_divergence_type": ["forward_kl", "js_divergence", "alpha_divergence"],
    "f_alpha_divergence_coef": [2.0, 1.0],
    "discopop_tau": [0.1],
    "bco_delta": [0.7],
    "simpo_gamma": [0.9],
    "simpo_alpha": [0.3],
}
TOKENS = {"ld_alpha": [0.4, 0.0]}


def per_pair(g: torch.Generator, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """The options with their tensors in place of the tensors' names."""
    values = {
        "beta": uniform(g, count) + 0.05,
        "smoothing": uniform(g, count) * 0.3 + 0.05,
        "margin": uniform(g, count),
        "weights": uniform(g, count) + 0.5,
    }
    return {
        key: values[value] if isinstance(value, str) and value in values else value
        for key, value in options.items()
    }


def build_pairs(count: int, layout: str = "sums", **options: Any) -> Callable[..., Arguments]:
    """Σ log p of each response, token log-probs padded, or packed."""

    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = per_pair(g, count, options)
        if layout == "sums":
            c, r = (leaf(-normal(g, count).abs() * 4 - 0.1, dtype) for _ in range(2))
            refs = [-normal(g, count).abs() * 4 for _ in range(2)]
            o["chosen_lengths"], o["rejected_lengths"] = lengths_of(g, count, 9), lengths_of(g, count, 9)
            if o.pop("nll", False):
                o["chosen_nll_logps"] = leaf(-normal(g, count).abs(), dtype)
                o["chosen_nll_lengths"] = lengths_of(g, count, 9)
        elif layout == "padded":
            c, r = leaf(-2 * uniform(g, count, 7), dtype), leaf(-2 * uniform(g, count, 5), dtype)
            refs = [-2 * uniform(g, count, 7), -2 * uniform(g, count, 5)]
            o["chosen_mask"], o["rejected_mask"] = padding(g, count, 7), padding(g, count, 5)
        else:
            o["chosen_cu_seqlens"], o["rejected_cu_seqlens"] = borders(g, count, 7), borders(g, count, 5)
            sizes = [int(o[f"{side}_cu_seqlens"][-1]) for side in ("chosen", "rejected")]
            c, r = (leaf(-2 * uniform(g, n), dtype) for n in sizes)
            refs = [-2 * uniform(g, n) for n in sizes]
        return (c, r, *([] if o.pop("no_reference", False) else refs)), o

    return build


def build_linear_pairs(
    pairs: int, length: int, dim: int, vocab: int, packed: bool = False, sequences: int = 2, **options: Any
) -> Callable[..., Arguments]:
    """``sequences`` 2: chosen and rejected; 1: responses on their own, with ``desirable``."""

    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = per_pair(g, pairs, options)
        count = pairs * sequences
        lead: tuple[int, ...] = (count, length)
        if packed:
            o["cu_seqlens"] = borders(g, count, length)
            lead = (int(o["cu_seqlens"][-1]),)
        x, w = head_operands(g, lead, dim, vocab, dtype, o)
        target = targets(g, vocab, *lead)
        how = o.pop("reference", "" if o.get("reference_free") else "logps")
        if how == "input":
            o["ref_input"] = normal(g, *lead, dim).to(dtype)
            o["ref_weight"] = (normal(g, vocab, dim) / dim**0.5).to(dtype)
            if "linear_bias" in o:
                o["ref_bias"] = normal(g, vocab).to(dtype)
        elif how == "logps" and sequences == 2:
            o["ref_chosen_logps"], o["ref_rejected_logps"] = (-normal(g, pairs).abs() * 4 for _ in range(2))
        elif how == "logps":
            o["ref_logps"] = -normal(g, pairs).abs() * 4
        args = (x, w, target) if sequences == 2 else (x, w, target, uniform(g, pairs) > 0.4)
        return args, o

    return build


def build_unpaired(count: int, layout: str = "sums", **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = per_pair(g, count, options)
        shape: tuple[int, ...] = (count,)
        if layout == "padded":
            shape, o["mask"] = (count, 6), padding(g, count, 6)
        elif layout == "packed":
            o["cu_seqlens"] = borders(g, count, 6)
            shape = (int(o["cu_seqlens"][-1]),)
        x = leaf(-3 * uniform(g, *shape), dtype)
        ref = None if o.pop("uniform", False) else -3 * uniform(g, *shape)
        if o.pop("mismatched", False):
            o["kl_logps"], o["ref_kl_logps"] = -3 * uniform(g, 4), -3 * uniform(g, 4) - 1
        return (x, ref, uniform(g, count) > 0.4), o

    return build


def preference_cases(rng: random.Random) -> Iterator[Case]:
    need = {"exo_pair": {"label_smoothing": 0.1}}
    for kind in PAIR_TYPES:
        o: dict[str, Any] = {"loss_type": kind, **need.get(kind, {})}
        for count, layout in ((7, "sums"), (301, "sums"), (5, "padded"), (5, "packed")):
            name = f"{layout}{count},{joined(o)}"
            yield Case(name, "preference_loss", build_pairs(count, layout, **o), small=count == 7)
        yield Case(f"7,reduction=none,{joined(o)}", "preference_loss", build_pairs(7, **o, reduction="none"))
        build = build_linear_pairs(3, 4, 16, 67, **o)
        yield Case(
            f"3x4x16x67,{joined(o)}", "linear_preference_loss", build, small=kind in ("sigmoid", "orpo")
        )
        o = {**o, "reference": "input", "bias": True}
        build = build_linear_pairs(3, 4, 16, 67, packed=True, **o)
        yield Case(f"packed3x4x16x67,{joined(o)}", "linear_preference_loss", build)
    singles = [{name: value} for name, values in PREFERENCE.items() for value in values]
    for k, o in enumerate([*singles, *combined(rng, PREFERENCE | TOKENS, 40)]):
        kind = rng.choice(PAIR_TYPES)
        o = {"loss_type": kind, **need.get(kind, {}), **o} if k >= len(singles) else o
        for layout in ("sums", "padded", "packed"):
            name = f"{layout}7,{joined(o)}"
            yield Case(
                name, "preference_loss", build_pairs(7, layout, **o), small=k % 3 == 0 and layout == "sums"
            )
    mixtures: list[dict[str, Any]] = [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["hinge", "apo_zero", "orpo", "simpo"], "beta": "beta", "weights": "weights"},
        {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.5], "nll": True},
        {"loss_type": ["sft"], "nll": True, "reduction": "none"},
    ]
    for o in mixtures:
        yield Case(f"7,{joined(o)}", "preference_loss", build_pairs(7, **o), small=True)
    linear = {k: v for k, v in PREFERENCE.items() if not k.startswith(("f_", "discopop", "bco"))} | HEAD
    linear |= TOKENS | {
        "temperature": [0.7],
        "softcap": [5.0],
        "token_metrics": [False],
        "use_weighting": [True],
    }
    linear |= {"reference": ["input", "logps"]}
    singles = [{name: value} for name, values in linear.items() for value in values]
    for o in [*singles, *combined(rng, linear, 40, 6)]:
        for packed in (False, True):
            name = f"{'packed' if packed else ''}3x4x16x67,{joined(o)}"
            yield Case(name, "linear_preference_loss", build_linear_pairs(3, 4, 16, 67, packed, **o))
    for o in [
        {},
        {"frozen": ("weight",)},
        {"loss_type": ["orpo", "sft"], "reference_free": True},
        {"chunk_size": 60},
    ]:
        build = build_linear_pairs(4, 30, 48, 700, **o)
        yield Case(f"4x30x48x700,{joined(o)}", "linear_preference_loss", build)
        yield Case(
            f"4x30x48x700,{joined(o)}", "explain", explained("linear_preference_loss", build), dtypes=("f32",)
        )
    yield Case("7", "dpo_loss", build_pairs(7, label_smoothing=0.1), small=True)
    yield Case("7", "ipo_loss", build_pairs(7, beta=0.2), small=True)
    for name in ("cpo_loss", "orpo_loss", "simpo_loss"):
        yield Case("7", name, build_pairs(7, no_reference=True), small=True)
        yield Case("padded5", name, build_pairs(5, "padded", no_reference=True, beta=0.7))
    for kind in ("hinge", "ipo", "simpo"):
        yield Case(f"7,{kind}", "cpo_loss", build_pairs(7, no_reference=True, loss_type=kind, cpo_alpha=0.3))
    yield Case("3x4x16x67", "linear_dpo_loss", build_linear_pairs(3, 4, 16, 67, label_smoothing=0.1))
    for name in ("linear_cpo_loss", "linear_orpo_loss", "linear_simpo_loss"):
        yield Case("3x4x16x67", name, build_linear_pairs(3, 4, 16, 67, reference=""))
        yield Case("packed", name, build_linear_pairs(3, 4, 16, 67, True, reference="", bias=True, beta=0.6))

    kto: list[dict[str, Any]] = [
        {"kl": 0.2},
        {"kl": torch.tensor(0.3), "reduction": "none"},
        {"mismatched": True},
        {"kl": 0.2, "beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7, "reduction": "sum"},
        {"loss_type": "apo_zero_unpaired"},
        {"kl": 0.1, "weights": "weights"},
        {"kl": 0.1, "uniform": True},
    ]
    bco: list[dict[str, Any]] = [
        {},
        {"delta": 0.4},
        {"beta": 0.5, "reduction": "none"},
        {"weights": "weights"},
    ]
    for name, options in (("kto_loss", kto), ("bco_loss", bco)):
        for o in options:
            for layout, count in (("sums", 7), ("padded", 7), ("packed", 7), ("sums", 301)):
                build = build_unpaired(count, layout, **o)
                yield Case(f"{layout}{count},{joined(o)}", name, build, small=count == 7 and layout == "sums")
    for o in [
        {"kl": 0.2},
        {"kl": 0.2, "reference": "input", "bias": True},
        {"kl": 0.1, "frozen": ("weight",), "reduction": "none"},
        {"loss_type": "apo_zero_unpaired", "weights": "weights", "chunk_size": 5},
        {"kl": 0.0, "reference": "", "temperature": 0.8, "softcap": 5.0, "token_metrics": False},
    ]:
        for packed in (False, True):
            build = build_linear_pairs(5, 4, 16, 67, packed, sequences=1, **o)
            yield Case(f"{'packed' if packed else ''}5x4x16x67,{joined(o)}", "linear_kto_loss", build)

    for o in [
        {},
        {"margin": 0.3, "center_coefficient": 0.1},
        {"margin": "margin", "label_smoothing": "smoothing", "weights": "weights", "reduction": "none"},
        {"label_smoothing": 0.2, "reduction": "sum"},
    ]:
        for shape in ((7,), (64,), (5, 1), (0,)):

            def build(
                dtype: torch.dtype, g: torch.Generator, shape: tuple[int, ...] = shape, o: dict[str, Any] = o
            ) -> Arguments:
                scores = (leaf(normal(g, *shape), dtype) for _ in range(2))
                return tuple(scores), per_pair(g, shape[0], o)

            yield Case(f"{shape},{joined(o)}", "reward_model_loss", build, small=shape == (7,))
    for o in [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"ignore_index": 1}]:

        def build(dtype: torch.dtype, g: torch.Generator, o: dict[str, Any] = o) -> Arguments:
            return (leaf(normal(g, 3, 5, 2), dtype), targets(g, 2, 3, 5, ignore=o.get("ignore_index"))), dict(
                o
            )

        yield Case(f"3x5x2,{joined(o)}", "process_reward_loss", build, small=True)
