"""preference_loss under its papers' names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastloss.engine import checks
from fastloss.losses.preference import PreferenceOutput, preference_loss
from fastloss.tables import Number


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    **options: Any,
) -> PreferenceOutput:
    """DPO (arXiv:2305.18290); with ``label_smoothing`` cDPO. Arguments and errors: :func:`preference_loss`.

    >>> import torch, fastloss
    >>> same = torch.tensor([-3.0])
    >>> round(fastloss.dpo_loss(same, same, same, same).loss.item(), 4)
    0.6931
    """
    return preference_loss(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        loss_type="sigmoid",
        beta=beta,
        label_smoothing=label_smoothing,
        **options,
    )


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Number = 0.1,
    **options: Any,
) -> PreferenceOutput:
    """IPO (arXiv:2310.12036), per token as its authors ran it; needs lengths or masks. See :func:`preference_loss`.

    >>> import torch, fastloss
    >>> same, lengths = torch.tensor([-3.0]), torch.tensor([4])
    >>> round(fastloss.ipo_loss(same, same, same, same, chosen_lengths=lengths, rejected_lengths=lengths).loss.item(), 4)
    25.0
    """
    return preference_loss(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        loss_type="ipo",
        beta=beta,
        **options,
    )


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: Number = 0.1,
    simpo_gamma: float = 0.5,
    simpo_alpha: float = 0.0,
    cpo_alpha: float = 0.0,
    label_smoothing: Number = 0.0,
    **options: Any,
) -> PreferenceOutput:
    r"""SimPO (arXiv:2405.14734), ``-log σ(β·(mean log p_c - mean log p_r) - γ)``; needs lengths or masks.

    Args:
        beta: TRL's default; the paper takes 2 to 10.
        simpo_gamma: γ (not γ/β). The paper takes 0.3 to 1.6 times beta.
        simpo_alpha: AlphaPO's α (arXiv:2501.03884), 0 is the logarithm.
        cpo_alpha: weight of the chosen responses' mean negative log-likelihood (CPO-SimPO).

    >>> import torch, fastloss
    >>> same, lengths = torch.tensor([-3.0]), torch.tensor([4])
    >>> out = fastloss.simpo_loss(same, same, simpo_gamma=0.0, chosen_lengths=lengths, rejected_lengths=lengths)
    >>> round(out.loss.item(), 4)
    0.6931
    """
    return cpo_loss(
        chosen_logps,
        rejected_logps,
        loss_type="simpo",
        beta=beta,
        simpo_gamma=simpo_gamma,
        simpo_alpha=simpo_alpha,
        cpo_alpha=cpo_alpha,
        label_smoothing=label_smoothing,
        **options,
    )


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: Number = 0.1,
    cpo_alpha: float = 1.0,
    simpo_gamma: float = 0.5,
    simpo_alpha: float = 0.0,
    label_smoothing: Number = 0.0,
    **options: Any,
) -> PreferenceOutput:
    """CPO (arXiv:2401.08417): DPO with a uniform reference, and ``cpo_alpha`` times the chosen responses' mean negative
    log-likelihood per token, which needs ``chosen_lengths`` or masks.

    Args:
        loss_type: "sigmoid", "hinge", "ipo" or "simpo"; the last two are per token and need both lengths.
        simpo_alpha: TRL's ``alpha`` (AlphaPO, arXiv:2501.03884).

    >>> import torch, fastloss
    >>> same = torch.tensor([-3.0])
    >>> round(fastloss.cpo_loss(same, same, cpo_alpha=0.0).loss.item(), 4)
    0.6931
    """
    checks.is_one_of("loss_type", loss_type, ("sigmoid", "hinge", "ipo", "simpo"))
    if loss_type == "ipo":
        options.setdefault("average_rewards", True)
    return preference_loss(
        chosen_logps,
        rejected_logps,
        loss_type=[loss_type, "sft"] if cpo_alpha else loss_type,
        loss_weights=[1.0, cpo_alpha] if cpo_alpha else None,
        reference_free=True,
        beta=beta,
        simpo_gamma=simpo_gamma,
        simpo_alpha=simpo_alpha,
        label_smoothing=label_smoothing,
        **options,
    )


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: Number = 0.1,
    chosen_nll_logps: Tensor | None = None,
    chosen_nll_lengths: Tensor | None = None,
    **options: Any,
) -> PreferenceOutput:
    """ORPO (arXiv:2403.07691): the chosen responses' mean negative log-likelihood per token, minus ``beta`` times the
    log σ of the log odds ratio of the responses' mean log-probs. Needs lengths or masks.

    Args:
        chosen_nll_logps, chosen_nll_lengths: what the likelihood is of, where it is not the response (TRL takes the
            prompt too), ``[B]``.

    >>> import torch, fastloss
    >>> same, lengths = torch.tensor([-4.0]), torch.tensor([4])
    >>> out = fastloss.orpo_loss(same, same, chosen_lengths=lengths, rejected_lengths=lengths)
    >>> round(out.loss.item(), 4)  # 1 + 0.1 · log 2
    1.0693
    """
    return preference_loss(
        chosen_logps,
        rejected_logps,
        loss_type=["orpo", "sft"],
        reference_free=True,
        beta=beta,
        chosen_nll_logps=chosen_nll_logps,
        chosen_nll_lengths=chosen_nll_lengths,
        **options,
    )
