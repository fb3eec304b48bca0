"""A code, a dtype or a name that does not exist is an error on every backend, never the formula of another loss.

At compile time too where the language can say so: test_triton_compiles.py, and ``switch`` over an enum class in C++.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, contract
from torch import Tensor

from fastloss import tables
from fastloss.engine.contract import Backend, PolicyInputs
from fastloss.engine.sequences import Sequences
from fastloss.tables import (
    CrossEntropyOptions,
    DistillationOptions,
    PairConstants,
    PairOptions,
    PolicyOptions,
    RowOptions,
    UnpairedConstants,
    UnpairedOptions,
)

N = 4


def numbers(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-2, -1, N).to(DEVICE, dtype)


def ones() -> Tensor:
    return torch.ones(N, dtype=torch.uint8, device=DEVICE)


def pairs(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[Backend], Any]:
    options = {"terms": ((0, 1.0),), **options}
    return lambda b: b.pair_loss(
        numbers(dtype), numbers(dtype) - 1, None, PairConstants(), PairOptions(**options)
    )


def unpaired(**options: Any) -> Callable[[Backend], Any]:
    return lambda b: b.unpaired_loss(numbers(), UnpairedConstants(ones()), UnpairedOptions(**options))


def policy(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[Backend], Any]:
    def call(backend: Backend) -> Any:
        x = numbers(dtype)
        layout = Sequences(None, 2, 2, N, x.device)
        inputs = PolicyInputs(layout, x, ones(), old=x, ref=x, sampler=x)
        return backend.policy_loss(x, x, inputs, PolicyOptions(**options))

    return call


def distillation(**options: Any) -> Callable[[Backend], Any]:
    z = numbers().reshape(1, N)
    parts = torch.zeros(1, 2).to(DEVICE)

    def call(backend: Backend) -> Any:
        sums = backend.row_divergence(
            z, z, None, DistillationOptions(**options), lse_parts=parts, teacher_lse_parts=parts
        )
        return SimpleNamespace(loss=sums[:, 0])

    return call


# option -> (a call with that code, the names that there are)
CODES: dict[str, tuple[Callable[[int], Callable[[Backend], Any]], tuple[str, ...]]] = {
    "terms": (lambda code: pairs(terms=((0, 0.5), (code, 1.0))), tables.PAIR_TERMS),
    "divergence": (lambda code: pairs(divergence=code), tables.DIVERGENCES),
    "term": (lambda code: unpaired(term=code), tables.UNPAIRED_TERMS),
    "surrogate": (lambda code: policy(surrogate=code), tables.SURROGATES),
    "level": (lambda code: policy(level=code), tables.LEVELS),
    "aggregation": (lambda code: policy(aggregation=code), tables.AGGREGATIONS),
    "kl_kind": (lambda code: policy(kl_kind=code), tables.KL_KINDS),
    "correction": (lambda code: policy(correction=code), tables.CORRECTIONS),
    "distillation's divergence": (
        lambda code: distillation(divergence=code),
        tables.DISTILLATION_DIVERGENCES,
    ),
}


@pytest.mark.parametrize("past", ["one past the end", "far past the end", "negative"])
@pytest.mark.parametrize("option", CODES)
@pytest.mark.parametrize("backend", ALL)
def test_code(backend: str, option: str, past: str) -> None:
    kernels = contract(backend)
    make, names = CODES[option]
    bad = {"one past the end": len(names), "far past the end": 1000, "negative": -1}[past]
    with pytest.raises(ValueError, match=rf"{option.split()[-1]}: expected .*got {bad}"):
        make(bad)(kernels)


@pytest.mark.parametrize("option", CODES)
@pytest.mark.parametrize("backend", ALL)
def test_every_code_that_exists_is_taken(backend: str, option: str) -> None:
    """The other side of it: the tables name no code that a backend does not know."""
    kernels = contract(backend)
    make, names = CODES[option]
    losses = [make(code)(kernels).loss for code in range(len(names))]
    # exo_pair has no value without label smoothing; what else is infinite would be a wrong formula.
    assert [n for n, loss in zip(names, losses) if not loss.isfinite().all() and n != "exo_pair"] == []


def rows(dtype: torch.dtype) -> Tensor:
    return torch.ones(2, 5, device=DEVICE).to(dtype)


TARGET = torch.tensor([1, 4], device=DEVICE)
DTYPES = (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [name for name in ALL if name != "reference"])
def test_dtype_of_logits(backend: str, dtype: torch.dtype) -> None:
    """The definition takes what PyTorch computes with; a kernel has a code for four dtypes."""
    kernels = contract(backend)
    assert str(dtype) in kernels.why_not_for(rows(dtype))
    with pytest.raises((TypeError, ValueError, KeyError)):
        kernels.row_stats(rows(dtype), TARGET, RowOptions(), want=("logsumexp",))
    with pytest.raises((TypeError, ValueError, KeyError)):
        kernels.row_cross_entropy(rows(dtype), TARGET, CrossEntropyOptions())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("backend", [name for name in ALL if name != "reference"])
def test_dtype_of_log_probs(backend: str, dtype: torch.dtype) -> None:
    """Pairs and policies are computed in float32, on the CPU in float64 too: other bytes must not be read as those."""
    kernels = contract(backend)
    for call in (pairs(dtype), policy(dtype)):
        with pytest.raises((TypeError, ValueError, KeyError)):
            call(kernels)


@pytest.mark.parametrize("backend", ALL)
def test_statistic(backend: str) -> None:
    with pytest.raises((ValueError, KeyError), match="perplexity"):
        contract(backend).row_stats(rows(torch.float32), TARGET, RowOptions(), want=("perplexity",))
