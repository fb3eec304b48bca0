"""policy_loss, value_loss, kl_estimate and advantages: the functions of verl's trainer/ppo/core_algos.py.

verl's package imports a whole training stack; the module itself needs torch and numpy, so that stack gets stand-ins.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch
from golden_format import DTYPES, Family, grid, leaf, lengths_mask, peer
from stand_ins import load
from torch import Tensor
from trl_grpo import ENTROPY, LENGTHS, LOGPROBS, OLD, REF, ROWS, SAMPLER, WIDTH

verl = load(
    "verl",
    (
        "verl.utils.device",
        "verl.utils.import_utils",
        "verl.utils.torch_functional",
        "verl.trainer.ppo.core_algos",
    ),
    ("omegaconf", "tensordict", "ray", "verl.trainer.config", "verl.workers"),
)
TOKEN_ADVANTAGES = grid(81, ROWS, WIDTH)
ADVANTAGES = grid(46, ROWS)
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
# verl's masked means have 1e-8 in the denominator.
TOLERANCE = {torch.float32: {"rtol": 3e-5, "atol": 2e-6}, torch.float64: {"rtol": 2e-8, "atol": 1e-9}}


def where(function: str) -> dict[str, str]:
    return peer("verl", f"trainer/ppo/core_algos.py {function}", "0.9.1")


def config(low: float, high: float, dual: float = 3.0, **more: Any) -> Any:
    """What the loss functions read of verl's ActorConfig; the class is the stand-in that they check for."""
    made = verl.ActorConfig()
    for name, value in {"clip_ratio": 0.2, "clip_ratio_low": low, "clip_ratio_high": high, "tau_pos": 1.0,
                        "tau_neg": 1.05, "global_batch_info": {}, "get": lambda key, default: dual,
                        "policy_loss": types.SimpleNamespace(**more)}.items():  # fmt: skip
        setattr(made, name, value)
    return made


class Policy:
    """The cases of one of verl's policy losses."""

    def __init__(self, file: str, function: str, note: str = ""):
        self.function = getattr(verl, function)
        shared = {"logprobs": LOGPROBS, "old_logprobs": OLD, "advantages": TOKEN_ADVANTAGES,
                  "mask": lengths_mask(LENGTHS["padded"], WIDTH)}  # fmt: skip
        self.family = Family(file, "policy_loss", where(function), shared, note)

    def add(self, name: str, options: dict[str, Any], settings: Any, *, advantages: Tensor = TOKEN_ADVANTAGES,
            how: str = "token-mean", mask_name: str = "padded", sampler: bool = False, metrics: dict[str, str] | None = None,
            kl: tuple[str, float] | None = None, entropy_coef: float = 0.0,
            constants: dict[str, Tensor] | None = None) -> None:  # fmt: skip
        mask = lengths_mask(LENGTHS[mask_name], WIDTH)
        for dtype in DTYPES:
            logps, entropy = leaf(LOGPROBS, dtype), leaf(ENTROPY, dtype)
            per_token = advantages if advantages.dim() == 2 else advantages.unsqueeze(1).expand(ROWS, WIDTH)
            # truncated importance sampling, as verl's rollout correction makes it
            weights = (OLD - SAMPLER).clamp(-20, 20).exp().clamp(max=1.25).to(dtype) if sampler else None
            loss, found = self.function(
                old_log_prob=OLD.to(dtype),
                log_prob=logps,
                advantages=per_token.to(dtype),
                response_mask=mask.to(dtype),
                loss_agg_mode=how,
                config=settings,
                rollout_is_weights=weights,
            )
            inputs = {"advantages": advantages, "mask": mask} | (constants or {})
            keywords = {"aggregation": how} | options
            if sampler:
                inputs["sampler_logprobs"] = SAMPLER
                keywords |= {"importance_mode": "token_truncate", "importance_cap": 1.25}
            if kl is not None:
                penalty = verl.kl_penalty(logps, REF.to(dtype), kl[0])
                loss = loss + kl[1] * verl.agg_loss(penalty, mask.to(dtype), how)
                inputs["ref_logprobs"] = REF
                keywords |= {"beta": kl[1], "kl_estimator": "low_var_kl" if kl[0] == "k3" else kl[0]}
            if entropy_coef:
                loss = loss - entropy_coef * verl.agg_loss(entropy, mask.to(dtype), how)
                inputs["entropy"] = ENTROPY
                keywords["entropy_coef"] = entropy_coef
            loss.backward()
            gradients = {"logprobs": logps.grad} | ({"entropy": entropy.grad} if entropy_coef else {})
            outputs = {"loss": loss,
                       "metrics": {ours: torch.tensor(found[theirs], dtype=dtype)
                                   for ours, theirs in (metrics or {}).items()}}  # fmt: skip
            self.family.add(f"{name} {how} {mask_name}", dtype, keywords, outputs, gradients, inputs=inputs,
                            tolerance=TOLERANCE[dtype])  # fmt: skip

    def write(self) -> None:
        self.family.write()


