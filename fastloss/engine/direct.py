"""Direct calls: small plain tensors on the CPU, one native call that makes loss, metrics and gradient.

The callers have checked the tensors. Arguments go by position here: naming a dozen of them costs more than the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.engine.gate import address, of_dense, of_made
from fastloss.engine.native import DIRECT_CODES, cpu_backend
from fastloss.tables import PairOptions, PolicyOptions, UnpairedOptions


class DirectPairs:
    """pair_loss with options that are the same for all pairs, to be remembered; float32 or float64 on the CPU."""

    def __init__(self, options: PairOptions) -> None:
        self.options = options
        self._run = cpu_backend().module.DirectPairs(options).run

    def run(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor | None,
        ref_rejected: Tensor | None,
        per_pair: bool,
        loss: Tensor,
        d_chosen: Tensor,
        d_rejected: Tensor,
        won: Tensor,
        lost: Tensor,
        metrics: Tensor,
        extremes: bool,
    ) -> None:
        """Writes ``loss`` (``[B]`` with ``per_pair``, else 0-d) and what follows it, all of them just made: gradients, rewards
        ``[B]``, and ``metrics``: the means of PAIR_SUMS but the loss, with ``extremes`` the least and largest log-prob."""
        self._run(
            DIRECT_CODES[chosen.dtype], chosen.numel(), of_dense(chosen), of_dense(rejected), of_dense(ref_chosen),
            of_dense(ref_rejected), per_pair, of_made(loss), of_made(d_chosen),
            of_made(d_rejected), of_made(won), of_made(lost),
            of_made(metrics), extremes,
        )  # fmt: skip


class DirectUnpaired:
    """unpaired_loss with options to be remembered; float32 or float64 on the CPU."""

    def __init__(self, options: UnpairedOptions) -> None:
        self.options = options
        self._run = cpu_backend().module.DirectUnpaired(options).run

    def run(
        self,
        logps: Tensor,
        ref: Tensor | None,
        desirable: Tensor,
        shift: float | Tensor | tuple[Tensor, Tensor] | None,
        per_response: bool,
        loss: Tensor,
        d_logps: Tensor,
        reward: Tensor,
        metrics: Tensor,
    ) -> None:
        """``shift``: KTO's KL or BCO's delta, a number, a 0-d tensor of ``logps``'s dtype, or the log-probs of mismatched responses
        under both models. Writes ``loss`` (``[B]`` with ``per_response``, else 0-d), the gradient, the rewards and ``metrics [8]``."""
        number, tensor = None, None
        pair: tuple[Tensor | None, Tensor | None] = (None, None)
        if type(shift) is tuple:
            pair = shift
        elif isinstance(shift, Tensor):
            tensor = shift
        else:
            number = shift
        self._run(
            DIRECT_CODES[logps.dtype], logps.numel(), of_dense(logps), of_dense(ref), of_dense(desirable), number,
            of_dense(tensor), of_dense(pair[0]), of_dense(pair[1]), 0 if pair[0] is None else pair[0].numel(), per_response,
            of_made(loss), of_made(d_logps), of_made(reward), of_made(metrics),
        )  # fmt: skip


class DirectPolicy:
    """policy_loss of padded sequences with options to be remembered; float32 or float64 on the CPU."""

    def __init__(self, options: PolicyOptions) -> None:
        module = cpu_backend().module
        self._run, self._options = module.direct_policy_loss, module.PolicyOptions(options)

    def run(
        self,
        logprobs: Tensor,
        old: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        ref: Tensor | None,
        entropy: Tensor | None,
        sampler: Tensor | None,
        normalizer: float | Tensor | None,
        d_logprobs: Tensor,
        d_entropy: Tensor | None,
        loss: Tensor,
        metrics: Tensor,
    ) -> None:
        """Writes ``loss`` 0-d, ``metrics`` (POLICY_METRICS) and the gradients times the scale, all of them just made."""
        count, length = logprobs.shape
        number, tensor = (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
        self._run(
            self._options, DIRECT_CODES[logprobs.dtype], of_dense(logprobs), of_dense(old), of_dense(advantages),
            advantages.dim() == 1, of_dense(mask), of_dense(ref), of_dense(entropy), of_dense(sampler), length, count, number,
            address(tensor), of_made(d_logprobs), 0 if d_entropy is None else of_made(d_entropy),
            of_made(loss), of_made(metrics), torch.get_num_threads(),
        )  # fmt: skip
