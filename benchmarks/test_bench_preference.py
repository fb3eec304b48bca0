"""Preference losses, from log-probs and from the head."""

from __future__ import annotations

import torch

KINDS = ("preference", "preference-linear", "unpaired", "kto-linear", "reward", "process-reward")


def test_preference(case, provider: str, run) -> None:
    error = run(case, provider)
    assert error is None or error < (0.1 if case.dtype == torch.bfloat16 else 1e-4)
