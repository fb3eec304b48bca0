"""preference_loss: TRL's DPOTrainer._compute_loss, called on seeded token log-probs."""

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
from trl import DPOTrainer

PAIRS, WIDTH, PROMPT = 4, 9, 2  # WIDTH positions, of which the first PROMPT are the prompt
WHERE = peer("trl", "DPOTrainer._compute_loss")
PADDED = ([7, 4, 1, 5], [3, 6, 7, 2])
FULL = ([7] * PAIRS, [7] * PAIRS)


def batch(lengths: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    """Token log-probs of policy and reference [2B, WIDTH - 1], 0 outside the completion, as TRL's head gives them."""
    completion = torch.cat([lengths_mask(x, WIDTH - PROMPT) for x in lengths])
    mask = torch.cat([torch.zeros(2 * PAIRS, PROMPT, dtype=torch.bool), completion], 1)  # [2B, WIDTH]
    tokens = -grid(1, 2 * PAIRS, WIDTH - 1, scale=1.5).abs() * mask[:, 1:]
    ref = (tokens + grid(2, 2 * PAIRS, WIDTH - 1, scale=0.8)).clamp(max=0) * mask[:, 1:]
    collision = -grid(3, 2 * PAIRS, WIDTH - 1, scale=0.5).abs() * mask[:, 1:]  # log Σ p²
    return {"mask": mask, "tokens": tokens, "ref": ref, "log_sum_sq_probs": collision}


def call_trl(data: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """The loss, its metrics and its gradient for the token log-probs, as TRL computes them."""
    tokens = leaf(data["tokens"], dtype)
    zeros = torch.zeros_like(tokens)
    extra = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}

    def model(log_probs: Tensor) -> Any:
        outputs = types.SimpleNamespace(
            log_probs=log_probs, log_sum_sq_probs=data["log_sum_sq_probs"].to(dtype), **extra
        )
        return lambda **_: outputs

    settings = {
        "beta": 0.1,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "discopop_tau": 0.05,
    } | options
    trainer = bare_trainer(
        DPOTrainer,
        precompute_ref_logps=False,
        ref_model=model(data["ref"].to(dtype)),
        args=types.SimpleNamespace(
            discopop_tau=settings.pop("discopop_tau"), gradient_checkpointing_kwargs=None
        ),
        **settings,
    )
    mask = data["mask"].to(torch.int64)
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    with default_dtype(dtype):
        loss = trainer._compute_loss(model(tokens), inputs, return_outputs=False)
    loss.backward()
    wanted = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
              "logps/rejected")  # fmt: skip
    metrics = last_metrics(trainer)
    return {
        "outputs": {
            "loss": loss,
            "metrics": {name: torch.tensor(metrics[name], dtype=dtype) for name in wanted},
        },
        "gradient": tokens.grad,
    }


def sequences(data: dict[str, Tensor], lengths: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    """fastloss's inputs: sums per sequence [B]."""
    chosen, rejected = data["tokens"].sum(1).chunk(2)
    ref_chosen, ref_rejected = data["ref"].sum(1).chunk(2)
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
        "chosen_lengths": torch.tensor(lengths[0]),
        "rejected_lengths": torch.tensor(lengths[1]),
    }


def sequence_gradients(gradient: Tensor) -> dict[str, Tensor]:
    """d loss / d sum of a sequence is the gradient of its first completion token."""
    chosen, rejected = gradient[:, PROMPT - 1].chunk(2)
    return {"chosen_logps": chosen, "rejected_logps": rejected}


SIDES = ("chosen", "rejected")
LENGTHS = {"ipo", "sigmoid_norm", "sft"}
SIMPLE: dict[str, list[dict[str, Any]]] = {
    "sigmoid": [{}, {"beta": 0.5}],
    "hinge": [{}, {"beta": 0.5}],
    "ipo": [{}, {"beta": 0.5}],
    "exo_pair": [{"label_smoothing": 0.001}, {"label_smoothing": 0.25, "beta": 0.5}],
    "nca_pair": [{}, {"beta": 0.5}],
    "robust": [{}, {"label_smoothing": 0.1, "beta": 0.5}],
    "bco_pair": [{}, {"beta": 0.5}],
    "sppo_hard": [{}, {"beta": 0.5}],
    "aot": [{}, {"label_smoothing": 0.2, "beta": 0.5}],
    "aot_unpaired": [{}, {"label_smoothing": 0.2, "beta": 0.5}],
    "apo_zero": [{}, {"beta": 0.5}],
    "apo_down": [{}, {"beta": 0.5}],
    "discopop": [{}, {"discopop_tau": 0.5, "beta": 0.5}],
    "sft": [{}],
    "sigmoid_norm": [{}, {"beta": 2.0}],
}
DIVERGENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
# TRL refuses aot with weights; sft and hinge fail in its in-place product.
WEIGHTED = [x for x in SIMPLE if x not in ("aot", "aot_unpaired", "sft", "hinge")]


