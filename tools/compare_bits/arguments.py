"""A seeded call of a public function, and the tensors that the calls are made of."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
CONTROLS = {"__version__", "backends", "explain", "nn", "use_backend", "validate_targets"}


class Case(NamedTuple):
    """One call. ``build(dtype, generator)`` gives its arguments; tensors that require a gradient are its leaves."""

    name: str
    function: str  # a public name, "nn.Name" for a module that is called, "explain" for the plan of ``build``'s call
    build: Callable[[torch.dtype, torch.Generator], Arguments]
    small: bool = False  # small enough for Triton's interpreter and the emulation of CUDA
    dtypes: tuple[str, ...] = ("f32", "bf16", "f16", "f64")
    plain: bool = False  # has no kernel: run once, with the default backend
    twice: bool = False  # also the gradient of the gradient
    autocast: bool = False
    compiled: str = ""  # torch.compile's backend


def normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=g) * scale


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g)


def leaf(x: Tensor, dtype: torch.dtype, frozen: bool = False) -> Tensor:
    return x.to(dtype).requires_grad_(not frozen)


def targets(g: torch.Generator, vocab: int, *shape: int, ignore: int | None = None) -> Tensor:
    """Classes, a quarter of them ignored."""
    t = torch.randint(0, vocab, shape, generator=g)
    t[uniform(g, *shape) < 0.25] = -100 if ignore is None else ignore
    t.view(-1)[-1] = vocab - 1
    return t


def lengths_of(g: torch.Generator, count: int, longest: int) -> Tensor:
    return torch.randint(1, longest + 1, (count,), generator=g)


def padding(g: torch.Generator, count: int, longest: int) -> Tensor:
    return torch.arange(longest)[None, :] < lengths_of(g, count, longest)[:, None]


def borders(g: torch.Generator, count: int, longest: int) -> Tensor:
    """``[count + 1]``, one sequence of length 0 where there are more than three."""
    lengths = lengths_of(g, count, longest)
    if count > 3:
        lengths[2] = 0
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def joined(options: dict[str, Any]) -> str:
    words = []
    for key, value in options.items():
        if isinstance(value, Tensor):
            value = f"tensor{value.item()}" if value.dim() == 0 else "tensor"
        words.append(key if value is True else f"{key}={value}")
    return ",".join(words).replace(" ", "").replace("'", "") or "default"


def combined(
    rng: random.Random, choices: dict[str, list[Any]], count: int, most: int = 5
) -> Iterator[dict[str, Any]]:
    """``count`` seeded combinations of 2 to ``most`` of the options."""
    for _ in range(count):
        names = rng.sample(list(choices), k=min(rng.randint(2, most), len(choices)))
        yield {name: rng.choice(choices[name]) for name in sorted(names)}


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
