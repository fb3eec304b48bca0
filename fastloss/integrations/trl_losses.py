"""TRL's losses of SFT, DPO, KTO, GRPO and RLOO in one pass over the head: 3 GEMMs in place of 4.

TRL's head hands out log-probabilities and is told their gradient in the backward, where it makes the logits again. Here
the head is told the loss before it begins. fastloss's loss makes the gradient while the logits are there; TRL's own code
gets the log-probabilities and statistics of the same pass, and computes the value of the loss and the metrics. The
gradient is put under that value. A call that fastloss does not compute in one pass goes TRL's way, and so does every
evaluation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.integrations.handle import expect_source
from fastloss.losses.token_stats import TokenStats

__all__ = ["ACTIVE", "replace_losses"]

# Of TRL 1.16: how the sha256 begins of the source of what replace_losses() relies on.
READ = (
    "422d009f04b66659", "ca448211ff653fe6", "5e58a1699e0d76cd", "90611af9cbadb8ec", "80295546bbdbf6f7", "ea73c3909275851d",
    "70e5262bf7b4fc77", "83c8d1cfdc4fab9d", "ebc903a2f9f7cd83", "c1f9fa0cd5a6948c", "ea73c3909275851d",
)  # fmt: skip
LOSS, REFERENCE = "_compute_loss", ("ref_chosen_logps", "ref_rejected_logps")
KTO_REFERENCE, KL_LOGPS = ("ref_logps", "ref_KL_logps"), "_compute_kl_logps"
# GRPO's losses whose divisor is theirs, or the number of accumulated batches; those that are divided by the number of items.
BY_BATCH, BY_ITEMS = ("grpo", "bnpo", "dr_grpo", "luspo", "sapo"), ("dapo", "cispo", "vespo")
OWN_OPTIONS = {
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}
SORTED = {"aot", "aot_unpaired"}  # a pair's gradient needs all pairs

# (hidden [N, D], weight, target [N], number of targets of each sequence, the head's options) -> (loss, TokenStats)
LossOfHead = Callable[[Tensor, Tensor, Tensor, Tensor, dict[str, Any]], tuple[Tensor, TokenStats]]


class OnePass:
    """One training call of a model: its head computes ``loss_of_head``, TRL's code goes on with detached statistics."""

    def __init__(self, loss_of_head: LossOfHead, scale: float | Tensor = 1.0) -> None:
        self.loss_of_head, self.scale = loss_of_head, scale
        self.labels: Any = None
        self.loss: Tensor | None = None
        self.carrier: Any = None

    def of_head(
        self, hidden: Tensor, weight: Tensor, target: Tensor, how: dict[str, Any]
    ) -> TokenStats | None:
        """What the head hands out; None where its rows are not those of the labels (virtual tokens of a prompt)."""
        counts = (self.labels != -100).sum(-1)
        if self.loss is not None or not hidden.shape[0] or int(counts.sum()) != hidden.shape[0]:
            return None
        self.loss, stats = self.loss_of_head(hidden, weight, target, counts, how)
        assert stats.logprobs is not None
        return stats._replace(logprobs=_Carry.apply(self.loss, stats.logprobs))

    def run(self, model: Any, trl: Callable[[Any], Tensor]) -> Tensor:
        """``trl(model)``: TRL's loss, over fastloss's gradient."""

        def recorded(**inputs: Any) -> Any:
            if not torch.is_grad_enabled():
                return model(**inputs)
            shifted = inputs.get("shift_labels")
            self.labels = inputs["labels"][:, 1:] if shifted is None else shifted
            token = ACTIVE.set(self)
            try:
                outputs = model(**inputs)
            finally:
                ACTIVE.reset(token)
            if self.loss is not None:
                # The gradient goes the way of the model's own outputs: FSDP and DDP have hooks there.
                self.carrier = outputs.log_probs
                outputs.log_probs = outputs.log_probs.detach()
            return outputs

        value = trl(recorded)
        if self.loss is None:
            return value
        ours, theirs = float(self.loss.detach() * self.scale), float(value.detach())
        comparable = (
            not value.requires_grad
        )  # else it contains an auxiliary loss of the body, with a gradient of its own
        if comparable and math.isfinite(ours + theirs) and abs(ours - theirs) > 1e-3 * (1 + abs(theirs)):
            raise RuntimeError(
                f"the trainer's loss is {theirs}, and fastloss's of the same options {ours}: this trainer computes "
                "another loss than TRL's; fastloss.integrations.trl.apply(losses=False) leaves losses alone"
            )
        out: Tensor = _Under.apply(self.carrier, value, self.scale)
        return out


