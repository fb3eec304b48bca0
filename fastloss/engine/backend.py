"""Which backends exist, why one does not, which one a call uses, and what ``explain`` tells of it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastloss.engine import checks, invariance
from fastloss.engine.checks import PLAIN
from fastloss.engine.contract import Backend
from fastloss.engine.definition import REFERENCE
from fastloss.engine.gate import LazyView, address
from fastloss.engine.native import NativeBackend, cpu_backend, cuda_backend
from fastloss.engine.triton import TritonBackend

log = logging.getLogger("fastloss")

# Read once: looking it up at each call costs as much as a tiny kernel.
_FROM_ENVIRONMENT = os.environ.get("FASTLOSS_BACKEND", "auto")
NAMES = ("reference", "cpu", "cuda", "triton")

_MAKERS: dict[str, Callable[[], Backend]] = {
    "reference": lambda: REFERENCE,
    "cpu": cpu_backend,
    "cuda": cuda_backend,
    "triton": TritonBackend,
}
_made: dict[str, Backend] = {}
_accepted: set[tuple[str, torch.device, torch.dtype]] = (
    set()
)  # (backend, device, dtype) that a kernel took before


class _State(threading.local):
    backend: str | None = None


_state = _State()
_validate_targets = False


def get_backend(name: str) -> Backend:
    """The backend of that name, whether or not it can run here (``why_not``)."""
    if name not in _made:
        _made[name] = _MAKERS[name]()
    return _made[name]


def replace_backend(name: str, backend: Backend) -> None:
    """Another implementation under the same name: the tests run the CUDA kernels emulated on the CPU."""
    _made[name] = backend
    _accepted.clear()


def runnable(name: str) -> Backend:
    """The backend of that name; RuntimeError with the reason where it cannot run."""
    backend = get_backend(name)
    if reason := backend.why_not():
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return backend


def backends() -> dict[str, str]:
    """Every backend and its state: ``"available"`` or the reason why it cannot run here.

    >>> import fastloss
    >>> fastloss.backends()["reference"]
    'available'
    """
    return {name: get_backend(name).why_not() or "available" for name in NAMES}


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
        check_name(name)
        runnable(name)
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


def check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of 'auto', {', '.join(map(repr, NAMES))}, got {name!r}")


class Call(NamedTuple):
    """Who computes one call of a public function, and why."""

    function: str
    backend: Backend
    reason: str
    # torch.compile, export or a fake tensor: kernels are reached through torch.library operators.
    traced: bool
    by_definition: bool  # no kernel: the definition, which autograd differentiates

    def without_kernels(self, reason: str) -> Call:
        """The same call by the definition, whatever backend was asked for."""
        return Call(self.function, REFERENCE, reason, self.traced, True)

    def announce(self, more: Callable[[], dict[str, Any]] = dict, **details: Any) -> None:
        """Tell the log, and ``explain`` if it is asking, which path the call takes; before anything is computed. ``more``: details
        that are only worked out for them."""
        if self.by_definition and self.function.startswith("linear_"):
            invariance.refuse(f"the definition computes it ({self.reason})")
        if self.traced:
            return
        if _explaining.active:
            plan = {
                "function": self.function,
                "backend": self.backend.name,
                "reason": self.reason,
                **details,
                **more(),
            }
            raise Explained(plan)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s: %s (%s) %s", self.function, self.backend.name, self.reason, {**details, **more()})


def resolve_call(
    function: str,
    backend: str,
    tensor: Tensor,
    *tensors: Any,
    unsupported: str = "",
    has_operators: bool = True,
    dtype: torch.dtype | None = None,
) -> Call:
    """Chooses who computes a call on ``tensor``.

    Args:
        tensors: the other arguments that a kernel would take, constants among them; what is no tensor is no matter.
        unsupported: why no kernel can do this call (empty: they can).
        has_operators: False where torch.compile traces the definition, because the kernels have no torch.library operator.
        dtype: that of the kernel's operands where it is not ``tensor``'s (autocast).
    """
    if is_traced(tensor):
        if has_operators and not unsupported:
            name = _traced_backend(backend, tensor.device.type, dtype or tensor.dtype)
            chosen = get_backend(name)
            return Call(function, chosen, "traced", True, chosen.differentiable)
        return Call(function, REFERENCE, unsupported or "traced as the definition", True, True)
    chosen, reason = choose(backend, tensor, unsupported or tracing_reason(tensor, *tensors))
    return Call(function, chosen, reason, False, chosen.differentiable)


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def resolves_views(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function``, with every negative or conjugate view among its tensors made its own memory where no kernel could read it, and
    every tensor of inference mode copied where autograd saves it.

    Those are rare and cost a copy; a call without one pays for no question about them.
    """

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():  # traces of a view read its numbers
            return function(*args, **kwargs)
        # The ranks of a group go through their collectives once, and together; what was overwritten is not there a second time.
        if kwargs.get("group") is None and not kwargs.get("inplace"):
            try:
                return function(*args, **kwargs)
            except LazyView:
                pass
            except RuntimeError:  # "Inference tensors cannot be saved for backward"
                if not any(map(_is_of_inference, (*args, *kwargs.values()))):
                    raise
        # At most some work was lost. A second error is of no argument: the caller's to see.
        return function(*[resolved(x) for x in args], **{name: resolved(x) for name, x in kwargs.items()})  # type: ignore[arg-type]

    return call


