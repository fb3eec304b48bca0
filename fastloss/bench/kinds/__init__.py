"""What is measured, a file per family: its cases, their tensors, fastloss's and PyTorch's loss, the loss in float64."""

from fastloss.bench.kinds import cross_entropy, policy, preference, token_stats

KINDS = {**cross_entropy.KINDS, **token_stats.KINDS, **preference.KINDS, **policy.KINDS}