ACTIVE: ContextVar[OnePass | None] = ContextVar("fastloss_trl_one_pass", default=None)


class _Carry(torch.autograd.Function):
    """Log-probs whose every element has the gradient of the loss itself as its own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logprobs: Tensor) -> Tensor:
        return logprobs.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[0], None


class _Under(torch.autograd.Function):
    """``value``, with ``scale`` times its gradient for what :class:`_Carry` carries."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, value: Tensor, scale: Any) -> Tensor:
        ctx.like, ctx.scale = (carrier.shape, carrier.dtype), scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shape, dtype = ctx.like
        return (grad * ctx.scale).to(dtype).expand(shape), grad, None


def _trains(trainer: Any) -> bool:
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    return bool(
        torch.is_grad_enabled()
        and trainer.model.training
        and not trainer.args.torch_compile
        and parallel is None
    )


def _borders(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def of_sft(trainer: Any, num_items_in_batch: Any) -> OnePass | None:
    if (
        not _trains(trainer)
        or trainer.args.loss_type != "nll"
        or trainer.compute_loss_func is not None
        or trainer.label_smoother is not None
    ):
        return None
    scale, normalizer = 1.0, None
    if num_items_in_batch is not None:
        normalizer = torch.as_tensor(num_items_in_batch).clamp(min=1)
        if trainer.args.average_tokens_across_devices:
            scale = trainer.accelerator.num_processes // trainer.get_tp_size()

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, counts: Tensor, how: dict[str, Any]) -> Any:
        how = {**how, "logit_scale": how["logit_scale"] / how["temperature"]}
        del how["temperature"]
        norm = None if normalizer is None else normalizer.to(hidden.device)
        return fastloss.linear_cross_entropy(
            hidden, weight, target, normalizer=norm, loss_dtype=torch.float32, return_stats=True, **how
        )

    return OnePass(loss, scale)


def of_dpo(trainer: Any, inputs: dict[str, Any]) -> OnePass:
    """``inputs`` have the reference's log-probabilities."""
    args = trainer.args

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, counts: Tensor, how: dict[str, Any]) -> Any:
        out, stats = fastloss.linear_preference_loss(
            hidden, weight, target, cu_seqlens=_borders(counts),
            ref_chosen_logps=inputs[REFERENCE[0]].float(), ref_rejected_logps=inputs[REFERENCE[1]].float(),
            loss_type=list(trainer.loss_types), loss_weights=list(trainer.loss_weights), beta=trainer.beta,
            label_smoothing=trainer.label_smoothing, f_divergence_type=trainer.f_divergence_type,
            f_alpha_divergence_coef=trainer.f_alpha_divergence_coef, discopop_tau=args.discopop_tau,
            ld_alpha=trainer.ld_alpha, use_weighting=trainer.use_weighting, return_stats=True, **how,
        )  # fmt: skip
        return out.loss, stats

    return OnePass(loss)


def of_kto(trainer: Any, inputs: dict[str, Any], kl_logps: Tensor | None) -> OnePass:
    """``inputs`` have the reference's log-probabilities; ``kl_logps``: the policy's, of the mismatched answers."""
    good, ref = inputs["label"].bool(), inputs[KTO_REFERENCE[0]].float()
    kl: Tensor | None = None
    if kl_logps is not None:
        mean = (kl_logps - inputs[KTO_REFERENCE[1]]).mean()
        kl = trainer.accelerator.gather_for_metrics(mean).mean().clamp(min=0)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, counts: Tensor, how: dict[str, Any]) -> Any:
        out, stats = fastloss.linear_kto_loss(
            hidden, weight, target, good, cu_seqlens=_borders(counts), ref_logps=ref, kl=kl, loss_type=trainer.loss_type,
            beta=trainer.beta, desirable_weight=trainer.desirable_weight, undesirable_weight=trainer.undesirable_weight,
            return_stats=True, **how,
        )  # fmt: skip
        return out.loss, stats

    return OnePass(loss)


