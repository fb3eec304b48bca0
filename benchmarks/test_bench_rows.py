"""Cross-entropy over rows of logits."""

from __future__ import annotations

import torch

KINDS = ("row",)


def test_rows(case, provider: str, run) -> None:
    error = run(case, provider)
    assert error is None or error < (0.1 if case.dtype == torch.bfloat16 else 1e-4)
