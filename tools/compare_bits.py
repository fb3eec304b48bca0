"""Compares the bits of two versions of fastloss: values, metrics and gradients of seeded calls of every public function.

    PYTHONPATH=<one checkout> python tools/compare_bits.py make before.pt
    PYTHONPATH=<another checkout> python tools/compare_bits.py make after.pt
    python tools/compare_bits.py compare before.pt after.pt

``make`` runs the calls on every backend that can run here: the definition, the CPU kernels (each instruction set that this
machine has, one thread and two), the CUDA kernels emulated on the CPU and the Triton kernels in Triton's interpreter (both:
fewer and smaller calls), a few of them under torch.compile, under autocast, and differentiated twice. ``compare`` lists every
call of which a bit differs, with the largest difference, and ends with 1 if there is one.

It uses public names alone, so that it runs against any version: this file need not be part of the checkout that is measured.
What is not public stands in ``instruction_sets`` and ``emulate_cuda``.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib
import inspect
import itertools
import math
import os
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Before torch and triton are imported. MKL may sum in another order at another address of its operands.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import torch
from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
CONTROLS = {"__version__", "backends", "explain", "nn", "use_backend", "validate_targets"}


class Case(NamedTuple):
    """One call. ``build(dtype, generator)`` gives its arguments; tensors that require a gradient are its leaves."""

    name: str
    function: str  # a public name, "nn.Name" for a module that is called, "explain" for the plan of ``build``'s call
    build: Callable[[torch.dtype, torch.Generator], Arguments]
    small: bool = False  # small enough for Triton's interpreter and the emulation of CUDA
    dtypes: tuple[str, ...] = ("f32", "bf16", "f16", "f64")
    plain: bool = False  # has no kernel: run once, with the default backend
    twice: bool = False  # also the gradient of the gradient
    autocast: bool = False
    compiled: str = ""  # torch.compile's backend


class Setting(NamedTuple):
    """How the calls of one pass run."""

    backend: str
    isa: str
    threads: int

    def __str__(self) -> str:
        return f"{self.backend}/{self.isa or 'any'}/{self.threads}"


# --- what is not public -----------------------------------------------------------------------------------------------


def instruction_sets() -> tuple[list[str], Callable[[str], None]]:
    """The instruction sets of this machine, the one that is taken by default first, and how to force one."""
    try:
        native = importlib.import_module("fastloss._cpu")
    except ImportError:
        return [], lambda _: None
    return list(native.supported_isas()), native.set_isa


def emulate_cuda(checkout: Path) -> str:
    """Put the CUDA sources, compiled by g++ for the CPU, in place of the GPU's module; or why that is not possible."""
    build = None
    for folder in ("tests", "tests/helpers"):
        if (checkout / folder / "cuda_emulation" / "build.py").exists():
            sys.path.insert(0, str(checkout / folder))
            build = importlib.import_module("cuda_emulation.build").build_emulated
    if build is None:
        return "no tests/cuda_emulation beside the package"
    try:
        module = build()
    except RuntimeError as error:  # no compiler
        return str(error).splitlines()[0]
    # By the file: an installed fastloss may answer for a module that this checkout does not have.
    if (checkout / "fastloss" / "engine" / "native.py").exists():
        native, backend = (
            importlib.import_module(f"fastloss.engine.{name}") for name in ("native", "backend")
        )
        backend.replace_backend("cuda", native.emulated_cuda(module))
        return ""
    if (checkout / "fastloss" / "ops" / "cuda_rows.py").exists():  # before the backends were classes
        importlib.import_module("fastloss.ops.cuda_rows").emulate(module)
        return ""
    return "this fastloss has no way to run the CUDA kernels emulated"


# --- arguments --------------------------------------------------------------------------------------------------------


def normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=g) * scale


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g)


def leaf(x: Tensor, dtype: torch.dtype, frozen: bool = False) -> Tensor:
    return x.to(dtype).requires_grad_(not frozen)


def targets(g: torch.Generator, vocab: int, *shape: int, ignore: int | None = None) -> Tensor:
    """Classes, a quarter of them ignored."""
    t = torch.randint(0, vocab, shape, generator=g)
    t[uniform(g, *shape) < 0.25] = -100 if ignore is None else ignore
    t.view(-1)[-1] = vocab - 1
    return t


def lengths_of(g: torch.Generator, count: int, longest: int) -> Tensor:
    return torch.randint(1, longest + 1, (count,), generator=g)


def padding(g: torch.Generator, count: int, longest: int) -> Tensor:
    return torch.arange(longest)[None, :] < lengths_of(g, count, longest)[:, None]


def borders(g: torch.Generator, count: int, longest: int) -> Tensor:
    """``[count + 1]``, one sequence of length 0 where there are more than three."""
    lengths = lengths_of(g, count, longest)
    if count > 3:
        lengths[2] = 0
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def joined(options: dict[str, Any]) -> str:
    words = []
    for key, value in options.items():
        if isinstance(value, Tensor):
            value = f"tensor{value.item()}" if value.dim() == 0 else "tensor"
        words.append(key if value is True else f"{key}={value}")
    return ",".join(words).replace(" ", "").replace("'", "") or "default"


def combined(
    rng: random.Random, choices: dict[str, list[Any]], count: int, most: int = 5
) -> Iterator[dict[str, Any]]:
    """``count`` seeded combinations of 2 to ``most`` of the options."""
    for _ in range(count):
        names = rng.sample(list(choices), k=min(rng.randint(2, most), len(choices)))
        yield {name: rng.choice(choices[name]) for name in sorted(names)}


