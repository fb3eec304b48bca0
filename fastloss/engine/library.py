"""The torch.library operators: what torch.compile, export, FakeTensor and FlopCounterMode see.

Eager calls on plain tensors take the autograd functions beside these files instead, which cost less per call and can
give their gradient buffer away; the numbers are the same, both run the same rows and the same head.
"""

from fastloss.engine import library_flops as library_flops
from fastloss.engine.library_linear import linear_cross_entropy, linear_row_grad, linear_token_stats
from fastloss.engine.library_rows import cross_entropy, row_grad, token_stats

__all__ = [
    "cross_entropy",
    "linear_cross_entropy",
    "linear_row_grad",
    "linear_token_stats",
    "row_grad",
    "token_stats",
]
