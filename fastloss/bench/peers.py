"""Other libraries, where they are installed: TRL, Liger-Kernel, cut-cross-entropy, quack."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss.bench.case import IGNORE, Case, Loss
from fastloss.bench.kinds import policy, preference, token_stats, unpaired
from fastloss.bench.provider import Provider, emulated

# The vocabulary tile of TRL 1.16's trainers (trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE).
TRL_CHUNK = 32768
TRL = ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
TRL_DIVERGENCE = ("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
LIGER = "liger_kernel.chunked_loss"


@functools.cache
def missing(module: str, attribute: str) -> str | None:
    """Why ``module.attribute`` cannot be had; a peer may fail to import in any way."""
    try:
        getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            return f"{error.name} is not installed"
        return f"ModuleNotFoundError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _needs(
    module: str,
    attribute: str,
    kind: str,
    gpu: bool = False,
    also: Callable[[Case, str], str | None] = lambda case, device: None,
) -> Callable[[Case, str], str | None]:
    def available(case: Case, device: str) -> str | None:
        if case.kind != kind:
            return ""
        if gpu and device != "cuda":
            return "needs a GPU"
        reason = also(case, device)
        return missing(module, attribute) if reason is None else reason

    return available


def _function(module: str, attribute: str) -> Any:
    return getattr(importlib.import_module(module), attribute)


def _first(result: Any) -> Tensor:
    """Some give (loss, z_loss or metrics, …)."""
    return result[0] if isinstance(result, tuple) else result


def _plain(module: str, attribute: str) -> Callable[[Case], Loss]:
    def loss(case: Case) -> Loss:
        function = _function(module, attribute)
        return lambda *args: _first(function(*args))

    return loss


def _trl_stats(hidden: Tensor, weight: Tensor, target: Tensor, outputs: tuple[str, ...] = ()) -> list[Tensor]:
    """Log-probs, and what else ``outputs`` says, per token of ``target [...]``; 0 where it is ignored."""
    function, kept, flat = _function(*TRL), target != IGNORE, hidden.reshape(-1, hidden.shape[-1])
    compact = hidden.is_cuda  # as its trainers: ignored tokens are dropped on a GPU, masked on a CPU
    rows = flat[kept.reshape(-1)] if compact else flat
    labels = target[kept] if compact else target.clamp(min=0).reshape(-1)
    out = function.apply(rows, weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, outputs)
    found = [value for value in out if value is not None]
    if compact:
        return [value.new_zeros(kept.shape).masked_scatter(kept, value) for value in found]
    return [value.view(kept.shape).masked_fill(~kept, 0) for value in found]


def _trl_linear(case: Case) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -_trl_stats(hidden, weight, target)[0].sum() / (target != IGNORE).sum()

    return loss


def _trl_token_stats(case: Case) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return token_stats.mean(*_trl_stats(hidden, weight, target, ("entropy",)))

    return loss


def _trl_preference(case: Case) -> Loss:
    """DPOTrainer: both models, with the metrics that it asks for beside the log-probs."""
    outputs = ("entropy", "mean_logits", "is_top1")

    def loss(
        hidden: Tensor, weight: Tensor, target: Tensor, ref_hidden: Tensor, ref_weight: Tensor
    ) -> Tensor:
        logprobs = _trl_stats(hidden, weight, target, outputs)[0]
        with torch.no_grad():
            reference = _trl_stats(ref_hidden, ref_weight, target, outputs)[0]
        return preference.of_answers(logprobs, reference)

    return loss


def _trl_kto(case: Case) -> Loss:
    """KTOTrainer, which asks for the entropy as a metric; its KL batch is not part of the case."""

    def loss(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        desirable: Tensor,
    ) -> Tensor:
        logps = _trl_stats(hidden, weight, target, ("entropy",))[0].sum(-1)
        with torch.no_grad():
            reference = _trl_stats(ref_hidden, ref_weight, target, ("entropy",))[0].sum(-1)
        return unpaired.kto(logps, reference, desirable, 0.0)

    return loss


def _trl_policy(case: Case) -> Loss:
    """GRPOTrainer: the entropy is a metric there, without a gradient."""
    surrogate = policy.surrogate(case)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
        return surrogate(_trl_stats(hidden, weight, target, ("entropy",))[0], *rest)

    return loss


def _trl_distillation(case: Case) -> Loss:
    """DistillationTrainer's forward KL (beta 0); it gives the entropy too."""

    def loss(
        hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, target: Tensor
    ) -> Tensor:
        kept = target != IGNORE
        found = _function(*TRL_DIVERGENCE).apply(hidden, weight, None, ref_hidden, ref_weight, None, 0.0)
        return (found[0] * kept).sum() / kept.sum()

    return loss


def _trl_gae(case: Case) -> Loss:
    """Its PPO trainer's loop. It knows no mask: rewards and values are 0 in the padding."""

    def advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        last: Tensor | float = 0.0
        reversed_advantages, length = [], rewards.shape[1]
        for t in reversed(range(length)):
            next_values = values[:, t + 1] if t < length - 1 else 0.0
            delta = rewards[:, t] + policy.GAMMA * next_values - values[:, t]
            last = delta + policy.GAMMA * policy.LAMBDA * last
            reversed_advantages.append(last)
        return torch.stack(reversed_advantages[::-1], dim=1)

    return advantages


