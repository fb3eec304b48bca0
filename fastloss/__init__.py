"""fastloss: losses for language models, fast, small and exact."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "fastloss needs PyTorch 2.8 or newer: install the build for this machine first (pytorch.org/get-started), "
        "for a CPU: pip install torch --index-url https://download.pytorch.org/whl/cpu",
        name="torch",
    ) from None

from fastloss import nn
from fastloss._version import __version__
from fastloss.engine.backend import backends, explain, use_backend, validate_targets
from fastloss.engine.invariance import batch_invariant
from fastloss.engine.skipping import skipped_share
from fastloss.losses.advantages import (
    discounted_returns,
    gae,
    optimal_token_advantages,
    reinforce_plus_plus_advantages,
    remax_advantages,
    token_rewards,
    whiten,
)
from fastloss.losses.cross_entropy import cross_entropy
from fastloss.losses.distillation import DistillationOutput, distillation_loss, linear_distillation_loss
from fastloss.losses.group_advantages import (
    gdpo_advantages,
    gpg_advantages,
    group_advantages,
    opo_advantages,
    pass_at_k_advantages,
    rloo_advantages,
)
from fastloss.losses.kl_estimate import kl_estimate
from fastloss.losses.linear_cross_entropy import linear_cross_entropy
from fastloss.losses.multi_token import MultiTokenTargets, multi_token_targets
from fastloss.losses.policy import PolicyOutput, policy_loss
from fastloss.losses.policy_linear import linear_policy_loss
from fastloss.losses.preference import PreferenceOutput, preference_loss
from fastloss.losses.preference_linear import (
    linear_cpo_loss,
    linear_dpo_loss,
    linear_orpo_loss,
    linear_preference_loss,
    linear_simpo_loss,
)
from fastloss.losses.preference_named import cpo_loss, dpo_loss, ipo_loss, orpo_loss, simpo_loss
from fastloss.losses.reward_lists import (
    ListwiseOutput,
    listwise_preference_loss,
    listwise_reward_loss,
    reward_regression_loss,
    tied_reward_loss,
)
from fastloss.losses.reward_model import RewardOutput, process_reward_loss, reward_model_loss
from fastloss.losses.router import RouterOutput, moe_load_balancing_loss, router_z_loss
from fastloss.losses.selected_logprobs import linear_selected_logprobs, selected_logprobs
from fastloss.losses.sequence_loss import SequencePart, linear_sequence_loss
from fastloss.losses.supervised import SupervisedOutput, linear_supervised_loss, supervised_loss
from fastloss.losses.support import sampler_metrics, sampler_support, support_from_mask
from fastloss.losses.token_stats import (
    TokenStats,
    entropy_from_logits,
    linear_token_stats,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
    token_stats,
)
from fastloss.losses.topk_distillation import linear_topk_distillation_loss, topk_distillation_loss
from fastloss.losses.trust_region import trust_region_mask
from fastloss.losses.unpaired import UnpairedOutput, bco_loss, kto_loss, linear_kto_loss
from fastloss.losses.value_loss import ValueOutput, value_loss

# These use the names above.
from fastloss.lazy_logits import LazyLogits  # isort: skip
from fastloss.patch import patch  # isort: skip

__all__ = [
    "DistillationOutput",
    "LazyLogits",
    "ListwiseOutput",
    "MultiTokenTargets",
    "PolicyOutput",
    "PreferenceOutput",
    "RewardOutput",
    "RouterOutput",
    "SequencePart",
    "SupervisedOutput",
    "TokenStats",
    "UnpairedOutput",
    "ValueOutput",
    "__version__",
    "backends",
    "batch_invariant",
    "bco_loss",
    "cpo_loss",
    "cross_entropy",
    "discounted_returns",
    "distillation_loss",
    "dpo_loss",
    "entropy_from_logits",
    "explain",
    "gae",
    "gdpo_advantages",
    "gpg_advantages",
    "group_advantages",
    "ipo_loss",
    "kl_estimate",
    "kto_loss",
    "linear_cpo_loss",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_orpo_loss",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_selected_logprobs",
    "linear_sequence_loss",
    "linear_simpo_loss",
    "linear_supervised_loss",
    "linear_token_stats",
    "linear_topk_distillation_loss",
    "listwise_preference_loss",
    "listwise_reward_loss",
    "moe_load_balancing_loss",
    "multi_token_targets",
    "nn",
    "opo_advantages",
    "optimal_token_advantages",
    "orpo_loss",
    "pass_at_k_advantages",
    "patch",
    "policy_loss",
    "preference_loss",
    "process_reward_loss",
    "reinforce_plus_plus_advantages",
    "remax_advantages",
    "reward_model_loss",
    "reward_regression_loss",
    "rloo_advantages",
    "router_z_loss",
    "sampler_metrics",
    "sampler_support",
    "selected_logprobs",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "simpo_loss",
    "skipped_share",
    "supervised_loss",
    "support_from_mask",
    "tied_reward_loss",
    "token_rewards",
    "token_stats",
    "topk_distillation_loss",
    "trust_region_mask",
    "use_backend",
    "validate_targets",
    "value_loss",
    "whiten",
]
