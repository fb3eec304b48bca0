"""policy_loss: every variant against its formula in float64, on every backend; the definition against formulas by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, KERNELS, need
from policy_inputs import STOPPED, B, T, agree, batch, call, double
from torch import Tensor

import fastloss
from fastloss.losses.policy_options import VARIANTS
from fastloss.tables import AGGREGATIONS, IMPORTANCE_MODES, KL_KINDS, LEVELS


def _grid() -> list[dict[str, Any]]:
    """Every loss_type with every aggregation and level; KL, corrections and clips in turn."""
    kl = itertools.cycle(
        [{}, *({"beta": 0.1, "kl_estimator": k, "kl_unbiased": u} for k in KL_KINDS for u in (False, True))]
    )
    sampler = itertools.cycle(
        [
            {},
            *(
                {"importance_mode": m, "importance_cap": 1.05, "importance_floor": 0.9}
                for m in IMPORTANCE_MODES
            ),
        ]
    )
    more = itertools.cycle(
        [
            {},
            {"entropy_coef": 0.05},
            {"off_policy_threshold": 0.02},
            {"top_entropy_quantile": 0.5},
            {"clip_low": 0.1, "clip_high": 0.3, "normalizer": 7.0},
            {"entropy_coef": 0.05, "entropy_aggregation": "token-mean", "normalizer": 3},
            {"entropy_coef": 0.05, "top_entropy_quantile": 0.4},
        ]
    )
    clips = itertools.cycle([{}, {"dual_clip": 1.3}, {"delta": 1.5}, {"dual_clip": 2.0, "delta": 1.4}])
    grid = []
    for loss_type, aggregation, level in itertools.product(VARIANTS, (None, *AGGREGATIONS), (None, *LEVELS)):
        options = {"loss_type": loss_type, "aggregation": aggregation, "importance_level": level}
        options |= {**next(kl), **next(sampler), **next(more)}
        if VARIANTS[loss_type].surrogate == "clip":
            options |= next(clips)
        if loss_type in ("kl_cov", "clip_cov"):
            options |= {
                "kl_cov_ratio": 0.3,
                "clip_cov_ratio": 0.2,
                "clip_cov_low": -9.0,
                "clip_cov_high": 9.0,
            }
        grid.append(options)
    return grid


GRID = _grid()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("loss_type", VARIANTS)
def test_variants(backend: str, loss_type: str) -> None:
    need(backend)
    cases = [o for o in GRID if o["loss_type"] == loss_type]
    if backend in ("triton", "cuda") and DEVICE != "cuda":
        cases = cases[:: 6 if backend == "triton" else 3]
    data = batch()
    for options in cases:
        want = call(double(data), **options)
        eager = call(data, **options)
        agree(call(data, backend, **options), want, eager, 2.0**-24)
        if backend in ("cpu", "reference"):
            agree(call(double(data), backend, **options), want, want, 2.0**-50)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 300), (1, 1100), (34, 2)])
def test_shapes(backend: str, shape: tuple[int, int]) -> None:
    need(backend)
    data = batch(b=shape[0], t=shape[1])
    for options in (
        {"beta": 0.1, "entropy_coef": 0.1},
        {"loss_type": "gspo", "clip_low": 0.1},
        {"loss_type": "gmpo", "beta": 0.1, "kl_unbiased": True},
    ):
        agree(call(data, backend, **options), call(double(data), **options), call(data, **options), 2.0**-23)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("loss_type", [v for v in VARIANTS if not v.endswith("_cov")])
def test_weights_scale_the_policy_term(backend: str, loss_type: str) -> None:
    """Every surrogate is homogeneous in the advantage, so a positive factor of the term is one of the advantage."""
    need(backend)
    data = batch()
    options = {"loss_type": loss_type, "beta": 0.1, "entropy_coef": 0.05, "importance_mode": "token_truncate"}
    weights = 0.5 + torch.rand(B, T, device=DEVICE)
    given = [weights.masked_fill(~data["mask"], 1), weights[:, 0].contiguous(), weights[:, :1]]
    if loss_type != "gmpo":  # its clip asks for the advantage's sign, and 0 has none
        given.append(weights > 1)
    for factors in given:
        per_token = (factors if factors.dim() == 2 else factors[:, None]).float()
        got = call({**data, "weights": factors}, backend, **options)
        scaled = data["advantages"][:, None] * per_token
        want = call({**data, "advantages": scaled.expand(B, T)}, backend, **options)
        for name in ("loss", "d_logprobs", "d_entropy", "policy_loss", "kl"):
            assert torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-7), name


# --- the definition against formulas written by hand, as trainers write them ----------------------------------------


def by_hand(d: dict[str, Tensor], loss_type: str, low: float = 0.2, high: float = 0.2) -> Tensor:
    """Value of each variant in plain expressions, TRL's and verl's where they have it."""
    m = d["mask"].double()
    lp, old = (torch.where(d["mask"], d[k], 0) for k in ("logprobs", "old_logprobs"))
    a = d["advantages"][:, None]
    lr = lp - old
    n = m.sum(-1).clamp(min=1)
    mean, seq_mean = lambda x: (x * m).sum() / m.sum(), lambda x: ((x * m).sum(-1) / n).mean()

    def clipped(rho: Tensor) -> Tensor:
        return torch.max(-a * rho, -a * rho.clamp(1 - low, 1 + high))

    if loss_type == "reinforce":
        return (-a * lp * m).sum(-1).mean()
    if loss_type == "gpg":
        return mean(-a * lp)
    if loss_type == "importance_sampling":
        return (-a * lr.exp() * m).sum(-1).mean()
    if loss_type in ("ppo", "dapo", "bnpo"):
        return mean(clipped(lr.exp()))
    if loss_type == "grpo":
        return seq_mean(clipped(lr.exp()))
    if loss_type == "dr_grpo":
        return (clipped(lr.exp()) * m).sum() / (m.shape[0] * m.shape[1])
    if loss_type in ("gspo", "luspo"):
        rho = ((lr * m).sum(-1) / n)[:, None].exp().expand(m.shape)
        return seq_mean(clipped(rho)) if loss_type == "gspo" else (clipped(rho) * m).sum(-1).mean()
    if loss_type == "rloo":
        return clipped((lr * m).sum(-1, keepdim=True).exp())[m.sum(-1) > 0].sum() / m.shape[0]
    if loss_type == "gmpo":
        bounded = lr.clamp(-low, high)
        one_sided = torch.where(a > 0, torch.minimum(lr, bounded), torch.maximum(lr, bounded))
        rho = ((one_sided * m).sum(-1) / n).exp()
        return (-rho * a[:, 0])[m.sum(-1) > 0].sum() / m.shape[0]
    if loss_type == "cispo":
        return mean(-lr.exp().clamp(max=1 + high).detach() * a * lp)
    if loss_type == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05)
        return seq_mean(-a * torch.sigmoid(tau * (lr.exp() - 1)) * 4 / tau)
    if loss_type == "vespo":
        log_w = (lr * m).sum(-1, keepdim=True).clamp(math.log(1e-8), 20)
        k, lam = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
        return mean(-(lam + k * log_w - lam * log_w.exp()).exp().detach() * a * lp)
    if loss_type in ("dppo_tv", "dppo_kl"):
        p, p_old = lp.exp(), old.exp()
        kl = p_old * (old - lp) + (1 - p_old) * ((1 - p_old + 1e-8) / (1 - p + 1e-8)).log()
        if loss_type == "dppo_tv":
            valid = torch.where(a > 0, p - p_old <= high, p - p_old >= -low)
        else:
            valid = torch.where(a > 0, (kl <= high) | (p <= p_old), (kl <= low) | (p >= p_old))
        return mean(-lr.exp().clamp(max=20).detach() * a * lp * valid.detach())
    raise KeyError(loss_type)


@pytest.mark.parametrize("loss_type", [v for v in VARIANTS if not v.endswith("_cov")])
def test_reference_is_the_formula(loss_type: str) -> None:
    data = double(batch())
    leaf = data["logprobs"].clone().requires_grad_()
    by_hand({**data, "logprobs": leaf}, loss_type, 0.1, 0.3).backward()
    got = call(data, upstream=1.0, loss_type=loss_type, clip_low=0.1, clip_high=0.3)
    assert torch.allclose(got["loss"], by_hand(data, loss_type, 0.1, 0.3).cpu(), atol=1e-14)
    assert torch.allclose(got["d_logprobs"], torch.where(data["mask"], leaf.grad, 0).cpu(), atol=1e-14)


@pytest.mark.parametrize("loss_type", ["dppo_tv", "dppo_kl"])
def test_dppo_counts_what_it_takes_out(loss_type: str) -> None:
    d = double(batch(spread=0.6))
    got = call(d, upstream=1.0, loss_type=loss_type, clip_low=0.02, clip_high=0.03)
    free = call(d, upstream=1.0, loss_type="cispo", cispo_max=20.0)
    dead = (got["d_logprobs"] == 0) & (free["d_logprobs"] != 0)
    tokens = d["mask"].sum().cpu()
    assert 0 < dead.sum() < tokens
    # A token without an advantage has no gradient either way: it is counted where its divergence is too large.
    assert got["clip_ratio/region"] * tokens >= dead.sum()
    assert torch.equal(got["d_logprobs"][~dead], free["d_logprobs"][~dead])


def test_kl_cov_is_verls() -> None:
    d = double(batch())
    got = call(d, upstream=1.0, loss_type="kl_cov", kl_cov_ratio=0.2, kl_cov_coef=0.7)
    m = d["mask"]
    a, lp = d["advantages"][:, None].expand(m.shape)[m], d["logprobs"][m]
    lr = lp - d["old_logprobs"][m]
    cov = (a - a.mean()) * (lp - lp.mean())
    penalised = cov.topk(max(1, int(len(cov) * 0.2))).indices
    losses = -a * lr.exp()
    losses[penalised] += 0.7 * lr.abs()[penalised]
    assert torch.allclose(got["loss"], losses.mean().cpu(), atol=1e-14)


def test_clip_cov_takes_the_tokens_out() -> None:
    d = double(batch())
    m = d["mask"]
    options = {"loss_type": "clip_cov", "clip_cov_ratio": 0.3, "clip_cov_low": -0.5, "clip_cov_high": 9.0}
    a, lp = d["advantages"][:, None].expand(m.shape)[m], d["logprobs"][m]
    rho = (lp - d["old_logprobs"][m]).exp()
    first, second = -a * rho, -a * rho.clamp(0.8, 1.2)
    cov = (a - a.mean()) * (lp - lp.mean())
    eligible = (cov > -0.5) & (cov < 9) & (second <= first)
    k = max(int(0.3 * len(cov)), 1)
    out = cov.masked_fill(~eligible, -math.inf).topk(k).indices
    weight = torch.ones_like(cov)
    weight[out] = 0
    weight[~eligible] = 1
    want = (torch.max(first, second) * weight).mean()
    got = call(d, upstream=1.0, **options)
    assert torch.allclose(got["loss"], want.cpu(), atol=1e-14)
    drawn = [
        call(d, **options, generator=torch.Generator().manual_seed(seed))["d_logprobs"]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert torch.equal(drawn[0], drawn[1]) and any(not torch.equal(drawn[0], x) for x in drawn[2:])
    # Each draw takes out as many; those eligible have a gradient without the selection.
    bare = call(d, **{**options, "loss_type": "ppo"})["d_logprobs"]
    for grad in drawn:
        assert ((bare != 0) & (grad == 0)).sum() <= min(k, int(eligible.sum()))


def test_trl_static_parts() -> None:
    """TRL's own off-policy mask and VESPO weights."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    d = double(batch())
    clean = {k: torch.where(d["mask"], v, 0) for k, v in d.items() if v.shape == (B, T)}
    m, a = d["mask"].double(), d["advantages"][:, None]
    lr = clean["logprobs"] - clean["old_logprobs"]
    drift = ((clean["sampler_logprobs"] - clean["logprobs"]) * m).sum(-1) / m.sum(-1).clamp(min=1)
    threshold = drift[d["advantages"] < 0].mean().item()
    keep = grpo.get_off_policy_mask(a, clean["logprobs"], clean["sampler_logprobs"], m, threshold)
    rho = lr.exp()
    losses = -torch.min(rho * a, rho.clamp(0.8, 1.2) * a) * keep
    got = call(d, loss_type="ppo", importance_mode=None, off_policy_threshold=threshold, upstream=1.0)
    assert 0 < keep.sum() < B
    assert torch.allclose(got["loss"], ((losses * m).sum() / m.sum()).cpu(), atol=1e-14)
    c = torch.where(d["mask"], (clean["old_logprobs"] - clean["sampler_logprobs"]).exp(), 1).clamp(max=1.05)
    phi = grpo.get_gamma_weights(a, lr, m, c)
    got = call(d, loss_type="vespo", importance_mode="token_truncate", importance_cap=1.05, upstream=1.0)
    want = (-phi * a * clean["logprobs"] * m).sum() / m.sum()
    assert torch.allclose(got["loss"], want.cpu(), atol=1e-14)


@pytest.mark.parametrize("loss_type", [v for v in VARIANTS if v not in STOPPED])
def test_reference_gradcheck(loss_type: str) -> None:
    d = {k: v[:2, :4].contiguous() if v.dim() == 2 else v[:2] for k, v in double(batch()).items()}
    d["mask"] = torch.ones_like(d["mask"])
    d = {k: torch.where(v.isnan(), -0.7, v) if v.is_floating_point() else v for k, v in d.items()}
    options = {"beta": 0.1, "entropy_coef": 0.1, "kl_unbiased": True, "loss_type": loss_type}

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return fastloss.policy_loss(
            **{**d, "logprobs": logprobs, "entropy": entropy}, backend="reference", **options
        ).loss

    leaves = d["logprobs"].requires_grad_(), d["entropy"].requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