def _is_of_inference(value: Any) -> bool:
    """A tensor, or one in a tuple, that inference mode made and autograd cannot save."""
    if isinstance(value, (tuple, list)):
        return any(map(_is_of_inference, value))
    return isinstance(value, Tensor) and value.is_inference() and torch.is_grad_enabled()


def resolved(value: Any) -> Any:
    """A negative or conjugate view as its own memory, a tensor of inference mode as a copy; anything else as it is."""
    if isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value):
        return type(value)(map(resolved, value)) if type(value) in (tuple, list) else value
    if not isinstance(value, Tensor):
        return value
    value = value.resolve_conj().resolve_neg()
    return value.clone() if _is_of_inference(value) else value


def announce_pointwise(function: str, backend: str) -> None:
    """The announcement of a function that is a few pointwise operations of PyTorch on every backend."""
    if backend != "auto":
        check_name(backend)
    if not torch.compiler.is_compiling():
        Call(function, REFERENCE, "a few pointwise operations of PyTorch", False, True).announce()


def choose(backend: str, tensor: Tensor, unsupported: str = "") -> tuple[Backend, str]:
    """The backend for ``tensor``, and why. ``unsupported`` says why no kernel can do this call (empty: they can)."""
    name = backend
    origin = "backend="
    if name == "auto":
        name, origin = _state.backend or _FROM_ENVIRONMENT, "use_backend / FASTLOSS_BACKEND"
    if name == "auto":
        return _choose_automatically(tensor, unsupported)
    check_name(name)
    chosen = get_backend(name)
    if name != "reference":
        reason = chosen.why_not() or unsupported or chosen.why_not_for(tensor)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
    return chosen, f"chosen by {origin}"


def is_default(backend: str) -> bool:
    """Whether a call on the CPU takes the ``cpu`` backend, with no ``explain`` waiting for an announcement."""
    if _explaining.active or not (backend == "auto" or backend == "cpu"):
        return False
    return backend == "cpu" or (_state.backend or _FROM_ENVIRONMENT) in ("auto", "cpu")


def _choose_automatically(tensor: Tensor, unsupported: str) -> tuple[Backend, str]:
    if unsupported:
        log.debug("reference: %s", unsupported)
        return REFERENCE, unsupported
    reasons = []
    for name in ("cpu",) if tensor.device.type == "cpu" else ("cuda", "triton"):
        backend = get_backend(name)
        key = name, tensor.device, tensor.dtype
        reason = "" if key in _accepted else backend.why_not() or backend.why_not_for(tensor)
        if not reason:
            _accepted.add(key)
            return backend, f"the best backend for {tensor.device.type} tensors"
        reasons.append(f"{name}: {reason}")
    text = "no kernel can run this call (" + "; ".join(reasons) + ")"
    _warn_once(text)
    return REFERENCE, text


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


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Which path ``fn(*args, **kwargs)`` would take, and why, without computing it.

    Returns:
        a dict with ``function``, ``backend``, ``reason`` and, for the linear head, ``gemms``, ``chunk_rows``,
        ``logits_dtype``, ``buffer_bytes`` and, in chunks of rows, ``accumulator_bytes`` (of a float32 gradient of the weight beside its own);
        where cross-entropy takes scaled exponentials also ``row_pass`` and ``scratch_bytes``; of CUDA's cross-entropy ``row_kernel``, which of
        its two row kernels computes the call, and why the other one does not.

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


