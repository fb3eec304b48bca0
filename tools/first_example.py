"""Runs a page's first Python example against the fastloss that is installed, with small tensors for its names.

python tools/first_example.py README.md
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch


def names() -> dict[str, object]:
    """What the example takes as given: two pairs of six tokens, a vocabulary of 32."""
    torch.manual_seed(0)
    weight, ref_weight = (torch.randn(32, 16).requires_grad_(grad) for grad in (True, False))
    target = torch.randint(32, (4, 6))
    return {
        "logits": torch.randn(4, 32, 6, requires_grad=True),
        "target": target,
        "hidden": torch.randn(4, 6, 16, requires_grad=True),
        "lm_head": SimpleNamespace(weight=weight),
        "ref_hidden": torch.randn(4, 6, 16),
        "ref_head": SimpleNamespace(weight=ref_weight),
    }


def main() -> None:
    page = Path(sys.argv[1]).read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)
    if example is None:
        sys.exit(f"{sys.argv[1]}: no Python example")
    scope = names()
    exec(example.group(1), scope)
    out = scope["out"]
    gradient = scope["lm_head"].weight.grad  # type: ignore[attr-defined]
    if gradient is None or not gradient.isfinite().all() or not gradient.any():
        sys.exit("the example left no gradient")
    print(f"first example: loss {out.loss.item():.6f}, from {sys.modules['fastloss'].__file__}")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
