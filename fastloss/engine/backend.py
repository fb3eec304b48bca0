"""Which backends exist, why one does not, and which one a call uses."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("fastloss")

# Read once: looking it up at each call costs as much as a tiny kernel.
_FROM_ENVIRONMENT = os.environ.get("FASTLOSS_BACKEND", "auto")
NAMES = ("reference", "cpu", "cuda", "triton")


class Choice(NamedTuple):
    """The backend of one call and why it was taken."""

    name: str
    rows: Any  # the module with row_stats, row_grad, row_cross_entropy; None for reference
    reason: str


class _State(threading.local):
    backend: str | None = None


_state = _State()
_validate_targets = False
_loaded: dict[str, tuple[Any, str]] = {}


def _load(name: str) -> tuple[Any, str]:
    """The adapter of a backend, or None and the reason why it cannot run here."""
    if name not in _loaded:
        try:
            adapter = importlib.import_module(f"fastloss.engine.{name}_rows")
            _loaded[name] = (adapter, adapter.why_not())
        except ImportError as error:
            _loaded[name] = (None, str(error))
    return _loaded[name]


def backends() -> dict[str, str]:
    """Every backend and its state: ``"available"`` or the reason why it cannot run here.

    >>> import fastloss
    >>> fastloss.backends()["reference"]
    'available'
    """
    table = {"reference": "available"}
    for name in NAMES[1:]:
        _, reason = _load(name)
        table[name] = reason or "available"
    return table


def use_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Choose the backend of later calls that pass ``backend="auto"``: as a call, or as a context manager.

    Args:
        name: "reference", "cpu", "cuda", "triton", or "auto" / None to go back to the automatic choice.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run here, with the reason.

    >>> import fastloss
    >>> with fastloss.use_backend("reference"):
    ...     pass
    """
    if name == "auto":
        name = None
    if name is not None:
        _check_name(name)
        if name != "reference" and _load(name)[1]:
            raise RuntimeError(f"backend {name!r} cannot run here: {_load(name)[1]}")
    previous, _state.backend = _state.backend, name

    @contextlib.contextmanager
    def restore() -> Iterator[None]:
        try:
            yield
        finally:
            _state.backend = previous

    return restore()


def validate_targets(enabled: bool) -> None:
    """With True, targets on a GPU are checked too (one synchronisation a call): IndexError instead of NaN.

    >>> import fastloss
    >>> fastloss.validate_targets(False)  # the default
    """
    global _validate_targets
    _validate_targets = bool(enabled)


def targets_are_validated() -> bool:
    return _validate_targets


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of 'auto', {', '.join(map(repr, NAMES))}, got {name!r}")


def choose(backend: str, tensor: Tensor, *, unsupported: str = "") -> Choice:
    """The backend for ``tensor``. ``unsupported`` says why no kernel can do this call (empty: they can)."""
    name = backend
    origin = "backend="
    if name == "auto":
        name, origin = (
            _state.backend or _FROM_ENVIRONMENT,
            "use_backend / FASTLOSS_BACKEND",
        )
    if name == "auto":
        return _choose_automatically(tensor, unsupported)
    _check_name(name)
    if name == "reference":
        return Choice("reference", None, f"chosen by {origin}")
    adapter, reason = _load(name)
    reason = reason or unsupported or adapter.why_not_for(tensor)
    if reason:
        raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
    return Choice(name, adapter, f"chosen by {origin}")


def is_default(backend: str) -> bool:
    """Whether a call on the CPU takes the ``cpu`` backend without anybody having to be told."""
    if _explaining.active or not (backend == "auto" or backend == "cpu"):
        return False
    return backend == "cpu" or (_state.backend or _FROM_ENVIRONMENT) in ("auto", "cpu")


def _choose_automatically(tensor: Tensor, unsupported: str) -> Choice:
    if unsupported:
        log.debug("reference: %s", unsupported)
        return Choice("reference", None, unsupported)
    reasons = []
    for name in ("cpu",) if tensor.device.type == "cpu" else ("cuda", "triton"):
        adapter, reason = _load(name)
        reason = reason or adapter.why_not_for(tensor)
        if not reason:
            return Choice(name, adapter, f"the best backend for {tensor.device.type} tensors")
        reasons.append(f"{name}: {reason}")
    text = "no kernel can run this call (" + "; ".join(reasons) + ")"
    _warn_once(text)
    return Choice("reference", None, text)


def gpu_kernels(tensor: Tensor) -> Any:
    """The adapter of the first GPU backend that takes ``tensor``, None where none does."""
    for name in ("cuda", "triton"):
        adapter, reason = _load(name)
        if not (reason or adapter.why_not_for(tensor)):
            return adapter
    return None


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        log.warning("falling back to the reference backend: %s", text)


class _Explaining(threading.local):
    active = False


class Explained(Exception):
    """Carries a call's plan out of a public function before it computes anything."""

    def __init__(self, plan: dict[str, Any]):
        self.plan = plan


_explaining = _Explaining()


def announce(function: str, choice: Choice, **details: Any) -> None:
    """Tell the log, and ``explain`` if it is asking, which path a call takes."""
    if _explaining.active:
        raise Explained({"function": function, "backend": choice.name, "reason": choice.reason, **details})
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %s (%s) %s", function, choice.name, choice.reason, details)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Which path ``fn(*args, **kwargs)`` would take, and why, without computing it.

    Returns:
        a dict with ``function``, ``backend``, ``reason`` and, for the linear head, ``gemms``, ``chunk_rows``
        and ``buffer_bytes``.

    >>> import torch, fastloss
    >>> plan = fastloss.explain(fastloss.cross_entropy, torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
    >>> plan["backend"] in ("cpu", "reference")
    True
    """
    _explaining.active = True
    try:
        fn(*args, **kwargs)
    except Explained as explained:
        return explained.plan
    finally:
        _explaining.active = False
    raise ValueError(f"explain: expected a fastloss function, got {getattr(fn, '__name__', fn)!r}")


def tracing_reason(*tensors: Tensor | None) -> str:
    """Why the eager kernels cannot take these tensors (functorch, forward AD, jit tracing, subclasses)."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms are differentiated through the definition"
    if torch.jit.is_tracing():
        return "torch.jit.trace records the definition"
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter):
            from torch.distributed.tensor import DTensor

            if isinstance(tensor, DTensor):
                return "a DTensor is computed through the definition"
    return ""
