"""trust_region_mask: compute_rollout_rejection_mask of verl's trainer/ppo/rollout_corr_helper.py."""

from __future__ import annotations

from typing import Any

from golden_format import DTYPES, Family, lengths_mask, peer
from stand_ins import load
from trl_grpo import LENGTHS, OLD, SAMPLER, WIDTH

rollout = load(
    "verl",
    (
        "verl.utils.device",
        "verl.utils.import_utils",
        "verl.utils.torch_functional",
        "verl.trainer.ppo.rollout_corr_helper",
    ),
    ("tensordict", "ray", "verl.protocol", "verl.trainer.config", "verl.trainer.config.algorithm", "verl.workers",
     "verl.workers.config", "verl.workers.config.actor"),
)  # fmt: skip

# verl's option, its threshold, fastloss's options. Its k1 is the ratio sampler / old, fastloss's old / sampler.
CASES: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("token_k1", "0.75_1.25", {"low": 0.8, "high": 4 / 3}),
    ("seq_sum_k1", "0.5_1.5", {"level": "seq_sum", "low": 2 / 3, "high": 2.0}),
    ("seq_mean_k1", "0.95_1.05", {"level": "seq_mean", "low": 1 / 1.05, "high": 1 / 0.95}),
    ("token_k2", 0.03, {"statistic": "k2", "high": 0.03}),
    ("seq_sum_k2", 0.25, {"statistic": "k2", "level": "seq_sum", "high": 0.25}),
    ("seq_mean_k2", 0.05, {"statistic": "k2", "level": "seq_mean", "high": 0.05}),
    ("seq_max_k2", 0.15, {"statistic": "k2", "level": "seq_max", "high": 0.15}),
    ("token_k3", 0.03, {"statistic": "k3", "high": 0.03}),
    ("seq_sum_k3", 0.25, {"statistic": "k3", "level": "seq_sum", "high": 0.25}),
    ("seq_mean_k3", 0.05, {"statistic": "k3", "level": "seq_mean", "high": 0.05}),
    ("seq_max_k3", 0.15, {"statistic": "k3", "level": "seq_max", "high": 0.15}),
)


def main() -> None:
    where = peer("verl", "trainer/ppo/rollout_corr_helper.py compute_rollout_rejection_mask", "0.9.1")
    family = Family(
        "verl_rollout_rejection",
        "trust_region_mask",
        where,
        {"old_logprobs": OLD, "sampler_logprobs": SAMPLER},
    )
    for name, threshold, options in CASES:
        for mask_name, lengths in LENGTHS.items():
            for dtype in DTYPES:
                mask = lengths_mask(lengths, WIDTH)
                kept, _ = rollout.compute_rollout_rejection_mask(
                    (OLD - SAMPLER).to(dtype), mask.to(dtype), name, threshold
                )
                rejected = int((mask & ~kept.bool()).sum())
                family.add(f"{name} {mask_name} ({rejected} tokens rejected)", dtype, options, {"result": kept.bool()}, {},
                           inputs={"mask": mask})  # fmt: skip
    family.write()


if __name__ == "__main__":
    main()
