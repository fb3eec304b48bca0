"""The losses of the parity suite: how each is called, its inputs, what a user writes in its place, options, shapes.

A new loss is one more row of LOSSES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

Inputs = dict[str, Tensor]


class Loss(NamedTuple):
    """``run(inputs, backend)`` against itself with backend="reference" in float64; ``eager`` is what a user writes."""

    run: Callable[..., Tensor]
    inputs: Callable[..., Inputs]
    eager: Callable[..., Tensor]
    options: list[dict[str, Any]]
    shapes: list[tuple[int, ...]]


def logits_of(shape: tuple[int, ...], dtype: torch.dtype, peaked: bool = False) -> Inputs:
    rows, vocab = shape
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    x = torch.randn(rows, vocab, generator=generator) * (8 if peaked else 2)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[::4] = -100
    if rows == 1:
        target[0] = 0
    return {
        "x": x.to(dtype),
        "target": target,
        "classes": torch.rand(vocab, generator=generator) + 0.5,
        "probabilities": torch.rand(rows, vocab, generator=generator).softmax(-1),
        "g": torch.randn(rows, generator=generator),
    }


def _hidden(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, dim, vocab = shape
    inputs = logits_of((rows, vocab), dtype)
    generator = torch.Generator().manual_seed(7)
    inputs["x"] = torch.randn(rows, dim, generator=generator).to(dtype)
    inputs["weight"] = (torch.randn(vocab, dim, generator=generator) / dim**0.5 * 2).to(dtype)
    inputs["bias"] = torch.randn(vocab, generator=generator).to(dtype)
    return inputs


def _kwargs(inputs: Inputs, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    options = dict(options)
    if options.pop("classes", False):
        options["weight"] = inputs["classes"].to(inputs["x"].dtype)
    target = inputs["target"]
    if options.pop("probabilities", False):
        target = inputs["probabilities"].to(inputs["x"].dtype)
    return target, options


def _weighted(loss: Tensor, inputs: Inputs) -> Tensor:
    """One number from a loss per row, through an upstream gradient that is not 1."""
    return (loss * inputs["g"].to(loss.dtype)).sum() if loss.dim() else loss * 1.5


def cross_entropy(inputs: Inputs, backend: str, **options: Any) -> Tensor:
    target, options = _kwargs(inputs, options)
    logits = inputs["x"] * 1 if options.get("inplace") else inputs["x"]
    return _weighted(fastloss.cross_entropy(logits, target, backend=backend, **options), inputs)


def _eager_transform(x: Tensor, options: dict[str, Any]) -> Tensor:
    cap, scale = options.pop("softcap", None), options.pop("logit_scale", 1.0)
    return (cap * torch.tanh(x / cap) if cap else x) * scale


def eager_cross_entropy(inputs: Inputs, **options: Any) -> Tensor:
    target, options = _kwargs(inputs, options)
    options.pop("inplace", None)
    z_loss, normalizer = options.pop("z_loss", 0.0), options.pop("normalizer", None)
    z = _eager_transform(inputs["x"], options)
    reduction = options.pop("reduction", "mean")
    loss = F.cross_entropy(z, target, reduction="none", **options)
    if z_loss:
        kept = 1 if target.is_floating_point() else target != -100
        loss = loss + z_loss * z.logsumexp(-1).square() * kept
    if reduction == "none":
        return _weighted(loss, inputs)
    count: Any = 1
    if normalizer is not None:
        count = normalizer
    elif reduction == "mean" and target.is_floating_point():
        count = target.shape[0]
    elif reduction == "mean":
        w = options.get("weight")
        kept = target[target != -100]
        count = len(kept) if w is None else w[kept].sum()
    return _weighted(loss.sum() / count, inputs)


def _linear_cross_entropy(inputs: Inputs, backend: str, bias: bool = False, **options: Any) -> Tensor:
    target, options = _kwargs(inputs, options)
    loss = fastloss.linear_cross_entropy(
        inputs["x"],
        inputs["weight"],
        target,
        linear_bias=inputs["bias"] if bias else None,
        backend=backend,
        **options,
    )
    return _weighted(loss, inputs)


def _eager_linear(inputs: Inputs, bias: bool = False, **options: Any) -> Tensor:
    options.pop("chunk_size", None)
    logits = F.linear(inputs["x"], inputs["weight"], inputs["bias"] if bias else None)
    return eager_cross_entropy({**inputs, "x": logits}, **options)


def _stats(inputs: Inputs, backend: str, outputs: tuple[str, ...], **options: Any) -> Tensor:
    inplace = options.get("inplace", False)
    out = fastloss.token_stats(
        inputs["x"] * 1 if inplace else inputs["x"],
        inputs["target"],
        outputs=outputs,
        backend=backend,
        **options,
    )
    return sum(
        (_weighted(getattr(out, name), inputs) * k for k, name in enumerate(outputs, 1)), torch.zeros(())
    )


def _eager_stats(inputs: Inputs, outputs: tuple[str, ...], **options: Any) -> Tensor:
    z = _eager_transform(inputs["x"], options) / options.pop("temperature", 1.0)
    logp = z.log_softmax(-1)
    kept = inputs["target"] != -100
    values = {
        "logprobs": logp.gather(-1, inputs["target"].clamp(min=0)[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1).detach(),
        "mean_logits": z.mean(-1).detach(),
    }
    return sum((_weighted(values[n] * kept, inputs) * k for k, n in enumerate(outputs, 1)), torch.zeros(()))


def _linear_stats(
    inputs: Inputs, backend: str, outputs: tuple[str, ...], bias: bool = False, **options: Any
) -> Tensor:
    out = fastloss.linear_token_stats(
        inputs["x"],
        inputs["weight"],
        inputs["target"],
        linear_bias=inputs["bias"] if bias else None,
        outputs=outputs,
        backend=backend,
        **options,
    )
    return sum(
        (_weighted(getattr(out, name), inputs) * k for k, name in enumerate(outputs, 1)), torch.zeros(())
    )


def _eager_linear_stats(inputs: Inputs, bias: bool = False, **options: Any) -> Tensor:
    options.pop("chunk_size", None)
    logits = F.linear(inputs["x"], inputs["weight"], inputs["bias"] if bias else None)
    return _eager_stats({**inputs, "x": logits}, **options)


def _policy(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Log-probs [B, T], or of a linear head over rows: packed sequences."""
    inputs = _hidden(shape, dtype) if len(shape) == 3 else {}
    generator = torch.Generator().manual_seed(11)
    lead = shape[:1] if len(shape) == 3 else shape
    logprobs = -3 * torch.rand(lead, generator=generator)
    inputs["mask"] = torch.rand(lead, generator=generator) > 0.3
    if len(shape) == 3:
        inputs["mask"] = inputs["target"] != -100
        logits = inputs["x"].double() @ inputs["weight"].double().t()
        chosen = inputs["target"].clamp(min=0)[:, None]
        logprobs = logits.log_softmax(-1).gather(-1, chosen)[:, 0].float()
        inputs["cu_seqlens"] = torch.tensor([0, shape[0] // 2, shape[0]])
    else:
        inputs["x"] = logprobs.to(dtype)
    inputs["old"], inputs["ref"] = (logprobs + 0.4 * torch.randn(lead, generator=generator) for _ in range(2))
    inputs["advantages"] = torch.randn(lead, generator=generator)
    return inputs


def _policy_loss(inputs: Inputs, backend: str, bias: bool = False, **options: Any) -> Tensor:
    fixed = (inputs["old"], inputs["advantages"], inputs["mask"])
    options |= {"ref_logprobs": inputs["ref"], "backend": backend}
    if "weight" not in inputs:
        return fastloss.policy_loss(inputs["x"], *fixed, **options).loss * 1.5
    options |= {"cu_seqlens": inputs["cu_seqlens"], "linear_bias": inputs["bias"] if bias else None}
    out = fastloss.linear_policy_loss(inputs["x"], inputs["weight"], inputs["target"], *fixed, **options)
    return out.loss * 1.5


def _eager_policy_loss(inputs: Inputs, bias: bool = False, **options: Any) -> Tensor:
    """Token-level clip and cispo, as trainers write them."""
    x, a, m, entropy = inputs["x"], inputs["advantages"], inputs["mask"], None
    if "weight" in inputs:
        options.pop("chunk_size", None)
        z = _eager_transform(F.linear(x, inputs["weight"], inputs["bias"] if bias else None), options)
        logp = (z / options.pop("temperature", 1.0)).log_softmax(-1)
        x = logp.gather(-1, inputs["target"].clamp(min=0)[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
    rho = (x - inputs["old"]).exp()
    if options.get("loss_type") == "cispo":
        loss = -rho.detach().clamp(max=1.2) * a * x
    else:
        loss = -torch.min(rho * a, rho.clamp(0.8, 1.2) * a)
    delta = inputs["ref"] - x
    loss = loss + options.get("beta", 0.0) * (delta.exp() - delta - 1)
    if entropy is not None:
        loss = loss - options.get("entropy_coef", 0.0) * entropy
    if options.get("loss_type") == "grpo":
        return ((loss * m).sum(-1) / m.sum(-1).clamp(min=1)).mean() * 1.5
    return (loss * m).sum() / options.get("normalizer", m.sum().clamp(min=1)) * 1.5


def _preference(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Σ log p of pairs, x [2, B]; or sequences of a linear head, x [2B, T, D]."""
    generator = torch.Generator().manual_seed(13)
    if len(shape) == 1:
        x = (-5 * torch.rand(2, *shape, generator=generator) - 0.5).to(dtype)
        inputs = {"x": x, "lengths": torch.randint(1, 9, (2, *shape), generator=generator)}
        reference = x.float() + 2 * torch.randn(2, *shape, generator=generator)
    else:
        pairs, length, dim, vocab = shape
        inputs = _hidden((2 * pairs * length, dim, vocab), dtype)
        inputs["target"] = inputs["target"].reshape(2 * pairs, length)
        inputs["x"] = inputs["x"].reshape(2 * pairs, length, dim)
        inputs["lengths"] = (inputs["target"] != -100).sum(-1).reshape(2, pairs)
        reference = -2.0 * inputs["lengths"] + torch.randn(2, pairs, generator=generator)
    inputs["reference"] = reference
    inputs["upstream"] = torch.rand(reference.shape[1], generator=generator) + 0.5
    inputs["beta"] = torch.rand(reference.shape[1], generator=generator) + 0.1
    return inputs


def _preference_loss(inputs: Inputs, backend: str, bias: bool = False, **options: Any) -> Tensor:
    if options.pop("per_pair", False):
        options |= {"beta": inputs["beta"], "weights": inputs["upstream"]}
    names = ("ref_chosen_logps", "ref_rejected_logps")
    options |= {"backend": backend, **dict(zip(names, inputs["reference"], strict=True))}
    if "weight" in inputs:
        options["linear_bias"] = inputs["bias"] if bias else None
        out = fastloss.linear_preference_loss(inputs["x"], inputs["weight"], inputs["target"], **options)
    else:
        options |= dict(zip(("chosen_lengths", "rejected_lengths"), inputs["lengths"], strict=True))
        out = fastloss.preference_loss(*inputs["x"], **options)
    return (out.loss * (inputs["upstream"].to(out.loss.dtype) if out.loss.dim() else 1.5)).sum()


def _eager_preference_loss(inputs: Inputs, bias: bool = False, **options: Any) -> Tensor:
    """As TRL writes them."""
    x = inputs["x"]
    if "weight" in inputs:
        z = _eager_transform(F.linear(x, inputs["weight"], inputs["bias"] if bias else None), options)
        picked = z.log_softmax(-1).gather(-1, inputs["target"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        x = (picked * (inputs["target"] != -100)).sum(-1).reshape(2, -1)
    c, r = x - inputs["reference"]
    lc, lr = inputs["lengths"].clamp(min=1)
    beta = inputs["beta"] if options.get("per_pair") else options.get("beta", 0.1)
    smoothing = options.get("label_smoothing", 0.0)
    u = beta * (c - r)
    terms = {
        "sigmoid": -F.logsigmoid(u) * (1 - smoothing) - F.logsigmoid(-u) * smoothing,
        "hinge": torch.relu(1 - u),
        "ipo": (c / lc - r / lr - 1 / (2 * beta)) ** 2,
        "apo_zero": 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
    }
    names = options.get("loss_type", "sigmoid")
    names = [names] if isinstance(names, str) else names
    weights = options.get("loss_weights", [1.0] * len(names))
    loss = sum(w * terms[n] for n, w in zip(names, weights, strict=True))
    if options.get("reduction") == "none":
        return (loss * inputs["upstream"]).sum()
    return (loss * inputs["upstream"] if options.get("per_pair") else loss).mean() * 1.5


PREFERENCE_OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss_type": "ipo", "beta": 0.3},
    {"label_smoothing": 0.2, "reduction": "none"},
    {"per_pair": True},
    {"loss_type": ["sigmoid", "hinge", "apo_zero"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.5},
]
CE_OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"classes": True},
    {"softcap": 5.0},
    {"logit_scale": 0.3},
    {"normalizer": 17},
    {"probabilities": True},
    {"probabilities": True, "classes": True, "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0},
    {"classes": True, "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 1.7},
    {
        "classes": True,
        "label_smoothing": 0.2,
        "z_loss": 0.01,
        "softcap": 4.0,
        "logit_scale": 1.7,
        "reduction": "none",
    },
    {"label_smoothing": 1.0, "normalizer": torch.tensor(9.0)},
]
STATS_OPTIONS: list[dict[str, Any]] = [
    {"outputs": ("logprobs",)},
    {"outputs": ("entropy",)},
    {"outputs": ("logsumexp",)},
    {"outputs": ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits")},
    {"outputs": ("logprobs", "entropy"), "temperature": 0.7, "softcap": 6.0, "logit_scale": 2.0},
]
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        cross_entropy,
        logits_of,
        eager_cross_entropy,
        CE_OPTIONS
        + [
            {"inplace": True},
            {"inplace": True, "softcap": 5.0, "label_smoothing": 0.1},
            {"inplace": True, "reduction": "none", "classes": True},
        ],
        [(1, 1), (1, 2), (7, 33), (5, 1031)],
    ),
    "linear_cross_entropy": Loss(
        _linear_cross_entropy,
        _hidden,
        _eager_linear,
        CE_OPTIONS
        + [
            {"chunk_size": 3},
            {"bias": True},
            {"bias": True, "chunk_size": 4, "reduction": "none", "softcap": 3.0},
            {"bias": True, "chunk_size": 2, "classes": True, "label_smoothing": 0.1},
        ],
        [(1, 4, 2), (9, 16, 67)],
    ),
    "token_stats": Loss(
        _stats,
        logits_of,
        _eager_stats,
        STATS_OPTIONS + [{"outputs": ("logprobs",), "inplace": True}],
        [(1, 1), (7, 33), (5, 1031)],
    ),
    "linear_token_stats": Loss(
        _linear_stats,
        _hidden,
        _eager_linear_stats,
        STATS_OPTIONS + [{"outputs": ("logprobs", "entropy"), "bias": True, "chunk_size": 2}],
        [(1, 4, 2), (9, 16, 67)],
    ),
    "policy_loss": Loss(
        _policy_loss,
        _policy,
        _eager_policy_loss,
        [{}, {"beta": 0.1}, {"loss_type": "grpo"}, {"loss_type": "cispo", "normalizer": 5, "beta": 0.1}],
        [(1, 1), (7, 33), (2, 1031)],
    ),
    "linear_policy_loss": Loss(
        _policy_loss,
        _policy,
        _eager_policy_loss,
        [
            {},
            {"beta": 0.1, "entropy_coef": 0.1, "chunk_size": 2},
            {"loss_type": "cispo", "bias": True, "temperature": 0.7, "softcap": 6.0, "chunk_size": 4},
        ],
        [(1, 4, 2), (9, 16, 67)],
    ),
    "preference_loss": Loss(
        _preference_loss, _preference, _eager_preference_loss, PREFERENCE_OPTIONS, [(1,), (7,), (301,)]
    ),
    "linear_preference_loss": Loss(
        _preference_loss,
        _preference,
        _eager_preference_loss,
        [*PREFERENCE_OPTIONS, {"bias": True, "softcap": 5.0}],
        [(1, 2, 4, 2), (3, 4, 16, 67)],
    ),
}
LEAVES = ("x", "weight", "bias")
