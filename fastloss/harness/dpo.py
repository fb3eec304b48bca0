"""DPO, top to bottom: pairs, policy and frozen reference, step, held-back accuracy of the implicit reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from . import measure, parallel
from .chat import Pair
from .config import DpoConfig
from .data import fingerprint, padded
from .export import export
from .loop import Metrics, StepFn
from .losses import example, explained, named
from .model import Head, head_of
from .pairs import Data, examples, prepare
from .run import Result, begun, open_folder, train
from .stage import Stage
from .start import language_model, reference, tokenizer_of
from .step import autocast, begins, cut_backward, learned, loss_and_grad, offsets, targets


class Read(NamedTuple):
    """What the loss reads of B pairs, sequence after sequence, the chosen first; tokens of answers alone."""

    ref_hidden: Tensor  # [N, D]
    target: Tensor  # [N]
    offsets: Tensor  # [2B + 1]


class Out(NamedTuple):
    loss: Tensor  # sum over pairs
    chosen: Tensor  # implicit rewards [B]
    rejected: Tensor


Loss = Callable[[Tensor, Head, Head, Read, DpoConfig], Out]  # hidden [N, D], policy's and reference's head


def fastloss_loss(hidden: Tensor, head: Head, ref: Head, read: Read, config: DpoConfig) -> Out:
    import fastloss

    out = fastloss.linear_preference_loss(
        hidden, head.weight, read.target, linear_bias=head.bias, cu_seqlens=read.offsets,
        ref_input=read.ref_hidden, ref_weight=ref.weight, ref_bias=ref.bias, loss_type=config.loss_type,
        beta=config.beta, label_smoothing=config.label_smoothing, logit_scale=head.scale,
        softcap=head.softcap, token_metrics=False, reduction="sum", group=head.group,
    )  # fmt: skip
    return Out(out.loss, out.chosen_rewards, out.rejected_rewards)


def torch_loss(hidden: Tensor, head: Head, ref: Head, read: Read, config: DpoConfig) -> Out:
    """DPO's own loss as most training loops have it: all logits of both models."""

    def sums(hidden: Tensor, head: Head) -> Tensor:  # [2B]
        logprobs = torch.log_softmax(head.logits(hidden), -1).gather(1, read.target[:, None])[:, 0]
        sequence = torch.repeat_interleave(read.offsets.diff())
        return logprobs.new_zeros(len(read.offsets) - 1).index_add(0, sequence, logprobs)

    with torch.no_grad():
        ref_sums = sums(read.ref_hidden, ref)
    chosen, rejected = (config.beta * (sums(hidden, head) - ref_sums)).chunk(2)
    u, smooth = chosen - rejected, config.label_smoothing
    log_sigmoid = nn.functional.logsigmoid
    loss = -(1 - smooth) * log_sigmoid(u) - smooth * log_sigmoid(-u)
    return Out(loss.sum(), chosen.detach(), rejected.detach())


LOSSES: dict[str, Loss] = {"fastloss": fastloss_loss, "torch": torch_loss}


def read_pairs(model: Any, ref: Any, pairs: Sequence[Pair], config: DpoConfig) -> tuple[Tensor, Read]:
    """Hidden states of the policy, with their graph, and the rest.  # [N, D]"""
    batch = padded(examples(pairs)).to(next(model.parameters()).device)
    with torch.no_grad():
        ref_hidden = learned(ref, batch, config)
    return learned(model, batch, config), Read(ref_hidden, targets(batch), offsets(batch))


def make_step(model: Any, ref: Any, loss_fn: Loss, data: Data, config: DpoConfig) -> StepFn:
    head, ref_head = head_of(model), head_of(ref)

    def step_fn(step: int) -> Metrics:
        total, loss_s, tokens = 0.0, 0.0, 0
        seen: list[Out] = []
        for start in config.starts(step):
            pairs = data.batch(start, config.batch_size)
            hidden, read = read_pairs(model, ref, pairs, config)
            loss, seconds = cut_backward(hidden, loss_of(head, ref_head, loss_fn, read, config, seen))
            total, loss_s, tokens = total + float(loss), loss_s + seconds, tokens + len(read.target)
        chosen, rejected = (
            torch.cat([getattr(out, side) for out in seen]) for side in ("chosen", "rejected")
        )
        step_loss, all_tokens, hits, margin, reward = parallel.summed(
            total, tokens, _hits(chosen, rejected), (chosen - rejected).sum(), chosen.sum()
        )
        pairs_seen = config.rows_per_step
        return {
            "loss": step_loss, "tokens": int(all_tokens), "loss_s": loss_s, "accuracy": hits / pairs_seen,
            "margin": margin / pairs_seen, "reward_chosen": reward / pairs_seen,
        }  # fmt: skip

    return step_fn


