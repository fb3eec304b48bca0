"""How far from the right number a result may be, and why."""

import torch

from fastloss.conformance.check import Tolerance

ROUNDING = Tolerance(16, "sums and exponentials of a few dozen float32 terms")
LOW_RESULT = Tolerance(1.5, "float32 inside, one rounding of the result to the low dtype")
LOW_LOGITS = Tolerance(8, "logits rounded to the low dtype, as plain PyTorch rounds them")
PEAKED = Tolerance(2048, "logits some 100 apart: exp multiplies their rounding by that")
EXACT = Tolerance(0, "nothing is computed")
OFFSET = Tolerance(64, "the inputs are exact; only differences from the row's largest logit count")
BF16, FP16 = torch.bfloat16, torch.float16
