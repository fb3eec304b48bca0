"""preference_loss, reward_model_loss, policy_loss, value_loss, kl_estimate: OpenRLHF's models/loss.py and models/utils.py."""

from __future__ import annotations

from typing import Any

import torch
from golden_format import DTYPES, TOLERANCE, Family, grid, leaf, lengths_mask, peer
from stand_ins import load
from trl_grpo import ADVANTAGES, LENGTHS, LOGPROBS, OLD, REF, ROWS, SAMPLER, WIDTH

openrlhf = load("openrlhf", ("openrlhf.models.utils", "openrlhf.models.loss"), ("deepspeed",))


def where(name: str) -> dict[str, str]:
    return peer("openrlhf", name, "0.11.2")


def preference() -> None:
    pairs = 6
    shared = {
        "chosen_logps": grid(91, pairs, scale=4, shift=-12),
        "rejected_logps": grid(92, pairs, scale=4, shift=-12),
        "ref_chosen_logps": grid(93, pairs, scale=4, shift=-12),
        "ref_rejected_logps": grid(94, pairs, scale=4, shift=-12),
    }
    family = Family("openrlhf_dpo", "preference_loss", where("models/loss.py DPOLoss"), shared,
                    "cDPO's label smoothing; IPO without normalisation by length is that of lengths of 1.")  # fmt: skip
    ones = {
        "chosen_lengths": torch.ones(pairs, dtype=torch.int64),
        "rejected_lengths": torch.ones(pairs, dtype=torch.int64),
    }
    for beta, smoothing, ipo in (
        (0.1, 0.0, False),
        (0.5, 0.1, False),
        (0.5, 0.4, False),
        (0.1, 0.0, True),
        (0.5, 0.0, True),
    ):
        for dtype in DTYPES:
            chosen, rejected = leaf(shared["chosen_logps"], dtype), leaf(shared["rejected_logps"], dtype)
            refs = [shared[f"ref_{x}_logps"].to(dtype) for x in ("chosen", "rejected")]
            loss, won, lost = openrlhf.DPOLoss(beta, smoothing, ipo)(chosen, rejected, *refs)
            loss.backward()
            options = {"loss_type": "ipo" if ipo else "sigmoid", "beta": beta, "label_smoothing": smoothing}
            family.add(f"{options}", dtype, options, {"loss": loss, "chosen_rewards": won, "rejected_rewards": lost},
                       {"chosen_logps": chosen.grad, "rejected_logps": rejected.grad},
                       inputs=ones if ipo else None)  # fmt: skip
    family.write()


def reward() -> None:
    pairs = 6
    shared = {"chosen_rewards": grid(95, pairs, scale=2), "rejected_rewards": grid(96, pairs, scale=2)}
    margin = grid(97, pairs).abs()
    family = Family(
        "openrlhf_reward", "reward_model_loss", where("models/loss.py PairWiseLoss, LogExpLoss"), shared
    )
    for kind in ("PairWiseLoss", "PairWiseLoss margin", "LogExpLoss"):
        for dtype in DTYPES:
            chosen, rejected = (leaf(x, dtype) for x in shared.values())
            given = margin.to(dtype) if "margin" in kind else None
            loss = getattr(openrlhf, kind.split()[0])()(chosen, rejected, given)
            loss.backward()
            family.add(kind, dtype, {}, {"loss": loss},
                       {"chosen_rewards": chosen.grad, "rejected_rewards": rejected.grad},
                       inputs={"margin": margin} if given is not None else None)  # fmt: skip
    family.write()


def policy() -> None:
    shared = {"logprobs": LOGPROBS, "old_logprobs": OLD, "advantages": ADVANTAGES,
              "mask": lengths_mask(LENGTHS["padded"], WIDTH)}  # fmt: skip
    family = Family("openrlhf_policy", "policy_loss", where("models/loss.py PolicyLoss"), shared)
    variants: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("ppo", {}, {}),
        ("ppo dual", {"dual_clip": 1.3, "clip_eps_high": 0.28}, {"dual_clip": 1.3, "clip_high": 0.28}),
        ("ppo sequences", {"token_level_loss": False}, {"aggregation": "seq-mean-token-mean"}),
        ("gspo", {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.1},
         {"loss_type": "gspo", "clip_low": 0.05, "clip_high": 0.1, "aggregation": "seq-mean-token-mean"}),
        ("tis", {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": [0.75, 1.25]},
         {"importance_mode": "token_truncate", "importance_floor": 0.75, "importance_cap": 1.25}),
        ("icepop", {"is_correction_level": "token", "is_correction_mode": "mask", "is_correction_threshold": [0.75, 1.25]},
         {"importance_mode": "token_mask", "importance_floor": 0.75, "importance_cap": 1.25}),
    ]  # fmt: skip
    for name, settings, keywords in variants:
        for mask_name, lengths in LENGTHS.items():
            for dtype in DTYPES:
                mask, logps = lengths_mask(lengths, WIDTH), leaf(LOGPROBS, dtype)
                correct = "is_correction_level" in settings
                loss, _, kl, _, cut = openrlhf.PolicyLoss(**settings)(
                    logps, OLD.to(dtype), ADVANTAGES.to(dtype).unsqueeze(1), mask.to(dtype),
                    SAMPLER.to(dtype) if correct else None,
                )  # fmt: skip
                loss.backward()
                options = {
                    "loss_type": "ppo",
                    "clip_low": 0.2,
                    "clip_high": 0.2,
                    "aggregation": "token-mean",
                } | keywords
                metrics = {"approx_kl": kl} | ({"importance/cut_fraction": cut} if correct else {})
                inputs = {"mask": mask} | ({"sampler_logprobs": SAMPLER} if correct else {})
                family.add(f"{name} {mask_name}", dtype, options, {"loss": loss, "metrics": metrics},
                           {"logprobs": logps.grad}, inputs=inputs, metric_tolerance=TOLERANCE[torch.float32],
                           tolerance={torch.float64: {"rtol": 2e-8, "atol": 1e-10}}.get(dtype))  # fmt: skip
    family.write()


