"""moe_load_balancing_loss and router_z_loss: what keeps the routers of a mixture of experts even, and their logits small."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss import reference
from fastloss.engine import checks
from fastloss.engine.autograd import differentiable_again
from fastloss.engine.backend import resolve_call, resolves_views
from fastloss.engine.checks import ShapeError
from fastloss.losses.token_stats import token_stats
from fastloss.tables import ACC_DTYPES

SCOPES = ("batch", "layer", "sequence")
SCORES = ("softmax", "sigmoid")
_MASKED = -100


class RouterOutput(NamedTuple):
    """``loss`` (0-d) carries a gradient; ``load`` and ``metrics`` are detached."""

    loss: Tensor
    load: Tensor  # f, [experts] ("batch"), [layers, experts] or [layers, sequences, experts]
    metrics: dict[str, Tensor]


@resolves_views
def moe_load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor],
    top_k: int,
    *,
    mask: Tensor | None = None,
    selected: Tensor | Sequence[Tensor] | None = None,
    scope: str = "batch",
    scores: str = "softmax",
    per_choice: bool = False,
    load: Tensor | None = None,
    backend: str = "auto",
) -> RouterOutput:
    r"""The load-balancing loss of all routers at once: ``E Σ_i f_i P_i`` over E experts (arXiv:2101.03961).

    f_i is how often expert i is among a token's ``top_k`` (a constant in the gradient), P_i the mean of its probability, both over the
    tokens of a scope; of several scopes the loss is the mean. It is ``top_k`` where all experts are alike (1 with ``per_choice``). A
    trainer adds it times a coefficient. Whose form is which: docs/router.md.

    Args:
        router_logits: one tensor for each layer, ``[N, E]`` or ``[B, T, E]``, or all of them ``[layers, N, E]``, ``[layers, B, T, E]``.
        top_k: experts of a token.
        mask: bool or 0/1 ``[B, T]`` (or ``[N]``): tokens that count.
        selected: int64, as router_logits with ``top_k`` in place of E: the experts that were chosen, where they are not those of the
            largest logits (DeepSeek-V3 adds a bias to choose). In a row they are different.
        scope: "batch": all tokens of all layers (transformers); "layer": those of a layer (Switch, Megatron); "sequence": those of a layer in
            a sequence, the rows of ``[B, T]`` (DeepSeek-V3).
        scores: "softmax", or "sigmoid" over their sum (DeepSeek-V3).
        per_choice: f is of choices and not of tokens: divided by ``top_k`` (DeepSeek, Megatron).
        load: f to take in place of this batch's, of the shape of the result's ``load``: that of all processes (arXiv:2501.11873).

    Returns:
        :class:`RouterOutput` in float32 (float64 for float64 logits); its ``metrics``: ``max_violation``, the largest load over the mean load,
        minus 1, and ``idle``, the share of experts with no token, both means over the scopes. No token that counts: loss 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; the message names the argument.
        IndexError: a selected expert that does not exist (on the CPU).

    >>> import torch, fastloss
    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    >>> round(fastloss.moe_load_balancing_loss([logits], top_k=1).loss.item(), 4)
    1.1904
    """
    layers = _layers("router_logits", router_logits)
    experts = layers[0].shape[-1]
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected an int from 1 to {experts}, got {top_k!r}")
    checks.is_one_of("scope", scope, SCOPES)
    checks.is_one_of("scores", scores, SCORES)
    acc, lead = ACC_DTYPES[layers[0].dtype], tuple(layers[0].shape[:-1])
    kept, lead = _kept(mask, lead, layers[0].device)
    if scope == "sequence" and len(lead) != 2:
        raise ShapeError(
            "scope: expected router_logits [B, T, E] or a mask [B, T] for 'sequence', got neither"
        )
    sequences, tokens = lead if len(lead) == 2 else (1, lead[0])
    chosen = None if selected is None else _layers("selected", selected, torch.int64)
    if chosen is not None:
        for ids, logits in zip(chosen, layers, strict=False):
            checks.has_shape("selected", ids, (*logits.shape[:-1], top_k))
            checks.same_device("selected", ids, logits.device)
        if len(chosen) != len(layers):
            raise ShapeError(f"selected: expected {len(layers)} layers, got {len(chosen)}")
    scopes = {"batch": (1, 1), "layer": (len(layers), 1), "sequence": (len(layers), sequences)}[scope]
    shape = (*scopes, experts) if scope == "sequence" else (*scopes[:1], experts)[scope == "batch" :]
    if load is not None:
        checks.is_floating("load", load)
        checks.has_shape("load", load, shape)
        checks.same_device("load", load, layers[0].device)
        load = load.detach().to(acc).reshape(*scopes, experts)
    call = resolve_call(
        "moe_load_balancing_loss", backend, layers[0], *layers[1:], mask, load, *(chosen or ()), has_operators=False
    )  # fmt: skip
    call.announce(terms="PyTorch's operations on a layer's logits at a time")
    size = (sequences, tokens)
    # All layers' logits in one tensor have one gradient.
    given = [router_logits] if isinstance(router_logits, Tensor) else layers
    flat = [x.reshape(len(layers) // len(given), *size, experts) for x in given]
    kept = kept.reshape(size)
    ids, bad = (None, None) if chosen is None else _chosen(chosen, kept, experts)
    run = _Run(kept, ids, load, scopes, scores, int(top_k), bool(per_choice), acc)
    loss, f = _defined(run, flat) if call.by_definition else LoadBalancing.apply(run, *flat)
    if bad is not None:
        loss = torch.where(bad, torch.nan, loss)
    f = f.detach()
    average = f.mean(-1)
    violation = f.amax(-1) / torch.where(average > 0, average, 1.0) - (average > 0).to(acc)
    metrics = {"max_violation": violation.mean(), "idle": (f == 0).to(acc).mean()}
    return RouterOutput(loss, f.reshape(shape), metrics)


def router_z_loss(
    router_logits: Tensor | Sequence[Tensor], *, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """``logsumexp(router logits)²``, the mean over the tokens of all layers (ST-MoE, arXiv:2202.08906): it keeps the logits small.

    Args:
        router_logits, mask: as in :func:`moe_load_balancing_loss`.

    Returns:
        float32 (float64 for float64 logits), 0-d; no token that counts: 0. The row kernels compute it.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; the message names the argument.

    >>> import torch, fastloss
    >>> round(fastloss.router_z_loss([torch.zeros(3, 4)]).item(), 4)
    1.9218
    """
    layers = _layers("router_logits", router_logits)
    kept, _ = _kept(mask, tuple(layers[0].shape[:-1]), layers[0].device)
    given = [router_logits] if isinstance(router_logits, Tensor) else layers
    target = torch.where(kept.reshape(-1), 0, _MASKED).repeat(len(layers) // len(given))
    total = None
    for logits in given:
        rows = logits.reshape(target.numel(), logits.shape[-1])
        lse = token_stats(
            rows, target, outputs=("logsumexp",), ignore_index=_MASKED, backend=backend
        ).logsumexp
        assert lse is not None
        part = lse.square().sum()
        total = part if total is None else total + part
    assert total is not None
    return total / (kept.sum() * len(layers)).clamp(min=1)


def _layers(name: str, value: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Each layer's tensor ``[..., width]``, all of one shape, dtype and device."""
    given = list(value.unbind(0)) if isinstance(value, Tensor) and value.dim() >= 3 else value
    if isinstance(given, Tensor) or not isinstance(given, Sequence) or not len(given):
        got = f"shape {list(given.shape)}" if isinstance(given, Tensor) else f"{type(given).__name__}"
        raise ShapeError(f"{name}: expected a tensor for each layer, or [layers, ..., experts], got {got}")
    for x in given:
        if dtype is None:
            checks.is_floating(name, x)
        else:
            checks.is_tensor(name, x)
            if x.dtype != dtype:
                raise TypeError(f"{name}: expected int64, got {str(x.dtype).removeprefix('torch.')}")
        if x.dim() < 2 or not x.shape[-1]:
            raise ShapeError(f"{name}: expected shape [..., experts], got {list(x.shape)}")
        checks.has_shape(name, x, tuple(given[0].shape))
        checks.same_device(name, x, given[0].device)
        if x.dtype != given[0].dtype:
            raise TypeError(f"{name}: expected {given[0].dtype} as the first layer, got {x.dtype}")
    return list(given)


