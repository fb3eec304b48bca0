"""What the project set out to reach, and what a run measured of it."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastloss.bench.ratios import OURS, is_default


@dataclass(frozen=True)
class Goal:
    what: str
    cases: str  # pattern of the cases' names
    # "over_limit", "extra" (of the logits' bytes), "extra_over_weight" (those past a float32 d weight), or a pattern of the
    # peers to be faster than
    key: str
    bound: float  # at most for "over_limit" and "extra"; at least, a factor, for peers
    memory: str = ""  # of the head: "low" or "fast"; empty: what it chooses


class Outcome(NamedTuple):
    what: str
    case: str
    measured: float
    bound: str
    reached: bool
    contended: bool = False  # somebody else was running: never counted as reached

    @property
    def verdict(self) -> str:
        if self.contended:
            return "contended: not counted"
        return "reached" if self.reached else "not reached"


HEADS = "*linear-*"
EAGER_METRICS = "eager with TRL's metrics"  # the same work: fastloss's losses come with theirs
GOALS = (
    Goal("in place, warm: over a copy", "row-f32-*-inplace-warm", "over_limit", 1.2),
    Goal("in place, cold: against eager", "row-f32-*-inplace-cold", "torch eager", 7.0),
    Goal("in place, cold: against compile", "row-f32-*-inplace-cold", "torch.compile", 4.5),
    Goal("in place, cold: against eager", "row-bf16-*-inplace-cold", "torch eager", 7.0),
    Goal("in place, cold: against compile", "row-bf16-*-inplace-cold", "torch.compile", 4.0),
    Goal("new tensor, warm: against eager", "row-f32-*-new-warm", "torch eager", 7.0),
    Goal("new tensor, warm: against compile", "row-f32-*-new-warm", "torch.compile", 5.0),
    Goal("new tensor, cold: against eager", "row-f32-*-new-cold", "torch eager", 2.5),
    Goal("new tensor, cold: against compile", "row-f32-*-new-cold", "torch.compile", 1.6),
    Goal("linear head: over three GEMMs", "linear-bf16-*[0-9]", "over_limit", 1.10),
    Goal("any head, frozen: over its GEMMs", "*linear-*-frozen", "over_limit", 1.10),
    Goal("any head, no gradient: over its GEMM", "*linear-*-nograd", "over_limit", 1.10),
    Goal("linear head: faster than every peer", "linear-bf16-*[0-9]", "*", 1.0),
    Goal("linear head: extra memory, of the logits", "linear-bf16-*[0-9]", "extra", 0.05),
    Goal("any head, fast: over its GEMMs", HEADS, "over_limit", 1.10, "fast"),
    Goal("any head, fast: extra memory, less d weight in float32", HEADS, "extra_over_weight", 0.05, "fast"),
    Goal("any head, low: over its GEMMs", HEADS, "over_limit", 1.35, "low"),
    Goal("any head, low: extra memory, of the logits", HEADS, "extra", 0.05, "low"),
    Goal("any head: faster than every peer", HEADS, "*", 1.0),
    Goal("tiny tensor: over torch's own", "tiny", "over_limit", 1.5),
    Goal("preference from the head: over 1 + 3 GEMMs", "preference-linear-bf16-*[0-9]", "over_limit", 1.15),
    Goal("preference from the head: against TRL", "preference-linear-bf16-*[0-9]", "trl", 3.0),
    Goal("preference from the head: against Liger", "preference-linear-bf16-*[0-9]", "liger*", 1.0),
    Goal("preference from the head: extra memory", "preference-linear-bf16-*[0-9]", "extra", 0.05),
    Goal("preference from log-probs: against eager", "preference-*-64", "torch eager", 3.0),
    Goal("preference from log-probs: against eager with metrics", "preference-*-64", EAGER_METRICS, 3.0),
    Goal("policy from the head: over three GEMMs", "policy-linear-bf16-*[0-9]", "over_limit", 1.15),
    Goal("policy from the head: against TRL", "policy-linear-bf16-*[0-9]", "trl", 3.0),
    Goal("policy from the head: against Liger", "policy-linear-bf16-*[0-9]", "liger*", 1.0),
    Goal("policy from the head: extra memory", "policy-linear-bf16-*[0-9]", "extra", 0.05),
    Goal("policy from log-probs: against eager", "policy-ppo-*", "torch eager", 5.0),
    Goal("policy from log-probs: against eager", "policy-gspo-*", "torch eager", 5.0),
    Goal("policy from log-probs: against eager with metrics", "policy-ppo-*", EAGER_METRICS, 5.0),
    Goal("policy from log-probs: against eager with metrics", "policy-gspo-*", EAGER_METRICS, 5.0),
    Goal("GPU, rows in place: over a copy", "row-*-8192x*-inplace-warm", "over_limit", 1 / 0.9),
    Goal("GPU, head: over three GEMMs", "linear-bf16-8192x4096x128256-whole", "over_limit", 1.04),
    Goal("GPU, head, an eighth ignored: over them", "linear-bf16-8192x4096x128256", "over_limit", 0.95),
    Goal(
        "GPU, head of few rows: against quack",
        "linear-bf16-[124]0[0-9][0-9]x4096x*-whole",
        "quack linear",
        1.0,
    ),
    Goal(
        "GPU, head of Gemma 2: against cut-cross-entropy",
        "linear-bf16-8192x2304x*",
        "cut-cross-entropy*",
        1.0,
    ),
    Goal("GPU, preference: against TRL and Liger", "preference-linear-bf16-8192x4096x*", "trl", 1.25),
    Goal("GPU, preference: against TRL and Liger", "preference-linear-bf16-8192x4096x*", "liger*", 1.25),
    Goal("GPU, policy: against TRL and Liger", "policy-linear-bf16-8192x4096x*[0-9]", "trl", 1.25),
    Goal("GPU, policy: against TRL and Liger", "policy-linear-bf16-8192x4096x*[0-9]", "liger*", 1.25),
    Goal("advantages: against verl's loop", "gae-*", "torch eager", 20.0),
    Goal("advantages: against TRL's loop", "gae-*", "trl", 20.0),
)
LENGTHS = ("f32", "bf16")  # dtypes of the cases over lengths
FLAT = 0.10  # cost per token over the lengths: (largest - least) / least


def met(results: dict[str, Any]) -> list[Outcome]:
    """Every goal whose cases and providers were measured."""
    outcomes = [
        outcome
        for goal in GOALS
        for case in results["cases"]
        if fnmatch.fnmatch(case["name"], goal.cases) and (outcome := _outcome(goal, case)) is not None
    ]
    for dtype in LENGTHS:
        costs = per_token(results, dtype)
        if len(costs) > 1:
            spread = max(costs.values()) / min(costs.values()) - 1
            lengths = f"tokens-{dtype} {min(costs)} … {max(costs)}"
            what = "cost per token: spread over lengths"
            involved = [p for case in _lengths(results, dtype) if (p := _fastest(case)) is not None]
            outcomes.append(_judged(what, lengths, spread, f"≤ {FLAT:g}", spread <= FLAT, involved))
    return outcomes


def _judged(
    what: str, case: str, measured: float, bound: str, reached: bool, involved: list[dict[str, Any]]
) -> Outcome:
    contended = any(p.get("contended") for p in involved)
    return Outcome(what, case, measured, bound, reached and not contended, contended)


def _outcome(goal: Goal, case: dict[str, Any]) -> Outcome | None:
    ours = _fastest(case, goal.memory)
    if ours is None:
        return None
    bound = f"≤ {goal.bound:g}"
    if goal.key == "extra":  # bytes do not depend on who else is running
        value = ours["extra_bytes"] / case["logits_bytes"]
        return Outcome(goal.what, case["name"], value, bound, value <= goal.bound)
    if goal.key == "extra_over_weight":
        _, dim, vocab = case["shape"]
        rest = max(0, ours["extra_bytes"] - dim * vocab * torch.float32.itemsize)
        value = rest / case["logits_bytes"]
        return Outcome(goal.what, case["name"], value, bound, value <= goal.bound)
    if goal.key == "over_limit":
        if (value := ours.get("over_limit")) is None:
            return None
        limit = [p for p in case["providers"] if p["name"] == case.get("limit")]
        return _judged(goal.what, case["name"], value, bound, value <= goal.bound, [ours, *limit])
    peers = [p for p in case["providers"] if "fastloss_speedup" in p and fnmatch.fnmatch(p["name"], goal.key)]
    if not peers:
        return None
    least = min(p["fastloss_speedup"] for p in peers)
    return _judged(goal.what, case["name"], least, f"≥ {goal.bound:g}", least >= goal.bound, [ours, *peers])


def _fastest(case: dict[str, Any], memory: str = "") -> dict[str, Any] | None:
    def is_asked(name: str) -> bool:
        return name.startswith(OURS) and name.endswith(f"memory={memory}") if memory else is_default(name)

    ours = [p for p in case["providers"] if is_asked(p["name"]) and "reason" not in p]
    return min(ours, key=lambda p: p["median"], default=None)


def per_token(results: dict[str, Any], dtype: str) -> dict[int, float]:
    """Rows of a batch to fastloss's seconds per token."""
    fastest = {case["shape"][0]: _fastest(case) for case in _lengths(results, dtype)}
    return {rows: ours["median"] / rows for rows, ours in sorted(fastest.items()) if ours is not None}


def _lengths(results: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    return [case for case in results["cases"] if case["name"].startswith(f"tokens-{dtype}-")]