# --- cross-entropy and token statistics -------------------------------------------------------------------------------

CROSS_ENTROPY: dict[str, list[Any]] = {
    "reduction": ["mean", "sum", "none"],
    "label_smoothing": [0.1, 1.0],
    "z_loss": [0.01],
    "logit_scale": [0.3, 1.7],
    "softcap": [4.0, 30.0],
    "normalizer": [17, 3.5],
    "classes": [True],
    "return_stats": [True],
    "probabilities": [True],
}
STATISTICS = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "is_top1")
STATS: dict[str, list[Any]] = {
    "temperature": [0.7, 1.9],
    "logit_scale": [0.5],
    "softcap": [6.0],
    "outputs": [(name,) for name in STATISTICS[:3]] + [STATISTICS, ("logprobs", "entropy"), ("is_top1",)],
}
HEAD: dict[str, list[Any]] = {"bias": [True], "chunk_size": [2, 5], "frozen": [("weight",), ("input",)]}


def target_and_classes(
    g: torch.Generator, rows: int, vocab: int, dtype: torch.dtype, options: dict[str, Any]
) -> Tensor:
    if options.pop("classes", False):
        options["weight"] = (uniform(g, vocab) + 0.5).to(dtype)
    t = targets(g, vocab, rows, ignore=options.get("ignore_index"))
    if options.pop("probabilities", False):
        return normal(g, rows, vocab).softmax(-1).to(dtype)
    return t


