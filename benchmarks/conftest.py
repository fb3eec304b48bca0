"""One step under pytest-benchmark: ``pytest benchmarks --benchmark-only``; FASTLOSS_BENCH_FULL=1 for the full shapes,
FASTLOSS_TEST_DEVICE=cuda for a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from fastloss.bench import limits
from fastloss.bench.case import Case
from fastloss.bench.cases import cases, data, exact
from fastloss.bench.clock import Flusher, synchronize
from fastloss.bench.exact import errors
from fastloss.bench.providers import chosen, registry
from fastloss.bench.steps import step

DEVICE = os.environ.get("FASTLOSS_TEST_DEVICE", "cpu")
FULL = os.environ.get("FASTLOSS_BENCH_FULL") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kinds = getattr(metafunc.module, "KINDS", ())
    if "case" in metafunc.fixturenames and kinds:
        found = [case for case in cases(not FULL, DEVICE) if case.kind in kinds]
        names = dict.fromkeys(["limit", *(p.name for p in registry())])
        metafunc.parametrize("case", found, ids=lambda case: case.name)
        metafunc.parametrize("provider", names)


@pytest.fixture
def run(benchmark):  # type: ignore[no-untyped-def]
    """run(case, name): benchmarks one provider, or the first limit, and gives its loss's error (None: a limit)."""

    def of(case: Case, name: str) -> float | None:
        inputs, loss_error = data(case, DEVICE), None
        if name == "limit":
            candidate = next(iter(limits.limits(case, inputs, DEVICE).values()), None)
            if candidate is None:
                pytest.skip("overhead is measured against torch eager")
        else:
            found, reasons = chosen(case, DEVICE)
            provider = next((p for p in found if p.name == name), None)
            if provider is None:
                pytest.skip(reasons.get(name, "does not take this case"))
            candidate = step(provider.loss(case), case, inputs)
            loss_error = errors(exact(case, inputs), candidate(), {})["loss"]
        flush = Flusher(DEVICE) if case.cold else None

        def before() -> None:
            candidate.prepare()
            inputs.restore()
            if flush is not None:
                flush()
            synchronize(DEVICE)

        def call() -> None:
            candidate()
            synchronize(DEVICE)

        benchmark.group = case.name
        benchmark.extra_info.update(provider=name, threads=torch.get_num_threads(), calls=case.calls)
        benchmark.pedantic(call, setup=before, rounds=5 if FULL else 2)
        torch.compiler.reset()
        return loss_error

    return of
