"""reward_model_loss: TRL's RewardTrainer.compute_loss, called on seeded rewards."""

from __future__ import annotations

import types

import torch
from golden_format import DTYPES, TOLERANCE, Family, bare_trainer, grid, last_metrics, leaf, peer
from trl import RewardTrainer

PAIRS = 7


def main() -> None:
    chosen, rejected = grid(31, PAIRS, scale=2.0), grid(32, PAIRS, scale=2.0)
    margin = grid(33, PAIRS).abs()
    where = peer("trl", "RewardTrainer.compute_loss")
    family = Family(
        "trl_reward", "reward_model_loss", where, {"chosen_rewards": chosen, "rejected_rewards": rejected}
    )
    for with_margin in (False, True):
        for coefficient in (None, 0.01, 0.5):
            for dtype in DTYPES:
                logits = leaf(torch.cat([chosen, rejected]).unsqueeze(1), dtype)  # [2B, 1]
                arguments = types.SimpleNamespace(center_rewards_coefficient=coefficient)
                trainer = bare_trainer(RewardTrainer, args=arguments)
                inputs = {"attention_mask": torch.ones(2 * PAIRS, 3)}
                if with_margin:
                    inputs["margin"] = margin.to(dtype)
                outputs = types.SimpleNamespace(logits=logits)
                loss = trainer.compute_loss(lambda outputs=outputs, **_: outputs, inputs)
                loss.backward()
                metrics = last_metrics(trainer)
                gradients = dict(zip(("chosen_rewards", "rejected_rewards"), logits.grad[:, 0].chunk(2)))
                results = {
                    "rewards/accuracies": torch.tensor(metrics["accuracy"], dtype=dtype),
                    "min_reward": torch.tensor(metrics["min_reward"], dtype=dtype),
                    "mean_reward": torch.tensor(metrics["mean_reward"], dtype=dtype),
                    "max_reward": torch.tensor(metrics["max_reward"], dtype=dtype),
                    "rewards/margins": torch.tensor(metrics["margin"], dtype=dtype),
                }
                options = {} if coefficient is None else {"center_coefficient": coefficient}
                family.add(f"center={coefficient} margin={with_margin}", dtype, options,
                           {"loss": loss, "metrics": results}, gradients,
                           inputs={"margin": margin} if with_margin else None,
                           metric_tolerance=TOLERANCE[torch.float32])  # fmt: skip
    family.write()


if __name__ == "__main__":
    main()
