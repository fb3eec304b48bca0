"""How much the log-probability of a token depends on what else is in its batch: PyTorch, TRL and fastloss.

    python benchmarks/log_ratios.py --tokens 128 --hidden 512 --vocab 32000

The same tokens are computed all at once and in batches of 1, 8 and 32 rows. In reinforcement learning the ratio of new to old policy is
exp of such a difference where nothing was learned: it should be 1. Prints how many tokens differ, and by how much.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

import fastloss

BATCHES = (1, 8, 32)
# Upper ends of the histogram's bins of |log ratio|.
BINS = (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, math.inf)
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_torch(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def of_trl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    out: Tensor = selective_log_softmax(torch.nn.functional.linear(hidden, weight), target)
    return out.float()


def of_fastloss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    out = fastloss.linear_token_stats(hidden, weight, target).logprobs
    assert out is not None
    return out


def differences(side: LogProbs, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """|log ratio| of each token, for each batch size, against all tokens at once."""
    whole = side(hidden, weight, target)
    found = []
    for size in BATCHES:
        rows = [side(h, weight, t) for h, t in zip(hidden.split(size), target.split(size), strict=True)]
        found.append((torch.cat(rows) - whole).abs())
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    given = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(given.tokens, given.hidden, generator=g, dtype=torch.float32, device="cpu")
    weight = (
        torch.randn(given.vocab, given.hidden, generator=g, dtype=torch.float32, device="cpu")
        * 3
        * given.hidden**-0.5
    )  # logits with a deviation of 3
    target = torch.distributions.Categorical(logits=hidden @ weight.t()).sample()  # as a policy draws them
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {vars(given)}, batches of {BATCHES}"
    )
    names = ["0", *(f"<= {b:g}" for b in BINS[1:-1]), f"> {BINS[-2]:g}"]
    print(f"| dtype | | {' | '.join(names)} | largest | ratios outside [0.9, 1.1] |")
    print("| --- " * (len(names) + 4) + "|")
    sides: dict[str, LogProbs] = {"PyTorch": of_torch, "TRL": of_trl, "fastloss": of_fastloss}
    for dtype in (torch.float32, torch.bfloat16):
        for name, side in sides.items():
            with torch.no_grad():
                gaps = differences(side, hidden.to(dtype), weight.to(dtype), target).flatten()
            places = torch.bucketize(gaps, torch.tensor(BINS, dtype=gaps.dtype))
            counts = torch.bincount(places, minlength=len(BINS)).tolist()
            ratio = gaps.exp()
            outside = int(((ratio > 1.1) | (1 / ratio < 0.9)).sum())
            row = " | ".join(str(c) for c in counts)
            print(
                f"| {str(dtype)[6:]} | {name} | {row} | {float(gaps.max()):.2g} | {outside} of {gaps.numel()} |"
            )


if __name__ == "__main__":
    main()
