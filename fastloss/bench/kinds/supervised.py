"""DFT's and EAFT's losses from hidden states: each token's log-probability times a weight that is a constant in the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.bench.case import IGNORE, Call, Case, Data, Loss, short
from fastloss.bench.exact import BLOCK, Exact, token
from fastloss.bench.kinds.base import Kind, head_leaves
from fastloss.bench.kinds.cross_entropy import linear_tensors

FUNCTION = "linear_supervised_loss"
EAFT_SCALE = 3.0


def cases(quick: bool) -> Iterator[Case]:
    shape = (32, 16, 500) if quick else (1024, 512, 32000)
    for loss_type, dtype in (("dft", torch.float32), ("dft", torch.bfloat16), ("eaft", torch.bfloat16)):
        name = f"{loss_type}-linear-{short(dtype)}-" + "x".join(map(str, shape))
        yield Case(name, "supervised-linear", *shape, dtype, options=(("loss_type", loss_type),))


def _ours(case: Case, call: Call) -> Loss:
    function: Any = getattr(fastloss, FUNCTION)
    return lambda *tensors: function(*tensors, **dict(case.options), **call).loss


def _losses(case: Case, logits: Tensor, target: Tensor) -> Tensor:
    """Of each row, 0 where the target is ignored."""
    dft = dict(case.options)["loss_type"] == "dft"
    logprobs, *entropy = token(logits, target, not dft)
    weight = logprobs.exp() if dft else entropy[0] / EAFT_SCALE
    return -weight.detach() * logprobs


def _eager(case: Case) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float()
        return _losses(case, logits, target).sum() / (target != IGNORE).sum()

    return loss


def _truth(case: Case, data: Data) -> Exact:
    weight, count = data["weight"].detach().double(), (data["target"] != IGNORE).sum()
    total, d_hidden, d_weight = weight.new_zeros(()), [], torch.zeros_like(weight)
    blocks = zip(data["hidden"].detach().split(BLOCK), data["target"].split(BLOCK))
    for hidden, target in blocks:
        logits = (hidden.double() @ weight.t()).requires_grad_()
        loss = _losses(case, logits, target).sum() / count
        (grad,) = torch.autograd.grad(loss, logits)
        total += loss.detach()
        d_hidden.append(grad @ weight)
        d_weight.addmm_(grad.t(), hidden.double())
    return Exact(total, {"hidden": torch.cat(d_hidden), "weight": d_weight})


KINDS = {
    "supervised-linear": Kind(
        cases, linear_tensors, head_leaves, _ours, _eager, _truth, needs=FUNCTION, is_head=True
    )
}
