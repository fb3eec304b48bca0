"""Published formulas in float64, for what no installable peer computes: bco_loss, process_reward_loss, gpg_advantages.

These files are not a peer's output. Each formula stands here as its paper writes it, with plain PyTorch in float64; the
float32 cases carry the same float64 numbers.
"""

from __future__ import annotations

import torch
from golden_format import DTYPES, TOLERANCE, Family, grid, leaf, peer
from torch import Tensor

LOOSE = {torch.float32: {"rtol": 3e-5, "atol": 2e-6}, torch.float64: TOLERANCE[torch.float64]}


def paper(where: str) -> dict[str, str]:
    return peer("formula", f"{where}, computed in float64 by published.py", "")


def bco() -> None:
    """arXiv:2404.04656, Eq. 8: a classifier whose logit is the reward minus the mean reward δ."""
    rows = 6
    logps, ref = grid(111, rows, scale=3, shift=-10), grid(112, rows, scale=3, shift=-10)
    desirable = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    family = Family("published_bco", "bco_loss", paper("BCO, arXiv:2404.04656, Eq. 8"),
                    {"logps": logps, "ref_logps": ref, "desirable": desirable})  # fmt: skip
    for beta, good, bad, shift in ((0.1, 1.0, 1.0, None), (0.5, 1.5, 0.75, None), (0.5, 1.0, 1.0, 0.25)):
        x = leaf(logps, torch.float64)
        rewards = beta * (x - ref)
        delta = rewards.detach().mean() if shift is None else torch.tensor(shift, dtype=torch.float64)
        probability = torch.where(
            desirable, torch.sigmoid(rewards - delta), 1 - torch.sigmoid(rewards - delta)
        )
        weight = torch.where(desirable, good * torch.ones_like(x), bad * torch.ones_like(x))
        loss = (-weight * probability.log()).mean()
        loss.backward()
        options = {"beta": beta, "desirable_weight": good, "undesirable_weight": bad}
        if shift is not None:
            options["delta"] = shift
        outputs = {"loss": loss, "rewards": rewards, "metrics": {"delta": delta}}
        for dtype in DTYPES:
            family.add(f"{options}", dtype, options, outputs, {"logps": x.grad}, tolerance=LOOSE[dtype])
    family.write()


def process_reward() -> None:
    """arXiv:2305.20050: the mean over labelled steps of -log p(label)."""
    logits = grid(113, 2, 5, 2, scale=2)
    labels = torch.tensor([[-100, 1, -100, 0, 1], [0, -100, -100, -100, 1]])
    family = Family("published_process_reward", "process_reward_loss", paper("PRM, arXiv:2305.20050"),
                    {"logits": logits, "labels": labels})  # fmt: skip
    z = leaf(logits, torch.float64)
    steps = labels != -100
    chosen = torch.gather(z, -1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    each = z.exp().sum(-1).log() - chosen
    loss = (each * steps).sum() / steps.sum()
    loss.backward()
    right = ((z.argmax(-1) == labels) & steps).sum() / steps.sum()
    for dtype in DTYPES:
        family.add("steps", dtype, {}, {"loss": loss, "metrics": {"accuracy": right.double()}}, {"logits": z.grad},
                   tolerance=LOOSE[dtype], metric_tolerance=LOOSE[torch.float32])  # fmt: skip
    family.write()


def gpg() -> None:
    """arXiv:2504.02546: (r - mean of the group) times B / (B - M), M responses of groups whose rewards are all equal."""
    rewards = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1], dtype=torch.float64)
    family = Family("published_gpg", "gpg_advantages", paper("GPG, arXiv:2504.02546"), {"rewards": rewards})
    for size in (2, 4):
        groups: Tensor = rewards.view(-1, size)
        equal = sum(size for group in groups if (group == group[0]).all())
        centred = groups - groups.mean(1, keepdim=True)
        result = (centred * (rewards.numel() / (rewards.numel() - equal))).flatten()
        for dtype in DTYPES:
            family.add(
                f"groups of {size}",
                dtype,
                {"group_size": size},
                {"result": result},
                {},
                tolerance=LOOSE[dtype],
            )
    family.write()


def main() -> None:
    bco()
    process_reward()
    gpg()


if __name__ == "__main__":
    main()
