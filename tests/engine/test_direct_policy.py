"""policy_loss of padded log-probs on the CPU in one native call is what the long way gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import need
from torch import Tensor

import fastloss
from fastloss.engine.direct import DirectPolicy
from fastloss.losses.policy_options import VARIANTS

B, T = 5, 300
OPTIONS: list[dict[str, Any]] = [
    *({"loss_type": name} for name, v in VARIANTS.items() if not v.selects),
    {"loss_type": "gspo", "clip_low": None, "clip_high": None},
    {"loss_type": "gspo", "beta": 0.1, "kl_unbiased": True},
    {"loss_type": "gspo", "off_policy_threshold": 0.0},
    {"loss_type": "grpo", "dual_clip": 1.5, "delta": 1.4, "normalizer": 7},
    {"loss_type": "dapo", "entropy_coef": 0.1, "normalizer": torch.tensor(11.0)},
    {"loss_type": "dapo", "importance_mode": "token_mask", "importance_cap": 1.2, "importance_floor": 0.8},
    {"loss_type": "vespo", "importance_mode": "sequence_truncate", "importance_cap": 1.1},
]


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3
    mask = torch.arange(T) < torch.tensor([T, 256, 0, 77, 1])[:, None]
    mask[0, 40:60] = False
    out = {"logprobs": logprobs, "mask": mask, "advantages": torch.tensor([1.0, -0.5, 2.0, -1.5, 0.7])}
    for name, spread in (("old_logprobs", 0.3), ("ref_logprobs", 0.4), ("sampler_logprobs", 0.2)):
        out[name] = logprobs + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    out["old_logprobs"][1, 3] += 30  # beyond the clamp
    out["entropy"] = torch.rand(B, T, generator=g, dtype=torch.float64)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in out.items()}


def call(data: dict[str, Tensor], upstream: float = -1.7, **options: Any) -> dict[str, Tensor]:
    leaves = {k: data[k].clone().requires_grad_() for k in ("logprobs", "entropy")}
    rest = {k: v for k, v in data.items() if k not in leaves}
    if not any(k.startswith(("importance", "off")) for k in options):
        del rest["sampler_logprobs"]
    out = fastloss.policy_loss(leaves["logprobs"], entropy=leaves["entropy"], **rest, **options)
    (out.loss * upstream).backward()
    grads = {f"d_{k}": torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}
    return {"loss": out.loss.detach(), **grads, **out.metrics}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with each native call of the short way."""
    need("cpu")
    calls: list[None] = []
    run = DirectPolicy.run

    def counted(self: DirectPolicy, *arguments: Any) -> Any:
        calls.append(None)
        return run(self, *arguments)

    monkeypatch.setattr(DirectPolicy, "run", counted)
    return calls


@pytest.mark.parametrize("of_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_short_way_is_the_long_way(
    options: dict[str, Any], dtype: torch.dtype, of_token: bool, taken: list[None]
) -> None:
    data = batch(dtype)
    if of_token:
        data["advantages"] = data["advantages"][:, None] + torch.linspace(-1, 1, T, dtype=dtype)
    got = call(data, **options)
    assert len(taken) == 1
    long = call(data, weights=torch.ones(B), **options)
    assert len(taken) == 1
    exact = call(
        {k: v.double() if v.is_floating_point() else v for k, v in data.items()},
        backend="reference",
        **options,
    )
    assert list(got) == list(long) and len(taken) == 1
    eps = 2e-6 if dtype == torch.float32 else 1e-12
    for name, value in got.items():
        size = float(exact[name].abs().max())
        assert (value - long[name]).abs().max() <= eps * max(size, 1e-3), name
        assert (value - exact[name]).abs().max() <= 10 * eps * max(size, 1e-3), name
        assert value.dtype == dtype and not value.requires_grad


def test_backward_twice(taken: list[None]) -> None:
    """Bugs 1 and 2: the first backward gives its buffer away and may have scaled it."""
    data = batch()
    leaf = data["logprobs"].clone().requires_grad_()
    loss = fastloss.policy_loss(leaf, data["old_logprobs"], data["advantages"], data["mask"]).loss
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.allclose(3 * second, kept, rtol=1e-6)
    with torch.no_grad():
        leaf += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert len(taken) == 2  # a backward after the first runs the call again


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_any_mask(dtype: torch.dtype, taken: list[None]) -> None:
    data = batch()
    want, got = call(data), call({**data, "mask": 2 * data["mask"].to(dtype)})
    assert len(taken) == 2
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_without_a_gradient(taken: list[None]) -> None:
    data = batch()
    arguments = (data["old_logprobs"], data["advantages"], data["mask"])
    for logprobs in (data["logprobs"], data["logprobs"].requires_grad_()):
        with torch.no_grad():
            out = fastloss.policy_loss(logprobs, *arguments)
        assert not out.loss.requires_grad and out.loss.isfinite()
    out = fastloss.policy_loss(
        data["logprobs"].detach(), *arguments, entropy=data["entropy"].requires_grad_(), entropy_coef=0.1
    )
    out.loss.backward()
    assert data["entropy"].grad.abs().sum() > 0
    assert len(taken) == 3


@pytest.mark.parametrize(
    "change",
    [
        *({"loss_type": name} for name, v in VARIANTS.items() if v.selects),
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.1, "entropy_aggregation": "token-mean"},
        {"weights": torch.ones(B)},
        {"mask": None},
        {"backend": "reference"},
        {"advantages": torch.ones(B, 1)},
        {"old_logprobs": torch.zeros(T, B).t()},
        {"logprobs": torch.zeros(B, T, dtype=torch.bfloat16)},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_takes_the_long_way(change: dict[str, Any], taken: list[None]) -> None:
    data = {**batch(), **change}
    del data["sampler_logprobs"], data["ref_logprobs"]
    if "logprobs" in change:
        data["entropy"] = data["entropy"].bfloat16()
    assert fastloss.policy_loss(**data).loss.isfinite()
    assert not taken


def test_errors_are_the_long_ways(taken: list[None]) -> None:
    """Remembered options: 1.0 and True are the same key to a cache, but not to us."""
    data = batch()
    arguments = [data[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")]
    fastloss.policy_loss(*arguments, clip_low=1.0)
    for options, message in (
        ({"clip_low": True}, "clip_low: expected a number"),
        ({"beta": 0.1}, "ref_logprobs: expected a tensor"),
        ({"entropy_coef": 0.1}, "entropy: expected a tensor"),
        ({"loss_type": "gpg", "dual_clip": 3.0}, "dual_clip: expected None"),
        ({"importance_cap": 3.0}, "sampler_logprobs: expected a tensor"),
        ({"backend": "gpu"}, "backend: expected one of"),
        ({"normalizer": -1.0}, "normalizer: expected"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fastloss.policy_loss(*arguments, **options)
    assert len(taken) == 1
