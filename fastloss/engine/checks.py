"""Argument checks, in one voice: ``name: expected …, got …``. All of them run before anything is computed."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor


class ShapeError(ValueError, RuntimeError):
    """A shape or dtype that does not fit. PyTorch raises RuntimeError here, so both ``except``s catch it."""


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
PLAIN = (Tensor, torch.nn.Parameter)


def is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if type(value) in PLAIN and not torch.compiler.is_compiling():
        _has_memory(name, value)


def as_rows(x: Tensor) -> Tensor:
    """``[..., W]`` as ``[rows, W]``, also where W is 0 and ``reshape(-1, W)`` could not tell how many."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _has_memory(name: str, value: Tensor) -> None:
    """PyTorch itself reads address 0 where a tensor's storage was freed."""
    try:
        freed = value.untyped_storage().nbytes() == 0 and value.numel() > 0
    except (RuntimeError, NotImplementedError):  # a wrapper of torch.func, sparse: no storage to free
        return
    if freed:
        raise ValueError(
            f"{name}: expected a tensor with memory, got one whose storage was freed, as FSDP does with parameters between "
            "uses; use it while its memory is there"
        )


def is_floating(name: str, value: Tensor) -> None:
    is_tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {_dtype(value)}")


def float_dtype(name: str, value: Any) -> None:
    if value not in FLOATS:
        raise TypeError(f"{name}: expected torch.float32, bfloat16, float16 or float64, got {value!r}")


def is_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """A finite Python number in [low, high] (or (low, high] with ``open_low``)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's numbers are Real too
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = float(value)
    if (
        torch.compiler.is_compiling()
    ):  # it may be symbolic, one that changes from call to call: only bounds are compared
        below = low > -math.inf and (value < low or (open_low and value == low))
        if below or (high < math.inf and value > high):
            raise ValueError(f"{name}: expected a number from {low} to {high}")
        return value
    if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
        bracket = "(" if open_low or low == -math.inf else "["
        close = ")" if high == math.inf else "]"
        raise ValueError(f"{name}: expected a finite number in {bracket}{low}, {high}{close}, got {value}")
    return value


def row_scale(temperature: Tensor, lead: tuple[int, ...], like: Tensor, name: str = "temperature") -> Tensor:
    """One over the temperature of each token, ``[rows]``, in the accumulation dtype of ``like``. ``temperature`` is broadcast to the
    tokens' shape ``lead``; ``name``: the argument that it is."""
    is_floating(name, temperature)
    same_device(name, temperature, like.device)
    if temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor that requires no gradient; to learn one, divide the logits or hidden states by it"
        )
    acc = torch.float64 if like.dtype == torch.float64 else torch.float32
    try:
        each = temperature.detach().to(acc).broadcast_to(lead)
    except RuntimeError:
        raise ShapeError(
            f"{name}: expected a number, or shape {list(lead)}, got {list(temperature.shape)}"
        ) from None
    if host_reads(temperature) and not bool(((temperature > 0) & temperature.isfinite()).all()):
        raise ValueError(f"{name}: expected finite numbers > 0, got others among them")
    return each.reshape(-1).reciprocal()


def token_weight(name: str, weight: Tensor, lead: tuple[int, ...], device: torch.device) -> None:
    """A constant factor of each token's log-prob, float of the tokens' shape ``lead``."""
    is_floating(name, weight)
    has_shape(name, weight, lead)
    same_device(name, weight, device)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")


def softcap_value(softcap: float | None) -> float:
    return 0.0 if softcap is None else number("softcap", softcap, low=0.0, open_low=True)


_SCALAR_TYPES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
}


def class_weight_dtype(weight: Tensor, input: Tensor) -> None:
    """PyTorch's rule for class weights beside classes (beside class probabilities any float dtype is taken): that of the logits,
    where autocast makes both float32 unless they are float64. In PyTorch's words."""
    expected, got = (autocast_dtype(x.dtype, input.device.type) for x in (input, weight))
    if expected != got:
        raise ShapeError(
            f"weight: expected scalar type {_SCALAR_TYPES[expected]} but found {_SCALAR_TYPES[got]}"
        )


