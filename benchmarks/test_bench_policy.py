"""Policy-gradient losses, from log-probs and from the head, and advantages."""

from __future__ import annotations

import torch

KINDS = ("policy", "policy-linear", "policy-corrected", "value", "kl", "gae", "group", "returns")


def test_policy(case, provider: str, run) -> None:
    error = run(case, provider)
    assert error is None or error < (0.1 if case.dtype == torch.bfloat16 else 1e-4)