def build_cross_entropy(rows: int, vocab: int, **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = dict(options)
        x = normal(g, rows, vocab, scale=o.pop("scale", 2.0))
        if o.pop("masked", False):
            x[:, ::3] = float("-inf")
        if o.pop("strided", False):
            x = x.repeat_interleave(2, 1)
            z = leaf(x, dtype)
            return (z[:, ::2], targets(g, vocab, rows)), o
        z = leaf(x, dtype)
        target = target_and_classes(g, rows, vocab, dtype, o)
        return (z * 1 if o.get("inplace") else z, target), o

    return build


def build_spatial(**options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        return (leaf(normal(g, 3, 11, 5, 2), dtype), targets(g, 11, 3, 5, 2)), dict(options)

    return build


def head_operands(
    g: torch.Generator,
    lead: tuple[int, ...],
    dim: int,
    vocab: int,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    frozen = options.pop("frozen", ())
    x = leaf(normal(g, *lead, dim), dtype, "input" in frozen)
    w = leaf(normal(g, vocab, dim, scale=2 / dim**0.5), dtype, "weight" in frozen)
    if options.pop("bias", False):
        options["linear_bias"] = leaf(normal(g, vocab), dtype, "bias" in frozen)
    return x, w


def build_linear_cross_entropy(rows: int, dim: int, vocab: int, **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = dict(options)
        x, w = head_operands(g, (rows,), dim, vocab, dtype, o)
        return (x, w, target_and_classes(g, rows, vocab, dtype, o)), o

    return build


def build_k_dimensional(**options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        x, w = leaf(normal(g, 6, 8), dtype), leaf(normal(g, 7, 3, 8), dtype)
        return (x, w, targets(g, 7, 6, 3, ignore=options.get("ignore_index"))), {
            "linear_bias": leaf(normal(g, 7, 3), dtype),
            **options,
        }

    return build


def build_stats(rows: int, vocab: int, **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        z = leaf(normal(g, rows, vocab, scale=2.0), dtype)
        return (
            z * 1 if options.get("inplace") else z,
            targets(g, vocab, rows, ignore=options.get("ignore_index")),
        ), dict(options)

    return build


def build_linear_stats(rows: int, dim: int, vocab: int, **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = dict(options)
        x, w = head_operands(g, (rows,), dim, vocab, dtype, o)
        return (x, w, targets(g, vocab, rows)), o

    return build


def vocabulary_cases(rng: random.Random) -> Iterator[Case]:
    singles = [{name: value} for name, values in CROSS_ENTROPY.items() for value in values]
    for o in [{}, *singles, *combined(rng, CROSS_ENTROPY, 30)]:
        yield Case(f"5x33,{joined(o)}", "cross_entropy", build_cross_entropy(5, 33, **o), small=True)
    extra: list[dict[str, Any]] = [
        {"inplace": True},
        {"inplace": True, "softcap": 5.0, "label_smoothing": 0.1},
        {"inplace": True, "reduction": "none", "classes": True, "z_loss": 0.01},
        {"masked": True},
        {"masked": True, "z_loss": 0.1, "reduction": "none"},
        {"strided": True},
        {"scale": 60.0},
        {"ignore_index": 3},
        {"normalizer": torch.tensor(9.0)},
        {"reduce": False},
        {"size_average": False},
    ]
    for o in extra:
        yield Case(f"5x33,{joined(o)}", "cross_entropy", build_cross_entropy(5, 33, **o), small=True)
    for o in [
        {},
        {"softcap": 5.0, "z_loss": 0.01},
        {"reduction": "none"},
        {"inplace": True},
        {"probabilities": True},
    ]:
        for rows, vocab in ((1, 1), (1, 2), (67, 1031), (3, 20011)):
            yield Case(f"{rows}x{vocab},{joined(o)}", "cross_entropy", build_cross_entropy(rows, vocab, **o))
    for o in [{}, {"reduction": "none"}, {"label_smoothing": 0.1}]:
        yield Case(f"3x11x5x2,{joined(o)}", "cross_entropy", build_spatial(**o), small=True)

    linear = CROSS_ENTROPY | HEAD
    singles = [{name: value} for name, values in linear.items() for value in values]
    for k, o in enumerate([{}, *singles, *combined(rng, linear, 40)]):
        build = build_linear_cross_entropy(9, 16, 67, **o)
        yield Case(f"9x16x67,{joined(o)}", "linear_cross_entropy", build, small=k < 25)
    for o in [
        {},
        {"bias": True, "softcap": 5.0, "z_loss": 0.01},
        {"reduction": "none"},
        {"frozen": ("weight",)},
        {"frozen": ("input",)},
        {"chunk_size": 64},
        {"label_smoothing": 0.1, "return_stats": True},
    ]:
        for rows, dim, vocab in ((1, 4, 2), (130, 48, 1031), (300, 96, 700)):
            name, build = (
                f"{rows}x{dim}x{vocab},{joined(o)}",
                build_linear_cross_entropy(rows, dim, vocab, **o),
            )
            yield Case(name, "linear_cross_entropy", build)
            yield Case(name, "explain", explained("linear_cross_entropy", build), dtypes=("f32", "bf16"))
    for o in [{}, {"reduction": "none"}, {"ignore_index": 2}]:
        yield Case(f"6x3x8x7,{joined(o)}", "linear_cross_entropy", build_k_dimensional(**o))

    singles = [{name: value} for name, values in STATS.items() for value in values]
    for o in [{}, *singles, *combined(rng, STATS, 12), {"inplace": True}, {"ignore_index": 5}]:
        for k, (rows, vocab) in enumerate(((7, 33), (65, 1031))):
            yield Case(
                f"{rows}x{vocab},{joined(o)}", "token_stats", build_stats(rows, vocab, **o), small=k == 0
            )
    linear = STATS | HEAD
    singles = [{name: value} for name, values in linear.items() for value in values]
    for k, o in enumerate([{}, *singles, *combined(rng, linear, 20)]):
        yield Case(
            f"9x16x67,{joined(o)}", "linear_token_stats", build_linear_stats(9, 16, 67, **o), small=k < 12
        )
        if k % 3 == 0:
            yield Case(
                f"130x48x1031,{joined(o)}", "linear_token_stats", build_linear_stats(130, 48, 1031, **o)
            )
    for many in (0, 3):
        for temperature in (1.0, 0.6):

            def build(
                dtype: torch.dtype, g: torch.Generator, many: int = many, t: float = temperature
            ) -> Arguments:
                shape = (4, 5, many) if many else (4, 5)
                index = torch.randint(0, 33, shape, generator=g)
                return (leaf(normal(g, 4, 5, 33), dtype), index, t), {}

            yield Case(f"4x5x33,K={many},{temperature}", "selective_log_softmax", build, small=True)
    yield Case(
        "4x5x33", "entropy_from_logits", lambda d, g: ((leaf(normal(g, 4, 5, 33), d),), {}), small=True
    )


def explained(function: str, build: Callable[..., Arguments]) -> Callable[..., Arguments]:
    def with_function(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        args, kwargs = build(dtype, g)
        return (function, *args), kwargs

    return with_function


# --- preference -------------------------------------------------------------------------------------------------------

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


# --- policy gradient --------------------------------------------------------------------------------------------------

POLICY_TYPES = [
    "reinforce",
    "ppo",
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "gmpo",
    "cispo",
    "sapo",
    "vespo",
    "luspo",
    "gpg",
    "rloo",
    "clip_cov",
    "kl_cov",
    "dppo_tv",
    "dppo_kl",
]
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
POLICY: dict[str, list[Any]] = {
    "clip_low": [0.1, None],
    "clip_high": [0.3, None],
    "dual_clip": [3.0],
    "delta": [1.5],
    "beta": [0.1],
    "kl_estimator": ["k1", "k2", "k3", "abs", "low_var_kl"],
    "kl_unbiased": [True],
    "importance_level": ["token", "sequence", "sequence_sum", "geometric"],
    "aggregation": AGGREGATIONS,
    "max_length": [11.0],
    "normalizer": [13, 4.5],
    "entropy_coef": [0.05],
    "entropy_aggregation": AGGREGATIONS,
    "top_entropy_quantile": [0.5],
    "off_policy_threshold": [0.1],
    "importance_mode": [*MODES, None],
    "importance_cap": [1.1],
    "importance_floor": [0.8],
    "cispo_min": [0.5],
    "cispo_max": [1.5],
    "weights": ["per_token", "per_sequence"],
    "advantage": ["per_token"],
    "on_policy": [True],
}
CLIPPED = {
    "ppo",
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "luspo",
    "rloo",
    "clip_cov",
}  # take dual_clip and delta
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "sapo": [{"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.4}],
    "vespo": [{"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.0}],
    "kl_cov": [{"kl_cov_coef": 0.5, "kl_cov_ratio": 0.2}],
    "clip_cov": [{"clip_cov_ratio": 0.3, "clip_cov_low": -1.0, "clip_cov_high": 3.0}],
}


def of_type(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    left_out = () if kind in CLIPPED else ("dual_clip", "delta")
    return {"loss_type": kind, **{k: v for k, v in options.items() if k not in left_out}}


def policy_tensors(
    g: torch.Generator, count: int, length: int, layout: str, o: dict[str, Any]
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape of the tokens, and every constant of the call that the options ask for."""
    lead: tuple[int, ...] = (count, length)
    if layout == "packed":
        o["cu_seqlens"] = borders(g, count, length)
        lead = (int(o["cu_seqlens"][-1]),)
        mask = uniform(g, *lead) > 0.2
    else:
        mask = padding(g, count, length) & (uniform(g, *lead) > 0.1)
        if count > 3:
            mask[1] = False
    logprobs = -3 * uniform(g, *lead)
    per_token = o.pop("advantage", "") == "per_token"
    tensors: dict[str, Any] = {
        "logprobs": logprobs,
        "old": None if o.pop("on_policy", False) else logprobs + normal(g, *lead, scale=0.3),
        "advantages": normal(g, *lead) if per_token else normal(g, count),
        "mask": None if o.pop("unmasked", False) else mask,
    }
    if o.get("beta") or o.pop("with_ref", False):
        o["ref_logprobs"] = logprobs + normal(g, *lead, scale=0.3)
    if "importance_mode" in o or "importance_cap" in o or "importance_floor" in o:
        o["sampler_logprobs"] = logprobs + normal(g, *lead, scale=0.2)
    if "weights" in o:
        o["weights"] = uniform(g, *(lead if o["weights"] == "per_token" else (count,))) + 0.5
    return lead, tensors


def build_policy(count: int, length: int, layout: str = "padded", **options: Any) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = dict(options)
        lead, t = policy_tensors(g, count, length, layout, o)
        if o.pop("seeded", False):
            o["generator"] = torch.Generator().manual_seed(5)
        if o.get("entropy_coef") or "top_entropy_quantile" in o or o.pop("with_entropy", False):
            o["entropy"] = leaf(uniform(g, *lead), dtype)
        return (leaf(t["logprobs"], dtype), t["old"], t["advantages"], t["mask"]), o

    return build


def build_linear_policy(
    count: int, length: int, dim: int, vocab: int, layout: str = "padded", **options: Any
) -> Callable[..., Arguments]:
    def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        o = dict(options)
        lead, t = policy_tensors(g, count, length, layout, o)
        x, w = head_operands(g, lead, dim, vocab, dtype, o)
        target = torch.randint(0, vocab, lead, generator=g)
        return (x, w, target, t["old"], t["advantages"], t["mask"]), o

    return build


def policy_cases(rng: random.Random) -> Iterator[Case]:
    for kind in POLICY_TYPES:
        for more in [{}, {"beta": 0.1, "entropy_coef": 0.05}, *PARAMETERS.get(kind, [])]:
            o: dict[str, Any] = {"loss_type": kind, **more}
            if kind == "dr_grpo":
                o["max_length"] = 9.0
            for count, length, layout in ((5, 9, "padded"), (5, 9, "packed"), (13, 130, "padded")):
                name = f"{layout}{count}x{length},{joined(o)}"
                build = build_policy(count, length, layout, **o)
                yield Case(name, "policy_loss", build, small=length == 9 and layout == "padded")
            for layout in ("padded", "packed"):
                build = build_linear_policy(3, 5, 16, 67, layout, **o)
                yield Case(
                    f"{layout}3x5x16x67,{joined(o)}", "linear_policy_loss", build, small=kind == "grpo"
                )
    yield Case(
        "seeded", "policy_loss", build_policy(5, 9, loss_type="clip_cov", seeded=True, clip_cov_ratio=0.3)
    )
    singles = [{name: value} for name, values in POLICY.items() for value in values]
    for k, o in enumerate([*singles, *combined(rng, POLICY, 60, 7)]):
        if k >= len(singles):
            o = of_type(rng.choice(POLICY_TYPES), o)
        o = {"beta": 0.1, **o} if "kl_estimator" in o or "kl_unbiased" in o else o
        for layout in ("padded", "packed"):
            build = build_policy(5, 9, layout, **o)
            yield Case(
                f"{layout}5x9,{joined(o)}", "policy_loss", build, small=layout == "padded" and k % 2 == 0
            )
    for o in [{"with_ref": True, "with_entropy": True}, {"unmasked": True}]:
        yield Case(f"5x9,{joined(o)}", "policy_loss", build_policy(5, 9, **o), small=True)
    linear = POLICY | HEAD | {"temperature": [0.7], "softcap": [5.0], "with_entropy": [True]}
    linear = {k: v for k, v in linear.items() if k not in ("cispo_min", "cispo_max", "kl_unbiased")}
    for o in [{"temperature": 0.7}, {"bias": True}, {"chunk_size": 4}, *combined(rng, linear, 60, 7)]:
        o = of_type(rng.choice(POLICY_TYPES), o)
        for layout in ("padded", "packed"):
            build = build_linear_policy(3, 5, 16, 67, layout, **o)
            yield Case(f"{layout}3x5x16x67,{joined(o)}", "linear_policy_loss", build)
    for o in [{}, {"loss_type": "gspo"}, {"frozen": ("weight",)}, {"entropy_coef": 0.1, "chunk_size": 50}]:
        build = build_linear_policy(4, 40, 48, 700, **o)
        yield Case(f"4x40x48x700,{joined(o)}", "linear_policy_loss", build)
        yield Case(
            f"4x40x48x700,{joined(o)}", "explain", explained("linear_policy_loss", build), dtypes=("f32",)
        )
    yield from advantage_cases(rng)


def tokens(
    g: torch.Generator, layout: str, count: int = 5, length: int = 9
) -> tuple[tuple[int, ...], dict[str, Any]]:
    if layout == "packed":
        cu_seqlens = borders(g, count, length)
        return (int(cu_seqlens[-1]),), {"cu_seqlens": cu_seqlens}
    return (count, length), {}


def advantage_cases(rng: random.Random) -> Iterator[Case]:
    for layout in ("padded", "packed"):
        for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 0.0)):

            def gae(
                dtype: torch.dtype,
                g: torch.Generator,
                layout: str = layout,
                gamma: float = gamma,
                lam: float = lam,
            ) -> Arguments:
                lead, o = tokens(g, layout)
                mask = uniform(g, *lead) > 0.2
                args = (normal(g, *lead).to(dtype), normal(g, *lead).to(dtype), mask)
                return args, {"gamma": gamma, "lam": lam, **o}

            yield Case(f"{layout},{gamma},{lam}", "gae", gae, small=True)

            def returns(
                dtype: torch.dtype, g: torch.Generator, layout: str = layout, gamma: float = gamma
            ) -> Arguments:
                lead, o = tokens(g, layout)
                return (normal(g, *lead).to(dtype), uniform(g, *lead) > 0.2), {"gamma": gamma, **o}

            yield Case(f"{layout},{gamma},{lam}", "discounted_returns", returns, small=True)

        def plus(dtype: torch.dtype, g: torch.Generator, layout: str = layout) -> Arguments:
            lead, o = tokens(g, layout, 4)
            return (normal(g, *lead).to(dtype), uniform(g, *lead) > 0.2), {
                "gamma": 0.9,
                "kl": normal(g, *lead),
                "kl_coef": 0.1,
                "group_size": 2,
                **o,
            }

        yield Case(layout, "reinforce_plus_plus_advantages", plus, small=True)

        def remax(dtype: torch.dtype, g: torch.Generator, layout: str = layout) -> Arguments:
            lead, o = tokens(g, layout)
            return (normal(g, *lead).to(dtype), normal(g, 5), uniform(g, *lead) > 0.2), o

        yield Case(layout, "remax_advantages", remax, small=True)

        def optimal(dtype: torch.dtype, g: torch.Generator, layout: str = layout) -> Arguments:
            lead, o = tokens(g, layout, 4)
            args = (
                normal(g, *lead).to(dtype),
                -uniform(g, *lead),
                -uniform(g, *lead),
                uniform(g, *lead) > 0.2,
                2,
            )
            return args, {"token_weights": uniform(g, *lead), **o}

        yield Case(layout, "optimal_token_advantages", optimal, plain=True)

        def outcome(dtype: torch.dtype, g: torch.Generator, layout: str = layout) -> Arguments:
            lead, o = tokens(g, layout)
            return (normal(g, 5).to(dtype), uniform(g, *lead) > 0.2), o

        yield Case(layout, "token_rewards", outcome, plain=True)
        for statistic, level in itertools.product(
            ("ratio", "k2", "k3", "tv", "binary_kl"), ("token", "seq_mean", "seq_sum", "seq_max")
        ):

            def trust(
                dtype: torch.dtype,
                g: torch.Generator,
                layout: str = layout,
                s: str = statistic,
                level: str = level,
            ) -> Arguments:
                lead, o = tokens(g, layout)
                old = -3 * uniform(g, *lead)
                sampler = old + normal(g, *lead, scale=0.2)
                bounds = {"low": 0.9, "high": 1.1} if s == "ratio" else {"high": 0.03}
                return (old.to(dtype), sampler.to(dtype), uniform(g, *lead) > 0.2), {
                    "statistic": s,
                    "level": level,
                    **bounds,
                    **o,
                }

            yield Case(f"{layout},{statistic},{level}", "trust_region_mask", trust, plain=True)
        for o in [
            {},
            {"clip_range": 0.2},
            {"clip_range": 0.2, "aggregation": "seq-mean-token-mean"},
            {"normalizer": 7},
        ]:

            def value(
                dtype: torch.dtype, g: torch.Generator, layout: str = layout, o: dict[str, Any] = o
            ) -> Arguments:
                lead, more = tokens(g, layout)
                v = normal(g, *lead)
                args = (
                    leaf(v, dtype),
                    v + normal(g, *lead, scale=0.3),
                    normal(g, *lead),
                    uniform(g, *lead) > 0.2,
                )
                return args, {**o, **more}

            yield Case(f"{layout},{joined(o)}", "value_loss", value, plain=True)
    for kind in ("k1", "k2", "k3", "abs", "low_var_kl"):

        def kl(dtype: torch.dtype, g: torch.Generator, kind: str = kind) -> Arguments:
            x = -3 * uniform(g, 4, 6)
            return (leaf(x, dtype), x + normal(g, 4, 6)), {"kind": kind}

        yield Case(kind, "kl_estimate", kl, plain=True)
    yield Case("remax", "remax_advantages", lambda d, g: ((normal(g, 5).to(d), normal(g, 5)), {}), small=True)

    def group(name: str, *more: Any, columns: int = 0, **options: Any) -> Case:
        def build(dtype: torch.dtype, g: torch.Generator) -> Arguments:
            x = normal(g, *((12, columns) if columns else (12,))).to(dtype)
            x[4:8] = 1.0
            args = (x, lengths_of(g, 12, 9), 4) if name == "opo_advantages" else (x, 4)
            return args, dict(options)

        return Case(joined(options), name, build, plain=True)

    for scale in ("group", "batch", "none"):
        yield group("group_advantages", scale=scale)
    for normalize in (False, True):
        yield group("rloo_advantages", normalize=normalize)
    yield group("opo_advantages")
    yield group("gpg_advantages")
    for scale in ("group", "none"):
        yield group("pass_at_k_advantages", scale=scale)
    yield group("gdpo_advantages", columns=3)
    yield group("gdpo_advantages", columns=3, weights=torch.tensor([1.0, 0.5, 2.0]))
    for shift in (True, False):
        mask_and_shift = {"shift_mean": shift}
        yield Case(
            f"shift={shift}",
            "whiten",
            lambda d, g, o=mask_and_shift: ((normal(g, 4, 6).to(d), uniform(g, 4, 6) > 0.3), dict(o)),
            plain=True,
        )


# --- modules, compiled, twice, autocast -------------------------------------------------------------------------------


def module_cases() -> Iterator[Case]:
    """The first argument of a module's ``build`` is its constructor's keywords."""

    def module(name: str, build: Callable[..., Arguments], **constructor: Any) -> Case:
        def with_constructor(dtype: torch.dtype, g: torch.Generator) -> Arguments:
            args, kwargs = build(dtype, g)
            return (constructor, *args), kwargs

        return Case(joined(constructor), f"nn.{name}", with_constructor)

    yield module("CrossEntropyLoss", build_cross_entropy(5, 33), label_smoothing=0.1, z_loss=0.01)
    yield module("PreferenceLoss", build_pairs(7), loss_type="hinge", beta=0.2)
    yield module("PolicyLoss", build_policy(5, 9), loss_type="grpo", clip_high=0.28)
    yield module(
        "RewardModelLoss", lambda d, g: ((leaf(normal(g, 5), d), leaf(normal(g, 5), d)), {}), margin=0.1
    )

    def hidden(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        return (leaf(normal(g, 9, 16), dtype), targets(g, 67, 9)), {}

    yield module("LinearCrossEntropyLoss", hidden, in_features=16, num_classes=67, z_loss=0.01)
    yield module("LinearHead", hidden, in_features=16, out_features=67, bias=True, softcap=5.0)

    def stats(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        return hidden(dtype, g)[0], {"stats": ("logprobs", "entropy")}

    yield module("LinearHead", stats, in_features=16, out_features=67)


def special_cases() -> Iterator[Case]:
    calls: list[tuple[str, Callable[..., Arguments]]] = [
        ("cross_entropy", build_cross_entropy(5, 33, z_loss=0.01, softcap=5.0)),
        ("cross_entropy", build_cross_entropy(5, 33, reduction="none", label_smoothing=0.1)),
        ("linear_cross_entropy", build_linear_cross_entropy(9, 16, 67, bias=True)),
        ("linear_cross_entropy", build_linear_cross_entropy(9, 16, 67, frozen=("weight",), reduction="none")),
        ("token_stats", build_stats(7, 33, outputs=STATISTICS)),
        ("linear_token_stats", build_linear_stats(9, 16, 67, outputs=("logprobs", "entropy"))),
        ("preference_loss", build_pairs(7, loss_type=["sigmoid", "sft"])),
        ("preference_loss", build_pairs(5, "padded", loss_type="ipo")),
        ("linear_preference_loss", build_linear_pairs(3, 4, 16, 67)),
        ("linear_kto_loss", build_linear_pairs(5, 4, 16, 67, sequences=1, kl=0.1)),
        ("kto_loss", build_unpaired(7, kl=0.1)),
        ("policy_loss", build_policy(5, 9, loss_type="grpo", beta=0.1)),
        ("policy_loss", build_policy(5, 9, loss_type="gspo")),
        ("linear_policy_loss", build_linear_policy(3, 5, 16, 67, beta=0.1, entropy_coef=0.01)),
        ("reward_model_loss", lambda d, g: ((leaf(normal(g, 7), d), leaf(normal(g, 7), d)), {})),
    ]
    for k, (name, build) in enumerate(calls):
        yield Case(f"twice{k}", name, build, twice=True, dtypes=("f32", "f64"))
        yield Case(f"autocast{k}", name, build, autocast=True, dtypes=("f32",))
        yield Case(f"aot_eager{k}", name, build, compiled="aot_eager", dtypes=("f32", "bf16"))
        if k in (0, 2, 6, 8, 11, 13):
            yield Case(f"inductor{k}", name, build, compiled="inductor", dtypes=("f32",))


def all_cases() -> list[Case]:
    rng = random.Random(20)
    cases = [
        *vocabulary_cases(rng),
        *preference_cases(rng),
        *policy_cases(rng),
        *module_cases(),
        *special_cases(),
    ]
    seen: Counter[str] = Counter()
    out = []
    for case in cases:  # two combinations may be the same options
        key = f"{case.function}:{case.name}"
        seen[key] += 1
        out.append(case if seen[key] == 1 else case._replace(name=f"{case.name}#{seen[key]}"))
    return out


# --- running ----------------------------------------------------------------------------------------------------------


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors whose gradient is asked for: through a view or a copy, the tensor that it was made of."""
    found = {}
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.requires_grad:
            while value.grad_fn is not None:
                node = value.grad_fn
                while not hasattr(node, "variable"):
                    node = node.next_functions[0][0]
                value = node.variable
            found[str(key)] = value
    return found


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for key, item in enumerate(value):
            yield from flatten(item, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path or "value", value


def evaluate(fastloss: Any, case: Case, setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the call gives: values by their names, "d name" gradients, or the error."""
    seed = zlib.crc32(f"{case.function}:{case.name}".encode())
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    args, kwargs = case.build(dtype, g)
    function, extra = case.function, {}
    if function.startswith("nn."):
        module = getattr(fastloss.nn, function[3:])(**args[0])
        args = args[1:]
        if case.build and isinstance(args[0], Tensor):
            module = module.to(dtype)
        extra = dict(module.named_parameters())
        call: Callable[..., Any] = module
    elif function == "explain":
        call, target = fastloss.explain, getattr(fastloss, args[0])
        args = (target, *args[1:])
    else:
        call = getattr(fastloss, function)
    if setting.backend != "auto" and not case.plain:
        kwargs["backend"] = setting.backend
    leaves = {**leaves_of(args, kwargs), **extra}
    if case.compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend=case.compiled, fullgraph=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext()
    try:
        with autocast:
            result = call(*args, **kwargs)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    if function == "explain":
        return {"plan": {k: v for k, v in result.items() if k != "reason"}}
    out: dict[str, Any] = {}
    upstream, differentiable = [], []
    for name, value in flatten(result):
        out[name] = value.detach().clone() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor) and value.requires_grad:
            differentiable.append(value)
            upstream.append(
                torch.randn(value.shape, generator=g).to(value.dtype)
                if value.dim()
                else torch.tensor(1.5, dtype=value.dtype)
            )
    if not differentiable or not leaves:
        return out
    try:
        grads = torch.autograd.grad(
            differentiable, list(leaves.values()), upstream, allow_unused=True, create_graph=case.twice
        )
        for name, grad in zip(leaves, grads, strict=True):
            out[f"d {name}"] = None if grad is None else grad.detach().clone()
        if case.twice:
            given = [x for x in grads if x is not None and x.requires_grad]
            total = sum((x * torch.randn(x.shape, generator=g).to(x.dtype)).sum() for x in given)
            second = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if given else ()
            for name, grad in zip(leaves, second, strict=False):
                out[f"dd {name}"] = None if grad is None else grad.detach().clone()
    except Exception as error:
        out["error in backward"] = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return out


def settings_of(fastloss: Any, wanted: list[str], checkout: Path) -> tuple[list[Setting], dict[str, str]]:
    """The passes that can run here, and why the others cannot."""
    isas, _ = instruction_sets()
    skipped: dict[str, str] = {}
    found = []
    if "auto" in wanted:
        found.append(Setting("auto", "", 1))
    if "reference" in wanted:
        found.append(Setting("reference", "", 1))
    if "cpu" in wanted and isas:
        found += [Setting("cpu", isas[0], 2), *(Setting("cpu", isa, 1) for isa in isas)]
    elif "cpu" in wanted:
        skipped["cpu"] = "no native module"
    if "cuda" in wanted:
        reason = emulate_cuda(checkout)
        if reason:
            skipped["cuda"] = reason
        else:
            found.append(Setting("cuda", "", 1))
    if "triton" in wanted:
        state = fastloss.backends()["triton"]
        if state == "available":
            found.append(Setting("triton", "", 1))
        else:
            skipped["triton"] = state
    return found, skipped


def runs_in(case: Case, setting: Setting, first_isa: str) -> bool:
    if case.plain or case.function.startswith("nn."):
        return setting.backend == "auto"
    if case.compiled:
        return setting.backend in ("auto", "reference")
    if case.twice or case.autocast:
        return setting.backend != "triton" and setting.isa in ("", first_isa)
    if case.function == "explain":
        return setting.backend in ("auto", "reference", "cuda")
    return case.small if setting.backend in ("cuda", "triton") else True


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def make(out: Path, wanted: list[str], only: list[str]) -> int:
    import fastloss

    checkout = Path(fastloss.__file__).resolve().parents[1]
    isas, force = instruction_sets()
    settings, skipped = settings_of(fastloss, wanted, checkout)
    for name, reason in skipped.items():
        print(f"{name}: left out ({reason})")
    cases = [case for case in all_cases() if matches(f"{case.function}:{case.name}", only)]
    calls: dict[str, dict[str, Any]] = {}
    for setting in settings:
        start = time.perf_counter()
        torch.set_num_threads(setting.threads)
        if isas:
            force(setting.isa or isas[0])
        count = errors = 0
        for case in cases:
            if not runs_in(case, setting, isas[0] if isas else ""):
                continue
            names = case.dtypes
            if setting.backend in ("cuda", "triton"):
                names = tuple(n for n in names if n != "f64")
            if setting.backend == "triton":
                names = tuple(n for n in names if n == "f32" or zlib.crc32(case.name.encode()) % 4 == 0)
            for name in names:
                result = evaluate(fastloss, case, setting, DTYPES[name])
                calls[f"{setting}|{case.function}|{case.name}|{name}"] = result
                count += 1
                errors += "error" in result
        seconds = time.perf_counter() - start
        print(f"{setting}: {count} calls, {errors} of them errors, {seconds:.0f} s", flush=True)
    called = {case.function.removeprefix("nn.") for case in cases}
    public = {n for n in fastloss.__all__ if inspect.isfunction(getattr(fastloss, n))} - CONTROLS
    public |= {
        n for n, c in vars(fastloss.nn).items() if inspect.isclass(c) and c.__module__ == fastloss.nn.__name__
    }
    missing = sorted(public - called) if only == ["*"] else []
    save(calls, isas, out)
    print(f"{len(calls)} calls in {out}, sha256 {digest(calls)[:16]}")
    if missing:
        print(f"public names that no call covers: {', '.join(missing)}")
    return 1 if missing else 0


def save(calls: dict[str, dict[str, Any]], isas: list[str], out: Path) -> None:
    """One file: the bytes of all arrays behind each other, each that is there twice once, and where each lies."""
    places: dict[tuple[str, tuple[int, ...], bytes], int] = {}
    data = bytearray()

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        raw, dtype, shape = bits(value), str(value.dtype).removeprefix("torch."), tuple(value.shape)
        key = (dtype, shape, hashlib.sha256(raw).digest())
        if key not in places:
            data.extend(b"\0" * (-len(data) % 8))
            places[key] = len(data)
            data.extend(raw)
        return {"dtype": dtype, "shape": shape, "start": places[key], "sha256": key[2].hex()}

    index = {key: {name: place(value) for name, value in values.items()} for key, values in calls.items()}
    whole = torch.frombuffer(data, dtype=torch.uint8)
    torch.save(
        {
            "torch": str(torch.__version__),
            "isas": isas,
            "calls": index,
            "bytes": whole,
            "hash": digest(calls),
        },
        out,
    )


def load(path: Path) -> dict[str, Any]:
    found = torch.load(path, weights_only=True)
    whole = found.pop("bytes")

    def tensor(value: Any) -> Any:
        if not (isinstance(value, dict) and "start" in value):
            return value
        dtype, shape = getattr(torch, value["dtype"]), value["shape"]
        size = dtype.itemsize * math.prod(shape)
        return whole[value["start"] : value["start"] + size].view(dtype).reshape(shape)

    found["calls"] = {
        key: {name: tensor(value) for name, value in values.items()} for key, values in found["calls"].items()
    }
    return found


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def digest(calls: dict[str, dict[str, Any]]) -> str:
    """One hash of all bits."""
    whole = hashlib.sha256()
    for key in sorted(calls):
        for name in sorted(calls[key]):
            value = calls[key][name]
            whole.update(f"{key} {name} ".encode())
            whole.update(bits(value) if isinstance(value, Tensor) else repr(value).encode())
    return whole.hexdigest()


# --- comparing --------------------------------------------------------------------------------------------------------


def difference(a: Any, b: Any) -> str:
    """What differs between two values, empty where nothing does."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return "" if type(a) is type(b) and a == b else f"{a!r} became {b!r}"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}"
    if bits(a) == bits(b):
        return ""
    x, y = a.double(), b.double()
    same_number = (x == y) | (x.isnan() & y.isnan())
    if bool(same_number.all()):
        return "signs of zeros or NaNs alone"
    finite = x.isfinite() & y.isfinite()
    if bool((~finite & ~same_number).any()):
        k = int((~finite & ~same_number).reshape(-1).int().argmax())
        return f"{x.reshape(-1)[k].item()} became {y.reshape(-1)[k].item()} at {k}"
    error = (x - y).abs()[finite].max().item()
    size = x.abs()[finite].max().item()
    roundings = error / (torch.finfo(a.dtype).eps * size) if a.is_floating_point() and size else float("inf")
    return f"{int((~same_number).sum())} of {x.numel()} differ, by {error:.3g} at most ({roundings:.2g} eps of the largest, {size:.3g})"


def compare(before: Path, after: Path, show: int, only: list[str]) -> int:
    old, new = (load(path) for path in (before, after))
    for field in ("torch", "isas"):
        if old[field] != new[field]:
            print(f"{field}: {old[field]} became {new[field]}")
    a, b = ({k: v for k, v in x["calls"].items() if matches(k, only)} for x in (old, new))
    for label, keys in (("only before", a.keys() - b.keys()), ("only after", b.keys() - a.keys())):
        if keys:
            print(f"{label}: {len(keys)} calls, such as {sorted(keys)[0]}")
    differing: dict[str, list[str]] = {}
    worded = 0
    for key in sorted(a.keys() & b.keys()):
        lines = []
        for name in dict.fromkeys((*a[key], *b[key])):
            if name.startswith("error") and name in a[key] and name in b[key]:
                kinds = [x[key][name].split(":")[0] for x in (a, b)]
                if kinds[0] == kinds[1]:  # the words of a message may change
                    worded += a[key][name] != b[key][name]
                    continue
            if name not in a[key] or name not in b[key]:
                there = a[key].get(name, b[key].get(name))
                what = there if isinstance(there, str) else "a value"
                lines.append(f"{name}: {what} {'is gone' if name in a[key] else 'is new'}")
            elif text := difference(a[key][name], b[key][name]):
                lines.append(f"{name}: {text}")
        if lines:
            differing[key] = lines
    for key, lines in itertools.islice(differing.items(), show or None):
        print(key)
        for line in lines:
            print(f"    {line}")
    print(
        f"{len(a.keys() & b.keys())} calls compared, {len(differing)} differ; {worded} errors have another message"
    )
    table = Counter((key.split("|")[0], key.split("|")[1]) for key in differing)
    for (setting, function), count in sorted(table.items()):
        print(f"    {count:5d}  {setting:24s} {function}")
    return 1 if differing or a.keys() != b.keys() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "make", help="run the calls with the fastloss on the path and keep what they give"
    )
    command.add_argument("out", type=Path)
    command.add_argument("--backends", default="auto,reference,cpu,cuda,triton")
    command.add_argument(
        "--only", action="append", help="a pattern of function:name, such as 'linear_*'; again for more"
    )
    command = commands.add_parser("compare", help="list the calls of which a bit differs")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.add_argument("--show", type=int, default=40, help="how many calls to print in full; 0: all")
    command.add_argument(
        "--only", action="append", help="a pattern of setting|function|name|dtype; again for more"
    )
    args = parser.parse_args()
    if args.command == "make":
        return make(args.out, args.backends.split(","), args.only or ["*"])
    return compare(args.before, args.after, args.show, args.only or ["*"])


if __name__ == "__main__":
    sys.exit(main())
