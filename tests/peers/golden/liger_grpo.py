"""linear_policy_loss: Liger-Kernel's fused linear GRPO loss (pure torch, not compiled), from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from golden_format import Family, grid, leaf, lengths_mask, peer
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

ROWS, WIDTH, HIDDEN, VOCAB = 4, 5, 8, 33
MASK = lengths_mask([5, 3, 1, 4], WIDTH)
AGGREGATION = {"grpo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm",
               "luspo": "seq-mean-token-sum"}  # fmt: skip


def main() -> None:
    hidden, weight = grid(71, ROWS, WIDTH, HIDDEN, scale=1.2), grid(72, VOCAB, HIDDEN, scale=0.6)
    bias = grid(73, VOCAB, scale=0.3)
    target = torch.randint(VOCAB, (ROWS, WIDTH), generator=torch.Generator().manual_seed(74))
    now = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    old = ((now + grid(75, ROWS, WIDTH, scale=0.3)) * 256).round() / 256
    shared = {
        "input": hidden,
        "linear_weight": weight,
        "target": target,
        "linear_bias": bias,
        "old_logprobs": old,
        "ref_logprobs": old + grid(76, ROWS, WIDTH, scale=0.4),
        "sampler_logprobs": old + grid(77, ROWS, WIDTH, scale=0.3),
        "advantages": torch.tensor([1.25, -0.75, 0.5, -1.5], dtype=torch.float64),
        "mask": MASK,
    }
    where = peer("liger-kernel", "LigerFusedLinearGRPOLoss", "0.8.5")
    note = "vllm_is_ratio is exp(old - sampler), truncated at 1.25. Liger multiplies in float32."
    family = Family("liger_grpo", "linear_policy_loss", where, shared, note)

    def add(name: str, *, bias_given: bool = True, correct: bool = False, on_policy: bool = False,
            items: float | None = None, **options: Any) -> None:  # fmt: skip
        settings = {"beta": 0.0, "loss_type": "dapo"} | options
        module = LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=settings["beta"] != 0.0,
                                          max_completion_length=16, **settings)  # fmt: skip
        leaves = {x: leaf(shared[x], torch.float32) for x in ("input", "linear_weight", "linear_bias")}
        if not bias_given:
            del leaves["linear_bias"]
        difference = (shared["old_logprobs"] - shared["sampler_logprobs"]) * MASK  # as TRL masks it
        ratio = difference.exp().clamp(max=1.25).float()
        loss, _ = module(
            leaves["input"],
            leaves["linear_weight"],
            target,
            MASK.float(),
            shared["advantages"].float(),
            bias=leaves.get("linear_bias"),
            ref_per_token_logps=shared["ref_logprobs"].float() if settings["beta"] else None,
            old_per_token_logps=None if on_policy else shared["old_logprobs"].float(),
            vllm_is_ratio=ratio if correct else None,
            num_items_in_batch=items,
        )
        loss.backward()
        loss_type = settings["loss_type"]
        keywords = {"loss_type": loss_type, "importance_level": settings.get("importance_sampling_level", "token"),
                    "aggregation": AGGREGATION.get(loss_type, "token-mean"),
                    "clip_low": settings.get("epsilon_low", 0.2),
                    "clip_high": settings.get("epsilon_high", 0.2)}  # fmt: skip
        if loss_type == "dr_grpo":
            keywords["max_length"] = 16
        if loss_type == "cispo":
            del keywords["clip_low"], keywords["clip_high"]
            keywords["cispo_max"] = settings["epsilon_high"]
        if correct:
            keywords |= {"importance_mode": "token_truncate", "importance_cap": 1.25}
        if settings.get("use_bias_correction_kl"):
            keywords["kl_unbiased"] = True
        if items is not None:
            keywords["normalizer"] = items
        same = ("beta", "delta", "temperature", "sapo_temperature_pos", "sapo_temperature_neg")
        keywords |= {x: settings[x] for x in same if x in settings}
        absent = [x for x, there in (("linear_bias", bias_given), ("ref_logprobs", settings["beta"] != 0.0),
                                     ("sampler_logprobs", correct), ("old_logprobs", not on_policy)) if not there]  # fmt: skip
        if on_policy:
            keywords["old_logprobs"] = None
        family.add(name, torch.float32, keywords, {"loss": loss}, {x: v.grad for x, v in leaves.items()},
                   inputs=dict.fromkeys(absent), tolerance={"rtol": 1e-4, "atol": 3e-6})  # fmt: skip

    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"):
        options: dict[str, Any] = {"loss_type": loss_type} | (
            {"epsilon_high": 1.25} if loss_type == "cispo" else {}
        )
        if loss_type != "luspo":  # Liger's token-level luspo is not TRL's: README.md
            add(f"{loss_type} token", **options)
            add(f"{loss_type} token beta", beta=0.2, **options)
            add(f"{loss_type} sampler", correct=True, **options)
        if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
            add(f"{loss_type} sequence", importance_sampling_level="sequence", **options)
    add("dapo temperature", temperature=0.7)
    add("dapo no bias", bias_given=False)
    add("dapo on policy", on_policy=True)
    add("dapo normalizer", items=29.0)
    add("grpo delta", loss_type="grpo", delta=1.3)
    add("grpo asymmetric", loss_type="grpo", epsilon_low=0.1, epsilon_high=0.28)
    add("grpo unbiased kl", loss_type="grpo", beta=0.2, use_bias_correction_kl=True)
    add("grpo chunks of two", loss_type="grpo", chunk_size=2)
    add("sapo temperatures", loss_type="sapo", sapo_temperature_pos=0.5, sapo_temperature_neg=2.0)
    family.write()


if __name__ == "__main__":
    main()