def of_rloo(trainer: Any, inputs: dict[str, Any]) -> OnePass:
    """A ratio of each completion; TRL's clipped surrogate of it."""
    advantages, old = inputs["advantages"], inputs["old_logps"]
    low, high = 1 - trainer.epsilon_low, 1 + trainer.epsilon_high

    def of_part(part: fastloss.SequencePart) -> Tensor:
        own, ratio = advantages[part.indices], torch.exp(part.logps - old[part.indices])
        return -torch.min(ratio * own, ratio.clamp(low, high) * own).sum() / len(advantages)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, counts: Tensor, how: dict[str, Any]) -> Any:
        return fastloss.linear_sequence_loss(
            hidden,
            weight,
            target,
            of_part,
            cu_seqlens=_borders(counts),
            outputs=("entropy",),
            return_stats=True,
            **how,
        )

    return OnePass(loss)


def of_grpo(trainer: Any, inputs: dict[str, Any]) -> OnePass | None:
    args, kind, level = trainer.args, trainer.loss_type, trainer.importance_sampling_level
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    if (
        not _trains(trainer)
        or kind not in BY_BATCH + BY_ITEMS
        or level not in ("token", "sequence")
        # The quantile is one over all processes.
        or (trainer.top_entropy_quantile < 1.0 and trainer.accelerator.num_processes > 1)
        or trainer._entropy_bonus_enabled
        or (kind == "vespo" and inputs.get("importance_sampling_ratio") is not None)
    ):
        return None
    kept = inputs["completion_mask"] != 0
    advantages = inputs["advantages"]
    if advantages.dim() == 2:
        advantages = advantages.expand(kept.shape)[kept]
    own: dict[str, Any] = {"normalizer": None, "top_entropy_quantile": trainer.top_entropy_quantile}
    if corrected:
        own["weights"] = inputs["importance_sampling_ratio"].expand(kept.shape)[kept]
    if trainer.off_policy_mask_threshold is not None:
        own["off_policy_threshold"] = trainer.off_policy_mask_threshold
        if "sampling_per_token_logps" in inputs:
            own.update(sampler_logprobs=inputs["sampling_per_token_logps"][kept], importance_mode=None)
    scale: float | Tensor = 1.0
    if kind in BY_ITEMS:
        share = trainer.current_gradient_accumulation_steps / args.steps_per_generation
        own["normalizer"] = (
            inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes * share
        )
    else:
        scale = 1 / trainer.current_gradient_accumulation_steps
    if kind == "cispo":
        own["cispo_max"] = trainer.epsilon_high
    elif kind in ("sapo", "vespo"):
        own.update({name: getattr(args, name) for name in OWN_OPTIONS[kind]})
    else:
        own.update(clip_low=trainer.epsilon_low, clip_high=trainer.epsilon_high, delta=args.delta)
    if kind == "dr_grpo":
        own["max_length"] = trainer.max_completion_length
    if trainer.beta:
        own.update(beta=trainer.beta, kl_unbiased=args.use_bias_correction_kl)
        own["ref_logprobs"] = inputs["ref_per_token_logps"][kept]
    old = inputs.get("old_per_token_logps")
    mask = kept if "tool_mask" not in inputs else kept & (inputs["tool_mask"] != 0)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, counts: Tensor, how: dict[str, Any]) -> Any:
        out, stats = fastloss.linear_policy_loss(
            hidden, weight, target, None if old is None else old[kept], advantages, mask[kept],
            cu_seqlens=_borders(counts), loss_type=kind, importance_level=level, with_entropy=True,
            return_stats=True, **own, **how,
        )  # fmt: skip
        return out.loss, stats

    return OnePass(loss, scale)


