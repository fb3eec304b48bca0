"""The picture of docs/preference.md: every contrast and its slope against the log-ratio margin. Run: python docs/plots.py"""

from __future__ import annotations

from pathlib import Path

import torch

import fastloss

BETA, TOKENS, REFERENCE = 0.1, 10, -20.0
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm", "simpo", "orpo",
)  # fmt: skip
PER_TOKEN = ("ipo", "sigmoid_norm", "simpo", "orpo")
SMOOTHED = ("exo_pair", "robust")


def curve(name: str, margin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair and its slope: half of the margin lifts the chosen response, half lowers the rejected one."""
    margin = margin.clone().requires_grad_()
    reference = torch.full_like(margin, REFERENCE)
    lengths = torch.full_like(margin, TOKENS)
    loss = fastloss.preference_loss(
        reference + margin / 2,
        reference - margin / 2,
        reference,
        reference,
        loss_type=name,
        beta=2.0 if name == "simpo" else BETA,
        label_smoothing=0.1 if name in SMOOTHED else 0.0,
        simpo_gamma=1.0,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        reduction="none",
    ).loss
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    return loss.detach(), slope


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 5, figsize=(14, 7.5), layout="constrained", sharex=True)
    margin = torch.linspace(-39, 39, 400)
    for name, axis in zip(LOSSES, axes.flat):
        loss, slope = curve(name, margin)
        axis.plot(margin, loss, color="tab:blue", label="loss")
        right = axis.twinx()
        right.plot(margin, slope, color="tab:orange", linestyle="--", label="slope")
        right.tick_params(labelsize=7, labelcolor="tab:orange")
        axis.tick_params(labelsize=7, labelcolor="tab:blue")
        axis.axvline(0, color="black", linewidth=0.6)
        note = ", ε = 0.1" if name in SMOOTHED else f", {TOKENS} tokens" if name in PER_TOKEN else ""
        axis.set_title(f"{name}{note}", fontsize=10)
    last = axes.flat[-1]
    last.axis("off")
    last.plot([], [], color="tab:blue", label="loss (left axis)")
    last.plot([], [], color="tab:orange", linestyle="--", label="slope (right axis)")
    last.legend(loc="center", frameon=False)
    figure.supxlabel(
        "log-ratio of the chosen response minus that of the rejected one; beta = 0.1 (simpo: 2, gamma = 1)",
        fontsize=10,
    )
    figure.savefig(Path(__file__).with_name("preference_losses.png"), dpi=110)


if __name__ == "__main__":
    main()
