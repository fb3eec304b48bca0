"""The same cases as a pytest-benchmark suite: pytest benchmarks --benchmark-only (FASTLOSS_BENCH_FULL=1: full shapes)."""

from __future__ import annotations

import os

import pytest

from fastloss.bench import measure
from fastloss.bench.cases import cases, data
from fastloss.bench.providers import providers

DEVICE = os.environ.get("FASTLOSS_TEST_DEVICE", "cpu")
CASES = cases(quick=os.environ.get("FASTLOSS_BENCH_FULL") != "1")
NAMES = (
    "fastloss[cpu]",
    "fastloss[cuda]",
    "fastloss[triton]",
    "torch eager",
    "torch linear_cross_entropy",
    "trl",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_step(benchmark, case, name: str) -> None:
    inputs = data(case, DEVICE)
    step = providers(case, inputs).get(name, "it has no such case")
    if isinstance(step, str):
        pytest.skip(step)
    exact = measure.exact_loss(case, inputs)
    benchmark.group = case.name
    source = None if inputs.logits is None else inputs.logits.detach().clone()

    def setup() -> None:
        if source is not None:
            inputs.logits.data.copy_(source)

    setup()
    assert abs(float(step()) - exact) < 0.2
    benchmark.pedantic(step, setup=setup, rounds=5)
