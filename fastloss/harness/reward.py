"""The reward model, top to bottom: pairs, scores at each answer's end, step, held-back accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from . import measure, parallel
from .chat import Pair
from .config import RewardConfig
from .data import fingerprint
from .export import export
from .loop import Metrics, StepFn
from .losses import explained, named
from .model import hidden_states
from .pairs import Data, examples, prepare
from .run import Result, begun, open_folder, train
from .stage import Stage
from .start import scoring_model, tokenizer_of
from .step import autocast, begins, cut_backward, loss_and_grad

Loss = Callable[[Tensor, Tensor, Tensor, RewardConfig], Tensor]  # chosen, rejected scores, margins [B] -> sum


def fastloss_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, config: RewardConfig) -> Tensor:
    import fastloss

    return fastloss.reward_model_loss(
        chosen, rejected, margin=margins, center_coefficient=config.center, reduction="sum"
    ).loss


def torch_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, config: RewardConfig) -> Tensor:
    loss = -nn.functional.logsigmoid(chosen.float() - rejected.float() - margins)
    if config.center:
        loss = loss + config.center * (chosen.float() + rejected.float()) ** 2
    return loss.sum()


LOSSES: dict[str, Loss] = {"fastloss": fastloss_loss, "torch": torch_loss}


def ends(model: Any, pairs: Sequence[Pair], pad: int, config: RewardConfig) -> Tensor:
    """Hidden states of each answer's last token, the chosen first.  # [2B, D]"""
    ids = [example.ids for example in examples(pairs)]
    inputs = torch.full((len(ids), max(map(len, ids))), pad, dtype=torch.int64, device="cpu")
    for row, tokens in enumerate(ids):
        inputs[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
    device = next(model.parameters()).device
    with autocast(config, device):
        hidden = hidden_states(model, inputs.to(device))
    last = torch.tensor([len(tokens) - 1 for tokens in ids], dtype=torch.int64, device=device)
    return hidden[torch.arange(len(ids), dtype=torch.int64, device=device), last]


def margins_of(pairs: Sequence[Pair], config: RewardConfig, device: torch.device) -> Tensor:
    """By how much each pair's chosen answer has to win.  # [B]"""
    return torch.tensor([config.margin * p.margin for p in pairs], dtype=torch.float32, device=device)


def make_step(model: Any, score: nn.Linear, loss_fn: Loss, data: Data, config: RewardConfig) -> StepFn:
    def step_fn(step: int) -> Metrics:
        total, hits, tokens, loss_s = 0.0, 0.0, 0, 0.0
        for start in config.starts(step):
            pairs = data.batch(start, config.batch_size)
            seen: list[Tensor] = []
            hidden = ends(model, pairs, model.config.pad_token_id, config)
            loss, seconds = cut_backward(hidden, loss_of(score, loss_fn, pairs, config, seen))
            total, loss_s = total + float(loss), loss_s + seconds
            hits += _hits(seen[0])
            tokens += sum(len(example.ids) for example in examples(pairs))
        step_loss, all_hits, all_tokens = parallel.summed(total, hits, tokens)
        accuracy = all_hits / config.rows_per_step
        return {"loss": step_loss, "tokens": int(all_tokens), "loss_s": loss_s, "accuracy": accuracy}

    return step_fn


def loss_of(
    score: nn.Linear, loss_fn: Loss, pairs: Sequence[Pair], config: RewardConfig, seen: list[Tensor]
) -> Any:
    """The pass's share of the step's mean over pairs; the scores go to ``seen``."""

    def of(hidden: Tensor) -> Tensor:
        with autocast(config, hidden.device):
            scores = score(hidden)[:, 0]  # [2B]
        seen.append(scores.detach())
        chosen, rejected = scores.chunk(2)
        margins = margins_of(pairs, config, scores.device)
        return loss_fn(chosen, rejected, margins, config) / config.rows_per_step

    return of


def _hits(scores: Tensor) -> float:
    """Pairs with the chosen above the rejected; a tie is half of one."""
    chosen, rejected = scores.float().chunk(2)
    return float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())


@torch.no_grad()
def evaluate(
    model: Any, score: nn.Linear, loss_fn: Loss, data: Data, config: RewardConfig
) -> dict[str, float]:
    if not data.val:
        return {}
    model.eval()

    def of(pairs: Sequence[Pair]) -> tuple[float, float, float]:
        hidden = ends(model, pairs, model.config.pad_token_id, config)
        with autocast(config, hidden.device):
            scores = score(hidden)[:, 0].float()
        chosen, rejected = scores.chunk(2)
        loss = loss_fn(chosen, rejected, margins_of(pairs, config, scores.device), config)
        return _hits(scores), float(loss), float((chosen - rejected).sum())

    totals = parallel.spread(of, list(data.held_back(32)))
    hits, loss, margin = map(sum, zip(*totals, strict=True))
    model.train()
    count = len(data.val)
    return {"accuracy": hits / count, "loss": loss / count, "margin": margin / count}


@begun
def run(config: RewardConfig, *, resume: bool, overwrite: bool, console: Console) -> Result:
    loss_fn = named(LOSSES, config.loss)
    folder = open_folder(config, resume, overwrite, console)
    tok = tokenizer_of(config, folder, console)
    data = parallel.from_reader(partial(prepare, config, tok, console))
    model, score = scoring_model(config, tok)

    def one_loss(name: str) -> Any:
        pairs = data.batch(0, config.batch_size)
        with torch.no_grad():
            hidden = ends(model, pairs, model.config.pad_token_id, config)
        return partial(loss_and_grad, hidden, loss_of(score, named(LOSSES, name), pairs, config, []))

    def loss_by(name: str) -> str:
        import fastloss

        scores = torch.zeros(
            config.batch_size, dtype=torch.float32, device=score.weight.device
        ).requires_grad_()
        return explained(name, fastloss.reward_model_loss, scores, scores)

    stage = Stage(
        title="reward",
        model=model,
        source=data.source,
        fingerprint=fingerprint(data.train, config.seed, config.rows_per_step),
        step=lambda name, _: make_step(model, score, named(LOSSES, name), data, config),
        loss_alone=one_loss,
        loss_by=loss_by,
        model_flops=lambda: measure.count_flops(
            partial(make_step(model, score, torch_loss, data, config), 0)
        ),
        same_shape=False,
        examples=lambda step: begins(
            tok, data.order.step(step, config.rows_per_step), lambda number: data.train[number].prompt
        ),
        held_back=lambda: evaluate(model, score, loss_fn, data, config),
        metrics={"accuracy": "accuracy on pairs", "loss": "loss (nats per pair)", "margin": "mean margin"},
        export=partial(export, model, tok),
        curves={"loss": "loss (nats per pair)", "accuracy": "accuracy"},
    )
    return train(stage, config, folder, resume=resume, console=console)
