"""cpo_loss and reward_regression_loss: the statements of TRL's experimental TPOTrainer and A2POTrainer that make their losses."""

from __future__ import annotations

import types

import torch
from golden_format import DTYPES, Family, grid, leaf, peer, run_statement
from trl.experimental.a2po.a2po_trainer import A2POTrainer
from trl.experimental.tpo.tpo_trainer import TPOTrainer

PAIRS = 5


def tpo() -> None:
    chosen, rejected = grid(71, PAIRS, scale=3.0, shift=-20), grid(72, PAIRS, scale=3.0, shift=-20)
    lengths = torch.tensor([4, 7, 3, 5, 9]), torch.tensor([6, 2, 8, 5, 4])
    gold, gold_lengths = grid(73, PAIRS, scale=2.0, shift=-12), torch.tensor([3, 4, 2, 6, 5])
    shared = {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_lengths": lengths[0],
        "rejected_lengths": lengths[1],
    }
    family = Family("trl_tpo", "cpo_loss", peer("trl", "TPOTrainer._compute_loss"), shared,
                    "tpo-l is simpo; the gold answer's likelihood is the sft term's.")  # fmt: skip
    for kind, smoothing in (("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0), ("tpo-l", 0.0)):
        for alpha in (0.0, 0.5):
            for dtype in DTYPES:
                c, r, g = leaf(chosen, dtype), leaf(rejected, dtype), leaf(gold, dtype)
                scale = [n if kind in ("ipo", "tpo-l") else torch.ones_like(n) for n in lengths]
                options = {"beta": 0.3, "label_smoothing": smoothing, "tpo_l_gamma": 0.7, "loss_type": kind}
                names = {
                    "self": types.SimpleNamespace(**options),
                    "delta_score": c / scale[0] - r / scale[1],
                }
                run_statement(TPOTrainer._compute_loss, 'if self.loss_type == "sigmoid":', names)
                loss = names["per_sequence_loss"].mean()
                inputs = {}
                if alpha:
                    loss = loss - alpha * g.sum() / gold_lengths.sum()
                    inputs = {"chosen_nll_logps": gold, "chosen_nll_lengths": gold_lengths}
                loss.backward()
                ours = {"loss_type": "simpo" if kind == "tpo-l" else kind, "beta": 0.3, "cpo_alpha": alpha}
                ours |= {"label_smoothing": smoothing} if smoothing else {}
                ours |= {"simpo_gamma": 0.7} if kind == "tpo-l" else {}
                family.add(f"{kind} {smoothing} alpha={alpha}", dtype, ours, {"loss": loss},
                           {"chosen_logps": c.grad, "rejected_logps": r.grad}, inputs=inputs)  # fmt: skip
    family.write()


def a2po() -> None:
    rewards, target = grid(74, PAIRS), grid(75, PAIRS)
    family = Family("trl_a2po", "reward_regression_loss", peer("trl", "A2POTrainer.compute_loss"),
                    {"rewards": rewards, "labels": target}, "rewards: β₂ (log p - log p_ref); labels: r - V.")  # fmt: skip
    for dtype in DTYPES:
        names = {"implicit_reward": leaf(rewards, dtype), "target": target.to(dtype)}
        run_statement(A2POTrainer.compute_loss, "loss = ((implicit_reward - target) ** 2).mean()", names)
        names["loss"].backward()
        family.add("a2po", dtype, {}, {"loss": names["loss"]}, {"rewards": names["implicit_reward"].grad})
    family.write()


def main() -> None:
    tpo()
    a2po()


if __name__ == "__main__":
    main()
