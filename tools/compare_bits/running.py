"""Runs the calls on every backend that can run here.

Uses public names alone; what is not public stands in ``instruction_sets`` and ``emulate_cuda``.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from all_calls import all_cases
from arguments import CONTROLS, DTYPES, Case, matches
from results import digest, save
from torch import Tensor


class Setting(NamedTuple):
    """How the calls of one pass run."""

    backend: str
    isa: str
    threads: int

    def __str__(self) -> str:
        return f"{self.backend}/{self.isa or 'any'}/{self.threads}"


def instruction_sets() -> tuple[list[str], Callable[[str], None]]:
    """The instruction sets of this machine, the one that is taken by default first, and how to force one."""
    try:
        native = importlib.import_module("fastloss._cpu")
    except ImportError:
        return [], lambda _: None
    return list(native.supported_isas()), native.set_isa


def emulate_cuda(checkout: Path) -> str:
    """Put the CUDA sources, compiled by g++ for the CPU, in place of the GPU's module; or why that is not possible."""
    build = None
    for folder in ("tests", "tests/helpers"):
        if (checkout / folder / "cuda_emulation" / "build.py").exists():
            sys.path.insert(0, str(checkout / folder))
            build = importlib.import_module("cuda_emulation.build").build_emulated
    if build is None:
        return "no tests/cuda_emulation beside the package"
    try:
        module = build()
    except RuntimeError as error:  # no compiler
        return str(error).splitlines()[0]
    # By the file: an installed fastloss may answer for a module that this checkout does not have.
    if (checkout / "fastloss" / "engine" / "native.py").exists():
        native, backend = (
            importlib.import_module(f"fastloss.engine.{name}") for name in ("native", "backend")
        )
        backend.replace_backend("cuda", native.emulated_cuda(module))
        return ""
    if (checkout / "fastloss" / "ops" / "cuda_rows.py").exists():  # before the backends were classes
        importlib.import_module("fastloss.ops.cuda_rows").emulate(module)
        return ""
    return "this fastloss has no way to run the CUDA kernels emulated"


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors whose gradient is asked for: through a view or a copy, the tensor that it was made of."""
    found = {}
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.requires_grad:
            while value.grad_fn is not None:
                node = value.grad_fn
                while not hasattr(node, "variable"):
                    node = node.next_functions[0][0]
                value = node.variable
            found[str(key)] = value
    return found


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for key, item in enumerate(value):
            yield from flatten(item, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path or "value", value


def evaluate(fastloss: Any, case: Case, setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the call gives: values by their names, "d name" gradients, or the error."""
    seed = zlib.crc32(f"{case.function}:{case.name}".encode())
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    args, kwargs = case.build(dtype, g)
    function, extra = case.function, {}
    if function.startswith("nn."):
        module = getattr(fastloss.nn, function[3:])(**args[0])
        args = args[1:]
        if case.build and isinstance(args[0], Tensor):
            module = module.to(dtype)
        extra = dict(module.named_parameters())
        call: Callable[..., Any] = module
    elif function == "explain":
        call, target = fastloss.explain, getattr(fastloss, args[0])
        args = (target, *args[1:])
    else:
        call = getattr(fastloss, function)
    if setting.backend != "auto" and not case.plain:
        kwargs["backend"] = setting.backend
    leaves = {**leaves_of(args, kwargs), **extra}
    if case.compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend=case.compiled, fullgraph=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext()
    try:
        with autocast:
            result = call(*args, **kwargs)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    if function == "explain":
        return {"plan": {k: v for k, v in result.items() if k != "reason"}}
    out: dict[str, Any] = {}
    upstream, differentiable = [], []
    for name, value in flatten(result):
        out[name] = value.detach().clone() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor) and value.requires_grad:
            differentiable.append(value)
            upstream.append(
                torch.randn(value.shape, generator=g).to(value.dtype)
                if value.dim()
                else torch.tensor(1.5, dtype=value.dtype)
            )
    if not differentiable or not leaves:
        return out
    try:
        grads = torch.autograd.grad(
            differentiable, list(leaves.values()), upstream, allow_unused=True, create_graph=case.twice
        )
        for name, grad in zip(leaves, grads, strict=True):
            out[f"d {name}"] = None if grad is None else grad.detach().clone()
        if case.twice:
            given = [x for x in grads if x is not None and x.requires_grad]
            total = sum((x * torch.randn(x.shape, generator=g).to(x.dtype)).sum() for x in given)
            second = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if given else ()
            for name, grad in zip(leaves, second, strict=False):
                out[f"dd {name}"] = None if grad is None else grad.detach().clone()
    except Exception as error:
        out["error in backward"] = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return out


