"""supervised_loss: the statements of TRL's SFTTrainer.compute_loss that make the loss of ``dft``, on seeded logits."""

from __future__ import annotations

import types

import torch
from golden_format import DTYPES, Family, grid, leaf, peer, run_statement
from trl import SFTTrainer

ROWS, VOCAB = 6, 9
STATEMENTS = (
    'if self.args.loss_type == "dft":',
    "loss = per_token_loss.sum() / torch.as_tensor(num_tokens).clamp(min=1)",
)


def main() -> None:
    logits, target = grid(61, ROWS, VOCAB, scale=2.0), torch.tensor([3, 0, -100, 8, 8, 1])
    kept = target != -100
    where = peer("trl", "SFTTrainer.compute_loss")
    family = Family("trl_sft", "supervised_loss", where, {"logits": logits, "target": target})
    for name in ("nll", "dft"):
        for items in (None, 17):
            for dtype in DTYPES:
                x = leaf(logits, dtype)
                own = x.log_softmax(-1).gather(-1, target.clamp(min=0)[:, None]).squeeze(-1) * kept
                names = {
                    "self": types.SimpleNamespace(args=types.SimpleNamespace(loss_type=name)),
                    "outputs": types.SimpleNamespace(log_probs=own),
                    "per_token_loss": -own,
                    "num_tokens": kept.sum() if items is None else items,
                    "torch": torch,
                }
                for statement in STATEMENTS:
                    run_statement(SFTTrainer.compute_loss, statement, names)
                names["loss"].backward()
                options = {"loss_type": name} | ({} if items is None else {"normalizer": items})
                family.add(
                    f"{name} items={items}", dtype, options, {"loss": names["loss"]}, {"logits": x.grad}
                )
    family.write()


if __name__ == "__main__":
    main()
