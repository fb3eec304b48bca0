"""Writes golden files: seeded inputs, tensors as JSON, one file per family of cases (README.md has the format)."""

from __future__ import annotations

import ast
import inspect
import json
import math
import textwrap
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.int64: "int64", torch.bool: "bool"}
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.float64: {"rtol": 1e-9, "atol": 1e-11}}
DTYPES = (torch.float32, torch.float64)


def grid(seed: int, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal numbers rounded to multiples of 1/256: exact in float32, short in JSON, float64 [*shape]."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((noise * scale + shift) * 256).round() / 256


def lengths_mask(lengths: list[int], width: int) -> Tensor:
    """bool [B, width]: the first ``lengths[b]`` positions of row b."""
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def number(value: float, single: bool) -> float | str:
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    return float(f"{value:.9g}") if single else value


def tensor(value: Tensor | float) -> dict[str, Any]:
    """A tensor as ``{"dtype", "shape", "data"}``, its elements in row-major order."""
    value = torch.as_tensor(value).detach().cpu()
    name = NAMES[value.dtype]
    if name in ("int64", "bool"):
        data = value.to(torch.int64).flatten().tolist()
    else:
        data = [number(x, name == "float32") for x in value.flatten().tolist()]
    return {"dtype": name, "shape": list(value.shape), "data": data}


def tensors(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tensors(value) if isinstance(value, dict) else tensor(value)
        for name, value in values.items()
        if value is not None
    }


class Family:
    """The cases of one file: they share a peer and the inputs given here; each call of ``add`` is a case."""

    def __init__(
        self, file: str, function: str, peer: dict[str, str], inputs: dict[str, Tensor], note: str = ""
    ):
        self.file, self.cases = file, []
        self.head: dict[str, Any] = {"format": 1, "function": function, "peer": peer}
        if note:
            self.head["note"] = note
        self.head["inputs"] = tensors(inputs)

    def add(
        self,
        name: str,
        dtype: torch.dtype,
        options: dict[str, Any],
        outputs: dict[str, Any],
        gradients: dict[str, Tensor],
        inputs: dict[str, Tensor | None] | None = None,
        tolerance: dict[str, float] | None = None,
        **more: Any,
    ) -> None:
        """``inputs`` are added to the file's; None there leaves a shared one out. ``more``: any key of a case."""
        case: dict[str, Any] = {"name": f"{name} {NAMES[dtype]}", "dtype": NAMES[dtype]}
        own = {key: None if x is None else tensor(x) for key, x in (inputs or {}).items()}
        own = {
            key: x for key, x in own.items() if x != self.head["inputs"].get(key)
        }  # what the file does not say yet
        if own:
            case["inputs"] = own
        case |= {"options": options, "outputs": tensors(outputs), "gradients": tensors(gradients)}
        case["tolerance"] = tolerance or TOLERANCE[dtype]
        self.cases.append(case | more)

    def write(self) -> None:
        """One line per case, so that a change of one case is a change of one line."""
        head = json.dumps(self.head, ensure_ascii=False, allow_nan=False)[:-1]
        lines = [json.dumps(case, ensure_ascii=False, allow_nan=False) for case in self.cases]
        DATA.mkdir(exist_ok=True)
        text = head + ', "cases": [\n' + ",\n".join(lines) + "\n]}\n"
        (DATA / f"{self.file}.json").write_text(text, encoding="utf-8")
        print(f"{self.file}.json: {len(self.cases)} cases, {len(text) / 1024:.0f} KiB")


def peer(name: str, where: str, version: str | None = None) -> dict[str, str]:
    if version is None:
        from importlib.metadata import version as installed

        version = installed(name)
    return {"name": name, "version": version, "where": where}


class Accelerator:
    """One process, so that gathering and padding do nothing."""

    num_processes, process_index, sync_gradients = 1, 0, True
    device = torch.device("cpu")

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = unwrap_model = gather

    def pad_across_processes(self, value: Tensor, **_: Any) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str = "sum") -> Tensor:
        return value


def bare_trainer(trainer_class: type, **attributes: Any) -> Any:
    """A trainer without its __init__: only what its loss method reads, one process, in training mode."""
    trainer = trainer_class.__new__(trainer_class)
    trainer.accelerator = Accelerator()
    trainer.model = types.SimpleNamespace(training=True, is_gradient_checkpointing=False)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size, trainer.aux_loss_enabled = 0, 1, False
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def last_metrics(trainer: Any) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


def run_statement(method: Any, first_line: str, names: dict[str, Any], containing: str = "") -> str:
    """Run one statement of a peer's method, found by its first line and a word in it, on ``names``; where it stands.

    For code in the middle of a method that cannot be called alone: what runs is the peer's source, not a copy.
    """
    method = inspect.unwrap(method)
    source = textwrap.dedent(inspect.getsource(method))
    lines = source.splitlines()
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt)
        and lines[node.lineno - 1].strip() == first_line
        and containing in "\n".join(lines[node.lineno - 1 : node.end_lineno])
    ]
    if len(found) != 1:
        raise LookupError(f"{method.__qualname__}: expected one statement {first_line!r}, found {len(found)}")
    block = ast.Module(body=[found[0]], type_ignores=[])
    exec(compile(block, method.__qualname__, "exec"), method.__globals__, names)
    begin = inspect.getsourcelines(method)[1] - 1
    return f"{method.__qualname__}, lines {begin + found[0].lineno}-{begin + found[0].end_lineno}"


class default_dtype:
    """``torch.tensor(0.1)`` inside a peer's method in the case's precision."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: Any) -> None:
        torch.set_default_dtype(self.before)


def leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that gathers a gradient."""
    return value.detach().to(dtype, copy=True).requires_grad_()
