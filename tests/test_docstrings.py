"""The examples in the docstrings of every public name run and print what they say."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator

import pytest
import torch

import fastloss
import fastloss.parallel
from fastloss import nn


def documented() -> Iterator[tuple[str, object]]:
    for name in fastloss.__all__:
        value = getattr(fastloss, name)
        if inspect.isroutine(value) or inspect.isclass(value):
            yield f"fastloss.{name}", value
    for name, value in vars(nn).items():
        if inspect.isclass(value) and value.__module__ == nn.__name__ and not name.startswith("_"):
            yield f"fastloss.nn.{name}", value
    for name in fastloss.parallel.__all__:
        yield f"fastloss.parallel.{name}", getattr(fastloss.parallel, name)


PUBLIC = dict(documented())
# A result's type and torch's own machinery need no example.
WITHOUT_EXAMPLE = {
    "DistillationOutput",
    "ListwiseOutput",
    "MultiTokenTargets",
    "PolicyOutput",
    "PreferenceOutput",
    "RewardOutput",
    "SequencePart",
    "RouterOutput",
    "SequenceShard",
    "SupervisedOutput",
    "TokenStats",
    "UnpairedOutput",
    "ValueOutput",
}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_examples(name: str) -> None:
    value = PUBLIC[name]
    tests = doctest.DocTestFinder(recurse=False).find(value, name, globs={})
    examples = sum(len(test.examples) for test in tests)
    assert examples or name.rsplit(".", 1)[1] in WITHOUT_EXAMPLE, f"{name}: expected an example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    printed: list[str] = []
    with torch.random.fork_rng():
        for test in tests:
            runner.run(test, out=printed.append)
    assert not runner.failures, "".join(printed)
