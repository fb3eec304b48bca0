"""A number that changes from call to call under torch.compile is compiled twice at most (bug 46): every public function, every number.

Calls are the fuzzer's draws: the first one in which the number counts. Graphs go through AOTAutograd, which alone shows that an operator
was given a symbolic number, and values and gradients are held to the eager call's.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE
from fuzz_draw import Case, Draw
from fuzz_functions import FUNCTIONS
from fuzz_judge import flat, upstream
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

import fastloss

VALUES = 10
RANGES = tuple(
    tuple(first + step * k for k in range(VALUES)) for first, step in ((0.1, 0.05), (1.1, 0.1), (3.0, 1.0))
)
# Of these every value is another computation: counts, classes, lists of numbers.
NO_NUMBERS = (
    "ignore_index",
    "chunk_size",
    "skip",
    "group_size",
    "top_k",
    "top",
    "loss_weights",
    "weights",
    "per_choice",
)
# Whose options a function takes by ``**options``.
SHARED: dict[str, Any] = {
    "process_reward_loss": fastloss.cross_entropy,
    "linear_policy_loss": fastloss.policy_loss,
    **{f"{name}_loss": fastloss.preference_loss for name in ("dpo", "ipo", "cpo", "simpo", "orpo")},
    **{f"linear_{name}_loss": fastloss.linear_preference_loss for name in ("dpo", "cpo", "simpo", "orpo")},
}
# A named loss reads these alone of preference_loss's numbers.
READ = {
    "dpo_loss": {"beta", "label_smoothing", "margin", "ld_alpha"},
    "ipo_loss": {"beta", "ld_alpha"},
    "cpo_loss": {"beta", "label_smoothing", "margin", "ld_alpha", "cpo_alpha", "simpo_gamma", "simpo_alpha"},
    "simpo_loss": {
        "beta",
        "label_smoothing",
        "margin",
        "ld_alpha",
        "cpo_alpha",
        "simpo_gamma",
        "simpo_alpha",
    },
    "orpo_loss": {"beta", "ld_alpha"},
}
for _name in ("dpo_loss", "cpo_loss", "simpo_loss", "orpo_loss"):
    READ[f"linear_{_name}"] = READ[_name] | {"temperature", "logit_scale", "softcap"}
# Options without which no draw has the number count.
WITH: dict[str, dict[str, Any]] = {
    "linear_preference_loss, simpo_alpha": {"loss_type": "simpo", "reference_free": True},
    "linear_cpo_loss, simpo_gamma": {"loss_type": "simpo"},
    # every token may be taken out: of so few, the default bounds leave none
    **{
        f"{name}, clip_cov_ratio": {"loss_type": "clip_cov", "clip_cov_low": -1e3, "clip_cov_high": 1e3}
        for name in ("policy_loss", "linear_policy_loss")
    },
}


def numbers_of(name: str) -> list[str]:
    parameters: dict[str, Any] = dict(inspect.signature(getattr(fastloss, name)).parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        parameters = {**inspect.signature(SHARED[name]).parameters, **parameters}
    found = [
        p.name
        for p in parameters.values()
        if p.name not in NO_NUMBERS and ("float" in str(p.annotation) or "Number" in str(p.annotation))
    ]
    return [x for x in found if x in READ.get(name, found)]


GRID = [f"{name}, {number}" for name in FUNCTIONS for number in numbers_of(name)]
CHEAP = ("cross_entropy, z_loss", "linear_distillation_loss, hard_loss_coef", "bco_loss, delta")


def usable(case: Case) -> bool:
    return all(
        0 < x.numel() < 6000 and (not x.is_floating_point() or bool(x.isfinite().all()))
        for x in case.tensors.values()
    )


def drawn(name: str, number: str) -> Iterator[Case]:
    for n in range(400):
        case = FUNCTIONS[name][0](Draw(131, n, [torch.float32]))
        case.tensors.pop(number, None)
        case.options.pop(number, None)
        case.options |= WITH.get(f"{name}, {number}", {})
        if usable(case):
            case.tensors = {k: x.to(DEVICE) if k != "cu_seqlens" else x for k, x in case.tensors.items()}
            yield case


def call_that_counts(name: str, number: str) -> tuple[Case, tuple[float, ...]]:
    function = getattr(fastloss, name)
    for case, values in itertools.product(drawn(name, number), RANGES):
        try:
            outs = [flat(function(**case.tensors, **case.options, **{number: v})) for v in values]
        except (ValueError, TypeError, RuntimeError):  # a range or an option that does not fit
            continue
        first, last = outs[0], outs[-1]
        finite = all(bool(x.isfinite().all()) for x in first.values() if x.is_floating_point())
        if finite and any(not torch.equal(first[k], last[k]) for k in first):
            return case, values
    raise AssertionError(f"no draw of {name} in which {number} counts")


def results(call: Any, case: Case, leaves: list[str], value: float) -> dict[str, Tensor]:
    tensors = {k: x.detach().clone().requires_grad_() if k in leaves else x for k, x in case.tensors.items()}
    out = flat(call(tensors, value))
    carrying = {k: x for k, x in out.items() if x.requires_grad}
    found = {k: x.detach() for k, x in out.items()}
    if carrying and leaves:
        ups = [upstream(k, x.cpu(), False).to(x.device) for k, x in carrying.items()]
        grads = torch.autograd.grad(list(carrying.values()), [tensors[k] for k in leaves], ups)
        found |= {f"d {k}": g for k, g in zip(leaves, grads, strict=True)}
    return found


def check(cell: str, dynamic: bool | None) -> None:
    name, number = cell.split(", ")
    case, values = call_that_counts(name, number)
    function, graphs = getattr(fastloss, name), 0
    leaves = [x for x in case.leaves if x in case.tensors][:1]

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    def call(tensors: dict[str, Tensor], value: float) -> Any:
        return function(**tensors, **case.options, **{number: value})

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=count, dynamic=dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in values:
            got, expected = (results(f, case, leaves, value) for f in (compiled, call))
            for key in expected:
                torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert graphs <= 2, f"{graphs} graphs for {values}"


def test_every_number_is_named() -> None:
    assert set(CHEAP) <= set(GRID) and set(WITH) <= set(GRID) and len(GRID) > 100


@pytest.mark.parametrize("cell", CHEAP)
def test_some_numbers_compile_twice_at_most(cell: str) -> None:
    check(cell, None)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("cell", GRID)
def test_every_number_compiles_twice_at_most(cell: str, dynamic: bool | None) -> None:
    check(cell, dynamic)
