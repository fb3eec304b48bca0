"""A loss and its gradients in float64, by PyTorch, and the distance of everybody's from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastloss.bench.case import IGNORE, Case, Data, Loss

BLOCK = 128  # rows at a time: float64 logits of a whole case would not fit everywhere
HELD = (
    2 << 30
)  # bytes of a gradient of logits in float64; of more rows than that those of the first alone are compared


class Exact(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]


Truth = Callable[[Case, Data], Exact]
_last: dict[tuple[object, ...], Exact] = {}


def cached(case: Case, data: Data, truth: Truth) -> Exact:
    """Kept for the next case if its inputs are the same."""
    key = (*case.inputs, data.device)
    if key not in _last:
        _last.clear()
        _last[key] = truth(case, data)
    return _last[key]


def token(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """The target's log-prob per row, and the entropy if asked for; 0 where the target is ignored."""
    logprobs = logits.log_softmax(-1)
    kept = target != IGNORE
    out = (logprobs.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) * kept,)
    return (*out, -(logprobs.exp() * logprobs).sum(-1) * kept) if entropy else out


def no_gradient_tokens(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """float64 log-probs of ``target [...]`` under a head, block by block."""
    dim = weight.shape[1]
    rows, flat, columns = hidden.detach().reshape(-1, dim), target.reshape(-1), weight.detach().double().t()
    blocks = zip(rows.split(BLOCK), flat.split(BLOCK))
    return torch.cat([token(h.double() @ columns, t, False)[0] for h, t in blocks]).view(target.shape)


def over_vocabulary(data: Data, target: Tensor, tail: Callable[..., Tensor], entropy: bool = False) -> Exact:
    """``tail(logprobs, entropy)``, of the shape of ``target``, over logits or over a head. The first pass makes the
    numbers per token; the second has their gradients and makes those of the logits or of the head."""
    linear = "hidden" in data.tensors
    source = (
        data["hidden"] if linear else data["logits"] if data.pristine is None else data.pristine
    ).detach()
    rows, flat = source.reshape(-1, source.shape[-1]), target.reshape(-1)
    weight = data["weight"].detach().double() if linear else None
    blocks = list(zip(rows.split(BLOCK), flat.split(BLOCK)))

    def logits(block: Tensor) -> Tensor:
        return block.double() if weight is None else block.double() @ weight.t()

    parts = zip(*(token(logits(block), t, entropy) for block, t in blocks))
    leaves = [torch.cat(part).view(target.shape).requires_grad_() for part in parts]
    loss = tail(*leaves)
    upstream = [g.reshape(-1) for g in torch.autograd.grad(loss, leaves)]
    d_rows, d_weight = [], None if weight is None else torch.zeros_like(weight)
    for k, (block, t) in enumerate(blocks):
        leaf = logits(block).requires_grad_()
        rows_here = slice(k * BLOCK, k * BLOCK + len(t))
        (grad,) = torch.autograd.grad(token(leaf, t, entropy), leaf, [g[rows_here] for g in upstream])
        if weight is not None:
            d_rows.append(grad @ weight)
        elif k * grad.numel() * grad.itemsize < HELD:
            d_rows.append(grad)
        if d_weight is not None:
            d_weight.addmm_(grad.t(), block.double())
    d_source = torch.cat(d_rows)
    if d_weight is None:
        return Exact(loss.detach(), {"logits": d_source})
    gradients = {"hidden": d_source.view(source.shape), "weight": d_weight}
    return Exact(loss.detach(), gradients)


def over_numbers(data: Data, loss: Loss) -> Exact:
    """Of losses that begin at log-probs: their own expression in float64."""
    double = {n: t.detach().double() if t.is_floating_point() else t for n, t in data.tensors.items()}
    leaves = {name: double[name].requires_grad_() for name in data.leaves}
    value = loss(*double.values())
    grads = torch.autograd.grad(value, list(leaves.values())) if leaves else ()
    return Exact(value.detach(), dict(zip(leaves, grads)))


def cross_entropy_tail(target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logprobs: -logprobs.sum() / (target != IGNORE).sum()


def errors(truth: Exact, loss: Tensor, gradients: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference, of the loss and of each gradient (of the rows that ``truth`` has); NaN where either is
    NaN."""
    out = {"loss": float((loss.detach().double() - truth.loss).abs().max())}
    for name, grad in gradients.items():
        blocks = zip(grad.split(BLOCK), truth.gradients[name].split(BLOCK))
        out[name] = float(torch.stack([(g.double() - e).abs().max() for g, e in blocks]).max())
    return out


def scale(truth: Exact) -> dict[str, float]:
    """The largest entry of each gradient: what an absolute error is to be seen against."""
    return {name: float(grad.abs().max()) for name, grad in truth.gradients.items()}
