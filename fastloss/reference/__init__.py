"""The definitions: plain PyTorch, one readable function per loss, any float dtype, differentiable twice."""

from fastloss.reference.cross_entropy import cross_entropy, linear_cross_entropy
from fastloss.reference.token_stats import linear_token_stats, token_stats

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_token_stats", "token_stats"]