def tracing_reason(*tensors: Any) -> str:
    """Why no kernel can take a call: somebody transforms or traces it, or a tensor is not its own dense memory. Then the
    definition computes it, whose every operation PyTorch knows."""
    if _interpreter() is not None:
        return "torch.func transforms are differentiated through the definition"
    if torch.jit.is_tracing():
        return "torch.jit.trace records the definition"
    if _dispatch_mode(_PROXY) is not None:
        return "make_fx records the definition"
    dual = forward_ad._current_level >= 0
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if reason := not_dense(tensor):
            return f"{reason} is computed through the definition"
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:
            return "forward-mode derivatives go through the definition"
    return ""


def not_dense(tensor: Tensor) -> str:
    """What a tensor is that is not its own dense memory; empty for a plain one. ValueError where its memory was freed, LazyView
    for a negative or conjugate view."""
    if type(tensor) not in PLAIN:
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_meta:
        return "a meta tensor"
    if tensor._is_zerotensor():
        return "a zero tensor of autograd"
    address(tensor)  # the gate's own question, quick for contiguous memory
    return ""


@torch.compiler.assume_constant_result
def _traced_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend's name while torch.compile traces, from device and dtype alone."""
    if device == "cpu" or torch.cuda.is_available():
        return choose(backend, torch.empty(0, dtype=dtype, device=device))[0].name
    return "reference"


def is_traced(tensor: Tensor) -> bool:
    """torch.compile, export or a fake tensor: the call goes through the torch.library operators."""
    if torch.compiler.is_compiling():
        return True
    kind = type(tensor)
    return (
        kind is not Tensor
        and kind is not torch.nn.Parameter
        and isinstance(
            tensor,
            (torch._subclasses.fake_tensor.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor),
        )
    )


# --- direct calls: small plain tensors on the CPU, one native call that makes loss, metrics and gradient -----------------

_logs = log.isEnabledFor
_tracing = torch._C._get_tracing_state
_interpreter = torch._C._functorch.peek_interpreter_stack
_dispatch_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY


def is_direct(backend: str) -> bool:
    """No torch.func transform, no tracer, no ``explain`` or debug log to tell, and the CPU's kernels are what is asked for.
    ``torch.compiler.is_compiling()`` is asked before: torch.compile cannot trace this."""
    return (
        _interpreter() is None
        and _tracing() is None
        and forward_ad._current_level < 0
        and _dispatch_mode(_PROXY) is None
        and is_default(backend)
        and not _logs(logging.DEBUG)
    )


def are_alike(like: Tensor, *tensors: Any) -> bool:
    """Whether each is None, or a plain contiguous tensor on the CPU of ``like``'s shape and dtype."""
    dtype, size = like.dtype, like.shape
    for x in tensors:
        if x is not None and not (
            type(x) in PLAIN and x.dtype is dtype and x.is_cpu and x.shape == size and x.is_contiguous()
        ):
            return False
    return True


# --- targets -----------------------------------------------------------------------------------------------------------


def count_targets(target: Tensor, vocab: int, ignore_index: int) -> int:
    """How many targets are not ``ignore_index``; IndexError for one outside [0, vocab). The host reads the tensor."""
    cpu = get_backend("cpu")
    if target.device.type != "cpu" or not isinstance(cpu, NativeBackend) or not cpu.has_head:
        checks.reject_bad_targets(target, vocab, ignore_index)
        return int((target != ignore_index).sum())
    valid, bad = cpu.count_targets(target, vocab, ignore_index)
    if bad >= 0:
        raise checks.bad_target(target, bad, vocab)
    return valid


def targets_are_validated() -> bool:
    """Whether targets on a GPU are checked too."""
    return _validate_targets


def check_targets(target: Tensor | None, vocab: int, ignore_index: int) -> None:
    """On the CPU, and with ``validate_targets(True)`` on a GPU: IndexError for a target outside [0, vocab)."""
    if target is None or is_traced(target) or tracing_reason(target):
        return
    if target.device.type == "cpu" or _validate_targets:
        checks.reject_bad_targets(target, vocab, ignore_index)