def describe(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def add(family: Family, name: str, data: dict[str, Tensor], lengths: Any, dtype: torch.dtype, trl: dict[str, Any],
        options: dict[str, Any], **more: Any) -> None:  # fmt: skip
    result = call_trl(data, dtype, **trl)
    inputs = sequences(data, lengths)
    if not LENGTHS & set(trl["loss_types"]):
        inputs["chosen_lengths"] = inputs["rejected_lengths"] = None
    family.add(name, dtype, options, result["outputs"], sequence_gradients(result["gradient"]),
               inputs=inputs | more.pop("inputs", {}), **more)  # fmt: skip


def plain() -> None:
    family = Family("trl_dpo", "preference_loss", WHERE, sequences(batch(PADDED), PADDED))
    for loss_type, variants in SIMPLE.items():
        for variant in variants:
            for padding, lengths in (("padded", PADDED), ("full", FULL)):
                for dtype in DTYPES:
                    options = {"loss_type": loss_type, "beta": 0.1} | variant
                    name = f"{describe({'': loss_type} | variant)[1:]} {padding}"
                    add(
                        family,
                        name,
                        batch(lengths),
                        lengths,
                        dtype,
                        {"loss_types": [loss_type]} | variant,
                        options,
                    )
    family.write()


def divergences() -> None:
    note = "TRL refuses float64 with alpha_divergence (its clamp has no entry for it): float32 alone."
    family = Family("trl_dpo_divergences", "preference_loss", WHERE, sequences(batch(PADDED), PADDED), note)
    for divergence, coefficient in (("forward_kl", None), ("js_divergence", None), ("alpha_divergence", 0.5),
                                    ("alpha_divergence", 2.0), ("alpha_divergence", 1.0)):  # fmt: skip
        for loss_type in DIVERGENCES:
            for dtype in DTYPES[:1] if divergence == "alpha_divergence" and coefficient != 1.0 else DTYPES:
                options: dict[str, Any] = {"f_divergence_type": divergence}
                if coefficient is not None:
                    options["f_alpha_divergence_coef"] = coefficient
                options |= {"beta": 0.5} | (
                    {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
                )
                trl = {"loss_types": [loss_type]} | options
                name = f"{loss_type} {divergence} {coefficient or ''}".strip()
                add(family, name, batch(PADDED), PADDED, dtype, trl, {"loss_type": loss_type} | options)
    family.write()


def weighting() -> None:
    """WPO: TRL makes the weights itself; fastloss takes them."""
    family = Family(
        "trl_dpo_weighting",
        "preference_loss",
        WHERE,
        sequences(batch(PADDED), PADDED),
        "use_weighting (WPO); weights by Eq. 2.",
    )
    data = batch(PADDED)
    count = data["mask"][:, 1:].sum(1)
    weights = ((data["tokens"] - data["log_sum_sq_probs"]).sum(1) / count).exp()
    chosen, rejected = weights.chunk(2)
    for loss_type in WEIGHTED:
        for dtype in DTYPES:
            options: dict[str, Any] = {"beta": 0.5}
            options |= {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
            trl = {"loss_types": [loss_type], "use_weighting": True} | options
            add(family, loss_type, data, PADDED, dtype, trl, {"loss_type": loss_type} | options,
                inputs={"weights": chosen * rejected})  # fmt: skip
    family.write()


def mixtures() -> None:
    family = Family(
        "trl_dpo_mixtures",
        "preference_loss",
        WHERE,
        sequences(batch(PADDED), PADDED),
        "Several loss types with weights (MPO).",
    )
    for types_, weights in ((["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]), (["ipo", "sppo_hard"], [1.0, 0.5]),
                            (["sigmoid", "aot", "aot_unpaired"], [0.5, 0.25, 0.25]),
                            (["exo_pair", "nca_pair", "apo_zero", "hinge"], [1.0, 0.5, 0.25, 2.0])):  # fmt: skip
        for dtype in DTYPES:
            options: dict[str, Any] = {"beta": 0.2} | (
                {"label_smoothing": 0.1} if "exo_pair" in types_ else {}
            )
            trl = {"loss_types": types_, "loss_weights": weights} | options
            add(family, "+".join(types_), batch(PADDED), PADDED, dtype, trl,
                {"loss_type": types_, "loss_weights": weights} | options)  # fmt: skip
    family.write()


def token_masks() -> None:
    """Token log-probs [B, T] with masks: every loss type once, and ld_alpha, which needs them."""
    tokens = Family(
        "trl_dpo_tokens", "preference_loss", WHERE, token_inputs(batch(PADDED)), "Token log-probs and masks."
    )
    for loss_type, variants in SIMPLE.items():
        for dtype in DTYPES:
            add_tokens(tokens, loss_type, PADDED, dtype, {"loss_type": loss_type, "beta": 0.1} | variants[-1])
    tokens.write()
    family = Family("trl_dpo_ld_alpha", "preference_loss", WHERE, token_inputs(batch(PADDED)), "LD-DPO.")
    for loss_type in ("sigmoid", "ipo", "hinge", "nca_pair"):
        for alpha in (0.0, 0.5, 1.0):
            for padding, lengths in (("padded", PADDED), ("full", FULL)):
                for dtype in DTYPES:
                    options = {"loss_type": loss_type, "beta": 0.1, "ld_alpha": alpha}
                    add_tokens(family, f"{loss_type} ld_alpha={alpha} {padding}", lengths, dtype, options)
    family.write()


def token_inputs(data: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {"logps": data["tokens"], "mask": data["mask"][:, 1:]}
    inputs = {
        f"{side}_{key}": part for key, both in named.items() for side, part in zip(SIDES, both.chunk(2))
    }
    return inputs | {f"ref_{side}_logps": part for side, part in zip(SIDES, data["ref"].chunk(2))}


def add_tokens(family: Family, name: str, lengths: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    data = batch(lengths)
    trl = {key: value for key, value in options.items() if key != "loss_type"}
    result = call_trl(data, dtype, loss_types=[options["loss_type"]], **trl)
    gradients = {
        f"{side}_logps": part
        for side, part in zip(SIDES, (result["gradient"] * data["mask"][:, 1:]).chunk(2))
    }
    family.add(name, dtype, options, result["outputs"], gradients, inputs=token_inputs(data))


def main() -> None:
    plain()
    divergences()
    weighting()
    mixtures()
    token_masks()


if __name__ == "__main__":
    main()
