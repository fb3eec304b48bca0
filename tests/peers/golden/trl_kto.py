"""kto_loss: TRL's KTOTrainer._compute_loss, called on seeded token log-probs."""

from __future__ import annotations

import types
from typing import Any

import torch
from golden_format import (
    DTYPES,
    Family,
    bare_trainer,
    default_dtype,
    grid,
    last_metrics,
    leaf,
    lengths_mask,
    peer,
)
from torch import Tensor
from trl import KTOTrainer

ROWS, WIDTH, PROMPT = 6, 8, 2
WHERE = peer("trl", "KTOTrainer._compute_loss")
LENGTHS = {"padded": [6, 3, 1, 5, 2, 4], "full": [6] * ROWS}
LABELS = {
    "mixed": [1, 0, 1, 1, 0, 0],
    "desirable only": [1] * ROWS,
    "undesirable only": [0] * ROWS,
}


def tokens_of(seed: int, mask: Tensor) -> Tensor:
    return -grid(seed, ROWS, WIDTH - 1, scale=1.2).abs() * mask[:, 1:]


def call_trl(
    lengths: list[int], labels: list[int], kl_shift: float, dtype: torch.dtype, **options: Any
) -> Any:
    mask = torch.cat([torch.zeros(ROWS, PROMPT, dtype=torch.bool), lengths_mask(lengths, WIDTH - PROMPT)], 1)
    policy = tokens_of(11, mask)
    ref = (policy + grid(12, ROWS, WIDTH - 1, scale=0.9)) * mask[:, 1:]
    kl_policy, kl_ref = tokens_of(13, mask), tokens_of(14, mask) - kl_shift * mask[:, 1:]
    logps = leaf(policy, dtype)
    ids, kl_ids = torch.ones(ROWS, WIDTH, dtype=torch.int64), torch.full((ROWS, WIDTH), 2)

    def model(normal: Tensor, kl: Tensor) -> Any:
        def forward(input_ids: Tensor, **_: Any) -> Any:
            zeros = torch.zeros(ROWS, WIDTH - 1, dtype=dtype)
            log_probs = normal if input_ids is ids else kl.to(dtype)
            return types.SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros)

        return forward

    settings = {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0} | options
    trainer = bare_trainer(
        KTOTrainer,
        calculate_KL=settings["loss_type"] == "kto",
        precompute_ref_logps=False,
        ref_model=model(ref.to(dtype), kl_ref),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        **settings,
    )
    integers = mask.to(torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": integers,
             "KL_input_ids": kl_ids, "KL_attention_mask": torch.ones_like(ids), "KL_completion_mask": integers,
             "label": torch.tensor(labels, dtype=torch.bool)}  # fmt: skip
    with default_dtype(dtype):
        loss = trainer._compute_loss(model(logps, kl_policy), batch, return_outputs=False)
    loss.backward()
    metrics = last_metrics(trainer)
    wanted = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl")
    inputs = {
        "logps": policy.sum(1),
        "ref_logps": ref.sum(1),
        "desirable": batch["label"],
        "kl_logps": kl_policy.sum(1) if settings["loss_type"] == "kto" else None,
        "ref_kl_logps": kl_ref.sum(1) if settings["loss_type"] == "kto" else None,
    }
    if settings["loss_type"] != "kto":
        del inputs["kl_logps"], inputs["ref_kl_logps"]
    outputs = {"loss": loss,
               "metrics": {x: torch.tensor(metrics[x], dtype=dtype) for x in wanted if x in metrics}}  # fmt: skip
    return inputs, outputs, {"logps": logps.grad[:, PROMPT - 1]}


def main() -> None:
    family = Family(
        "trl_kto", "kto_loss", WHERE, {}, "KL shift -4 makes TRL's estimate negative: it is clamped to 0."
    )
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    variants: list[dict[str, Any]] = [{}, {"beta": 0.5} | weights, {"loss_type": "apo_zero_unpaired"},
                                      {"loss_type": "apo_zero_unpaired", "beta": 0.5} | weights]  # fmt: skip
    for options in variants:
        for labels_name, labels in LABELS.items():
            for padding, lengths in LENGTHS.items():
                for shift in (0.5, -4.0) if options.get("loss_type", "kto") == "kto" else (0.5,):
                    if labels_name != "mixed" and (padding == "full" or shift < 0):
                        continue
                    for dtype in DTYPES:
                        inputs, outputs, gradients = call_trl(lengths, labels, shift, dtype, **options)
                        name = " ".join(
                            [*(f"{k}={v}" for k, v in options.items()), labels_name, padding, f"{shift}"]
                        )
                        settings = {"loss_type": "kto", "beta": 0.1} | options
                        family.add(name, dtype, settings, outputs, gradients, inputs=inputs)
    family.write()


if __name__ == "__main__":
    main()