def autocast_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What PyTorch's cross-entropy makes of a float argument: float32 under autocast, but for float64."""
    return torch.float32 if dtype != torch.float64 and autocasts(device) else dtype


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device; there is none on "meta"."""
    if torch.compiler.is_compiling():  # torch 2.8 cannot trace the question whether it is available
        return device != "meta" and torch.is_autocast_enabled(device)
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of PyTorch's cross-entropy: the input's, float32 under autocast; of class probabilities the widest of all."""
    device = input.device.type
    dtype = autocast_dtype(input.dtype, device)
    if not target.is_floating_point():
        return dtype
    for other in (target, weight):
        if other is not None:
            dtype = torch.promote_types(dtype, autocast_dtype(other.dtype, device))
    return dtype


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def has_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ShapeError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def index_target(name: str, target: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """int64 class indices of exactly ``shape``."""
    is_tensor(name, target)
    if target.dtype != torch.int64 or tuple(target.shape) != tuple(shape):
        raise ShapeError(
            f"{name}: expected int64 of shape {list(shape)}, got {_dtype(target)} of shape {list(target.shape)}"
        )
    same_device(name, target, device)


def wide_index(target: Any) -> Any:
    """Classes in uint8, which PyTorch takes, as int64."""
    return target.long() if isinstance(target, Tensor) and target.dtype == torch.uint8 else target


def normalizer_value(normalizer: Any, reduction: str, device: torch.device) -> float | Tensor | None:
    """A number, a 0-d tensor, or one value per device (what the transformers Trainer passes): its first."""
    if normalizer is None:
        return None
    if reduction == "none":
        raise ValueError("normalizer: expected reduction='mean' or 'sum', got reduction='none'")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ShapeError(
                f"normalizer: expected a number or a 0-d tensor, got shape {list(normalizer.shape)}"
            )
        return normalizer.detach().reshape(()).to(device)
    return number("normalizer", normalizer, low=0.0)


def chunk_size_value(chunk_size: Any) -> None:
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, numbers.Integral) or chunk_size < 1
    ):
        raise ValueError(f"chunk_size: expected a positive int, got {chunk_size!r}")


MEMORY = ("auto", "low", "fast")


def memory_value(memory: Any) -> None:
    if memory not in MEMORY:
        raise ValueError(f"memory: expected one of {', '.join(map(repr, MEMORY))}, got {memory!r}")


def logits_dtype_value(logits_dtype: Any) -> None:
    if logits_dtype not in (None, torch.float32):
        raise ValueError(f"logits_dtype: expected None or torch.float32, got {logits_dtype!r}")


def skip_value(skip: Any) -> float:
    if skip == 0 and not isinstance(skip, (bool, Tensor)):
        return 0.0
    value = number("skip", skip, low=0.0, high=1.0)
    if value >= 1:
        raise ValueError(f"skip: expected a number from 0 to less than 1, got {skip}")
    return value


def reject_bad_targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    """IndexError that names the first target outside [0, vocab) which is not ignore_index."""
    bad = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if bool(bad.any()):
        raise bad_target(target, int(bad.reshape(-1).nonzero()[0]), vocab)


def bad_target(target: Tensor, flat_position: int, vocab: int) -> IndexError:
    position: list[int] = []
    for size in reversed(target.shape):
        position.insert(0, flat_position % size)
        flat_position //= size
    value = int(target[tuple(position)])
    where = f" at position {position}" if position else ""
    return IndexError(f"Target {value} is out of bounds{where}: expected a class in [0, {vocab})")


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def replaced(value: Any, **fields: Any) -> Any:
    """``value._replace(**fields)`` of a NamedTuple, in a form that torch.compile of torch 2.8 traces."""
    kind = type(value)
    return kind(*[fields.get(name, old) for name, old in zip(kind._fields, value, strict=True)])


def host_reads(tensor: Tensor) -> bool:
    """Whether a value of ``tensor`` may be looked at: it is on the CPU, and nothing traces or transforms the call."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )
