"""TRL: the heads and log-probabilities of its trainers computed by fastloss.

Every trainer of TRL (SFT, DPO, KTO, GRPO, RLOO, reward models aside) gets its per-token log-probabilities either from
``add_fused_lm_head``, whose work is one autograd function, or from logits by three functions of ``trl.trainer.utils``.
``apply()`` puts fastloss in those four places. The losses of SFT, DPO, KTO, GRPO and RLOO also make their gradient while the head's
logits are there (trl_losses.py), and so does distillation (trl_distillation.py). Values of losses, metrics and trainers stay TRL's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.integrations import trl_distillation, trl_losses
from fastloss.integrations.handle import Handle, UnknownVersion, expect_signature, replace_everywhere
from fastloss.lazy_logits import ask

__all__ = ["apply"]

NO_TOKEN = -(2**63)  # an ignore_index that no label can be: TRL masks by itself
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

EXPECTED = {
    "selective_log_softmax": "logits, index, temperature, row_mask",
    "entropy_from_logits": "logits, chunk_size",
    "selective_log_softmax_and_entropy": "logits, index, entropy_requires_grad, temperature, row_mask",
}
HEAD_PARAMETERS = "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs"


class FastlossLogProb:
    """Stands in for ``trl.kernels.ChunkedLogProbFunction``: the same call, the same five outputs."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,  # columns in TRL; fastloss chooses its own blocks
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL,
    ) -> tuple[Tensor | None, ...]:
        softcap = final_logit_softcapping
        if softcap is not None:
            # TRL caps logits that were scaled: cap · tanh(scale · x / cap) = scale · (cap / scale) · tanh(x / (cap / scale))
            softcap = softcap / logit_scale
        how: dict[str, Any] = {
            "linear_bias": bias,
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
        }
        known, stats = trl_losses.ACTIVE.get(), None
        if known is not None:
            stats = known.of_head(hidden, weight, targets, how)
        if stats is None:
            names = ("logprobs", *(name for name in OPTIONAL if name in outputs))
            stats = fastloss.linear_token_stats(
                hidden, weight, targets, ignore_index=NO_TOKEN, outputs=names, **how
            )
        return stats.logprobs, stats.entropy, stats.log_sum_sq_probs, stats.mean_logits, stats.is_top1


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """``trl.trainer.utils.selective_log_softmax``, in one pass over the logits, without gradient for masked rows."""
    if row_mask is None or index.dim() == logits.dim():
        out = ask(fastloss.selective_log_softmax, logits, index, temperature)
        return out if row_mask is None else out.masked_fill(row_mask == 0, 0.0)
    stats = _stats(logits, index, temperature, row_mask, ("logprobs",))
    assert stats.logprobs is not None
    return stats.logprobs


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """``trl.trainer.utils.entropy_from_logits``, in one pass, no softmax held."""
    out: Tensor = ask(fastloss.entropy_from_logits, logits)
    return out


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``trl.trainer.utils.selective_log_softmax_and_entropy``: both from the same pass over the logits."""
    stats = _stats(logits, index, temperature, row_mask, ("logprobs", "entropy"))
    assert stats.logprobs is not None and stats.entropy is not None
    return stats.logprobs, stats.entropy if entropy_requires_grad else stats.entropy.detach()


def _stats(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, outputs: tuple[str, ...]
) -> fastloss.TokenStats:
    if temperature <= 0:
        raise ValueError("temperature must be positive")  # TRL's words, which its users' tests may look for
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, NO_TOKEN)
    stats: fastloss.TokenStats = ask(
        fastloss.token_stats, logits, index, temperature=temperature, ignore_index=NO_TOKEN, outputs=outputs
    )
    return stats


def apply(*, only_labelled_positions: bool = True, losses: bool = True) -> Handle:
    """All TRL trainers of this process take their log-probabilities and entropies from fastloss.

    Args:
        losses: SFT, DPO, KTO, GRPO, RLOO and distillation also make the gradient of their loss in the pass that makes their log-probabilities: 3
            GEMMs of the head in place of 4. Their loss and metrics remain those that TRL's code computes; a trainer whose
            loss is another one than TRL's is refused at its first step, and a version whose code was not read here.
            Needs ``only_labelled_positions``.
        only_labelled_positions: on the CPU, too, the fused head scores only positions with a label, as TRL does on GPUs.

    Returns:
        Handle: ``undo()``, or leave the ``with`` block. Applying twice is harmless; the first handle undoes it.

    Raises:
        ImportError: TRL is not installed.
        UnknownVersion: its functions are not those that were read (TRL 1.16).
    """
    import trl.trainer.utils as utils

    if utils._ChunkedLogProbFunction is FastlossLogProb:
        return Handle([])
    head = utils._ChunkedLogProbFunction
    expect_signature(head.forward, HEAD_PARAMETERS, "trl")
    for name, parameters in EXPECTED.items():
        expect_signature(getattr(utils, name), parameters, "trl")
    undo = [replace_everywhere("trl", head, FastlossLogProb)]
    for function in (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy):
        undo.append(replace_everywhere("trl", getattr(utils, function.__name__), function))
    if losses and only_labelled_positions:
        try:
            undo.append(trl_distillation.replace_divergence())
            undo += trl_losses.replace_losses()
        except UnknownVersion:
            Handle(undo).undo()
            raise
    if only_labelled_positions:
        before = utils._use_triton  # in this module the name decides about the positions, and nothing else

        def scores_labelled_alone(device: torch.device) -> bool:
            return device.type == "cpu" or before(device)

        def put_back() -> None:
            if utils._use_triton is scores_labelled_alone:
                utils._use_triton = before

        utils._use_triton = scores_labelled_alone
        undo.append(put_back)
    return Handle(undo)
