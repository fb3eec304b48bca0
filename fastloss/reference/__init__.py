"""The definitions: plain PyTorch, one readable function per loss, any float dtype, differentiable twice."""

from fastloss.reference.advantages import discounted_returns, gae
from fastloss.reference.cross_entropy import cross_entropy, linear_cross_entropy
from fastloss.reference.distillation import DistillationRows, distillation_rows
from fastloss.reference.logits import row_gradient
from fastloss.reference.policy_gradient import (
    Sequences,
    correction,
    kl_estimate,
    policy_loss,
    shares,
    value_loss,
    value_terms,
)
from fastloss.reference.preference import pair_loss, segment_sum, unpaired_loss
from fastloss.reference.router import load_balancing
from fastloss.reference.supervised import supervised_rows, supervised_terms
from fastloss.reference.token_stats import linear_token_stats, lse_parts, token_stats
from fastloss.reference.topk_distillation import TopKRows, selected_logprobs, topk_distillation_rows

__all__ = [
    "DistillationRows",
    "Sequences",
    "TopKRows",
    "correction",
    "cross_entropy",
    "discounted_returns",
    "distillation_rows",
    "gae",
    "kl_estimate",
    "linear_cross_entropy",
    "linear_token_stats",
    "load_balancing",
    "lse_parts",
    "pair_loss",
    "policy_loss",
    "row_gradient",
    "segment_sum",
    "selected_logprobs",
    "shares",
    "supervised_rows",
    "supervised_terms",
    "token_stats",
    "topk_distillation_rows",
    "unpaired_loss",
    "value_loss",
    "value_terms",
]
