"""Log-probs and entropies over logits ("stats") and over hidden states and the vocabulary matrix ("stats-linear")."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import Call, Case, Data, Loss, short
from fastloss.bench.exact import Exact, over_vocabulary, token
from fastloss.bench.kinds.base import Kind, head_leaves
from fastloss.bench.kinds.cross_entropy import linear_tensors, row_tensors

ENTROPY = 0.01  # its share in the number that is differentiated


def cases(quick: bool) -> Iterator[Case]:
    rows, vocab = (16, 2000) if quick else (1024, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(f"stats-{short(dtype)}-{rows}x{vocab}", "stats", rows, 0, vocab, dtype)


def linear_cases(quick: bool) -> Iterator[Case]:
    shape = (32, 16, 500) if quick else (1024, 512, 32000)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"stats-linear-{short(dtype)}-" + "x".join(map(str, shape))
        yield Case(name, "stats-linear", *shape, dtype, forwards=2)
        yield Case(f"{name}-nograd", "stats-linear", *shape, dtype, nograd=True)


def mean(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """One number whose gradient reaches both."""
    return -(logprobs.mean() + ENTROPY * entropy.mean())


def _ours(case: Case, call: Call) -> Loss:
    function = fastloss.token_stats if case.kind == "stats" else fastloss.linear_token_stats

    def loss(*tensors: Tensor) -> Tensor:
        out = function(*tensors, outputs=("logprobs", "entropy"), **call)
        assert out.logprobs is not None and out.entropy is not None
        return mean(out.logprobs, out.entropy)

    return loss


def _eager(case: Case) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return mean(*token(logits.float(), target, True))

    return loss


def _eager_linear(case: Case) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return mean(*token(F.linear(hidden, weight).float(), target, True))

    return loss


def _truth(case: Case, data: Data) -> Exact:
    return over_vocabulary(data, data["target"], mean, entropy=True)


def _read_and_copy(case: Case, data: Data) -> Callable[[], object]:
    """The coefficients are known only after the forward: it reads the logits, the backward reads and writes them."""
    source = data["logits"].detach().clone()
    into = source.clone()
    words = source.view(torch.float32) if case.vocab % 2 == 0 else source

    def run() -> Tensor:
        into.copy_(source)
        return words.sum()

    return run


KINDS = {
    "stats": Kind(
        cases,
        row_tensors,
        lambda case: ("logits",),
        _ours,
        _eager,
        _truth,
        limit=("read + copy", _read_and_copy),
    ),
    "stats-linear": Kind(
        linear_cases, linear_tensors, head_leaves, _ours, _eager_linear, _truth, is_head=True
    ),
}