def _liger_preference(compiled: bool) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        module = _function(LIGER, "LigerFusedLinearDPOLoss")(beta=preference.BETA, compiled=compiled)

        def loss(
            hidden: Tensor, weight: Tensor, target: Tensor, ref_hidden: Tensor, ref_weight: Tensor
        ) -> Tensor:
            own = target.view(
                target.shape
            )  # it marks its targets as dynamic for torch.compile: not everybody's
            return _first(module(weight, hidden, own, ref_input=ref_hidden, ref_weight=ref_weight))

        return loss

    return make


def _liger_kto(compiled: bool) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        module = _function(LIGER, "LigerFusedLinearKTOLoss")(
            beta=unpaired.BETA, compiled=compiled, use_ref_model=True
        )

        def loss(
            hidden: Tensor,
            weight: Tensor,
            target: Tensor,
            ref_hidden: Tensor,
            ref_weight: Tensor,
            desirable: Tensor,
        ) -> Tensor:
            own = target.view(target.shape)
            return _first(
                module(
                    hidden,
                    weight,
                    own,
                    preference_labels=desirable,
                    ref_input=ref_hidden,
                    ref_weight=ref_weight,
                )
            )

        return loss

    return make


def _liger_policy(compiled: bool) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        option = policy.OPTIONS["dapo"]
        module = _function(LIGER, "LigerFusedLinearGRPOLoss")(
            beta=option["beta"],
            epsilon_low=option["clip_low"],
            epsilon_high=option["clip_high"],
            loss_type="dapo",
            use_ref_model=False,
            compiled=compiled,
        )

        def loss(
            hidden: Tensor, weight: Tensor, target: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
        ) -> Tensor:
            return _first(module(hidden, weight, target, mask, advantages, old_per_token_logps=old))

        return loss

    return make


def _only_in_place(case: Case, device: str) -> str | None:
    return None if case.inplace else ""


def _cut_exact(case: Case) -> Loss:
    """Without its filter, which skips the small probabilities: on random logits almost all."""
    return functools.partial(_function("cut_cross_entropy", "linear_cross_entropy"), impl="cce_exact")


def _quack_rows(case: Case) -> Loss:
    function = _function("quack.cross_entropy", "cross_entropy")
    return functools.partial(function, reduction="mean", inplace_backward=case.inplace)


def _quack_linear(case: Case) -> Loss:
    function = _function("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return functools.partial(function, chunk_size=4096, reduction="mean")


def registry() -> list[Provider]:
    liger_rows = ("liger_kernel.transformers.functional", "liger_cross_entropy")
    liger_linear = ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    liger_dpo, liger_grpo = (LIGER, "LigerFusedLinearDPOLoss"), (LIGER, "LigerFusedLinearGRPOLoss")
    cut = ("cut_cross_entropy", "linear_cross_entropy")
    quack_rows = ("quack.cross_entropy", "cross_entropy")
    quack_linear = ("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    dpo = functools.partial(_needs, *liger_dpo, "preference-linear")
    kto = functools.partial(_needs, LIGER, "LigerFusedLinearKTOLoss", "kto-linear")
    grpo = _needs(*liger_grpo, kind="policy-linear")
    return [
        Provider("trl", _needs(*TRL, kind="linear"), _trl_linear),
        Provider("trl", _needs(*TRL, kind="stats-linear"), _trl_token_stats),
        Provider("trl", _needs(*TRL, kind="preference-linear"), _trl_preference),
        Provider("trl", _needs(*TRL, kind="kto-linear"), _trl_kto),
        Provider("trl", _needs(*TRL, kind="policy-linear"), _trl_policy),
        Provider("trl", _needs(*TRL_DIVERGENCE, kind="distillation-linear"), _trl_distillation),
        Provider("trl", lambda case, device: None if case.kind == "gae" else "", _trl_gae),
        Provider(
            "liger", _needs(*liger_rows, kind="row", gpu=True, also=_only_in_place), _plain(*liger_rows)
        ),
        Provider("liger linear", _needs(*liger_linear, kind="linear", gpu=True), _plain(*liger_linear)),
        Provider("liger dpo", dpo(), _liger_preference(False)),
        Provider(
            "liger dpo, compiled",
            dpo(also=emulated),
            _liger_preference(True),
            compiles=True,
        ),
        Provider("liger kto", kto(), _liger_kto(False)),
        Provider("liger kto, compiled", kto(also=emulated), _liger_kto(True), compiles=True),
        Provider("liger grpo", grpo, _liger_policy(False)),
        Provider(
            "liger grpo, compiled",
            grpo,
            _liger_policy(True),
            compiles=True,
        ),
        Provider("cut-cross-entropy", _needs(*cut, kind="linear", gpu=True), _plain(*cut)),
        Provider("cut-cross-entropy exact", _needs(*cut, kind="linear", gpu=True), _cut_exact),
        Provider("quack", _needs(*quack_rows, kind="row", gpu=True), _quack_rows),
        Provider("quack linear", _needs(*quack_linear, kind="linear", gpu=True), _quack_linear),
    ]
