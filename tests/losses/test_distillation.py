"""distillation_loss and linear_distillation_loss against formulas written out here, and their edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, dtypes, need
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


# Of logits up to 12: their distance to the largest is rounded to 2^-21, which is the relative error of a probability.
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
OPTIONS: list[dict[str, Any]] = [
    {"reduction": "none"},
    {"temperature": 2.0, "teacher_temperature": 1.5, "temperature_squared": True, "hard_loss_coef": 0.3, "interpolation": 0.1},
    {"hard_loss_coef": 0.5, "interpolation": 0.9},
]  # fmt: skip
CASES = [
    (backend, dtype, name, k)
    for backend in KERNELS
    for i, dtype in enumerate(dtypes(backend))
    for j, name in enumerate(DISTILLATION_DIVERGENCES)
    for k in range(len(OPTIONS))
    if backend == "cpu" or (i + j + k) % 3 == 0  # interpreted and emulated: in turn
]


@pytest.mark.parametrize(("backend", "dtype", "name", "option"), CASES)
def test_kernels(backend: str, dtype: torch.dtype, name: str, option: int) -> None:
    """Values, gradients and metrics against the definition in float64, over more than one vector, block and thread."""
    need(backend)
    g = torch.Generator().manual_seed(1)
    vocab = 2079 if backend == "cpu" else 37
    z, y = (3 * torch.randn(4, vocab, generator=g) for _ in range(2))
    z, y, target = (x.to(DEVICE) for x in (z.to(dtype), y.to(dtype), torch.tensor([0, -100, vocab - 1, 5])))

    def run(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        leaf = z.to(dtype).requires_grad_()
        out = fastloss.distillation_loss(
            leaf, y.to(dtype), target, divergence=name, backend=backend, **OPTIONS[option]
        )
        (grad,) = torch.autograd.grad((out.loss * 1.5).sum(), leaf)
        return out.loss.detach().double(), grad.double(), out.metrics

    loss, grad, metrics = run(dtype, backend)
    right, right_grad, right_metrics = run(torch.float64, "reference")
    value = min(EXACT[dtype], EXACT[torch.float32])
    assert (loss - right).abs().max() <= value * right.abs().max()
    assert (grad - right_grad).abs().max() <= EXACT[dtype] * right_grad.abs().max()
    for key, metric in metrics.items():
        torch.testing.assert_close(metric.double(), right_metrics[key], rtol=value, atol=value, msg=key)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", DISTILLATION_DIVERGENCES)
def test_extreme_rows(backend: str, name: str) -> None:
    """Logits hundreds apart, where probabilities are 0 in float32, and classes that one or both models rule out."""
    need(backend)
    z = torch.tensor(
        [[0.0, 300.0, -300.0, 5.0], [1.0, 2.0, -math.inf, -math.inf], [0.0, 1e-4, 2e-4, 0.0]], device=DEVICE
    )
    y = torch.tensor(
        [[300.0, 0.0, 5.0, -300.0], [2.0, 1.0, -math.inf, -math.inf], [1e-4, 0.0, 0.0, 2e-4]], device=DEVICE
    )

    def run(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = z.to(dtype).requires_grad_()
        loss = fastloss.distillation_loss(
            leaf, y.to(dtype), divergence=name, interpolation=0.3, reduction="none", backend=backend
        ).loss
        return loss.detach().double(), torch.autograd.grad(loss.sum(), leaf)[0].double()

    got, right = run(torch.float32, backend), run(torch.float64, "reference")
    # 1e-4 apart, a divergence is 1e-9 and below the rounding of one probability; its sign is not.
    torch.testing.assert_close(got[0], right[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[1], right[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_heads_on_every_backend(backend: str) -> None:
    need(backend)
    g = torch.Generator().manual_seed(2)
    x, w, b, teacher, tw = (
        torch.randn(*shape, generator=g).to(DEVICE) for shape in ((7, 6), (13, 6), (13,), (7, 4), (11, 4))
    )
    target = torch.tensor([0, 3, -100, 10, 2, 2, -100], device=DEVICE)

    def run(dtype: torch.dtype, backend: str, **options: Any) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        loss = fastloss.linear_distillation_loss(
            leaves[0], leaves[1], teacher.to(dtype), tw.to(dtype), target, linear_bias=leaves[2], divergence="jsd",
            hard_loss_coef=0.2, temperature=1.5, backend=backend, **options,
        ).loss  # fmt: skip
        grads = torch.autograd.grad(loss.sum(), leaves)
        return tuple(t.detach().double() for t in (loss, *grads))

    for options in ({"chunk_size": 3}, {"reduction": "none", "chunk_size": 2}):
        plain = {k: v for k, v in options.items() if k != "chunk_size"}
        torch.testing.assert_close(
            run(torch.float32, backend, **options),
            run(torch.float64, "reference", **plain),
            rtol=1e-5,
            atol=1e-6,
        )


# trl 1.16 GKDTrainer.generalized_jsd_loss(reduction="batchmean", temperature=1.5) in float64 of the inputs below.
TRL_GENERALIZED_JSD = {
    0.0: 0.8365140816303227,
    0.1: 0.06533656107801825,
    0.5: 0.14863552756785336,
    1.0: 0.5742145482039032,
}


@pytest.mark.parametrize("beta", TRL_GENERALIZED_JSD)
def test_trl_generalized_jsd(beta: float) -> None:
    z = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4).sin() * 3
    y = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4).cos() * 2
    labels = torch.tensor([[-100, 1, 2], [3, -100, 0]])
    loss = fastloss.distillation_loss(
        z, y, labels, divergence="jsd", interpolation=beta, temperature=1.5
    ).loss
    assert loss.item() == pytest.approx(TRL_GENERALIZED_JSD[beta], rel=1e-12)


@pytest.mark.parametrize("w", [0.2, 0.7])
@pytest.mark.parametrize("name", sorted(set(DISTILLATION_DIVERGENCES) - {"tvd"}))
def test_gradcheck(name: str, w: float) -> None:
    z, y, target = batch()

    def loss(z: torch.Tensor) -> torch.Tensor:
        return fastloss.distillation_loss(
            z, y, target, divergence=name, interpolation=w, hard_loss_coef=0.1, temperature=1.3
        ).loss

    assert torch.autograd.gradcheck(loss, z)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction: str) -> None:
    """Through the operators, in one graph; by the same kernels."""
    z, y, target = (t.float() if t.is_floating_point() else t for t in batch())
    z = z.detach().reshape(10, 11).requires_grad_()
    w = torch.randn(6, 11, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y, target = y.reshape(10, 11), target.reshape(10).clamp(max=5)

    def run(z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a = fastloss.distillation_loss(z, y, target, hard_loss_coef=0.1, temperature=2.0, reduction=reduction)
        b = fastloss.linear_distillation_loss(
            z, w, y, w.detach() * 2, target, divergence="jsd", reduction=reduction
        )
        return (a.loss + 2 * b.loss + a.metrics["kl"]).sum()

    need("cpu")
    want = run(z, w)
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(z, w)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (z, w)), torch.autograd.grad(want, (z, w)))


def test_mixed_dtypes() -> None:
    """A teacher in bfloat16 beside a student in float32 and the other way round: compared in the wider."""
    need("cpu")
    z, y, _ = batch(torch.float32)
    low = y.bfloat16()
    same = fastloss.distillation_loss(z, low.float()).loss
    torch.testing.assert_close(fastloss.distillation_loss(z, low).loss, same)
    w = torch.randn(5, 11, generator=torch.Generator().manual_seed(3))
    student = z.detach().bfloat16().requires_grad_()
    loss = fastloss.linear_distillation_loss(student, w.bfloat16(), y, w).loss
    (grad,) = torch.autograd.grad(loss, student)
    wide = student.detach().float().requires_grad_()
    right = fastloss.linear_distillation_loss(wide, w.bfloat16().float(), y, w).loss
    torch.testing.assert_close(loss, right, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(grad.float(), torch.autograd.grad(right, wide)[0], rtol=5e-2, atol=2e-3)


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
    teacher, tw = torch.randn(8, 3), torch.randn(12, 3)

    def plan(weight: torch.Tensor, **options: Any) -> dict[str, Any]:
        return fastloss.explain(
            fastloss.linear_distillation_loss, x, weight, teacher, tw, chunk_size=2, **options
        )

    need("cpu")
    assert plan(w)["gemms"] == 4 and plan(w.detach())["gemms"] == 3
    assert plan(w, reduction="none")["gemms"] == 6  # the backward makes both models' logits again
    assert plan(w)["chunk_rows"] == 2 and plan(w)["buffer_bytes"] == 2 * (10 + 10) * 4
    assert plan(w)["backend"] == "cpu" and plan(w)["schedule"] == "chunks of rows"


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
    with pytest.raises(ValueError, match="teacher_weight"):
        fastloss.linear_distillation_loss(z, torch.ones(4, 11, dtype=z.dtype), y, torch.ones(4, 11))
    with pytest.raises(ValueError, match="chunk_size"):
        fastloss.linear_distillation_loss(z, y[0], y, y[0], chunk_size=0)


def test_the_module_is_the_function() -> None:
    z, y, target = batch()
    module = fastloss.nn.DistillationLoss("jsd", interpolation=0.3)
    assert repr(module) == "DistillationLoss(divergence='jsd', interpolation=0.3)"
    expected = fastloss.distillation_loss(z, y, target, divergence="jsd", interpolation=0.3, temperature=2.0)
    torch.testing.assert_close(module(z, y, target, temperature=2.0), expected)


def test_no_tokens_cost_nothing() -> None:
    x, w = torch.ones(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    loss = fastloss.linear_distillation_loss(x, w, torch.ones(0, 3), torch.ones(5, 3)).loss
    assert loss.item() == 0 and not torch.autograd.grad(loss, w)[0].any()
    assert fastloss.distillation_loss(x, torch.ones(0, 4)).loss.item() == 0


@pytest.mark.skipif(DEVICE != "cpu", reason="chunks of the CPU")
def test_low_memory_is_a_twentieth_of_both_logits() -> None:
    x, w = torch.zeros(1024, 4, requires_grad=True), torch.zeros(300, 4, requires_grad=True)
    both = 2 * 1024 * 300 * 4

    def buffers(**options: Any) -> Any:
        return fastloss.explain(fastloss.linear_distillation_loss, x, w, x.detach(), w.detach(), **options)[
            "buffer_bytes"
        ]

    assert buffers(memory="low") <= 0.05 * both < buffers(memory="auto")
    assert buffers(memory="low", chunk_size=128) == 0.125 * both
