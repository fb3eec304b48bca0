"""The same numbers as another tensor: strides, offsets, views that are not their memory, types."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuzz_draw import Draw
from torch import Tensor


class Subclass(Tensor):
    """A subclass of the kind that trainers have."""


def transposed(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.dim() > 1 else x


def odd_offset(x: Tensor) -> Tensor:
    """Rows further apart than they are long, beginning at an odd place."""
    if x.dim() == 0:
        return torch.stack([x, x, x])[1]
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), 77, dtype=x.dtype, device=x.device)
    wide[..., 3 : 3 + x.shape[-1]] = x
    return wide[..., 3 : 3 + x.shape[-1]]


def every_other(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 55)], -1)[..., 0]


def negative_view(x: Tensor) -> Tensor:
    return torch._neg_view(-x) if x.is_floating_point() else x


def imaginary_part(x: Tensor) -> Tensor:
    """Of a conjugate: a negative view with a stride of 2."""
    if x.dtype not in (torch.float32, torch.float64):
        return x
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def half_of_complex(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        return x
    return torch.complex(x, torch.ones_like(x)).real


def parameter(x: Tensor) -> Tensor:
    return torch.nn.Parameter(x.clone(), requires_grad=False)


def subclass(x: Tensor) -> Tensor:
    return x.clone().as_subclass(Subclass)


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x.clone(),
    "transposed": transposed,
    "odd offset": odd_offset,
    "every other": every_other,
    "negative view": negative_view,
    "imaginary part": imaginary_part,
    "half of complex": half_of_complex,
    "parameter": parameter,
    "subclass": subclass,
    "inference": inference,
}


def drawn_kinds(
    d: Draw, tensors: dict[str, Tensor], fixed: tuple[str, ...], traced: bool = False
) -> dict[str, str]:
    """A kind for each tensor; ``fixed`` ones ask for a gradient, which a tensor of inference mode cannot. What is ``traced`` by
    torch.compile is dense memory, of any strides."""
    if d.chance(0.4):
        return dict.fromkeys(tensors, "plain")
    common = ("plain", "plain", "transposed", "odd offset", "every other")
    rare = ("negative view", "imaginary part", "half of complex", "parameter", "subclass", "inference")
    if traced:
        rare = ("parameter",)
    out = {}
    for name in tensors:
        kind = d.pick(*common) if d.chance(0.75) else d.pick(*rare)
        out[name] = "plain" if kind == "inference" and name in fixed else kind
    return out


def expanded_rows(d: Draw, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Some tensors become one row expanded (their numbers change): name -> "expanded"."""
    out = {}
    tied = {"support", "target"} if "support" in tensors else set()  # a target is in its own set
    for name, x in tensors.items():
        fixed = "seqlens" in name or "mask" in name or name in tied
        if x.dim() and x.shape[0] > 1 and not fixed and d.chance(0.03):
            tensors[name] = x[:1].expand(x.shape).contiguous()
            out[name] = "expanded"
    return out


KINDS["expanded"] = lambda x: x[:1].clone().expand(x.shape)
