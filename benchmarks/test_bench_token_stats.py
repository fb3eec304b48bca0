"""Log-probs and entropies per token."""

from __future__ import annotations

import torch

KINDS = ("stats", "stats-linear")


def test_token_stats(case, provider: str, run) -> None:
    error = run(case, provider)
    assert error is None or error < (0.1 if case.dtype == torch.bfloat16 else 1e-4)
