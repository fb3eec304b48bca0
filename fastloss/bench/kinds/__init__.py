"""What is measured, a file per family: its cases, their tensors, fastloss's and PyTorch's loss, the loss in float64."""

from fastloss.bench.kinds import (
    advantages,
    corrections,
    cross_entropy,
    distillation,
    lora,
    multi_token,
    policy,
    preference,
    rewards,
    supervised,
    support,
    token_stats,
    topk,
    unpaired,
)

FAMILIES = (
    cross_entropy,
    token_stats,
    preference,
    unpaired,
    rewards,
    support,
    policy,
    corrections,
    advantages,
    distillation,
    topk,
    supervised,
    multi_token,
    lora,
)
KINDS = {name: kind for family in FAMILIES for name, kind in family.KINDS.items()}
