"""policy_loss: TRL's GRPOTrainer._compute_loss and GMPOTrainer._compute_loss, called on seeded token log-probs."""

from __future__ import annotations

import math
import os
import types
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from golden_format import (
    DTYPES,
    TOLERANCE,
    Family,
    bare_trainer,
    default_dtype,
    grid,
    last_metrics,
    leaf,
    lengths_mask,
    peer,
    run_statement,
)
from torch import Tensor
from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

ROWS, WIDTH = 6, 7
LENGTHS = {"padded": [7, 5, 3, 1, 6, 4], "full": [WIDTH] * ROWS}
OLD = -grid(41, ROWS, WIDTH, scale=1.5).abs()
LOGPROBS = OLD + grid(42, ROWS, WIDTH, scale=0.35)
REF = LOGPROBS + grid(43, ROWS, WIDTH, scale=0.5)
SAMPLER = OLD + grid(44, ROWS, WIDTH, scale=0.3)
ENTROPY = grid(45, ROWS, WIDTH, scale=1.0).abs()
ADVANTAGES = grid(46, ROWS)
ADVANTAGES[4] = 0.0

DEFAULTS: dict[str, Any] = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "mode": None,  # vllm_importance_sampling_mode; None: no vLLM
    "clip_min": None,
    "clip_max": None,
    "delta": None,
    "use_bias_correction_kl": False,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
ARGUMENTS = ("delta", "use_bias_correction_kl", *(x for x in DEFAULTS if x.startswith(("sapo", "vespo"))))
AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
MAX_LENGTH = 16


def vllm_ratio(trainer: Any, old: Tensor, sampler: Tensor, mask: Tensor) -> tuple[Tensor, str]:
    """The importance ratio, by the statement of _generate_and_score_completions that makes it."""
    names = {"self": trainer, "old_per_token_logps": old, "sampling_per_token_logps": sampler,
             "completion_mask": mask, "tool_mask": None}  # fmt: skip
    first = "if self.use_vllm and self.vllm_importance_sampling_correction:"
    where = run_statement(GRPOTrainer._generate_and_score_completions, first, names, "logps_diff")
    return names["vllm_importance_sampling_ratio"], where


def call_trl(mask: Tensor, dtype: torch.dtype, trainer_class: type = GRPOTrainer, old: Tensor | None = OLD,
             sampler: Tensor = SAMPLER, items: float | None = None, **options: Any) -> dict[str, Any]:  # fmt: skip
    """Loss, metrics and gradients. ``items``: num_items_in_batch, TRL's normaliser of cispo, dapo and vespo."""
    settings = DEFAULTS | options
    settings.pop("entropy_aggregation", None)  # TRL's bonus is always a mean over tokens
    logps, entropy = leaf(LOGPROBS, dtype), leaf(ENTROPY, dtype)
    mode = settings.pop("mode")
    correction = {"use_vllm": mode is not None, "vllm_importance_sampling_correction": mode is not None,
                  "vllm_importance_sampling_mode": mode,
                  "vllm_importance_sampling_clip_min": settings.pop("clip_min"),
                  "vllm_importance_sampling_clip_max": settings.pop("clip_max")}  # fmt: skip
    arguments = types.SimpleNamespace(steps_per_generation=1, **{x: settings.pop(x) for x in ARGUMENTS})
    trainer = bare_trainer(
        trainer_class,
        args=arguments,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=settings["entropy_coef"] != 0.0,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        **correction,
        **settings,
    )
    integers = mask.to(torch.int64)
    inputs = {"prompt_ids": torch.ones(ROWS, 1, dtype=torch.int64), "completion_ids": integers,
              "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int64), "completion_mask": integers,
              "advantages": ADVANTAGES.to(dtype), "ref_per_token_logps": REF.to(dtype),
              "num_items_in_batch": torch.tensor(mask.sum().item() if items is None else items)}  # fmt: skip
    note = {}
    if old is not None:
        inputs["old_per_token_logps"] = old.to(dtype)
    if mode is not None:
        inputs["sampling_per_token_logps"] = sampler.to(dtype)
        ratio, where = vllm_ratio(trainer, old.to(dtype), sampler.to(dtype), integers)
        inputs["importance_sampling_ratio"] = ratio
        note = {"note": f"importance_sampling_ratio by {where}"}
    with default_dtype(dtype):
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {"logprobs": torch.zeros_like(logps) if logps.grad is None else logps.grad}
    if settings["entropy_coef"] != 0.0:
        gradients["entropy"] = entropy.grad
    return {"loss": loss, "metrics": last_metrics(trainer), "gradients": gradients, "more": note}


