"""What is done with a loss in a check. The same procedure runs with the right function, whose numbers are the right ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.conformance.check import Inputs, Loss, Measured


class WrongDtype(Exception):
    """A gradient that is not of its leaf's dtype."""


def _call(loss: Loss, inputs: Inputs) -> Tensor:
    return loss(*inputs.values())


def _number(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _grads(out: Tensor, inputs: Inputs, leaves: tuple[str, ...], upstream: Tensor, **how: bool) -> Measured:
    found = torch.autograd.grad(out, [inputs[name] for name in leaves], upstream, **how)
    return {f"d {name}": grad for name, grad in zip(leaves, found)}


def value(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    return {"value": _call(loss, inputs)}


def gradients(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """The value and, for an upstream gradient of ones, the gradients."""
    out = _call(loss, inputs)
    return {"value": out.detach(), **_grads(out, inputs, leaves, torch.ones_like(out))}


def scaled(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """An upstream gradient of 1024, as of a GradScaler."""
    out = _call(loss, inputs)
    return _grads(out, inputs, leaves, torch.full_like(out, 1024.0))


def expanded(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """An upstream gradient of one number with strides of 0."""
    out = _call(loss, inputs)
    return _grads(
        out, inputs, leaves, torch.tensor(0.375, dtype=out.dtype, device=out.device).expand(out.shape)
    )


def each(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """Another upstream gradient for each row."""
    out = _call(loss, inputs)
    upstream = torch.arange(1, out.numel() + 1, dtype=out.dtype, device=out.device) / 8
    return _grads(out, inputs, leaves, upstream.view(out.shape))


def twice(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """The second backward through a graph that was retained."""
    out = _call(loss, inputs)
    upstream = torch.full_like(out, 3.0)
    _grads(out, inputs, leaves, upstream, retain_graph=True)
    return _grads(out, inputs, leaves, upstream)


def second(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """The gradient of the gradient's sum of squares; with allow_unused, a None counts as 0."""
    out = _call(loss, inputs)
    first = torch.autograd.grad(
        out, [inputs[name] for name in leaves], torch.ones_like(out), create_graph=True
    )
    if not any(grad.requires_grad for grad in first):
        raise RuntimeError("the gradient cannot be differentiated")
    square = sum((grad.square().sum() for grad in first), start=torch.zeros_like(first[0].sum()))
    found = torch.autograd.grad(square, [inputs[name] for name in leaves], allow_unused=True)
    return {
        f"d² {name}": torch.zeros_like(inputs[name]) if grad is None else grad
        for name, grad in zip(leaves, found)
    }


def per_sample(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """torch.func.vmap(grad(loss)) over the rows; the leaves are the first arguments, the first has the rows."""
    rows, *shared, target = inputs.values()

    def one(row: Tensor, label: Tensor) -> Tensor:
        return loss(row[None], *shared, label[None])

    return {"d rows": torch.func.vmap(torch.func.grad(one))(rows.detach(), target)}


def unchanged(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """The inputs after forward and backward."""
    out = _call(loss, inputs)
    _grads(out, inputs, leaves, torch.ones_like(out))
    return {name: inputs[name].detach().clone() for name in leaves}


def added_up(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """Leaves that something else reads too, as tied embeddings do: the gradients must add up."""
    other = sum((inputs[name].square().sum() for name in leaves), start=_number(0))
    out = _call(loss, inputs)
    return _grads(out + other.to(out.dtype), inputs, leaves, torch.ones_like(out))


def default_dtype(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """Under torch.set_default_dtype(float64), which is no business of a loss of float32 inputs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return gradients(loss, inputs, leaves)
    finally:
        torch.set_default_dtype(before)


def state(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """1 for each of random state, default dtype and number of threads that is the same afterwards."""
    generator, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    gradients(loss, inputs, leaves)
    kept = (
        torch.equal(generator, torch.get_rng_state()),
        dtype == torch.get_default_dtype(),
        threads == torch.get_num_threads(),
    )
    return {"random state, default dtype, threads kept": _number(kept)}


def refused(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """1 if it raises or says NaN: never a number made of memory outside the row."""
    try:
        out = _call(loss, inputs)
    except (IndexError, ValueError, RuntimeError, TypeError, AssertionError):
        return {"refused": _number(1)}
    return {"refused": out.detach().isnan().any().float()}


def autocast(loss: Loss, inputs: Inputs, leaves: tuple[str, ...]) -> Measured:
    """Under autocast to bfloat16 with float32 leaves, whose gradients must be float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=inputs[leaves[0]].dtype != torch.float64):
        found = gradients(loss, inputs, leaves)
    for name in leaves:
        if found[f"d {name}"].dtype != inputs[name].dtype:
            raise WrongDtype(f"the gradient of {name} is {found[f'd {name}'].dtype}")
    return found
