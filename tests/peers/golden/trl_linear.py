"""linear_preference_loss, linear_policy_loss: TRL's fused head (its ChunkedLogProbFunction) and its trainers' losses.

The head's kernel and the losses are TRL's; the glue between them (labels, masks) follows its patched forward
(trainer/utils.py, fused_forward). float32: the kernel accumulates in it.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from golden_format import Family, bare_trainer, grid, last_metrics, leaf, lengths_mask, peer
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl_grpo import ARGUMENTS, DEFAULTS, METRICS, RENAME

HIDDEN, VOCAB, CHUNK = 8, 33, 16
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FLOAT32 = torch.float32
TOLERANCE = {"rtol": 1e-4, "atol": 3e-6}


def head(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, temperature: float = 1.0) -> Any:
    """TRL's outputs [B, T], 0 where there is no label."""
    mask = labels != -100
    made = ChunkedLogProbFunction.apply(hidden.reshape(-1, HIDDEN), weight, bias, labels.clamp(min=0).reshape(-1),
                                        temperature, CHUNK, None, 1.0, OUTPUTS)  # fmt: skip
    named = zip(("log_probs", *OUTPUTS), made)
    return types.SimpleNamespace(**{name: x.view(mask.shape).masked_fill(~mask, 0) for name, x in named})


