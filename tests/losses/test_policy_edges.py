"""policy_loss, kl_estimate and value_loss: what holds for every backend, the edges, the errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, KERNELS, need
from policy_inputs import B, T, batch, call, double
from torch import Tensor

import fastloss
from fastloss.losses.policy_options import VARIANTS
from fastloss.tables import KL_KINDS


@pytest.mark.parametrize("backend", ALL)
def test_on_policy_ratio_is_one(backend: str) -> None:
    """Bug 27."""
    need(backend)
    data = {k: v for k, v in batch().items() if k in ("logprobs", "advantages", "mask")}
    leaf = data["logprobs"].clone().requires_grad_()
    out = fastloss.policy_loss(leaf, None, data["advantages"], data["mask"], loss_type="ppo", backend=backend)
    out.loss.backward()
    for name in ("ratio/min", "ratio/max", "ratio/mean", "ess"):
        assert out.metrics[name] == 1, name
    assert out.metrics["approx_kl"] == 0 and out.metrics["clip_ratio/region"] == 0
    want = torch.where(data["mask"], -data["advantages"][:, None] / data["mask"].sum(), 0)
    assert torch.allclose(leaf.grad, want)
    same = fastloss.policy_loss(
        leaf.detach(), leaf.detach(), data["advantages"], data["mask"], loss_type="ppo", backend=backend
    )
    assert same.metrics["ratio/max"] == 1 and torch.equal(same.loss, out.loss)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", [{"loss_type": v, "beta": 0.1, "entropy_coef": 0.1} for v in VARIANTS])
def test_extremes_are_finite(backend: str, options: dict[str, Any]) -> None:
    """Bugs 24 and 33: log-ratios of ±1e4, nothing unmasked, no advantage, no token at all."""
    need(backend)
    data = batch()
    signs = torch.where(torch.arange(T, device=DEVICE) % 2 == 0, 1e4, -1e4)
    wild = {**data, "logprobs": data["logprobs"] + signs, "ref_logprobs": data["ref_logprobs"] - signs}
    options = {**options, "importance_mode": "token_truncate"}
    cases = [
        wild,
        {**wild, "sampler_logprobs": wild["old_logprobs"] + signs},
        {**data, "mask": torch.zeros_like(data["mask"])},
        {**data, "advantages": torch.zeros_like(data["advantages"])},
        {k: v[:0] for k, v in data.items()},
        {k: v[:, :0] if v.dim() == 2 else v for k, v in data.items()},
    ]
    for case in cases:
        got = call(case, backend, **options)
        want = call(double(case), **options)
        for key, value in got.items():
            assert value.isfinite().all(), key
            assert torch.allclose(value, want[key], rtol=2e-4, atol=1e-5), key
    empty = call(cases[2], backend, **options)
    assert empty["loss"] == 0 and not empty["d_logprobs"].any() and not empty["d_entropy"].any()
    assert empty["ratio/min"] == empty["ratio/max"] == 1


@pytest.mark.parametrize("backend", ALL)
def test_masked_positions_touch_nothing(backend: str) -> None:
    """Bugs 23 and 28: NaN or large numbers in the padding change no bit."""
    need(backend)
    data = batch()
    options = {"beta": 0.1, "entropy_coef": 0.1, "importance_mode": "token_mask", "importance_cap": 1.1}
    for loss_type in ("dapo", "gspo", "gmpo", "vespo"):
        a = call(data, backend, loss_type=loss_type, **options)
        other = {k: torch.where(v.isnan(), 77.0, v) if v.is_floating_point() else v for k, v in data.items()}
        b = call(other, backend, loss_type=loss_type, **options)
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert not a["d_logprobs"][~data["mask"].cpu()].any()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "gmpo", "vespo", "rloo", "grpo"])
def test_packed_is_padded(backend: str, loss_type: str) -> None:
    need(backend)
    data = batch()
    lengths = torch.tensor([3, 9, 0, 4, 1])
    inside = (torch.arange(T)[None, :] < lengths[:, None]).to(DEVICE)
    data = {k: torch.where(v.isnan(), 0.3, v) if v.is_floating_point() else v for k, v in data.items()}
    data["mask"] = inside & (torch.arange(T, device=DEVICE) != 1)
    packed = {k: v[inside] if v.dim() == 2 else v for k, v in data.items()}
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(DEVICE)
    options = {
        "loss_type": loss_type,
        "beta": 0.1,
        "importance_mode": "sequence_truncate",
        "importance_cap": 1.1,
        "off_policy_threshold": 0.1,
    }
    a, b = call(data, backend, **options), call(packed, backend, **options)
    for key in a:
        value = a[key][inside.cpu()] if a[key].dim() == 2 else a[key]
        assert torch.allclose(value, b[key], rtol=1e-6, atol=1e-7), key
    # One advantage a token is the same as one a sequence.
    packed["advantages"] = data["advantages"][:, None].expand(B, T)[inside]
    c = call(packed, backend, **options)
    assert all(torch.equal(b[k], c[k]) for k in b)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", [{"loss_type": v} for v in VARIANTS if not v.endswith("_cov")])
def test_micro_batches_add_up(backend: str, options: dict[str, Any]) -> None:
    """Bugs 5 and 26: the global batch's count as normalizer, a number or a tensor."""
    need(backend)
    data = batch()
    aggregation = VARIANTS[options["loss_type"]].aggregation
    count = data["mask"].sum() if aggregation == "token-mean" else torch.tensor(float(B))
    options = {**options, "beta": 0.1, "entropy_coef": 0.05}
    whole = call(data, backend, upstream=1.0, **options)
    for normalizer in (count.to(DEVICE), float(count)):  # sums that differ by rounding alone
        parts = [
            call(
                {k: v[i : i + 2] for k, v in data.items()},
                backend,
                upstream=1.0,
                normalizer=normalizer,
                **options,
            )
            for i in range(0, B, 2)
        ]
        assert torch.allclose(sum(p["loss"] for p in parts), whole["loss"], rtol=1e-6, atol=1e-7)
        for key in ("d_logprobs", "d_entropy"):
            gathered = torch.cat([p[key] for p in parts])
            assert (gathered - whole[key]).abs().max() <= 2**-23 * whole[key].abs().max()


