"""group_advantages, rloo_advantages: the statements of TRL's _generate_and_score_completions that make them."""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from golden_format import DTYPES, Family, bare_trainer, default_dtype, grid, peer, run_statement
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

GROUPS, SIZE = 4, 5


def rewards_table() -> dict[str, Tensor]:
    mixed = grid(51, GROUPS * SIZE, scale=1.5)
    equal = mixed.clone()
    equal[:SIZE] = 1.0  # a group whose rewards are all equal
    binary = (grid(52, GROUPS * SIZE) > 0).double()
    unscorable = mixed.clone()
    unscorable[[2, 7]] = math.nan
    return {"mixed": mixed, "one group of equals": equal, "binary": binary, "unscorable": unscorable}


def grpo(rewards: Tensor, scale: str, size: int) -> tuple[Tensor, str]:
    trainer = bare_trainer(GRPOTrainer, scale_rewards=scale, multi_objective_aggregation="sum_then_normalize",
                           reward_weights=torch.ones(1, dtype=rewards.dtype), reward_funcs=[None])  # fmt: skip
    table = rewards.unsqueeze(1)
    names: dict[str, Any] = {"self": trainer, "rewards_per_func": table, "num_generations": size,
                             "unscorable_mask": table.isnan().all(1), "device": rewards.device}  # fmt: skip
    method = GRPOTrainer._generate_and_score_completions
    with default_dtype(rewards.dtype):
        where = run_statement(method, 'if self.multi_objective_aggregation == "sum_then_normalize":', names)
        run_statement(method, "advantages = torch.nan_to_num(advantages, nan=0.0)", names)
    return names["advantages"], where


def gdpo(table: Tensor, weights: Tensor, size: int) -> tuple[Tensor, str]:
    trainer = bare_trainer(GRPOTrainer, scale_rewards="group", multi_objective_aggregation="normalize_then_sum",
                           reward_weights=weights, reward_funcs=[None] * table.shape[1])  # fmt: skip
    names: dict[str, Any] = {"self": trainer, "rewards_per_func": table, "num_generations": size,
                             "unscorable_mask": table.isnan().all(1), "device": table.device}  # fmt: skip
    method = GRPOTrainer._generate_and_score_completions
    with default_dtype(table.dtype):
        where = run_statement(method, 'if self.multi_objective_aggregation == "sum_then_normalize":', names)
        run_statement(method, "advantages = torch.nan_to_num(advantages, nan=0.0)", names)
    return names["advantages"], where


RLOO_STATEMENTS = (  # first line, and a word in the statement where several begin so
    ("grouped_rewards = rewards.view(-1, num_generations)", ""),
    ("scorable_counts = (~torch.isnan(grouped_rewards)).sum(dim=1, keepdim=True)  # (num_prompts, 1)", ""),
    ("grouped_sum = torch.nansum(grouped_rewards, dim=1, keepdim=True)  # (num_prompts, 1)", ""),
    ("if num_generations > 1:", "baselines"),
    ("if self.normalize_advantages:", ""),
    ("advantages = torch.nan_to_num(advantages, nan=0.0)", ""),
)


def rloo(rewards: Tensor, normalize: bool) -> tuple[Tensor, str]:
    names: dict[str, Any] = {"self": types.SimpleNamespace(normalize_advantages=normalize), "rewards": rewards,
                             "num_generations": SIZE}  # fmt: skip
    method = RLOOTrainer._generate_and_score_completions
    with default_dtype(rewards.dtype):
        places = [run_statement(method, line, names, word) for line, word in RLOO_STATEMENTS]
    first, last = places[0].split("lines ")[1].split("-")[0], places[-1].rsplit("-", 1)[1]
    return names["advantages"], f"{method.__qualname__}, statements of lines {first}-{last}"


def main() -> None:
    table = rewards_table()
    _, where = grpo(table["mixed"], "group", SIZE)
    family = Family(
        "trl_group_advantages",
        "group_advantages",
        peer("trl", where),
        {},
        "A NaN is an unscorable completion.",
    )
    for name, rewards in table.items():
        for scale in ("group", "batch", "none"):
            for dtype in DTYPES:
                result, _ = grpo(rewards.to(dtype), scale, SIZE)
                family.add(f"{name} {scale}", dtype, {"group_size": SIZE, "scale": scale}, {"result": result}, {},
                           inputs={"rewards": rewards})  # fmt: skip
    for scale in ("group", "none"):
        for dtype in DTYPES:
            result, _ = grpo(table["mixed"].to(dtype), scale, 1)
            family.add(f"groups of one {scale}", dtype, {"group_size": 1, "scale": scale}, {"result": result}, {},
                       inputs={"rewards": table["mixed"]})  # fmt: skip
    family.write()

    _, where = rloo(table["mixed"], False)
    family = Family(
        "trl_rloo_advantages", "rloo_advantages", peer("trl", where), {}, "A NaN is an unscorable completion."
    )
    for name, rewards in table.items():
        for normalize in (False, True):
            for dtype in DTYPES:
                result, _ = rloo(rewards.to(dtype), normalize)
                options = {"group_size": SIZE} | ({"normalize": True} if normalize else {})
                family.add(f"{name} normalize={normalize}", dtype, options, {"result": result}, {},
                           inputs={"rewards": rewards})  # fmt: skip
    family.write()

    several = torch.stack([*table.values()], 1)  # an unscorable reward beside three that are not
    unscored = several.clone()
    unscored[7] = math.nan
    _, where = gdpo(several, torch.ones(several.shape[1], dtype=several.dtype), SIZE)
    family = Family(
        "trl_gdpo_advantages", "gdpo_advantages", peer("trl", where), {}, "Four rewards; NaN: none."
    )
    for name, rewards in (("four", several), ("one unscorable response", unscored)):
        for weights in (
            torch.ones(4, dtype=torch.float64),
            torch.tensor([1.0, 0.5, 0.25, 2.0], dtype=torch.float64),
        ):
            for dtype in DTYPES:
                result, _ = gdpo(rewards.to(dtype), weights.to(dtype), SIZE)
                family.add(f"{name} {weights.tolist()}", dtype, {"group_size": SIZE}, {"result": result}, {},
                           inputs={"rewards": rewards, "weights": weights})  # fmt: skip
    family.write()


if __name__ == "__main__":
    main()
