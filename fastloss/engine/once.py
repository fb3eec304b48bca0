"""A backward that refuses to be differentiated again: an error, never silent zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        raise RuntimeError(
            "fastloss: the kernels' gradient cannot be differentiated again (double backward); "
            "backend='reference' can be differentiated twice"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Like torch's, but with ``create_graph=True`` the gradient carries a node that raises.

    torch's marks only gradients whose upstream requires grad, so that a gradient penalty would silently vanish.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        anchor = torch.zeros((), requires_grad=True)
        return tuple(_Refuse.apply(g, anchor) if isinstance(g, Tensor) else g for g in grads)

    return wrapper
