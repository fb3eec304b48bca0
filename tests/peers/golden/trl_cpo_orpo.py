"""cpo_loss, simpo_loss, orpo_loss: TRL's experimental trainers' loss methods and their batch metrics."""

from __future__ import annotations

import os
import types
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from golden_format import DTYPES, TOLERANCE, Family, bare_trainer, grid, leaf, lengths_mask, peer
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PAIRS = 5
CHOSEN_LENGTHS, REJECTED_LENGTHS = torch.tensor([4, 8, 2, 1, 16]), torch.tensor([8, 2, 4, 16, 1])
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


def sums(seed: int, lengths: Tensor) -> Tensor:
    """Σ log p of responses of these lengths (powers of two, so that the mean over tokens is exact), [B]."""
    return -(grid(seed, PAIRS, scale=0.7).abs() + 0.25) * lengths


CHOSEN, REJECTED = sums(21, CHOSEN_LENGTHS), sums(22, REJECTED_LENGTHS)
NLL_LENGTHS = CHOSEN_LENGTHS + torch.tensor([3, 1, 2, 7, 4])  # with the prompt
NLL = sums(23, NLL_LENGTHS)
SEQUENCES = {"chosen_logps": CHOSEN, "rejected_logps": REJECTED}
LENGTHS = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}


