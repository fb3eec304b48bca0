"""fastloss: losses for language models, fast, small and exact."""

from fastloss import nn
from fastloss._version import __version__
from fastloss.advantages import (
    discounted_returns,
    gae,
    gpg_advantages,
    group_advantages,
    opo_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    rloo_advantages,
    token_rewards,
    whiten,
)
from fastloss.cross_entropy import cross_entropy
from fastloss.dispatch import backends, explain, use_backend, validate_targets
from fastloss.linear_cross_entropy import linear_cross_entropy
from fastloss.ops import library as _library  # noqa: F401 - registers the torch.library operators
from fastloss.policy_gradient import PolicyOutput, ValueOutput, kl_estimate, policy_loss, value_loss
from fastloss.policy_linear import linear_policy_loss
from fastloss.preference import PreferenceOutput, preference_loss
from fastloss.preference_linear import (
    linear_cpo_loss,
    linear_dpo_loss,
    linear_orpo_loss,
    linear_preference_loss,
    linear_simpo_loss,
)
from fastloss.preference_named import cpo_loss, dpo_loss, ipo_loss, orpo_loss, simpo_loss
from fastloss.reward_model import RewardOutput, process_reward_loss, reward_model_loss
from fastloss.token_stats import (
    TokenStats,
    entropy_from_logits,
    linear_token_stats,
    selective_log_softmax,
    token_stats,
)
from fastloss.unpaired import UnpairedOutput, bco_loss, kto_loss, linear_kto_loss

__all__ = [
    "PolicyOutput",
    "PreferenceOutput",
    "RewardOutput",
    "TokenStats",
    "UnpairedOutput",
    "ValueOutput",
    "__version__",
    "backends",
    "bco_loss",
    "cpo_loss",
    "cross_entropy",
    "discounted_returns",
    "dpo_loss",
    "entropy_from_logits",
    "explain",
    "gae",
    "gpg_advantages",
    "group_advantages",
    "ipo_loss",
    "kl_estimate",
    "kto_loss",
    "linear_cpo_loss",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_orpo_loss",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_simpo_loss",
    "linear_token_stats",
    "nn",
    "opo_advantages",
    "orpo_loss",
    "policy_loss",
    "preference_loss",
    "process_reward_loss",
    "reinforce_plus_plus_advantages",
    "remax_advantages",
    "reward_model_loss",
    "rloo_advantages",
    "selective_log_softmax",
    "simpo_loss",
    "token_rewards",
    "token_stats",
    "use_backend",
    "validate_targets",
    "value_loss",
    "whiten",
]