def dpo() -> None:
    pairs, width, prompt = 3, 6, 2
    tokens = torch.randint(VOCAB, (2 * pairs, width), generator=torch.Generator().manual_seed(101))
    mask = lengths_mask([6, 4, 3, 5, 6, 4], width)
    mask[:, :prompt] = False
    labels = tokens.masked_fill(~mask, -100)
    shared = {
        "input": grid(102, 2 * pairs, width - 1, HIDDEN, scale=1.2),
        "linear_weight": grid(103, VOCAB, HIDDEN, scale=0.6),
        "linear_bias": grid(104, VOCAB, scale=0.3),
        "target": labels[:, 1:],
        "ref_input": grid(105, 2 * pairs, width - 1, HIDDEN, scale=1.2),
        "ref_weight": grid(106, VOCAB, HIDDEN, scale=0.6),
        "ref_bias": grid(107, VOCAB, scale=0.3),
    }
    family = Family("trl_linear_dpo", "linear_preference_loss", peer("trl", "DPOTrainer._compute_loss, "
                    "kernels.ChunkedLogProbFunction"), shared)  # fmt: skip
    smoothing = {"exo_pair": 0.1, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
    variants: list[dict[str, Any]] = [
        {"loss_type": x} | ({"label_smoothing": smoothing[x]} if x in smoothing else {})
        for x in ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
                  "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
    ]  # fmt: skip
    variants += [
        {"loss_type": "sigmoid", "use_weighting": True},
        {"loss_type": "sigmoid", "ld_alpha": 0.5},
        {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
        {"loss_type": "ipo", "f_divergence_type": "forward_kl"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ]
    for variant in variants:
        options = {"beta": 0.2} | variant
        names = options["loss_type"] if isinstance(options["loss_type"], list) else [options["loss_type"]]
        leaves = {x: leaf(shared[x], FLOAT32) for x in ("input", "linear_weight", "linear_bias")}
        reference = head(
            *(shared[x].float() for x in ("ref_input", "ref_weight", "ref_bias")), shared["target"]
        )
        settings: dict[str, Any] = {
            "loss_weights": [1.0] * len(names), "label_smoothing": 0.0, "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5, "ld_alpha": None, "use_weighting": False,
        } | {key: value for key, value in options.items() if key != "loss_type"}  # fmt: skip
        trainer = bare_trainer(DPOTrainer, loss_types=names, precompute_ref_logps=False, ref_model=lambda **_: reference,
                               args=types.SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
                               **settings)  # fmt: skip
        outputs = head(*leaves.values(), shared["target"])
        inputs = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "completion_mask": mask.long(),
        }
        loss = trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
        loss.backward()
        metrics = {
            name: torch.tensor(value) for name, value in last_metrics(trainer).items() if name != "num_tokens"
        }
        family.add(f"{variant}", FLOAT32, options, {"loss": loss, "metrics": metrics},
                   {name: x.grad for name, x in leaves.items()}, tolerance=TOLERANCE)  # fmt: skip
    family.write()


def grpo() -> None:
    rows, width = 4, 5
    mask = lengths_mask([5, 3, 1, 4], width)
    target = torch.randint(VOCAB, (rows, width), generator=torch.Generator().manual_seed(74))
    hidden, weight, bias = (
        grid(71, rows, width, HIDDEN, scale=1.2),
        grid(72, VOCAB, HIDDEN, scale=0.6),
        grid(73, VOCAB),
    )
    now = head(hidden, weight, bias, target).log_probs
    old = ((now.double() + grid(75, rows, width, scale=0.3)) * 256).round() / 256
    shared = {
        "input": hidden,
        "linear_weight": weight,
        "linear_bias": bias,
        "target": target,
        "old_logprobs": old,
        "advantages": torch.tensor([1.25, -0.75, 0.5, -1.5], dtype=torch.float64),
        "mask": mask,
        "ref_logprobs": old + grid(76, rows, width, scale=0.4),
    }
    family = Family("trl_linear_grpo", "linear_policy_loss", peer("trl", "GRPOTrainer._compute_loss, "
                    "kernels.ChunkedLogProbFunction"), shared)  # fmt: skip
    variants: list[dict[str, Any]] = [
        {"temperature": 0.7},
        {"beta": 0.2, "temperature": 1.3},
        {"entropy_coef": 0.05, "temperature": 0.7},
        {"entropy_coef": 0.05, "top_entropy_quantile": 0.4},
        {"top_entropy_quantile": 0.4, "beta": 0.1},
        {"off_policy_mask_threshold": 0.05},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
        {"loss_type": "vespo", "beta": 0.1},
        {"loss_type": "cispo", "epsilon_high": 1.25, "entropy_coef": 0.05},
    ]
    for variant in variants:
        options = dict(variant)
        temperature = options.pop("temperature", 1.0)
        settings = DEFAULTS | options
        leaves = {x: leaf(shared[x], FLOAT32) for x in ("input", "linear_weight", "linear_bias")}
        outputs = head(*leaves.values(), target, temperature)
        arguments = types.SimpleNamespace(steps_per_generation=1, **{x: settings.pop(x) for x in ARGUMENTS})
        for unused in ("mode", "clip_min", "clip_max"):
            del settings[unused]
        trainer = bare_trainer(
            GRPOTrainer, args=arguments, max_completion_length=width, current_gradient_accumulation_steps=1,
            use_adaptive_entropy=False, _entropy_bonus_enabled=settings["entropy_coef"] != 0.0, use_vllm=False,
            _get_per_token_logps_and_entropies=lambda *_, **__: (outputs.log_probs, outputs.entropy, None), **settings,
        )  # fmt: skip
        ones = torch.ones(rows, 1, dtype=torch.int64)
        inputs = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": target, "completion_mask": mask.long(),
                  "advantages": shared["advantages"].float(), "old_per_token_logps": old.float(),
                  "ref_per_token_logps": shared["ref_logprobs"].float(),
                  "num_items_in_batch": mask.sum()}  # fmt: skip
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        keywords = {
            "loss_type": "dapo",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "with_entropy": True,
            "temperature": temperature,
        }
        keywords |= {RENAME.get(name, name): value for name, value in options.items()}
        keywords |= {
            "aggregation": "seq-mean-token-mean" if keywords["loss_type"] == "grpo" else "token-mean"
        }
        if keywords["loss_type"] == "cispo":
            keywords["cispo_max"] = keywords["clip_high"]
        if "entropy_coef" in options:
            keywords["entropy_aggregation"] = "token-mean"
        metrics = {
            METRICS[name]: torch.tensor(value)
            for name, value in last_metrics(trainer).items()
            if name in METRICS
        }
        if keywords.get("importance_level") == "sequence":
            metrics = {name: value for name, value in metrics.items() if "clip" not in name}
        absent = None if "beta" in options else {"ref_logprobs": None}
        family.add(f"{variant}", FLOAT32, keywords, {"loss": loss, "metrics": metrics},
                   {name: x.grad for name, x in leaves.items()}, inputs=absent, tolerance=TOLERANCE)  # fmt: skip
    family.write()


def main() -> None:
    dpo()
    grpo()


if __name__ == "__main__":
    main()