# TRL's option -> fastloss's.
RENAME = {
    "importance_sampling_level": "importance_level",
    "epsilon_low": "clip_low",
    "epsilon_high": "clip_high",
    "use_bias_correction_kl": "kl_unbiased",
    "off_policy_mask_threshold": "off_policy_threshold",
    "mode": "importance_mode",
    "clip_min": "importance_floor",
    "clip_max": "importance_cap",
}
METRICS = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/low_mean": "clip_ratio/low",
    "clip_ratio/high_mean": "clip_ratio/high",
    "clip_ratio/region_mean": "clip_ratio/region",
    "cispo_clip_ratio": "clip_ratio/high",
}


def to_fastloss(options: dict[str, Any]) -> dict[str, Any]:
    """fastloss's keywords for TRL's options, with TRL's defaults written out."""
    full = DEFAULTS | options
    keywords = {"loss_type": full["loss_type"], "importance_level": full["importance_sampling_level"],
                "clip_low": full["epsilon_low"], "clip_high": full["epsilon_high"],
                "aggregation": AGGREGATION.get(full["loss_type"], "token-mean")}  # fmt: skip
    if full["loss_type"] == "dr_grpo":
        keywords["max_length"] = MAX_LENGTH
    if full["loss_type"] == "cispo":
        keywords["cispo_max"] = full["epsilon_high"]
        del keywords["clip_low"], keywords["clip_high"]
    for name, value in options.items():
        if name not in ("loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high"):
            keywords[RENAME.get(name, name)] = value
    return keywords


def add(family: Family, name: str, mask_name: str, dtype: torch.dtype, options: dict[str, Any], *,
        old: Tensor | None = OLD, sampler: Tensor = SAMPLER, items: float | None = None) -> None:  # fmt: skip
    mask = lengths_mask(LENGTHS[mask_name], WIDTH)
    result = call_trl(mask, dtype, old=old, sampler=sampler, items=items, **options)
    keywords = to_fastloss(options)
    inputs: dict[str, Tensor | None] = {"mask": mask}
    if old is None:
        inputs["old_logprobs"] = None
        keywords["old_logprobs"] = None
    if options.get("beta"):
        inputs["ref_logprobs"] = REF
    if options.get("mode"):
        inputs["sampler_logprobs"] = sampler
    if options.get("entropy_coef") or "top_entropy_quantile" in options:
        inputs["entropy"] = ENTROPY
    if items is not None:
        keywords["normalizer"] = items
    # At the sequence level TRL's clip fractions count sequences, fastloss's tokens; below a small delta TRL counts none.
    comparable = keywords["importance_level"] == "token" and options.get("delta", 9.0) > 1 + keywords.get(
        "clip_high", 0
    )
    corrected = options.get("use_bias_correction_kl", False)  # TRL's KL metric is then the weighted one
    metrics = {
        METRICS[key]: torch.tensor(value, dtype=dtype)
        for key, value in result["metrics"].items()
        if key in METRICS
        and (comparable or "clip" not in key)
        and not (corrected and key == "kl")
        and (key != "entropy" or "entropy" in inputs)
    }
    family.add(f"{name} {mask_name}", dtype, keywords, {"loss": result["loss"], "metrics": metrics},
               result["gradients"], inputs=inputs,
               metric_tolerance=TOLERANCE[torch.float32], **result["more"])  # fmt: skip


SHARED = {"logprobs": LOGPROBS, "old_logprobs": OLD, "advantages": ADVANTAGES,
          "mask": lengths_mask(LENGTHS["padded"], WIDTH)}  # fmt: skip
WHERE = peer("trl", "GRPOTrainer._compute_loss")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
ALL = (*CLIPPED, "cispo", "sapo", "vespo")


def for_type(loss_type: str) -> dict[str, Any]:
    return {"loss_type": loss_type} | ({"epsilon_high": 1.25} if loss_type == "cispo" else {})


def family_of(file: str, note: str = "") -> Family:
    return Family(file, "policy_loss", WHERE, SHARED, note)


def types_and_levels() -> None:
    family = family_of("trl_grpo")
    for loss_type in ALL:
        for level in ("token", "sequence"):
            if level == "sequence" and loss_type == "vespo":
                continue  # vespo has no other level
            for mask in LENGTHS:
                for dtype in DTYPES:
                    add(family, f"{loss_type} {level}", mask, dtype,
                        for_type(loss_type) | {"importance_sampling_level": level})  # fmt: skip
    for dtype in DTYPES:
        for loss_type in ALL:
            add(family, f"{loss_type} on policy", "padded", dtype, for_type(loss_type), old=None)
        add(family, "sapo temperatures", "padded", dtype,
            {"loss_type": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0})  # fmt: skip
        add(family, "vespo shape", "padded", dtype,
            {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.5,
             "vespo_k_neg": 2.0, "vespo_lambda_neg": 4.0})  # fmt: skip
        for loss_type in ("dapo", "cispo", "vespo"):
            add(family, f"{loss_type} normalizer", "padded", dtype, for_type(loss_type), items=61)
    family.write()


