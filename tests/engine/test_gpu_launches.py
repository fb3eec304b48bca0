"""How much a call gives a GPU to do: kernels of a backend, and operations of PyTorch that are a launch or more."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, contract
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastloss
from fastloss.engine import devices, head
from fastloss.engine.native import NativeBackend

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter and in the emulation")
GPU_KERNELS = [name for name in KERNELS if name != "cpu"]
ROWS, DIM, VOCAB = 12, 16, 40
ROW = {"row_cross_entropy kernel": 1, "sum_rows kernel": 1}
SCALE = {"cuda": "scale_in_place kernel", "triton": "scale kernel"}
# Memory and views of it, and what only a mode sees.
NO_LAUNCH = {
    "empty", "new_empty", "empty_like", "view", "_unsafe_view", "detach", "alias", "slice", "select", "t", "transpose", "expand",
    "as_strided", "unsqueeze", "squeeze", "_reshape_alias", "lift_fresh", "head_gemms",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts, by name, PyTorch's operations; the kernels' come from :func:`watch`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Watched:
    """A native module whose functions are counted."""

    def __init__(self, module: Any, launches: Launches) -> None:
        self._module, self._launches = module, launches

    def __getattr__(self, name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._launches.found[f"{name} kernel"] += 1
            return getattr(self._module, name)(*args, **kwargs)

        return run


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, backend: str) -> Launches:
    """On CPU tensors that are taken for a GPU's."""
    counting, kernels = Launches(), contract(backend)
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(head, "_disable_current_modes", contextlib.nullcontext)
    if isinstance(kernels, NativeBackend):
        monkeypatch.setattr(kernels, "module", Watched(kernels.module, counting))
    else:
        from triton.runtime.interpreter import GridExecutor

        plain = GridExecutor.__call__

        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            counting.found[f"{self.fn.__name__}".replace("_kernel", " kernel")] += 1
            with torch._C._DisableTorchDispatch():  # the interpreter's own copies
                return plain(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", run)
    return counting


def counted(launches: Launches, function: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    launches.found.clear()
    with launches:
        out = function()
    return out, dict(launches.found)


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = (torch.randn(n, DIM).to(dtype).requires_grad_() for n in (ROWS, VOCAB))
    logits = torch.randn(ROWS, VOCAB).to(dtype).requires_grad_()
    return logits, hidden, weight, torch.randint(0, VOCAB, (ROWS,))


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_mean_cross_entropy(launches: Launches, backend: str) -> None:
    logits, _, _, target = leaves()
    loss, forward = counted(launches, lambda: fastloss.cross_entropy(logits, target, backend=backend))
    assert forward == {f"{name} kernel": 1 for name in ("reciprocal_count", "row_cross_entropy", "sum_rows")}
    one = torch.ones(())
    _, backward = counted(launches, lambda: torch.autograd.grad(loss, logits, one))
    assert backward == {SCALE[backend]: 1}


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_summed_cross_entropy(launches: Launches, backend: str) -> None:
    logits, _, _, target = leaves()
    call = lambda: fastloss.cross_entropy(logits, target, reduction="sum", backend=backend)
    assert counted(launches, call)[1] == {"row_cross_entropy kernel": 1, "sum_rows kernel": 1}


@pytest.mark.parametrize("ignored", [0, 4])
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_head(launches: Launches, backend: str, ignored: int) -> None:
    _, hidden, weight, target = leaves()
    target[:ignored] = -100
    call = lambda: fastloss.linear_cross_entropy(hidden, weight, target, backend=backend)
    loss, forward = counted(launches, call)
    products = {"mm": 2, "addmm": 1}
    asked = {"ne": 1, "nonzero": 1}  # which rows carry a target
    gathered = {"index_select": 2, "zeros": 1, "index_copy_": 1} if ignored else {}
    assert forward == {**products, **asked, **gathered, **ROW}
    one = torch.ones(())
    _, backward = counted(launches, lambda: torch.autograd.grad(loss, (hidden, weight), one))
    assert backward == {SCALE[backend]: 2}


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_head_that_may_not_wait(launches: Launches, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(devices, "SKIP_IGNORED", False)
    _, hidden, weight, target = leaves()
    call = lambda: fastloss.linear_cross_entropy(hidden, weight, target, backend=backend)
    forward = counted(launches, call)[1]
    assert forward == {"mm": 2, "addmm": 1, "reciprocal_count kernel": 1, **ROW}