def ppo() -> None:
    policy = Policy("verl_ppo", "compute_policy_loss_vanilla")
    clips = {"loss_type": "ppo", "clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.3}
    settings = config(0.1, 0.28, 1.3)
    metrics = {"approx_kl": "actor/ppo_kl", "clip_ratio/dual": "actor/pg_clipfrac_lower"}
    for how in AGGREGATIONS:
        for mask_name in LENGTHS:
            policy.add("dual clip", clips, settings, how=how, mask_name=mask_name, metrics=metrics)
        for estimator in ("k1", "k2", "abs", "k3"):
            policy.add(f"KL {estimator}", clips, settings, how=how, kl=(estimator, 0.3))
        policy.add("entropy", clips, settings, how=how, entropy_coef=0.1)
        policy.add("sampler", clips, settings, how=how, sampler=True)
    policy.write()


def others() -> None:
    policy = Policy(
        "verl_gspo", "compute_policy_loss_gspo", "The same advantage for every token of a sequence."
    )
    for mask_name in LENGTHS:
        policy.add("gspo", {"loss_type": "gspo", "clip_low": 0.05, "clip_high": 0.1}, config(0.05, 0.1),
                   advantages=ADVANTAGES, how="seq-mean-token-mean", mask_name=mask_name,
                   metrics={"approx_kl": "actor/ppo_kl"})  # fmt: skip
    policy.write()
    policy = Policy("verl_gmpo", "compute_policy_loss_geo_mean")
    for mask_name in LENGTHS:
        policy.add("gmpo", {"loss_type": "gmpo", "clip_low": 0.2, "clip_high": 0.3}, config(0.2, 0.3),
                   advantages=ADVANTAGES, how="seq-mean-token-mean", mask_name=mask_name)  # fmt: skip
    policy.write()
    policy = Policy("verl_cispo", "compute_policy_loss_cispo", "verl bounds the weight below too.")
    for how in AGGREGATIONS:
        policy.add(
            "cispo", {"loss_type": "cispo", "cispo_min": 0.75, "cispo_max": 1.5}, config(0.25, 0.5), how=how
        )
    policy.write()
    policy = Policy("verl_sapo", "compute_policy_loss_sapo")
    for mask_name in LENGTHS:
        policy.add(
            "sapo", {"loss_type": "sapo"}, config(0.2, 0.2), how="seq-mean-token-mean", mask_name=mask_name
        )
    policy.write()
    policy = Policy("verl_gpg", "compute_policy_loss_gpg")
    for how in AGGREGATIONS:
        for loss_type in ("gpg", "reinforce"):
            policy.add(loss_type, {"loss_type": loss_type}, config(0.2, 0.2), how=how)
    policy.add("gpg sampler", {"loss_type": "gpg"}, config(0.2, 0.2), sampler=True)
    policy.write()
    policy = Policy("verl_dro", "compute_policy_loss_dro", "Its penalty is k2 to the old policy.")
    options = {"loss_type": "gpg", "beta": 0.5, "kl_estimator": "k2"}
    for how in AGGREGATIONS:
        for mask_name in LENGTHS:
            policy.add("dro", options, config(0.2, 0.2, dro_beta=0.5), how=how, mask_name=mask_name,
                       constants={"ref_logprobs": OLD}, metrics={"approx_kl": "actor/ppo_kl"})  # fmt: skip
    policy.write()
    for name in ("dppo_tv", "dppo_kl"):
        policy = Policy(f"verl_{name}", f"compute_policy_loss_{name}", "clip_ratio_c is cispo_max.")
        for low, high, cap in ((0.05, 0.1, 20.0), (0.01, 0.02, 1.25)):
            options = {"loss_type": name, "clip_low": low, "clip_high": high, "cispo_max": cap}
            for mask_name in LENGTHS:
                policy.add(f"{name} {low} {high} {cap}", options, config(low, high, cap), mask_name=mask_name,
                           metrics={"approx_kl": "actor/ppo_kl", "clip_ratio/region": "actor/pg_clipfrac"})  # fmt: skip
        policy.write()
    note = "verl draws among the eligible tokens: here the ratio takes all of them, so that nothing is drawn."
    policy = Policy("verl_clip_cov", "compute_policy_loss_clip_cov", note)
    for low, high in ((0.2, 5.0), (0.05, 0.75)):
        options = {"loss_type": "clip_cov", "clip_low": 0.2, "clip_high": 0.2, "clip_cov_ratio": 1.0,
                   "clip_cov_low": low, "clip_cov_high": high}  # fmt: skip
        policy.add(f"clip_cov ({low}, {high})", options,
                   config(0.2, 0.2, clip_cov_ratio=1.0, clip_cov_lb=low, clip_cov_ub=high))  # fmt: skip
    policy.write()
    policy = Policy("verl_kl_cov", "compute_policy_loss_kl_cov")
    for ratio, coefficient in ((0.01, 1.0), (0.25, 0.5)):
        options = {"loss_type": "kl_cov", "kl_cov_ratio": ratio, "kl_cov_coef": coefficient}
        for how in ("token-mean", "seq-mean-token-mean"):
            policy.add(f"kl_cov {ratio}", options, config(0.2, 0.2, kl_cov_ratio=ratio, ppo_kl_coef=coefficient),
                       how=how)  # fmt: skip
    policy.write()


def kl_and_value() -> None:
    family = Family(
        "verl_kl", "kl_estimate", where("kl_penalty_forward"), {"logprobs": LOGPROBS, "ref_logprobs": REF}
    )
    for kind in ("k1", "k2", "abs", "low_var_kl"):
        for dtype in DTYPES:
            logps = leaf(LOGPROBS, dtype)
            estimate = verl.kl_penalty_forward(logps, REF.to(dtype), kind)
            estimate.sum().backward()
            family.add(kind, dtype, {"kind": kind}, {"result": estimate}, {"logprobs": logps.grad})
    family.write()
    values, old_values, returns = (
        grid(82, ROWS, WIDTH),
        grid(83, ROWS, WIDTH),
        grid(84, ROWS, WIDTH, scale=1.5),
    )
    shared = {"values": values, "old_values": old_values, "returns": returns}
    family = Family("verl_value", "value_loss", where("compute_value_loss"), shared)
    for how in AGGREGATIONS:
        for mask_name, lengths in LENGTHS.items():
            for dtype in DTYPES:
                mask, guess = lengths_mask(lengths, WIDTH), leaf(values, dtype)
                loss, fraction = verl.compute_value_loss(guess, returns.to(dtype), old_values.to(dtype), mask.to(dtype),
                                                         0.5, how)  # fmt: skip
                loss.backward()
                family.add(f"{how} {mask_name}", dtype, {"clip_range": 0.5, "aggregation": how},
                           {"loss": loss, "metrics": {"value/clip_ratio": fraction}}, {"values": guess.grad},
                           inputs={"mask": mask}, tolerance=TOLERANCE[dtype])  # fmt: skip
    family.write()


def advantages() -> None:
    size, index = 3, np.array([0, 0, 0, 1, 1, 1])
    outcome = grid(85, ROWS, scale=1.5)
    mask = lengths_mask(LENGTHS["padded"], WIDTH)
    last = mask.sum(1) - 1
    rewards = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    rewards[torch.arange(ROWS), last] = outcome
    values = grid(86, ROWS, WIDTH)
    gaps = mask.clone()  # a tool's answer in the middle of a response
    gaps[0, 2:4] = False
    gaps[4, 1] = False

    def write(
        file: str, function: str, verl_function: str, cases: list[dict[str, Any]], note: str = ""
    ) -> None:
        family = Family(file, function, where(verl_function), {}, note)
        for case in cases:
            for dtype in DTYPES:
                family.add(case["name"], dtype, case["options"],
                           case["run"](dtype), {}, inputs=case["inputs"], tolerance=TOLERANCE[dtype])  # fmt: skip
        family.write()

    def gae_case(gamma: float, lam: float, name: str, keep: Tensor) -> dict[str, Any]:
        dense = grid(87, ROWS, WIDTH) * keep

        def run(dtype: torch.dtype) -> dict[str, Tensor]:
            guess = values.to(dtype)
            _, returns = verl.compute_gae_advantage_return(dense.to(dtype), guess, keep.to(dtype), gamma, lam)
            return {"0": (returns - guess) * keep, "1": returns * keep}

        inputs = {"rewards": dense, "values": values, "mask": keep}
        return {"name": f"gamma={gamma} lam={lam} {name}", "options": {"gamma": gamma, "lam": lam}, "run": run,
                "inputs": inputs}  # fmt: skip

    note = "verl whitens its advantages: here they are its returns minus the values, and 0 where masked."
    cases = [gae_case(gamma, lam, name, keep)
             for gamma, lam in ((1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0))
             for name, keep in (("padded", mask), ("full", torch.ones_like(mask)), ("gaps", gaps))]  # fmt: skip
    write("verl_gae", "gae", "compute_gae_advantage_return", cases, note)

    def whitened(shift: bool) -> dict[str, Any]:
        run = lambda dtype: {
            "result": verl.verl_F.masked_whiten(values.to(dtype), mask.to(dtype), shift) * mask
        }
        return {"name": f"shift_mean={shift}", "options": {"shift_mean": shift}, "run": run,
                "inputs": {"x": values, "mask": mask}}  # fmt: skip

    write("verl_whiten", "whiten", "verl_F.masked_whiten", [whitened(True), whitened(False)],
          "verl leaves something at masked positions: 0 here.")  # fmt: skip

    def per_sequence(function: Any, **more: Any) -> Any:
        """verl gives the advantage to every token: the first token's is the sequence's."""
        return lambda dtype: {
            "result": function(rewards.to(dtype), mask.to(dtype), index=index, **more)[0][:, 0]
        }

    grouped = {"rewards": outcome}
    grpo = verl.compute_grpo_outcome_advantage
    write("verl_group_advantages", "group_advantages", "compute_grpo_outcome_advantage", [
        {"name": "std", "options": {"group_size": size, "eps": 1e-6}, "inputs": grouped, "run": per_sequence(grpo)},
        {"name": "no std", "options": {"group_size": size, "scale": "none"}, "inputs": grouped,
         "run": per_sequence(grpo, norm_adv_by_std_in_grpo=False)},
    ])  # fmt: skip
    write("verl_rloo_advantages", "rloo_advantages", "compute_rloo_outcome_advantage", [
        {"name": "rloo", "options": {"group_size": size}, "inputs": grouped,
         "run": per_sequence(verl.compute_rloo_outcome_advantage)},
    ])  # fmt: skip
    write("verl_opo_advantages", "opo_advantages", "compute_opo_outcome_advantage", [
        {"name": "opo", "options": {"group_size": size}, "inputs": grouped | {"lengths": mask.sum(1)},
         "run": per_sequence(verl.compute_opo_outcome_advantage)},
    ])  # fmt: skip

    def returns_case(gamma: float) -> dict[str, Any]:
        settings = types.SimpleNamespace(gamma=gamma)
        run = lambda dtype: {"result": verl.compute_reinforce_plus_plus_outcome_advantage(
            rewards.to(dtype), mask.to(dtype), settings)[0]}  # fmt: skip
        return {"name": f"gamma={gamma}", "options": {"gamma": gamma}, "run": run,
                "inputs": {"rewards": rewards, "mask": mask}}  # fmt: skip

    write("verl_reinforce_plus_plus", "reinforce_plus_plus_advantages", "compute_reinforce_plus_plus_outcome_advantage",
          [returns_case(1.0), returns_case(0.9)])  # fmt: skip
    baseline = verl.compute_reinforce_plus_plus_baseline_outcome_advantage
    write("verl_reinforce_plus_plus_baseline", "reinforce_plus_plus_advantages",
          "compute_reinforce_plus_plus_baseline_outcome_advantage", [
        {"name": "baseline", "options": {"group_size": size}, "inputs": {"rewards": rewards, "mask": mask},
         "run": lambda dtype: {"result": baseline(rewards.to(dtype), mask.to(dtype), index=index)[0]}},
    ])  # fmt: skip

    def discounted(gamma: float) -> dict[str, Any]:
        settings = types.SimpleNamespace(gamma=gamma)
        run = lambda dtype: {"result": verl.compute_reinforce_plus_plus_outcome_advantage(
            rewards.to(dtype), mask.to(dtype), settings)[1] * mask}  # fmt: skip
        return {"name": f"gamma={gamma}", "options": {"gamma": gamma}, "run": run,
                "inputs": {"rewards": rewards, "mask": mask}}  # fmt: skip

    write("verl_returns", "discounted_returns", "compute_reinforce_plus_plus_outcome_advantage (returns)",
          [discounted(1.0), discounted(0.9)])  # fmt: skip
    greedy = grid(88, ROWS)
    write("verl_remax", "remax_advantages", "compute_remax_outcome_advantage", [
        {"name": "tokens", "options": {}, "inputs": {"rewards": rewards, "greedy_rewards": greedy, "mask": mask},
         "run": lambda dtype: {"result": verl.compute_remax_outcome_advantage(
             rewards.to(dtype), greedy.to(dtype), mask.to(dtype))[0]}},
    ])  # fmt: skip
    best = verl.compute_grpo_passk_outcome_advantage
    write("verl_pass_at_k", "pass_at_k_advantages", "compute_grpo_passk_outcome_advantage", [
        {"name": scale, "options": {"group_size": size, "scale": scale}, "inputs": grouped,
         "run": lambda dtype, std=std: {"result": best(rewards.to(dtype), mask.to(dtype), index,
                                                       config={"norm_adv_by_std_in_grpo": std})[0][:, 0]}}
        for scale, std in (("group", True), ("none", False))
    ])  # fmt: skip
    log_squares = grid(89, ROWS, WIDTH, shift=-3).clamp(max=-0.5)
    optimal = verl.compute_multi_turn_optimal_token_baseline_advantage

    def baseline_case(name: str, keep: Tensor, weighted: bool) -> dict[str, Any]:
        dense = grid(87, ROWS, WIDTH) * keep
        weights = (OLD - SAMPLER).clamp(-20, 20).exp().clamp(max=1.25).float().double() if weighted else None

        def run(dtype: torch.dtype) -> dict[str, Tensor]:
            found = optimal(dense.to(dtype), keep.to(dtype), index, OLD.to(dtype), log_squares.to(dtype).exp(),
                            None if weights is None else weights.to(dtype))  # fmt: skip
            return {"result": found[0]}

        inputs = {"rewards": dense, "logprobs": OLD, "log_sum_sq_probs": log_squares, "mask": keep}
        return {"name": name, "options": {"group_size": size}, "run": run,
                "inputs": inputs | ({"token_weights": weights} if weighted else {})}  # fmt: skip

    write("verl_optimal_token", "optimal_token_advantages", "compute_multi_turn_optimal_token_baseline_advantage", [
        baseline_case(f"{name}{' weighted' * weighted}", keep, weighted)
        for name, keep in (("padded", mask), ("full", torch.ones_like(mask)), ("gaps", gaps)) for weighted in (False, True)
    ])  # fmt: skip


def main() -> None:
    ppo()
    others()
    kl_and_value()
    advantages()


if __name__ == "__main__":
    main()
