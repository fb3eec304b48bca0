"""policy_loss with loss_type "rloo": TRL's RLOOTrainer._compute_loss, called on seeded token log-probs."""

from __future__ import annotations

import torch
from golden_format import DTYPES, Family, bare_trainer, default_dtype, leaf, lengths_mask, peer
from trl import RLOOTrainer
from trl_grpo import ADVANTAGES, ENTROPY, LENGTHS, LOGPROBS, OLD, ROWS, WIDTH


def main() -> None:
    where = peer("trl", "RLOOTrainer._compute_loss")
    shared = {"logprobs": LOGPROBS, "old_logprobs": OLD, "advantages": ADVANTAGES,
              "mask": lengths_mask(LENGTHS["padded"], WIDTH)}  # fmt: skip
    note = "TRL takes the old log-probs as sums per sequence: here the sums of old_logprobs over the mask."
    family = Family("trl_rloo", "policy_loss", where, shared, note)
    for low, high in ((0.2, 0.2), (0.5, 1.0)):
        for mask_name, lengths in LENGTHS.items():
            for dtype in DTYPES:
                mask = lengths_mask(lengths, WIDTH)
                integers = mask.to(torch.int64)
                logps, entropy = leaf(LOGPROBS, dtype), ENTROPY.to(dtype)
                trainer = bare_trainer(RLOOTrainer, epsilon_low=low, epsilon_high=high,
                                       _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None))  # fmt: skip
                ones = torch.ones(ROWS, 1, dtype=torch.int64)
                inputs = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": integers,
                          "completion_mask": integers, "advantages": ADVANTAGES.to(dtype),
                          "old_logps": (OLD * mask).sum(1).to(dtype)}  # fmt: skip
                with default_dtype(dtype):
                    loss = trainer._compute_loss(trainer.model, inputs)
                loss.backward()
                options = {"loss_type": "rloo", "clip_low": low, "clip_high": high}
                family.add(f"clip {low} {high} {mask_name}", dtype, options, {"loss": loss}, {"logprobs": logps.grad},
                           inputs={"mask": mask})  # fmt: skip
    family.write()


if __name__ == "__main__":
    main()