@pytest.mark.parametrize("backend", ALL)
def test_normalizer_below_one(backend: str) -> None:
    """Tokens over ranks can be a fraction: it is not rounded up."""
    need(backend)
    data = batch()
    for loss_type in ("dapo", "dr_grpo"):
        one, half = (call(data, backend, loss_type=loss_type, normalizer=n) for n in (1.0, 0.5))
        assert torch.allclose(2 * one["loss"], half["loss"]) and one["loss"] != 0
        assert torch.allclose(2 * one["d_logprobs"], half["d_logprobs"])


@pytest.mark.parametrize("backend", ALL)
def test_upstream_retained_and_twice(backend: str) -> None:
    """Bugs 1, 2 and 3."""
    need(backend)
    data = batch()
    leaf, entropy = data["logprobs"].clone().requires_grad_(), data["entropy"].clone().requires_grad_()
    kept = {k: data[k] for k in ("old_logprobs", "advantages", "mask")}
    loss = fastloss.policy_loss(leaf, **kept, entropy=entropy, entropy_coef=0.1, backend=backend).loss
    first = torch.autograd.grad(loss, (leaf, entropy), retain_graph=True)
    second = torch.autograd.grad(loss, (leaf, entropy), torch.tensor(4.0, device=DEVICE), retain_graph=True)
    assert all(torch.equal(4 * a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logprobs(backend: str, dtype: torch.dtype) -> None:
    """Bug 25: everything is float32 from the first subtraction on; the gradient's dtype is the leaf's."""
    need(backend)
    data = batch()
    data["logprobs"] = data["logprobs"].to(dtype)
    leaf = data["logprobs"].clone().requires_grad_()
    kept = {k: data[k] for k in ("old_logprobs", "advantages", "mask", "ref_logprobs")}
    out = fastloss.policy_loss(leaf, **kept, beta=0.1, backend=backend)
    out.loss.backward()
    wide = data["logprobs"].float().requires_grad_()
    exact = fastloss.policy_loss(wide, **kept, beta=0.1, backend=backend)
    exact.loss.backward()
    assert out.loss.dtype == torch.float32 and leaf.grad.dtype == dtype
    assert torch.equal(out.loss, exact.loss) and torch.equal(leaf.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("backend", ALL)
def test_bits_do_not_change(backend: str) -> None:
    need(backend)
    data = batch(b=3, t=700)
    for loss_type in ("dapo", "gspo", "vespo"):
        a, b = (call(data, backend, loss_type=loss_type, entropy_coef=0.1) for _ in range(2))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("backend", ALL)
def test_metrics(backend: str) -> None:
    """Bug 28: over unmasked tokens, with the advantage's sign; dual clip where A < 0 alone."""
    need(backend)
    data = batch(spread=1.0)
    options = {"loss_type": "ppo", "dual_clip": 1.4, "beta": 0.1, "entropy_coef": 0.01}
    options |= {"importance_mode": "token_truncate", "importance_cap": 1.05, "importance_floor": 0.95}
    got = call(data, backend, **options)
    d = double(data)
    m = d["mask"]
    a = d["advantages"][:, None].expand(B, T)[m]
    lr = (d["logprobs"] - d["old_logprobs"])[m]
    rho, t = lr.exp(), (d["ref_logprobs"] - d["logprobs"])[m]
    d_sampler = (d["old_logprobs"] - d["sampler_logprobs"])[m]
    low, high = (rho < 0.8) & (a < 0), (rho > 1.2) & (a > 0)
    plain = torch.max(-a * rho, -a * rho.clamp(0.8, 1.2))
    want = {
        "clip_ratio/low": low,
        "clip_ratio/high": high,
        "clip_ratio/region": low | high,
        "clip_ratio/dual": (a < 0) & (plain > -1.4 * a),
        "approx_kl": -lr,
        "approx_kl_k3": rho - 1 - lr,
        "kl": t.exp() - 1 - t,
        "entropy": d["entropy"][m],
        "ratio/mean": rho,
        "importance/cut_fraction": (d_sampler.exp() > 1.05) | (d_sampler.exp() < 0.95),
    }
    for name, values in want.items():
        assert torch.allclose(got[name], values.double().mean().cpu(), rtol=1e-5), name
        assert values.double().mean().abs() > 0, name
    assert torch.allclose(got["ratio/min"], rho.min().cpu()) and torch.allclose(
        got["ratio/max"], rho.max().cpu()
    )
    assert torch.allclose(got["ess"], (rho.sum() ** 2 / (len(rho) * (rho**2).sum())).cpu(), rtol=1e-5)
    policy = torch.where(a < 0, torch.min(plain, -1.4 * a), plain) * d_sampler.exp().clamp(0.95, 1.05)
    assert torch.allclose(got["policy_loss"], policy.mean().cpu(), rtol=1e-5)


def test_top_entropy_is_trls_quantile() -> None:
    d = double(batch())
    m = d["mask"]
    threshold = torch.quantile(d["entropy"][m], 0.6)
    chosen = m & (d["entropy"] >= threshold)
    got = call(
        d,
        loss_type="gpg",
        top_entropy_quantile=0.4,
        entropy_coef=0.1,
        entropy_aggregation="token-mean",
        upstream=1.0,
    )
    want = -(d["advantages"][:, None] * d["logprobs"])[chosen].sum() / m.sum()
    assert 0 < chosen.sum() < m.sum()
    assert torch.allclose(got["loss"], (want - 0.1 * d["entropy"][chosen].mean()).cpu(), atol=1e-14)
    assert torch.equal(got["d_logprobs"] != 0, (chosen & (d["advantages"] != 0)[:, None]).cpu())


def test_entropy_bonus_has_its_gradient() -> None:
    """Bug 31."""
    for backend in ALL:
        need(backend)
        data = batch()
        leaf = data["entropy"].clone().requires_grad_()
        kept = {k: data[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")}
        for extra, share in (
            ({}, data["mask"] / data["mask"].sum()),
            (
                {"entropy_aggregation": "seq-mean-token-mean"},
                data["mask"] / data["mask"].sum(-1, keepdim=True).clamp(min=1) / B,
            ),
        ):
            leaf.grad = None
            fastloss.policy_loss(
                **kept, entropy=leaf, entropy_coef=0.3, backend=backend, **extra
            ).loss.backward()
            assert torch.allclose(leaf.grad, -0.3 * share)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_estimate(kind: str) -> None:
    """Bug 30: value and derivative for the policy's log-prob."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5, 300.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -0.5, -300.0], dtype=torch.float64, requires_grad=True)
    kl = fastloss.kl_estimate(logprobs, ref, kind=kind)
    kl.sum().backward()
    t = (ref - logprobs).detach()[:3]
    value = {"k1": -t, "k2": t**2 / 2, "k3": t.exp() - 1 - t, "abs": t.abs(), "low_var_kl": t.exp() - 1 - t}[
        kind
    ]
    slope = {"k1": 1 + 0 * t, "k2": -t, "k3": 1 - t.exp(), "abs": -t.sign(), "low_var_kl": 1 - t.exp()}[kind]
    assert torch.allclose(kl[:3], value) and torch.allclose(logprobs.grad[:3], slope)
    assert kl[3].isfinite() and logprobs.grad[3] == 0 and ref.grad is None


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_value_loss(clip_range: float | None) -> None:
    """TRL's and verl's: half the larger square; masked positions, NaN included, touch nothing."""
    g = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(4, 6, generator=g) > 0.4
    mask[1] = False
    leaf = values.masked_fill(~mask, math.nan).requires_grad_()
    out = fastloss.value_loss(leaf, old, returns, mask, clip_range=clip_range)
    v, o, r = (x[mask].clone() for x in (values, old, returns))
    v.requires_grad_()
    squares = (v - r) ** 2
    if clip_range is not None:
        squares = torch.max(squares, (torch.clamp(v, o - clip_range, o + clip_range) - r) ** 2)
    want = 0.5 * squares.mean()
    out.loss.backward()
    want.backward()
    assert torch.allclose(out.loss, want) and torch.allclose(leaf.grad[mask], v.grad)
    assert not leaf.grad[~mask].any()
    explained = 1 - (r - v.detach()).var(unbiased=False) / r.var(unbiased=False)
    assert torch.allclose(out.metrics["value/explained_variance"], explained)
    whole = fastloss.value_loss(values, old, returns, mask, clip_range=clip_range, normalizer=mask.sum()).loss
    halves = sum(
        fastloss.value_loss(
            values[i : i + 2],
            old[i : i + 2],
            returns[i : i + 2],
            mask[i : i + 2],
            clip_range=clip_range,
            normalizer=int(mask.sum()),
        ).loss
        for i in (0, 2)
    )
    assert torch.allclose(whole, out.loss) and torch.allclose(halves, whole)
    nothing = fastloss.value_loss(leaf, old, returns, torch.zeros_like(mask), clip_range=clip_range)
    assert nothing.loss == 0 and all(m.isfinite() for m in nothing.metrics.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_type": "pp0"}, ValueError, "loss_type: expected one of"),
        ({"aggregation": "mean"}, ValueError, "aggregation: expected one of"),
        ({"importance_level": "word"}, ValueError, "importance_level: expected one of"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator: expected one of"),
        ({"importance_mode": "clip"}, ValueError, "importance_mode: expected one of"),
        ({"clip_low": -0.1}, ValueError, "clip_low: expected a finite number"),
        ({"clip_high": "0.2"}, TypeError, "clip_high: expected a number"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip: expected a finite number"),
        ({"dual_clip": 3.0, "loss_type": "cispo"}, ValueError, "dual_clip: expected None"),
        ({"delta": 3.0, "loss_type": "sapo"}, ValueError, "delta: expected None"),
        ({"beta": 0.1}, ValueError, "ref_logprobs: expected a tensor for beta=0.1, got None"),
        ({"entropy_coef": 0.1}, ValueError, "entropy: expected a tensor"),
        ({"top_entropy_quantile": 0.2}, ValueError, "entropy: expected a tensor"),
        ({"top_entropy_quantile": 1.2}, ValueError, "top_entropy_quantile"),
        ({"importance_cap": 2.0}, ValueError, "sampler_logprobs: expected a tensor"),
        (
            {"advantages": torch.zeros(3)},
            ValueError,
            r"advantages: expected shape \[5\] or \[5, 9\], got \[3\]",
        ),
        ({"weights": torch.ones(4)}, ValueError, r"weights: expected shape \[5\] or \[5, 9\], got \[4\]"),
        ({"weights": 0.5}, TypeError, "weights: expected a torch.Tensor"),
        ({"mask": torch.ones(5, 8)}, ValueError, r"mask: expected shape \[5, 9\]"),
        ({"old_logprobs": torch.zeros(5)}, ValueError, "old_logprobs: expected shape"),
        ({"logprobs": torch.zeros(45)}, ValueError, "logprobs: expected shape"),
        ({"logprobs": torch.zeros(5, 9, dtype=torch.int64)}, TypeError, "logprobs: expected float32"),
        ({"logprobs": [0.0]}, TypeError, "logprobs: expected a torch.Tensor"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer: expected a number or a 0-d tensor"),
        ({"backend": "numpy"}, ValueError, "backend: expected one of"),
        ({"max_length": 0}, ValueError, "max_length"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        k: v.cpu() for k, v in batch().items() if k in ("logprobs", "old_logprobs", "advantages", "mask")
    }
    with pytest.raises(error, match=message):
        fastloss.policy_loss(**{**arguments, **change})


def test_packed_errors() -> None:
    flat, mask = torch.zeros(4), torch.ones(4)
    for borders, message in (([0, 5], "offsets that rise from 0 to 4"), ([0, 3, 2, 4], "offsets that rise")):
        with pytest.raises(ValueError, match=message):
            fastloss.policy_loss(flat, None, flat, mask, cu_seqlens=torch.tensor(borders))
    with pytest.raises(ValueError, match="max_length: expected a number"):
        fastloss.policy_loss(flat, None, flat, mask, cu_seqlens=torch.tensor([0, 4]), loss_type="dr_grpo")
    with pytest.raises(ValueError, match="cu_seqlens: expected int32 or int64"):
        fastloss.policy_loss(flat, None, flat, mask, cu_seqlens=torch.tensor([0.0, 4.0]))


def test_compiled_is_eager() -> None:
    """torch.compile fuses the definition, in one graph."""
    data = {k: v.cpu() for k, v in batch().items() if k in ("logprobs", "old_logprobs", "advantages", "mask")}
    data["logprobs"].requires_grad_()

    def loss(logprobs: Tensor, **kept: Tensor) -> Tensor:
        return fastloss.policy_loss(logprobs, **kept, loss_type="gspo").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a = loss(**data)
    (ga,) = torch.autograd.grad(a, data["logprobs"])
    b = compiled(**data)
    (gb,) = torch.autograd.grad(b, data["logprobs"])
    assert torch.allclose(a, b) and torch.allclose(ga, gb, atol=1e-7)


def test_explain_and_module() -> None:
    data = {k: v for k, v in batch().items() if k in ("logprobs", "old_logprobs", "advantages", "mask")}
    plan = fastloss.explain(fastloss.policy_loss, **data, backend="reference")
    assert plan["function"] == "policy_loss" and plan["backend"] == "reference"
    module = fastloss.nn.PolicyLoss("gspo", clip_low=3e-4)
    a = module(**data, clip_high=4e-4, backend="reference").loss
    b = fastloss.policy_loss(
        **data, loss_type="gspo", clip_low=3e-4, clip_high=4e-4, backend="reference"
    ).loss
    c = fastloss.policy_loss(
        **data, loss_type="gspo", clip_low=None, clip_high=None, backend="reference"
    ).loss
    assert torch.equal(a, b) and torch.equal(a, c) and "gspo" in repr(module)


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_a_clip_of_no_width_on_the_policy(loss_type: str) -> None:
    """A ratio at its bound is inside: its gradient is the advantage's, whatever torch's clamp says there."""
    advantages = torch.tensor([1.0, -2.0], device=DEVICE)
    for backend in ("auto", "reference"):
        x = torch.full((2, 3), -0.5, device=DEVICE, requires_grad=True)
        options = {"clip_low": 0.0, "clip_high": 0.0, "loss_type": loss_type, "backend": backend}
        fastloss.policy_loss(x, None, advantages, None, **options).loss.backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, (-advantages / 6)[:, None].expand(2, 3))


@pytest.mark.parametrize("count", [1, 2])
def test_packed_sequences_of_symbolic_number(count: int) -> None:
    """An advantage for each sequence, whose number is symbolic in the trace: one sequence was taken for another number."""
    numbers = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 3, 7][: count + 1], dtype=torch.int64, device=DEVICE)
    logprobs = torch.randn(int(offsets[-1]), generator=numbers).to(DEVICE).requires_grad_()
    old, advantages = logprobs.detach() - 0.1, torch.randn(count, generator=numbers).to(DEVICE)

    def call(x: Tensor) -> Tensor:
        return fastloss.policy_loss(x, old, advantages, None, cu_seqlens=offsets, loss_type="gspo").loss

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(logprobs), call(logprobs))


@pytest.mark.parametrize("options", [
    {"loss_type": "ppo"}, {"loss_type": "gspo"}, {"loss_type": "gmpo"}, {"loss_type": "cispo"}, {"loss_type": "sapo"},
    {"loss_type": "ppo", "beta": 0.1, "entropy_coef": 0.1, "importance_mode": "token_truncate"},
    {"loss_type": "rloo"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", KERNELS)
def test_a_nan_that_counts_is_in_every_metric_of_the_definition(
    backend: str, options: dict[str, Any]
) -> None:
    need(backend)
    data = batch()
    names = [name for name in data if name != "mask"]
    if "beta" not in options:
        names = ["logprobs", "old_logprobs", "advantages"]
    for name in names:
        broken = data[name].clone()
        sequence = 1
        place = (sequence, int(data["mask"][sequence].nonzero()[-1])) if broken.dim() == 2 else (sequence,)
        broken[place] = math.nan
        given = {**data, name: broken}
        got, want = call(given, backend, **options), call(double(given), **options)
        numbers = [k for k in want if not k.startswith("d_")]
        wrong = [k for k in numbers if not torch.equal(got[k].isnan(), want[k].isnan())]
        assert not wrong, (name, wrong)
