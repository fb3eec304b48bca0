"""Run a check on a provider: the same procedure with the provider's function and, in float64, with the right one."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastloss.conformance.check import Check, Inputs, Loss, Measured, Result
from fastloss.conformance.providers import Provider

# A refusal is not a wrong number. What else can be raised (AssertionError, NameError, …) is a failure.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)


def run(check: Check, provider: Provider) -> Result:
    function = provider.functions.get(check.interface)
    if function is None:
        return Result(check.name, provider.name, "not supported", "no such function")
    if lacking := _lacking(function, check.options):
        return Result(check.name, provider.name, "not supported", f"no option {', '.join(lacking)}")
    given = _inputs(check)
    right = _measured(check, check.right, {name: _exact(value) for name, value in given.items()})
    try:
        found = _measured(check, function, given)
    except REFUSALS as error:
        return Result(check.name, provider.name, "not supported", f"{type(error).__name__}: {_line(error)}")
    except Exception as error:
        return Result(check.name, provider.name, "fail", f"{type(error).__name__}: {_line(error)}")
    wrong = _difference(check, found, right)
    return Result(check.name, provider.name, "fail" if wrong else "pass", wrong)


def run_all(checks: Iterable[Check], providers: Iterable[Provider]) -> Iterator[Result]:
    checks = list(checks)
    for provider in providers:
        for check in checks:
            yield run(check, provider)


def _lacking(function: Loss, options: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    return [name for name in options if name not in {p.name for p in parameters}]


def _inputs(check: Check) -> Inputs:
    """The same numbers on every machine and in every order of the checks."""
    generator = torch.Generator().manual_seed(zlib.crc32(check.name.encode()))
    return check.inputs(generator)


def _exact(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float64).contiguous()
    return value


def _measured(check: Check, function: Loss, inputs: Inputs) -> Measured:
    """Leaves are made here; a view of a leaf stays a view."""
    fresh = {
        name: value.detach().requires_grad_() if name in check.leaves else value
        for name, value in inputs.items()
    }
    options = {
        name: _exact(value) if fresh[next(iter(fresh))].dtype == torch.float64 else value
        for name, value in check.options.items()
    }
    return check.measure(lambda *args: function(*args, **options), fresh, check.leaves)


def _difference(check: Check, found: Measured, right: Measured) -> str:
    for name, exact in right.items():
        got = found[name].detach().double().cpu()
        exact = exact.detach().double()
        if got.shape != exact.shape:
            return f"{name}: shape {list(got.shape)}, right {list(exact.shape)}"
        if torch.equal(got.isnan(), exact.isnan()):
            got, exact = (
                got.nan_to_num(0.0, torch.inf, -torch.inf),
                exact.nan_to_num(0.0, torch.inf, -torch.inf),
            )
        error = torch.where(got == exact, 0.0, (got - exact).abs()).nan_to_num(torch.inf, torch.inf)
        if error.numel() and error.max().item() > check.tolerance.allowed(check.dtype, exact):
            at = int(error.argmax())
            return f"{name}: {got.flatten()[at].item():.6g}, right {exact.flatten()[at].item():.6g}"
    return ""


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else ""