def replace_losses() -> list[Callable[[], None]]:
    """The five trainers' losses replaced. Returns what puts them back.

    Raises:
        UnknownVersion: the code of TRL is not that which was read; nothing was replaced.
    """
    from trl.trainer import utils
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer
    from trl.trainer.sft_trainer import SFTTrainer

    found = (
        utils.add_fused_lm_head,
        SFTTrainer.compute_loss,
        DPOTrainer._compute_loss,
        DPOTrainer.compute_ref_log_probs,
        GRPOTrainer._compute_loss,
        GRPOTrainer._get_per_token_logps_and_entropies,
        KTOTrainer._compute_loss,
        KTOTrainer.compute_ref_log_probs,
        KTOTrainer._compute_kl_logps,
        RLOOTrainer._compute_loss,
        RLOOTrainer._get_per_token_logps_and_entropies,
    )
    for digits, function in zip(READ, found, strict=True):
        expect_source(function, digits, "trl", "1.16")
    _, sft, dpo, _, grpo, _, kto, _, _, rloo, _ = found

    @functools.wraps(sft)
    def sft_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        known = None if return_outputs else of_sft(self, num_items_in_batch)
        if known is None:
            return sft(self, model, inputs, return_outputs, num_items_in_batch)
        return known.run(model, lambda recorded: sft(self, recorded, inputs, False, num_items_in_batch))

    @functools.wraps(dpo)
    def dpo_loss(self: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
        # A completion without a prompt: TRL's lengths count its first token, which nothing predicts.
        if (
            return_outputs
            or not _trains(self)
            or SORTED & set(self.loss_types)
            or inputs["completion_mask"][:, 0].any()
        ):
            return dpo(self, model, inputs, return_outputs)
        before = self.precompute_ref_logps
        if not before:  # the reference first: the pass needs its log-probabilities
            reference = self.model if self.ref_model is None else self.ref_model
            made = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, **dict(zip(REFERENCE, made, strict=True))}
        self.precompute_ref_logps = True
        try:
            return of_dpo(self, inputs).run(model, lambda recorded: dpo(self, recorded, inputs, False))
        finally:
            self.precompute_ref_logps = before

    @functools.wraps(grpo)
    def grpo_loss(self: Any, model: Any, inputs: Any) -> Any:
        known = of_grpo(self, inputs)
        if known is None:
            return grpo(self, model, inputs)
        return known.run(model, lambda recorded: grpo(self, recorded, inputs))

    @functools.wraps(kto)
    def kto_loss(self: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
        # An answer without a prompt: as in DPO. An answer that lost all its tokens has none in the head.
        if return_outputs or not _trains(self) or inputs["completion_mask"][:, 0].any():
            return kto(self, model, inputs, return_outputs)
        if not self.precompute_ref_logps:
            reference = self.model if self.ref_model is None else self.ref_model
            made = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, **dict(zip(KTO_REFERENCE, made, strict=True))}
        kl_logps = self._compute_kl_logps(model, inputs)
        # TRL's code asks for both again.
        known = {"precompute_ref_logps": True, KL_LOGPS: lambda model, batch: kl_logps}
        before = {name: vars(self)[name] for name in known if name in vars(self)}
        vars(self).update(known)
        try:
            return of_kto(self, inputs, kl_logps).run(
                model, lambda recorded: kto(self, recorded, inputs, False)
            )
        finally:
            for name in known:
                del vars(self)[name]
            vars(self).update(before)

    @functools.wraps(rloo)
    def rloo_loss(self: Any, model: Any, inputs: Any) -> Any:
        # A completion without tokens has a ratio of 1 and a loss, and no gradient.
        if not _trains(self) or not (inputs["completion_mask"] != 0).any(1).all():
            return rloo(self, model, inputs)
        return of_rloo(self, inputs).run(model, lambda recorded: rloo(self, recorded, inputs))

    places = ((SFTTrainer, "compute_loss", sft_loss, sft), (DPOTrainer, LOSS, dpo_loss, dpo), (GRPOTrainer, LOSS, grpo_loss, grpo),
              (KTOTrainer, LOSS, kto_loss, kto), (RLOOTrainer, LOSS, rloo_loss, rloo))  # fmt: skip
    for cls, name, ours, _ in places:
        setattr(cls, name, ours)

    def undo() -> None:
        for cls, name, ours, theirs in places:
            if vars(cls).get(name) is ours:
                setattr(cls, name, theirs)

    return [undo]
