"""linear_* preference losses: Liger-Kernel's fused linear DPO, KTO, ORPO, SimPO and CPO (pure torch, not compiled)."""

from __future__ import annotations

from typing import Any

import torch
from golden_format import Family, grid, leaf, peer
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from torch import Tensor

PAIRS, WIDTH, HIDDEN, VOCAB, IGNORE = 3, 5, 8, 33, -100
LENGTHS = [5, 3, 1, 2, 5, 4]  # tokens of the chosen, then of the rejected responses
FLOAT32 = torch.float32  # Liger's log_softmax is in float32 whatever it is given
TOLERANCE = {"rtol": 1e-4, "atol": 3e-6}


def inputs(full: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(61)
    target = torch.randint(VOCAB, (2 * PAIRS, WIDTH), generator=generator)
    if not full:
        for row, length in enumerate(LENGTHS):
            target[row, : WIDTH - length] = IGNORE  # the prompt
    return {
        "input": grid(62, 2 * PAIRS, WIDTH, HIDDEN, scale=1.2),
        "linear_weight": grid(63, VOCAB, HIDDEN, scale=0.6),
        "target": target,
        "linear_bias": grid(64, VOCAB, scale=0.3),
        "ref_input": grid(65, 2 * PAIRS, WIDTH, HIDDEN, scale=1.2),
        "ref_weight": grid(66, VOCAB, HIDDEN, scale=0.6),
        "ref_bias": grid(67, VOCAB, scale=0.3),
    }


class Call:
    """The leaves of one call; ``result`` is a case's outputs and gradients."""

    def __init__(self, data: dict[str, Tensor], bias: bool, ref: bool):
        self.leaves = {x: leaf(data[x], FLOAT32) for x in ("input", "linear_weight")}
        if bias:
            self.leaves["linear_bias"] = leaf(data["linear_bias"], FLOAT32)
        self.target = data["target"]
        self.ref = [data[x].float() for x in ("ref_input", "ref_weight", "ref_bias")] if ref else [None] * 3
        if not bias:
            self.ref[2] = None

    def result(self, loss: Tensor, **outputs: Tensor) -> dict[str, Any]:
        loss.backward()
        gradients = {name: value.grad for name, value in self.leaves.items()}
        return {"outputs": {"loss": loss} | outputs, "gradients": gradients, "tolerance": TOLERANCE}


def without(data: dict[str, Tensor], bias: bool, ref: bool) -> dict[str, None]:
    absent = [] if bias else ["linear_bias", "ref_bias"]
    absent += [] if ref else ["ref_input", "ref_weight", "ref_bias"]
    return {name: None for name in dict.fromkeys(absent) if name in data}


def paired(family: Family, name: str, module: Any, data: dict[str, Tensor], options: dict[str, Any], *,
           bias: bool, ref: bool = False, **more: Any) -> None:  # fmt: skip
    call = Call(data, bias, ref)
    arguments = [
        call.leaves["linear_weight"],
        call.leaves["input"],
        call.target,
        call.leaves.get("linear_bias"),
    ]
    loss, aux = module(*arguments, *(call.ref if ref else []))
    sums = {} if more.pop("averaged", False) else {"chosen_logps": aux[0], "rejected_logps": aux[1]}
    rewards = {"chosen_rewards": aux[5], "rejected_rewards": aux[6]}
    family.add(name, FLOAT32, options, **call.result(loss, **sums, **rewards),
               inputs=without(data, bias, ref) | more.pop("inputs", {}), **more)  # fmt: skip


def dpo() -> None:
    data = inputs()
    where = peer("liger-kernel", "LigerFusedLinearDPOLoss", "0.8.5")
    family = Family("liger_dpo", "linear_preference_loss", where, data)
    smoothing = {"exo_pair": 0.1, "robust": 0.2}
    for loss_type in ("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
                      "apo_down", "discopop"):  # fmt: skip
        options = {"beta": 0.2} | (
            {"label_smoothing": smoothing[loss_type]} if loss_type in smoothing else {}
        )
        module = LigerFusedLinearDPOLoss(compiled=False, loss_type=loss_type, **options)
        paired(family, loss_type, module, data, {"loss_type": loss_type} | options, bias=True, ref=True)
    module = LigerFusedLinearDPOLoss(compiled=False, beta=0.2)
    paired(family, "sigmoid no bias", module, data, {"beta": 0.2}, bias=False, ref=True)
    module = LigerFusedLinearDPOLoss(compiled=False, beta=0.2, use_ref_model=False)
    paired(family, "sigmoid reference-free", module, data, {"beta": 0.2, "reference_free": True}, bias=True)
    module = LigerFusedLinearDPOLoss(compiled=False, beta=2.0, average_log_prob=True)
    options = {"beta": 2.0, "loss_type": "sigmoid_norm", "average_rewards": True}
    paired(family, "sigmoid of averages", module, data, options, bias=True, ref=True, averaged=True)
    module = LigerFusedLinearDPOLoss(compiled=False, beta=0.2, compute_nll_loss=True, alpha=0.5, chunk_size=2)
    paired(family, "sigmoid + nll", module, data,
           {"beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, bias=True, ref=True)  # fmt: skip
    family.write()
    full = inputs(full=True)
    family = Family("liger_dpo_full", "linear_preference_loss", where, full, "No position is ignored.")
    for loss_type in ("sigmoid", "apo_zero"):
        module = LigerFusedLinearDPOLoss(compiled=False, loss_type=loss_type, beta=0.2)
        paired(family, loss_type, module, full, {"loss_type": loss_type, "beta": 0.2}, bias=True, ref=True)
    family.write()


def averaged() -> None:
    """Losses of the mean log-prob per token, and CPO: no reference."""
    data = {x: value for x, value in inputs().items() if not x.startswith("ref")}
    for nll in (True, False):
        suffix = "nll" if nll else "no nll"
        module: Any = LigerFusedLinearORPOLoss(compiled=False, beta=0.5, compute_nll_loss=nll)
        if nll:
            family = Family(
                "liger_orpo",
                "linear_orpo_loss",
                peer("liger-kernel", "LigerFusedLinearORPOLoss", "0.8.5"),
                data,
            )
            for bias in (True, False):
                paired(family, f"bias={bias}", module, data, {"beta": 0.5}, bias=bias, averaged=True)
            family.write()
            simpo = Family(
                "liger_simpo",
                "linear_simpo_loss",
                peer("liger-kernel", "LigerFusedLinearSimPOLoss", "0.8.5"),
                data,
            )
            cpo = Family(
                "liger_cpo", "linear_cpo_loss", peer("liger-kernel", "LigerFusedLinearCPOLoss", "0.8.5"), data
            )
        alpha = 0.5 if nll else 0.0
        for smoothing in (0.0, 0.1):
            module = LigerFusedLinearSimPOLoss(compiled=False, beta=2.0, gamma=0.75, label_smoothing=smoothing,
                                               compute_nll_loss=nll, alpha=alpha)  # fmt: skip
            options = {"beta": 2.0, "simpo_gamma": 0.75, "label_smoothing": smoothing, "cpo_alpha": alpha}
            # Liger's gamma is subtracted as it stands; TRL's simpo_gamma too (gamma / beta inside beta).
            paired(simpo, f"smoothing={smoothing} {suffix}", module, data, options, bias=True, averaged=True)
            module = LigerFusedLinearCPOLoss(compiled=False, beta=0.2, label_smoothing=smoothing,
                                             compute_nll_loss=nll, alpha=alpha)  # fmt: skip
            options = {"beta": 0.2, "label_smoothing": smoothing, "cpo_alpha": alpha}
            paired(cpo, f"smoothing={smoothing} {suffix}", module, data, options, bias=True)
    simpo.write()
    cpo.write()


def kto() -> None:
    data = inputs() | {"desirable": torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)}
    where = peer("liger-kernel", "LigerFusedLinearKTOLoss", "0.8.5")
    family = Family("liger_kto", "linear_kto_loss", where, data)
    for kl in (None, 0.75):
        for ref in (True, False):
            for bias in (True, False):
                call = Call(data, bias, ref)
                module = LigerFusedLinearKTOLoss(compiled=False, beta=0.2, use_ref_model=ref)
                loss, _ = module(call.leaves["input"], call.leaves["linear_weight"], call.target,
                                 call.leaves.get("linear_bias"), data["desirable"], *call.ref,
                                 kl=None if kl is None else torch.tensor([kl]))  # fmt: skip
                given = without(data, bias, ref) | ({"kl": torch.tensor(kl or 0.0, dtype=torch.float64)})
                family.add(
                    f"kl={kl} ref={ref} bias={bias}",
                    FLOAT32,
                    {"beta": 0.2},
                    **call.result(loss),
                    inputs=given,
                )
    family.write()


def main() -> None:
    dpo()
    averaged()
    kto()


if __name__ == "__main__":
    main()
