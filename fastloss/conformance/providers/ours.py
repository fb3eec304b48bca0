"""fastloss, a provider per backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import fastloss
from fastloss.conformance.providers.interface import Missing, Provider

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


def of(backend: str) -> Callable[[], Provider]:
    return lambda: _provider(backend)


def _provider(backend: str) -> Provider:
    if backend != "auto" and (why := fastloss.backends()[backend]) != "available":
        raise Missing(f"backend {backend}: {why}")

    def cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return fastloss.cross_entropy(logits, target, backend=backend, **options)

    def linear_cross_entropy(
        hidden: Tensor, linear_weight: Tensor, target: Tensor, *, bias: Tensor | None = None, **options: Any
    ) -> Tensor:
        return fastloss.linear_cross_entropy(
            hidden, linear_weight, target, linear_bias=bias, backend=backend, **options
        )

    def logprobs(logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
        return fastloss.selective_log_softmax(logits, target, temperature, backend=backend)

    def linear_logprobs(
        hidden: Tensor, linear_weight: Tensor, target: Tensor, *, temperature: float = 1.0
    ) -> Tensor:
        found = fastloss.linear_token_stats(
            hidden, linear_weight, target, temperature=temperature, backend=backend
        ).logprobs
        assert found is not None
        return found

    def entropy(logits: Tensor) -> Tensor:
        return fastloss.entropy_from_logits(logits, backend=backend)

    def dpo(c: Tensor, r: Tensor, rc: Tensor, rr: Tensor, *, beta: float = 0.1) -> Tensor:
        return fastloss.dpo_loss(c, r, rc, rr, beta=beta, backend=backend).loss

    def kto(logps: Tensor, ref: Tensor, desirable: Tensor, *, kl: float = 0.0, beta: float = 0.1) -> Tensor:
        return fastloss.kto_loss(logps, ref, desirable, kl=kl, beta=beta, backend=backend).loss

    def orpo(c: Tensor, r: Tensor, cl: Tensor, rl: Tensor, *, beta: float = 0.1) -> Tensor:
        return fastloss.orpo_loss(
            c, r, chosen_lengths=cl, rejected_lengths=rl, beta=beta, backend=backend
        ).loss

    def bco(logps: Tensor, ref: Tensor, desirable: Tensor, *, delta: float, beta: float = 0.1) -> Tensor:
        return fastloss.bco_loss(logps, ref, desirable, delta=delta, beta=beta, backend=backend).loss

    def policy(
        logprobs: Tensor,
        old: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        clip: float = 0.2,
        **options: Any,
    ) -> Tensor:
        return fastloss.policy_loss(
            logprobs,
            old,
            advantages,
            mask,
            loss_type="ppo",
            clip_low=clip,
            clip_high=clip,
            backend=backend,
            **{"aggregation": "token-mean", **options},
        ).loss

    def packed_policy(
        logprobs: Tensor,
        old: Tensor,
        advantages: Tensor,
        cu_seqlens: Tensor,
        *,
        clip: float = 0.2,
        aggregation: str = "token-mean",
    ) -> Tensor:
        return fastloss.policy_loss(
            logprobs,
            old,
            advantages,
            None,
            loss_type="ppo",
            clip_low=clip,
            clip_high=clip,
            aggregation=aggregation,
            cu_seqlens=cu_seqlens,
            backend=backend,
        ).loss

    def kl(logprobs: Tensor, ref: Tensor, *, kind: str = "k3") -> Tensor:
        return fastloss.kl_estimate(logprobs, ref, kind=kind, backend=backend)

    def gae(
        rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
    ) -> Tensor:
        return fastloss.gae(rewards, values, mask, gamma=gamma, lam=lam, backend=backend)[0]

    def packed_gae(
        rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float = 0.95
    ) -> Tensor:
        return fastloss.gae(
            rewards, values, None, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, backend=backend
        )[0]

    functions = (
        cross_entropy,
        linear_cross_entropy,
        logprobs,
        linear_logprobs,
        entropy,
        dpo,
        kto,
        orpo,
        bco,
        packed_policy,
        packed_gae,
        policy,
        kl,
        gae,
    )
    named = {function.__name__: function for function in functions}
    return Provider(
        f"fastloss:{backend}",
        fastloss.__version__,
        {**named, "group_advantages": fastloss.group_advantages, "whiten": fastloss.whiten},
    )
