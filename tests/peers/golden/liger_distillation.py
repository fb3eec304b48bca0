"""linear_distillation_loss: Liger-Kernel's fused linear JSD, with and without the hard loss, called on seeded hidden states."""

from __future__ import annotations

import torch
from golden_format import Family, grid, leaf, peer
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

ROWS, DIM, TEACHER_DIM, VOCAB = 7, 6, 9, 13
TARGET = torch.tensor([3, -100, 0, 12, 5, 5, 7])


def main() -> None:
    inputs = {
        "input": grid(151, ROWS, DIM), "linear_weight": grid(152, VOCAB, DIM), "linear_bias": grid(153, VOCAB),
        "teacher_input": grid(154, ROWS, TEACHER_DIM, scale=0.7), "teacher_weight": grid(155, VOCAB, TEACHER_DIM),
        "teacher_bias": grid(156, VOCAB), "target": TARGET,
    }  # fmt: skip
    where = peer("liger-kernel", "LigerFusedLinearJSDLoss(compiled=False)")
    family = Family("liger_jsd", "linear_distillation_loss", where, inputs)
    for beta in (0.0, 0.3, 0.5, 1.0):
        for hard, temperature in ((0.0, 1.0), (0.4, 1.0), (0.0, 1.7)):
            x, w, b = (
                leaf(inputs[name], torch.float32) for name in ("input", "linear_weight", "linear_bias")
            )
            teacher = [inputs[name].float() for name in ("teacher_input", "teacher_weight", "teacher_bias")]
            module = LigerFusedLinearJSDLoss(
                weight_hard_loss=hard,
                weight_soft_loss=1.0,
                beta=beta,
                temperature=temperature,
                compiled=False,
                chunk_size=3,
            )
            loss = module(x, w, *teacher[:2], TARGET, b, teacher[2])
            loss.backward()
            options = {
                "divergence": "jsd", "interpolation": beta, "temperature": temperature, "teacher_temperature": temperature,
                "hard_loss_coef": hard,
            }  # fmt: skip
            family.add(f"beta={beta} hard={hard} temperature={temperature}", torch.float32, options, {"loss": loss},
                       {"input": x.grad, "linear_weight": w.grad, "linear_bias": b.grad},
                       tolerance={"rtol": 5e-5, "atol": 5e-6})  # fmt: skip
    family.write()


if __name__ == "__main__":
    main()
