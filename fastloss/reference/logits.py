"""From raw logits to the logits a loss sees."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.tables import Number


def effective_logits(
    logits: Tensor, *, bias: Tensor | None = None, scale: Number = 1.0, softcap: float | None = None
) -> Tensor:
    """``scale · softcap · tanh((logits + bias) / softcap)`` in float32 (float64 for float64 logits). ``scale``: a number, or one for
    each row ``[rows]``."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(scale, Tensor):
        return z * scale.to(z.dtype).unsqueeze(-1)
    # One that changes under torch.compile is not compared: to be 1 would be another graph.
    return z if not torch.compiler.is_compiling() and scale == 1.0 else z * scale


def linear_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """``input @ linear_weight.T + linear_bias``: the head that fastloss never materialises. With a LoRA ``input`` has r columns more, u,
    and ``linear_bias`` is B ``[V, r]``, or that and the bias ``[V, r + 1]``: ``input @ linear_weight.T + u @ B.T + bias``."""
    if linear_bias is None or linear_bias.dim() == 1 or linear_weight.dim() != 2:
        return torch.nn.functional.linear(input, linear_weight, linear_bias)
    dim = linear_weight.shape[1]
    rank = input.shape[-1] - dim
    bias = linear_bias[:, rank].to(linear_weight.dtype) if linear_bias.shape[1] > rank else None
    low_rank, u = linear_bias[:, :rank], input[..., dim:]
    z = torch.nn.functional.linear(input[..., :dim].to(linear_weight.dtype), linear_weight, bias)
    wide = torch.promote_types(u.dtype, low_rank.dtype)
    return (z + torch.nn.functional.linear(u.to(wide), low_rank.to(wide))).to(z.dtype)


def row_gradient(
    logits: Tensor,
    target: Tensor | None,
    lse_parts: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    d: Tensor | None,
    *,
    w: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Number = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """``dz_v = a·[v = target] + b·p_v + c·p_v·log p_v + d·w_v`` of ``logits [rows, V]``, through soft-cap and scale."""
    x = logits.detach().requires_grad_()
    with torch.enable_grad():
        z = effective_logits(x, bias=bias, scale=scale, softcap=softcap)
    logp = (z.detach() - lse_parts[:, :1]) - lse_parts[:, 1:]
    p = logp.exp()
    dz = torch.zeros_like(p)
    if b is not None:
        dz = dz + b.unsqueeze(-1) * p
    if c is not None:
        dz = dz + c.unsqueeze(-1) * torch.where(p == 0, 0, p * logp)
    if d is not None:
        dz = dz + d.unsqueeze(-1) * (torch.ones_like(p) if w is None else w)
    if target is not None:
        bad = ((target < 0) | (target >= logits.shape[1])) & (target != ignore_index)
        if a is not None:
            safe = torch.where((target == ignore_index) | bad, torch.zeros_like(target), target)
            dz = dz.scatter_add(1, safe.unsqueeze(1), a.unsqueeze(1))
        dz = torch.where((target == ignore_index).unsqueeze(1), 0, dz)
    (out,) = torch.autograd.grad(z, x, dz.to(z.dtype))
    if target is not None:
        out = out.masked_fill(bad.unsqueeze(1), float("nan"))
        out = out.masked_fill((target == ignore_index).unsqueeze(1), 0)
    return out