def clips_and_kl() -> None:
    family = family_of(
        "trl_grpo_clips_kl", "Asymmetric and two-sided clips; KL to the reference (k3), corrected or not."
    )
    for loss_type in CLIPPED:
        for level in ("token", "sequence"):
            for options in ({"epsilon_low": 0.1, "epsilon_high": 0.28}, {"delta": 1.5}, {"delta": 1.1}):
                for dtype in DTYPES:
                    add(family, f"{loss_type} {level} {options}", "padded", dtype,
                        {"loss_type": loss_type, "importance_sampling_level": level} | options)  # fmt: skip
    for loss_type in ALL:
        for level in ("token", "sequence") if loss_type != "vespo" else ("token",):
            for corrected in (False, True):
                for dtype in DTYPES:
                    options = for_type(loss_type) | {"importance_sampling_level": level, "beta": 0.25}
                    if corrected:
                        options["use_bias_correction_kl"] = True
                    add(family, f"{loss_type} {level} beta corrected={corrected}", "padded", dtype, options)
    family.write()


def masks_and_entropy() -> None:
    family = family_of("trl_grpo_masks", "Off-policy sequence mask, tokens of high entropy, entropy bonus.")
    for loss_type in ALL:
        for dtype in DTYPES:
            for threshold in (0.05, -0.05):
                add(family, f"{loss_type} off-policy {threshold}", "padded", dtype,
                    for_type(loss_type) | {"off_policy_mask_threshold": threshold, "beta": 0.1})  # fmt: skip
            add(family, f"{loss_type} top entropy", "padded", dtype,
                for_type(loss_type) | {"top_entropy_quantile": 0.3, "beta": 0.1})  # fmt: skip
            for quantile in (1.0, 0.3):
                name = f"{loss_type} entropy bonus, top {quantile}"
                options = for_type(loss_type) | {"entropy_coef": 0.05, "entropy_aggregation": "token-mean"}
                if quantile < 1:
                    options["top_entropy_quantile"] = quantile
                add(family, name, "padded", dtype, options)
    family.write()


def sampler_correction() -> None:
    note = "Sampler mismatch; one sampler log-prob is NaN (not known): its ratio is 1."
    family = family_of("trl_grpo_sampler", note)
    sampler = SAMPLER.clone()
    sampler[1, 2] = math.nan
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        for loss_type in ALL:
            for floor, cap in ((None, 1.25), (0.75, 1.25)):
                for dtype in DTYPES if floor else DTYPES[:1]:
                    options: dict[str, Any] = for_type(loss_type) | {"mode": mode, "clip_max": cap}
                    if floor:
                        options["clip_min"] = floor
                    add(
                        family,
                        f"{loss_type} {mode} [{floor}, {cap}]",
                        "padded",
                        dtype,
                        options,
                        sampler=sampler,
                    )
        for dtype in DTYPES:
            add(family, f"dapo {mode} with KL and off-policy mask", "padded", dtype,
                {"mode": mode, "clip_max": 1.5, "beta": 0.1, "off_policy_mask_threshold": 0.05})  # fmt: skip
    family.write()


def gmpo() -> None:
    where = peer("trl", "experimental.gmpo.GMPOTrainer._compute_loss")
    family = Family("trl_gmpo", "policy_loss", where, SHARED)
    for options in ({}, {"epsilon_low": 0.1, "epsilon_high": 0.3}, {"beta": 0.2}):
        for mask_name in LENGTHS:
            for dtype in DTYPES:
                mask = lengths_mask(LENGTHS[mask_name], WIDTH)
                trl = {"epsilon_low": 0.4, "epsilon_high": 0.4} | options
                result = call_trl(mask, dtype, GMPOTrainer, **trl)
                keywords = {"loss_type": "gmpo", "clip_low": trl["epsilon_low"], "clip_high": trl["epsilon_high"],
                            "aggregation": "seq-mean-token-mean", "beta": trl.get("beta", 0.0)}  # fmt: skip
                inputs = {"mask": mask} | ({"ref_logprobs": REF} if "beta" in options else {})
                metrics = (
                    {"kl": torch.tensor(result["metrics"]["kl"], dtype=dtype)} if "beta" in options else {}
                )
                family.add(f"{options} {mask_name}", dtype, keywords, {"loss": result["loss"], "metrics": metrics},
                           result["gradients"], inputs=inputs, metric_tolerance=TOLERANCE[torch.float32])  # fmt: skip
    family.write()


def main() -> None:
    types_and_levels()
    clips_and_kl()
    masks_and_entropy()
    sampler_correction()
    gmpo()


if __name__ == "__main__":
    main()