def _kept(mask: Tensor | None, lead: tuple[int, ...], device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """Which tokens count, bool, and their shape: ``[B, T]`` where logits or mask tell it."""
    count = 1
    for size in lead:
        count *= size
    if mask is None:
        return torch.ones(lead, dtype=torch.bool, device=device), lead
    checks.is_tensor("mask", mask)
    checks.same_device("mask", mask, device)
    if tuple(mask.shape) != lead and (len(lead) != 1 or mask.numel() != count or mask.dim() > 2):
        raise ShapeError(f"mask: expected shape {list(lead)}, got {list(mask.shape)}")
    return mask != 0, tuple(mask.shape)


def _chosen(chosen: list[Tensor], kept: Tensor, experts: int) -> tuple[list[Tensor], Tensor | None]:
    """Each layer's ``[sequences, tokens, K]``, 0 where masked; on a GPU also whether there is one that does not exist."""
    ids = [torch.where(kept[..., None], x.reshape(*kept.shape, x.shape[-1]), 0) for x in chosen]
    if checks.host_reads(ids[0]):
        for x in ids:
            checks.reject_bad_targets(x, experts, -1 - experts)
        return ids, None
    bad = torch.stack([((x < 0) | (x >= experts)).any() for x in ids]).any()
    return [x.clamp(0, experts - 1) for x in ids], bad


@dataclass(frozen=True)
class _Run:
    """What forward and backward need beside the logits ``[sequences, tokens, experts]`` of each layer."""

    kept: Tensor  # bool [sequences, tokens]
    selected: list[Tensor] | None
    load: Tensor | None  # acc [*scopes, experts]
    scopes: tuple[int, int]
    scores: str
    top_k: int
    per_choice: bool
    acc: torch.dtype

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of a layer, 0 where masked; and the sigmoids."""
        z = logits.detach().to(self.acc)
        if self.scores == "softmax":
            return z.softmax(-1).masked_fill_(~self.kept[..., None], 0.0), None
        s = z.sigmoid()
        total = s.sum(-1, keepdim=True).clamp(min=torch.finfo(self.acc).tiny)
        return (s / total).masked_fill_(~self.kept[..., None], 0.0), s

    def gradient(self, logits: Tensor, c: Tensor) -> Tensor:
        """Of Σ p · c."""
        p, sigmoid = self.probabilities(logits)
        grad = p * (c - (p * c).sum(-1, keepdim=True))
        if sigmoid is None:
            return grad
        return (grad * (1 - sigmoid)).masked_fill(~self.kept[..., None], 0.0)


def _defined(run: _Run, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    logits = torch.cat([x.to(run.acc) for x in given]) if len(given) > 1 else given[0].to(run.acc)
    chosen = run.selected or [ids for x in given for ids in x.detach().topk(run.top_k, -1).indices.unbind(0)]
    return reference.load_balancing(
        logits, torch.stack(chosen), run.kept, run.scopes, run.scores, run.load, run.per_choice
    )


def _again(ctx: Any) -> Any:
    return [_defined(ctx.run, ctx.saved_tensors)[0], None], [None, *ctx.saved_tensors]


class LoadBalancing(torch.autograd.Function):
    """(run, logits ``[layers, sequences, tokens, experts]`` in one tensor or several) -> (loss, load). The backward makes the
    probabilities again: a layer's alone are ever held."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *given: Tensor) -> Any:
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        layers = [x for several in given for x in several.unbind(0)]
        experts, device = layers[0].shape[-1], layers[0].device
        sequences = run.kept.shape[0]
        chosen, mass = [], []
        # Whole numbers are added: the same in any order. A masked token's choices go to a place of their own.
        place = torch.arange(sequences, dtype=torch.int64, device=device)[:, None, None] * (experts + 1)
        for k, logits in enumerate(layers):
            ids = logits.detach().topk(run.top_k, -1).indices if run.selected is None else run.selected[k]
            ids = torch.where(run.kept[..., None], ids, experts) + place
            counts = torch.zeros(sequences * (experts + 1), dtype=torch.int64, device=device)
            counts.scatter_add_(0, ids.reshape(-1), torch.ones_like(ids).reshape(-1))
            chosen.append(counts.view(sequences, experts + 1)[:, :experts])
            mass.append(run.probabilities(logits)[0].sum(1))  # [sequences, experts]

        def within(x: Tensor) -> Tensor:
            per_scope = len(layers) // run.scopes[0], sequences // max(1, run.scopes[1])
            shape = (run.scopes[0], per_scope[0], run.scopes[1], per_scope[1], x.shape[-1])
            return x.reshape(shape).sum((1, 3)).to(run.acc)

        count = within(run.kept.sum(1)[:, None].expand(len(layers), sequences, 1)).clamp(min=1)
        f = run.load
        if f is None:
            f = within(torch.stack(chosen)) / (count * (run.top_k if run.per_choice else 1))
        p = within(torch.stack(mass)) / count
        ctx.slope = experts * f / count / (run.scopes[0] * max(1, run.scopes[1]))  # d loss / d Σ p
        ctx.mark_non_differentiable(f)
        return experts * (f * p).sum(-1).sum() / max(1, f.numel() // experts), f

    @staticmethod
    @differentiable_again(_again)
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> Any:
        run: _Run = ctx.run
        if upstream is None:
            return (None, *(None for _ in ctx.saved_tensors))
        slope, k, grads = ctx.slope * upstream, 0, []
        for several, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True):
            out = torch.empty(several.shape, dtype=several.dtype, device=several.device) if needed else None
            for i, logits in enumerate(several.unbind(0)):
                if out is not None:
                    # [scopes, 1, experts]: of each sequence, or of all
                    out[i] = run.gradient(logits, slope[min(k, run.scopes[0] - 1)][:, None])
                k += 1
            grads.append(out)
        return (None, *grads)
