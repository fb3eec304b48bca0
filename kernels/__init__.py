"""The kernels of docs/engine.md and docs/sequences.md in Triton, one file per family with its launch functions.

The launch functions are methods of fastloss/engine/contract.py's ``Backend``, for float32 (logits: also bfloat16 and
float16): outputs allocated, one launch each (policy_loss, value_loss: two), ValueError for a code that does not exist and TypeError for
a tensor that a kernel cannot read.
"""

from .divergences import row_divergence, row_divergence_grad
from .exponentials import row_exponentials
from .pairs import pair_loss, segment_expand, segment_sum, unpaired_loss
from .policy import policy_loss
from .reduce import reciprocal_count, sum_rows
from .rows import row_cross_entropy, row_grad, row_stats
from .scale import scale_in_place
from .scan import discounted_returns, gae
from .tokens import kl_estimate, value_loss

__all__ = [
    "discounted_returns",
    "gae",
    "kl_estimate",
    "pair_loss",
    "policy_loss",
    "reciprocal_count",
    "row_cross_entropy",
    "row_divergence",
    "row_divergence_grad",
    "row_exponentials",
    "row_grad",
    "row_stats",
    "scale_in_place",
    "segment_expand",
    "segment_sum",
    "sum_rows",
    "unpaired_loss",
    "value_loss",
]