def leaves(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return leaf(CHOSEN, dtype), leaf(REJECTED, dtype)


def call(
    trainer: Any, dtype: torch.dtype, average: bool, with_nll: bool, prompt: bool = False
) -> dict[str, Any]:
    """get_batch_loss_metrics with the model's forward replaced by these log-probs."""
    chosen, rejected = leaves(dtype)
    likelihood, tokens = (leaf(NLL, dtype), NLL_LENGTHS) if prompt else (chosen, CHOSEN_LENGTHS)
    logits = torch.zeros(PAIRS, 1, 1, dtype=dtype)
    nll = -likelihood.sum() / tokens.sum() if with_nll else torch.zeros((), dtype=dtype)
    passed = (chosen / CHOSEN_LENGTHS, rejected / REJECTED_LENGTHS) if average else (chosen, rejected)
    trainer.concatenated_forward = lambda model, batch: (*passed, logits, logits, nll)
    loss, metrics = trainer.get_batch_loss_metrics(None, {})
    loss.backward()
    gradients = {"chosen_logps": chosen.grad, "rejected_logps": rejected.grad}
    if prompt:
        gradients["chosen_nll_logps"] = likelihood.grad
    return {
        "outputs": {"loss": loss, "metrics": {x: torch.tensor(metrics[x], dtype=dtype) for x in METRICS}},
        "gradients": gradients,
        "metric_tolerance": TOLERANCE[torch.float32],  # TRL's accuracies are float32
    }


def cpo() -> None:
    where = peer("trl", "experimental.cpo.CPOTrainer.get_batch_loss_metrics (cpo_loss)")
    note = "The NLL term is over the response: -Σ chosen_logps / Σ chosen_lengths, what concatenated_forward gives."
    family = Family("trl_cpo", "cpo_loss", where, SEQUENCES | LENGTHS, note)
    for loss_type in ("sigmoid", "hinge", "ipo"):
        for options in ({}, {"label_smoothing": 0.1, "beta": 0.5}, {"cpo_alpha": 0.0, "beta": 0.25}):
            if loss_type != "sigmoid" and "label_smoothing" in options:
                continue
            settings = {
                "loss_type": loss_type,
                "beta": 0.1,
                "label_smoothing": 0.0,
                "cpo_alpha": 1.0,
            } | options
            for dtype in DTYPES:
                trainer = bare_trainer(CPOTrainer, alpha=0.0, simpo_gamma=0.5, **settings)
                result = call(trainer, dtype, loss_type == "ipo", settings["cpo_alpha"] != 0)
                family.add(f"{loss_type} {options}", dtype, settings, **result)
    family.write()


def simpo() -> None:
    where = peer("trl", "experimental.cpo.CPOTrainer.get_batch_loss_metrics (cpo_loss, loss_type simpo)")
    family = Family(
        "trl_simpo", "simpo_loss", where, SEQUENCES | LENGTHS, "simpo_alpha is TRL's alpha (AlphaPO)."
    )
    for beta, gamma, smoothing, alpha, shape in ((2.0, 0.5, 0.0, 0.0, 0.0), (2.5, 1.25, 0.1, 0.0, 0.0),
                                                 (2.0, 0.5, 0.0, 1.0, 0.0), (2.5, 0.25, 0.0, 0.0, 0.25),
                                                 (2.5, 0.25, 0.1, 1.0, -0.5)):  # fmt: skip
        for dtype in DTYPES:
            trainer = bare_trainer(CPOTrainer, alpha=shape, loss_type="simpo", simpo_gamma=gamma, beta=beta,
                                   label_smoothing=smoothing, cpo_alpha=alpha)  # fmt: skip
            options = {"beta": beta, "simpo_gamma": gamma, "label_smoothing": smoothing, "cpo_alpha": alpha,
                       "simpo_alpha": shape}  # fmt: skip
            family.add(f"{options}", dtype, options, **call(trainer, dtype, True, alpha != 0))
    family.write()


def orpo() -> None:
    where = peer("trl", "experimental.orpo.ORPOTrainer.get_batch_loss_metrics (odds_ratio_loss)")
    note = ("The NLL term is over the response, or over prompt and response as TRL's concatenated_forward has it "
            "(chosen_nll_logps). odds_ratio_loss computes in float32 whatever it is given: float32 alone.")  # fmt: skip
    family = Family("trl_orpo", "orpo_loss", where, SEQUENCES | LENGTHS, note)
    for beta in (0.1, 1.0):
        for prompt in (False, True):
            trainer = bare_trainer(ORPOTrainer, beta=beta)
            dtype = torch.float32
            given = {"chosen_nll_logps": NLL, "chosen_nll_lengths": NLL_LENGTHS} if prompt else None
            family.add(f"beta={beta} prompt={prompt}", dtype, {"beta": beta}, inputs=given,
                       **call(trainer, dtype, True, True, prompt))  # fmt: skip
    family.write()


def from_hidden_states() -> None:
    """CPO as TRL runs it: logits of the whole batch from a model, here hidden states times a matrix."""
    width, hidden_size, vocab, pairs, prompt = 7, 8, 33, 3, 2
    hidden, weight = grid(23, 2 * pairs, width, hidden_size), grid(24, vocab, hidden_size, scale=0.6)
    tokens = torch.randint(vocab, (2 * pairs, width), generator=torch.Generator().manual_seed(25))
    mask = lengths_mask([7, 5, 3, 4, 7, 6], width)
    labels = tokens.masked_fill(~mask, -100)
    labels[:, :prompt] = -100
    batch = {}
    for side, rows in (("chosen", slice(pairs)), ("rejected", slice(pairs, None))):
        batch |= {f"{side}_input_ids": tokens[rows], f"{side}_labels": labels[rows],
                  f"{side}_attention_mask": mask[rows].long()}  # fmt: skip
    where = peer("trl", "experimental.cpo.CPOTrainer.get_batch_loss_metrics (concatenated_forward)")
    shared = {"input": hidden[:, :-1], "linear_weight": weight, "target": labels[:, 1:]}
    for function, kinds in (("linear_cpo_loss", ("sigmoid",)), ("linear_simpo_loss", ("simpo",))):
        family = Family(
            f"trl_{function}", function, where, shared, "The last position predicts nothing and is left out."
        )
        for loss_type in kinds:
            for alpha in (0.0, 1.0):
                for dtype in DTYPES:
                    states, matrix = leaf(hidden, dtype), leaf(weight, dtype)
                    trainer = bare_trainer(CPOTrainer, alpha=0.0, simpo_gamma=0.5, beta=0.5, label_smoothing=0.1,
                                           loss_type=loss_type, cpo_alpha=alpha, is_encoder_decoder=False,
                                           pad_token_id=0)  # fmt: skip
                    logits = states @ matrix.T
                    model = lambda *_, logits=logits, **__: types.SimpleNamespace(logits=logits)
                    loss, _ = trainer.get_batch_loss_metrics(model, batch)
                    loss.backward()
                    options = {"beta": 0.5, "label_smoothing": 0.1, "cpo_alpha": alpha}
                    family.add(f"{loss_type} cpo_alpha={alpha}", dtype, options, {"loss": loss},
                               {"input": states.grad[:, :-1], "linear_weight": matrix.grad},
                               tolerance={torch.float32: {"rtol": 1e-4, "atol": 3e-6}}.get(dtype))  # fmt: skip
        family.write()


def main() -> None:
    cpo()
    simpo()
    orpo()
    from_hidden_states()


if __name__ == "__main__":
    main()