def loss_of(
    head: Head, ref: Head, loss_fn: Loss, read: Read, config: DpoConfig, seen: list[Out]
) -> Callable[[Tensor], Tensor]:
    """The pass's share of the step's mean over pairs; the rewards go to ``seen``."""

    def of(hidden: Tensor) -> Tensor:
        with autocast(config, hidden.device):
            out = loss_fn(hidden, head.gathered(), ref.gathered(), read, config)
        seen.append(out)
        return out.loss / config.rows_per_step

    return of


def _hits(chosen: Tensor, rejected: Tensor) -> float:
    """Pairs with the chosen above the rejected; a tie is half of one."""
    return float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())


@torch.no_grad()
def evaluate(model: Any, ref: Any, loss_fn: Loss, data: Data, config: DpoConfig) -> dict[str, float]:
    """Before the first step policy and reference are one, every margin is 0 and the accuracy 1/2."""
    if not data.val:
        return {}

    def of(pairs: Sequence[Pair]) -> tuple[float, float, float]:
        hidden, read = read_pairs(model, ref, pairs, config)
        with autocast(config, hidden.device):
            out = loss_fn(hidden, head_of(model).gathered(), head_of(ref).gathered(), read, config)
        margin = float((out.chosen - out.rejected).sum())
        return _hits(out.chosen, out.rejected), float(out.loss), margin

    hits, loss, margin = map(sum, zip(*parallel.spread(of, list(data.held_back(32))), strict=True))
    count = len(data.val)
    return {"accuracy": hits / count, "loss": loss / count, "margin": margin / count}


@begun
def run(config: DpoConfig, *, resume: bool, overwrite: bool, console: Console) -> Result:
    loss_fn = named(LOSSES, config.loss)
    if config.loss_type != "sigmoid" and (config.compare or config.loss == "torch"):
        raise ValueError(f"loss_type: expected 'sigmoid' beside PyTorch's loss, got {config.loss_type!r}")
    folder = open_folder(config, resume, overwrite, console)
    tok = tokenizer_of(config, folder, console)
    data = parallel.from_reader(partial(prepare, config, tok, console))
    # no dropout: the log-ratio of two dropout masks is noise
    model = language_model(config, tok).eval()
    ref = reference(config, model)
    head = head_of(model)

    def one_loss(name: str) -> Any:
        with torch.no_grad():
            hidden, read = read_pairs(model, ref, data.batch(0, config.batch_size), config)
        of = loss_of(head, head_of(ref), named(LOSSES, name), read, config, [])
        return partial(loss_and_grad, hidden, of)

    def loss_by(name: str) -> str:
        import fastloss

        whole = head.gathered()
        batch = padded(examples(data.batch(0, config.batch_size)))
        target, bounds = targets(batch).to(head.weight.device), offsets(batch).to(head.weight.device)
        hidden, weight = example(whole, len(target), torch.bfloat16 if config.bf16 else torch.float32)
        return explained(
            name, fastloss.linear_preference_loss, hidden, weight, target, cu_seqlens=bounds,
            ref_input=hidden.detach(), ref_weight=weight.detach(), loss_type=config.loss_type,
            beta=config.beta, softcap=head.softcap, logit_scale=head.scale, token_metrics=False, group=whole.group,
        )  # fmt: skip

    stage = Stage(
        title="dpo",
        model=model,
        source=data.source,
        fingerprint=fingerprint(data.train, config.seed, config.rows_per_step),
        step=lambda name, _: make_step(model, ref, named(LOSSES, name), data, config),
        loss_alone=one_loss,
        loss_by=loss_by,
        model_flops=lambda: measure.count_flops(partial(make_step(model, ref, torch_loss, data, config), 0)),
        same_shape=False,
        examples=lambda step: begins(
            tok, data.order.step(step, config.rows_per_step), lambda number: data.train[number].prompt
        ),
        held_back=lambda: evaluate(model, ref, loss_fn, data, config),
        metrics={
            "accuracy": "accuracy of the implicit reward", "loss": "loss (nats per pair)", "margin": "mean margin"
        },
        export=partial(export, model, tok),
        curves={"loss": "loss (nats per pair)", "accuracy": "accuracy"},
    )  # fmt: skip
    return train(stage, config, folder, resume=resume, console=console)
