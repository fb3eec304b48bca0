"""distillation_loss and linear_distillation_loss against formulas written out here, and their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

import fastloss
from fastloss.tables import DISTILLATION_DIVERGENCES


def by_hand(name: str, p: torch.Tensor, q: torch.Tensor, w: float) -> torch.Tensor:
    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    m = w * p + (1 - w) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: w * kl(p, m) + (1 - w) * kl(q, m),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "skewed_forward_kl": lambda: kl(p, m),
        "skewed_reverse_kl": lambda: kl(q, (1 - w) * p + w * q),
        "alpha": lambda: (1 - (p**w * q ** (1 - w)).sum(-1)) / (w * (1 - w)),
    }[name]()


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    z, y = (3 * torch.randn(2, 5, 11, generator=g, dtype=torch.float64) for _ in range(2))
    target = torch.randint(11, (2, 5), generator=g)
    target[0, :2] = -100
    return z.to(dtype).requires_grad_(), y.to(dtype), target


@pytest.mark.parametrize("w", [0.1, 0.7])
@pytest.mark.parametrize("name", DISTILLATION_DIVERGENCES)
def test_value_and_gradient(name: str, w: float) -> None:
    z, y, target = batch()
    weight = torch.linspace(0.5, 2, 10, dtype=torch.float64).reshape(2, 5)
    loss = fastloss.distillation_loss(
        z, y, target, divergence=name, interpolation=w, temperature=2.0, teacher_temperature=1.5,
        temperature_squared=True, token_weight=weight, hard_loss_coef=0.3,
    ).loss  # fmt: skip
    rows = 4 * by_hand(name, (y / 1.5).softmax(-1), (z / 2).softmax(-1), w)
    rows = rows + 0.3 * cross_entropy(z.transpose(1, 2), target, reduction="none")
    expected = (rows * weight)[target != -100].sum() / 8
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize("w", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", DISTILLATION_DIVERGENCES)
def test_a_teacher_equal_to_the_student_costs_nothing(name: str, w: float) -> None:
    z = batch(torch.float32)[0]
    loss = fastloss.distillation_loss(z, z.detach(), divergence=name, interpolation=w).loss
    assert loss.item() == 0
    assert torch.autograd.grad(loss, z)[0].abs().max() <= 2e-8


def test_the_ends_of_the_interpolation_are_kls() -> None:
    z, y, _ = batch()

    def loss(name: str, w: float) -> torch.Tensor:
        return fastloss.distillation_loss(z, y, divergence=name, interpolation=w).loss

    forward, reverse = loss("forward_kl", 0.5), loss("reverse_kl", 0.5)
    for name, w, end in [("jsd", 0, forward), ("jsd", 1, reverse), ("alpha", 1, forward), ("alpha", 0, reverse),
                         ("skewed_forward_kl", 0, forward), ("skewed_reverse_kl", 0, reverse)]:  # fmt: skip
        assert loss(name, w) == end, (name, w)


@pytest.mark.parametrize("name", sorted(set(DISTILLATION_DIVERGENCES) - {"reverse_kl"}))
def test_a_class_the_teacher_rules_out(name: str) -> None:
    z, y, _ = batch()
    ruled_out, nearly = y.clone(), y.clone()
    ruled_out[..., 3], nearly[..., 3] = -math.inf, -600.0
    a, b = (
        fastloss.distillation_loss(z, t, divergence=name, interpolation=0.4).loss for t in (ruled_out, nearly)
    )
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a, z), torch.autograd.grad(b, z))
    both = torch.cat([z[..., :3], z[..., 4:]], -1), torch.cat([y[..., :3], y[..., 4:]], -1)
    masked = z.masked_fill(torch.arange(11) == 3, -math.inf)
    torch.testing.assert_close(
        fastloss.distillation_loss(masked, ruled_out, divergence=name).loss,
        fastloss.distillation_loss(*both, divergence=name).loss,
    )


def test_reverse_kl_is_infinite_where_the_teacher_rules_out_a_class() -> None:
    z, y, _ = batch()
    y[..., 3] = -math.inf
    assert fastloss.distillation_loss(z, y, divergence="reverse_kl").loss.item() == math.inf


def test_ignored_rows_may_hold_anything_and_none_left_is_zero() -> None:
    z, y, target = batch()
    y[0, 0] = math.nan
    loss = fastloss.distillation_loss(z, y, target).loss
    assert loss.isfinite() and not torch.autograd.grad(loss, z)[0][0, :2].any()
    out = fastloss.distillation_loss(z, y, torch.full_like(target, -100), hard_loss_coef=1.0)
    assert out.loss.item() == 0 and not torch.autograd.grad(out.loss, z)[0].any()
    assert all(value.item() == 0 for value in out.metrics.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_from_hidden_states(reduction: str) -> None:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, w, b = (t.requires_grad_() for t in (draw(2, 5, 6), draw(13, 6), draw(13)))
    teacher, tw, tb = draw(2, 5, 4), draw(11, 4), draw(11)
    target = batch()[2]
    options = {"divergence": "jsd", "temperature": 1.5, "hard_loss_coef": 0.2, "reduction": reduction}
    plain = fastloss.distillation_loss(linear(x, w, b), linear(teacher, tw, tb), target, **options)
    for chunk in (3, None):
        fused = fastloss.linear_distillation_loss(
            x, w, teacher, tw, target, linear_bias=b, teacher_bias=tb, chunk_size=chunk, **options
        )
        torch.testing.assert_close(fused, plain)
        upstream = torch.arange(1.0, 1 + plain.loss.numel(), dtype=torch.float64).view(plain.loss.shape)
        torch.testing.assert_close(
            torch.autograd.grad(fused.loss, (x, w, b), upstream),
            torch.autograd.grad(plain.loss, (x, w, b), upstream, retain_graph=True),
        )


def test_explain_counts_gemms_and_memory() -> None:
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    teacher, tw = torch.randn(8, 3), torch.randn(10, 3)

    def plan(weight: torch.Tensor) -> dict:
        return fastloss.explain(fastloss.linear_distillation_loss, x, weight, teacher, tw, chunk_size=2)

    assert plan(w)["gemms"] == 4 and plan(w.detach())["gemms"] == 3
    assert plan(w)["chunk_rows"] == 2 and plan(w)["buffer_bytes"] == 2 * (10 + 10) * 4


@pytest.mark.parametrize("bad", [{"divergence": "kl"}, {"interpolation": 1.5}, {"temperature": 0.0}, {"reduction": "x"},
                                 {"hard_loss_coef": 1.0}, {"token_weight": torch.ones(3)}])  # fmt: skip
def test_bad_input_is_named(bad: dict) -> None:
    z, y, _ = batch()
    with pytest.raises(ValueError, match=next(iter(bad))):
        fastloss.distillation_loss(z, y, **bad)


def test_bad_tensors_are_named() -> None:
    z, y, target = batch()
    with pytest.raises(ValueError, match="teacher_logits"):
        fastloss.distillation_loss(z, y[:1])
    with pytest.raises(IndexError):
        fastloss.distillation_loss(z, y, target.masked_fill(target == -100, 11))
    with pytest.raises(RuntimeError, match="no kernel"):
        fastloss.distillation_loss(z, y, backend="cpu")
    with pytest.raises(TypeError, match="teacher_weight"):
        fastloss.linear_distillation_loss(z, torch.ones(4, 11, dtype=z.dtype), y, torch.ones(4, 11))


def test_no_tokens_cost_nothing() -> None:
    x, w = torch.ones(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    loss = fastloss.linear_distillation_loss(x, w, torch.ones(0, 3), torch.ones(5, 3)).loss
    assert loss.item() == 0 and not torch.autograd.grad(loss, w)[0].any()
    assert fastloss.distillation_loss(x, torch.ones(0, 4)).loss.item() == 0