def gate(gating: str, seq: bool, low: float, high: float, mask: torch.Tensor) -> torch.Tensor:
    """Which tokens OpenRLHF's statistic keeps, by its formula: the input ``weights`` of the case."""
    p, q = SAMPLER.exp().clamp(1e-6, 1 - 1e-6), OLD.exp().clamp(1e-6, 1 - 1e-6)
    stat = {
        "ratio": OLD - SAMPLER,
        "tv": (p - q).abs(),
        "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
    }[gating]
    if seq:
        stat = ((stat * mask).sum(1) / mask.sum(1)).unsqueeze(1).expand_as(stat)
    stat = stat.exp() if gating == "ratio" else stat
    return (stat >= low) & (stat <= high)


def gated() -> None:
    """The survivors of a gate keep their weight per token: ``weights`` beside ``token_truncate`` without a cap."""
    shared = {
        "logprobs": LOGPROBS,
        "old_logprobs": OLD,
        "advantages": ADVANTAGES,
        "sampler_logprobs": SAMPLER,
    }
    family = Family(
        "openrlhf_gated", "policy_loss", where("models/loss.py PolicyLoss, is_correction_gating"), shared
    )
    options = {"loss_type": "ppo", "aggregation": "token-mean"}
    for gating, seq, threshold in (
        ("ratio", True, [0.95, 1.05]), ("tv", False, [0.0, 0.05]), ("tv", True, [0.0, 0.08]),
        ("binary_kl", False, [0.0, 0.01]), ("binary_kl", True, [0.0, 0.03]),
    ):  # fmt: skip
        for mask_name, lengths in LENGTHS.items():
            mask = lengths_mask(lengths, WIDTH)
            keep = gate(gating, seq, *threshold, mask)
            assert 0 < (keep & mask).sum() < mask.sum(), (gating, seq, "the case decides nothing")
            for dtype in DTYPES:
                logps = leaf(LOGPROBS, dtype)
                loss, *_ = openrlhf.PolicyLoss(
                    is_correction_level="seq" if seq else "token", is_correction_gating=gating, is_correction_threshold=threshold,
                )(logps, OLD.to(dtype), ADVANTAGES.to(dtype).unsqueeze(1), mask.to(dtype), SAMPLER.to(dtype))  # fmt: skip
                loss.backward()
                family.add(f"{gating} {'sequences' if seq else 'tokens'} {mask_name}", dtype, options, {"loss": loss},
                           {"logprobs": logps.grad}, inputs={"mask": mask, "weights": keep},
                           tolerance={torch.float64: {"rtol": 2e-8, "atol": 1e-10}}.get(dtype))  # fmt: skip
    family.write()


def value_and_kl() -> None:
    values, old_values, returns = (
        grid(82, ROWS, WIDTH),
        grid(83, ROWS, WIDTH),
        grid(84, ROWS, WIDTH, scale=1.5),
    )
    shared = {"values": values, "old_values": old_values, "returns": returns}
    family = Family("openrlhf_value", "value_loss", where("models/loss.py ValueLoss"), shared)
    for clip in (None, 0.5):
        for token_level in (True, False):
            for dtype in DTYPES:
                mask, guess = lengths_mask(LENGTHS["padded"], WIDTH), leaf(values, dtype)
                loss = openrlhf.ValueLoss(clip, token_level)(
                    guess, old_values.to(dtype), returns.to(dtype), mask.to(dtype)
                )
                loss.backward()
                options = {
                    "clip_range": clip,
                    "aggregation": "token-mean" if token_level else "seq-mean-token-mean",
                }
                family.add(f"{options}", dtype, options, {"loss": loss}, {"values": guess.grad}, inputs={"mask": mask},
                           tolerance={torch.float64: {"rtol": 2e-8, "atol": 1e-10}}.get(dtype))  # fmt: skip
    family.write()
    note = "OpenRLHF computes in float32. Its estimates end at ±10: these are smaller."
    shared = {"logprobs": LOGPROBS, "ref_logprobs": REF}
    family = Family("openrlhf_kl", "kl_estimate", where("models/utils.py compute_approx_kl"), shared, note)
    utils = __import__("sys").modules["openrlhf.models.utils"]
    for kind in ("k1", "k2", "k3"):
        logps = leaf(LOGPROBS, torch.float32)
        estimate = utils.compute_approx_kl(logps, REF.float(), kl_estimator=kind)
        estimate.sum().backward()
        family.add(kind, torch.float32, {"kind": kind}, {"result": estimate}, {"logprobs": logps.grad})
    family.write()


def main() -> None:
    preference()
    reward()
    policy()
    gated()
    value_and_kl()


if __name__ == "__main__":
    main()