def settings_of(fastloss: Any, wanted: list[str], checkout: Path) -> tuple[list[Setting], dict[str, str]]:
    """The passes that can run here, and why the others cannot."""
    isas, _ = instruction_sets()
    skipped: dict[str, str] = {}
    found = []
    if "auto" in wanted:
        found.append(Setting("auto", "", 1))
    if "reference" in wanted:
        found.append(Setting("reference", "", 1))
    if "cpu" in wanted and isas:
        found += [Setting("cpu", isas[0], 2), *(Setting("cpu", isa, 1) for isa in isas)]
    elif "cpu" in wanted:
        skipped["cpu"] = "no native module"
    if "cuda" in wanted:
        reason = emulate_cuda(checkout)
        if reason:
            skipped["cuda"] = reason
        else:
            found.append(Setting("cuda", "", 1))
    if "triton" in wanted:
        state = fastloss.backends()["triton"]
        if state == "available":
            found.append(Setting("triton", "", 1))
        else:
            skipped["triton"] = state
    return found, skipped


def runs_in(case: Case, setting: Setting, first_isa: str) -> bool:
    if case.plain or case.function.startswith("nn."):
        return setting.backend == "auto"
    if case.compiled:
        return setting.backend in ("auto", "reference")
    if case.twice or case.autocast:
        return setting.backend != "triton" and setting.isa in ("", first_isa)
    if case.function == "explain":
        return setting.backend in ("auto", "reference", "cuda")
    return case.small if setting.backend in ("cuda", "triton") else True


def make(out: Path, wanted: list[str], only: list[str]) -> int:
    import fastloss

    checkout = Path(fastloss.__file__).resolve().parents[1]
    isas, force = instruction_sets()
    settings, skipped = settings_of(fastloss, wanted, checkout)
    for name, reason in skipped.items():
        print(f"{name}: left out ({reason})")
    cases = [case for case in all_cases() if matches(f"{case.function}:{case.name}", only)]
    calls: dict[str, dict[str, Any]] = {}
    for setting in settings:
        start = time.perf_counter()
        torch.set_num_threads(setting.threads)
        if isas:
            force(setting.isa or isas[0])
        count = errors = 0
        for case in cases:
            if not runs_in(case, setting, isas[0] if isas else ""):
                continue
            names = case.dtypes
            if setting.backend in ("cuda", "triton"):
                names = tuple(n for n in names if n != "f64")
            if setting.backend == "triton":
                names = tuple(n for n in names if n == "f32" or zlib.crc32(case.name.encode()) % 4 == 0)
            for name in names:
                result = evaluate(fastloss, case, setting, DTYPES[name])
                calls[f"{setting}|{case.function}|{case.name}|{name}"] = result
                count += 1
                errors += "error" in result
        seconds = time.perf_counter() - start
        print(f"{setting}: {count} calls, {errors} of them errors, {seconds:.0f} s", flush=True)
    called = {case.function.removeprefix("nn.") for case in cases}
    public = {n for n in fastloss.__all__ if inspect.isfunction(getattr(fastloss, n))} - CONTROLS
    public |= {
        n for n, c in vars(fastloss.nn).items() if inspect.isclass(c) and c.__module__ == fastloss.nn.__name__
    }
    missing = sorted(public - called) if only == ["*"] else []
    save(calls, isas, out)
    print(f"{len(calls)} calls in {out}, sha256 {digest(calls)[:16]}")
    if missing:
        print(f"public names that no call covers: {', '.join(missing)}")
    return 1 if missing else 0
