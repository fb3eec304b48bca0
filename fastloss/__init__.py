"""fastloss: losses for language models, fast, small and exact."""

from fastloss import nn
from fastloss._version import __version__
from fastloss.cross_entropy import cross_entropy, linear_cross_entropy
from fastloss.dispatch import backends, explain, use_backend, validate_targets
from fastloss.ops import library as _library  # noqa: F401 - registers the torch.library operators
from fastloss.token_stats import (
    TokenStats,
    entropy_from_logits,
    linear_token_stats,
    selective_log_softmax,
    token_stats,
)

__all__ = [
    "TokenStats",
    "__version__",
    "backends",
    "cross_entropy",
    "entropy_from_logits",
    "explain",
    "linear_cross_entropy",
    "linear_token_stats",
    "nn",
    "selective_log_softmax",
    "token_stats",
    "use_backend",
    "validate_targets",
]
