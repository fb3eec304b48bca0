"""Run a check on a provider: the same procedure with the provider's function and, in float64, with the right one."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastloss.conformance.check import Check, Inputs, Loss, Measured, Result
from fastloss.conformance.measure import WrongDtype
from fastloss.conformance.providers import Provider

# What an exception says that is about what it was given, in lower case. ValueError and TypeError are about an argument where they
# say what they take; PyTorch's RuntimeErrors say "expected" of their own insides too, so that of those only the plain words count.
SAYS_NO = (
    "not support",
    "unsupported",
    "not implemented",
    "unexpected keyword",
    "cannot run this call",
    "cannot be differentiated",
    "must override the setup_context",  # torch.func on an autograd.Function that was not made for it
    "requires create_graph=false",  # torch.compile, of a second backward
)
SAYS_WHAT_IT_TAKES = ("expected", "expects", "must ", "should ", "only ", "required", "requires")


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
    except WrongDtype as error:
        return Result(check.name, provider.name, "fail", str(error))
    except Exception as error:
        state = "refused" if is_refusal(error) else "error"
        return Result(check.name, provider.name, state, f"{type(error).__name__}: {_line(error)}")
    wrong = _difference(check, found, right)
    return Result(check.name, provider.name, "fail" if wrong else "pass", wrong)


def is_refusal(error: Exception) -> bool:
    """Whether an exception refuses what it was given, in words: not a wrong number, and not a crash either."""
    if isinstance(error, NotImplementedError):
        return True
    words = SAYS_NO + (SAYS_WHAT_IT_TAKES if isinstance(error, (ValueError, TypeError)) else ())
    text = str(error).lower()
    return isinstance(error, (ValueError, TypeError, RuntimeError)) and any(word in text for word in words)


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
