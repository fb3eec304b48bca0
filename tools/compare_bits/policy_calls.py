"""Calls of policy-gradient losses and advantages."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from arguments import Arguments, Case, borders, combined, joined, leaf, lengths_of, normal, padding, uniform
from vocabulary_calls import HEAD, explained, head_operands

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
