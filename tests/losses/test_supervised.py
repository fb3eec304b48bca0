"""Supervised losses against formulas written out here and trainers' own expressions, on every backend, and their edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from backends_under_test import DEVICE, KERNELS, need
from torch import Tensor

import fastloss
from fastloss.tables import SUPERVISED_LOSSES

ROWS, DIM, VOCAB = 10, 6, 37


def batch(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias; targets, which are to become unlikely, a weight per token."""
    g = torch.Generator().manual_seed(0)
    shapes = ((ROWS, DIM), (VOCAB, DIM), (VOCAB,))
    leaves = [torch.randn(s, generator=g).to(DEVICE, dtype).requires_grad_() for s in shapes]
    target = torch.randint(VOCAB, (ROWS,), generator=g)
    target[4] = -100
    unlikely, weight = torch.rand(ROWS, generator=g) < 0.3, torch.rand(ROWS, generator=g)
    return leaves, target.to(DEVICE), unlikely.to(DEVICE), weight.to(DEVICE)


def by_hand(name: str, z: Tensor, target: Tensor) -> Tensor:
    """As the papers write them, with their default numbers and those below."""
    log_p = z.log_softmax(-1)
    own = log_p.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1)
    p, all_p = own.exp(), log_p.exp()
    entropy = -(all_p * log_p).sum(-1).detach()
    q = all_p.square().sum(-1).detach()
    made: dict[str, Tensor] = {
        "nll": -own,
        "dft": -p.detach() * own,
        "eaft": -((entropy / 2.5) ** 1.5) * own,
        "focal": -((1 - p) ** 1.7) * own,
        "power": (1 - p**0.4) / 0.4,
        "deft": (1 - p**q) / q,
        "soft_trim": own * -torch.sigmoid((3.0 + own.detach()) / 0.5),
        "unlikelihood": -(1 - p).log(),
    }
    return made[name] * (target != -100)


NUMBERS: dict[str, Any] = {
    "eaft_alpha": 1.5, "eaft_scale": 2.5, "focal_gamma": 1.7, "power": 0.4, "trim_threshold": 3.0, "trim_width": 0.5
}  # fmt: skip


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_by_hand(name: str) -> None:
    (x, w, b), target, unlikely, weight = batch()
    z = torch.tanh((x @ w.t() + b) / 4) * 4 / 1.5
    expected = torch.where(
        unlikely & (target != -100), by_hand("unlikelihood", z, target), by_hand(name, z, target)
    )
    expected = (expected * weight).sum() / 9
    out = fastloss.linear_supervised_loss(
        x, w, target, linear_bias=b, loss_type=name, unlikely=unlikely, token_weight=weight, softcap=4.0,
        temperature=1.5, **NUMBERS,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, (x, w, b)), torch.autograd.grad(expected, (x, w, b))
    )
    torch.testing.assert_close(out.metrics["nll"], by_hand("nll", z.detach(), target).sum() / 9)
    assert ("entropy" in out.metrics) == (name == "eaft")


# The row kernels know no loss by its name: interpreted and emulated, those that read each of the statistics.
CASES = [("cpu", name) for name in SUPERVISED_LOSSES] if DEVICE == "cpu" else []
CASES += [
    (backend, name)
    for backend in KERNELS
    if backend != "cpu"
    for name in ("focal", "eaft", "deft")[:: 1 if DEVICE == "cuda" else 2]
]


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_on_every_backend(backend: str, name: str) -> None:
    need(backend)

    def run(dtype: torch.dtype, backend: str, **options: Any) -> list[Tensor]:
        (x, w, b), target, unlikely, weight = batch(dtype)
        made: list[Tensor] = []
        for reduction in ("mean", "none") if backend in ("cpu", "reference") else ("mean",):
            given: dict[str, Any] = dict(
                loss_type=name, unlikely=unlikely, token_weight=weight, reduction=reduction, backend=backend, **NUMBERS
            )  # fmt: skip
            out = fastloss.linear_supervised_loss(
                x, w, target, linear_bias=b, softcap=3.0, **given, **options
            )
            z = (x.detach() @ w.detach().t()).requires_grad_()
            own = fastloss.supervised_loss(z, target, **given)
            made += [out.loss, *torch.autograd.grad(out.loss.square().sum(), (x, w, b))]
            made += [own.loss, *torch.autograd.grad(own.loss.square().sum(), z)]
            made += [*out.metrics.values(), *own.metrics.values()]
        return made

    got, right = run(torch.float32, backend, chunk_size=7), run(torch.float64, "reference")
    for a, b in zip(got, right, strict=backend == "cpu"):
        assert (a.double() - b).abs().max() <= 2e-5 * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """A mean over many tokens keeps its gradient in float16, whose smallest number is 6e-8."""
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(s, generator=g).to(DEVICE, dtype).requires_grad_() for s in ((400, 8), (50, 8)))
    target = torch.randint(50, (400,), generator=g).to(DEVICE)

    def gradients(x: Tensor, w: Tensor, **options: Any) -> tuple[Tensor, ...]:
        loss = fastloss.linear_supervised_loss(x, w, target, loss_type="dft", **options).loss
        return torch.autograd.grad(loss * 1e-2, (x, w))

    got = gradients(x, w)
    right = gradients(*(t.detach().double().requires_grad_() for t in (x, w)), backend="reference")
    for a, b in zip(got, right, strict=True):
        assert (a.double() - b).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 5e-3) * b.abs().max()


@pytest.mark.parametrize("name", ["dft", "focal", "deft", "unlikelihood"])
def test_blocks_of_the_vocabulary(name: str) -> None:
    """The CPU's other schedule, and the frozen head's 2 GEMMs."""
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(s, generator=g).to(DEVICE).requires_grad_() for s in ((70, 32), (3000, 32)))
    target = torch.randint(3000, (70,), generator=g).to(DEVICE)

    def run(x: Tensor, w: Tensor, **options: Any) -> list[Tensor]:
        loss = fastloss.linear_supervised_loss(x, w, target, loss_type=name, **options).loss
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    right = run(*(t.detach().double().requires_grad_() for t in (x, w)), backend="reference")
    frozen = fastloss.linear_supervised_loss(x, w.detach(), target, loss_type=name).loss
    got = [*run(x, w, memory="low"), *torch.autograd.grad(frozen, x)]
    for a, b in zip(got, [*right, right[1]], strict=True):
        assert (a.double() - b).abs().max() <= 2e-5 * b.abs().max()


def test_what_it_costs() -> None:
    (x, w, _), target, _, _ = batch(torch.float32)

    def gemms(x: Tensor, w: Tensor, **options: Any) -> float:
        plan = fastloss.explain(
            fastloss.linear_supervised_loss, x, w, target, loss_type="eaft", chunk_size=4, **options
        )
        return float(plan["gemms"])

    assert gemms(x, w, backend="triton") == 3
    assert gemms(x, w.detach(), backend="triton") == 2
    assert gemms(x, w, backend="triton", reduction="none") == 4
    assert gemms(x.detach(), w.detach()) == 1


def test_llama_factory_eaft() -> None:
    """Its expression: entropy of the 20 likeliest over 3, to the power alpha. With 20 classes the two entropies are one."""
    z = torch.randn(7, 20, generator=torch.Generator().manual_seed(0)).double().to(DEVICE).requires_grad_()
    target = torch.tensor([1, 4, -100, 0, 19, 3, 3], device=DEVICE)
    losses = F.cross_entropy(z, target, reduction="none")[target != -100]
    top = z[target != -100].detach().topk(20, dim=-1).values
    log_probs = top - top.logsumexp(-1, keepdim=True)
    weight = (-(log_probs.exp() * log_probs).sum(-1) / 3.0) ** 2.0
    expected = (losses * weight).mean()
    loss = fastloss.supervised_loss(z, target, loss_type="eaft", eaft_alpha=2.0).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))


def test_fairseq_unlikelihood() -> None:
    """Welleck et al.'s token-level loss: the tokens that came before are candidates, from their log-probabilities."""
    (x, w, _), target, _, _ = batch()
    before = target.roll(1)[:, None].repeat(1, 2)
    before[:, 1] = target.roll(2)
    candidates = torch.where((before == target[:, None]) | (before < 0), -1, before)
    z = x @ w.t()
    one_minus = (1.0 - z.softmax(-1).gather(-1, candidates.clamp(min=0))).clamp(min=1e-5)
    expected = (-one_minus.log() * (candidates >= 0)).sum()
    log_p = fastloss.linear_selected_logprobs(x, w, candidates)
    loss = torch.where(candidates >= 0, -torch.log1p(-log_p.exp()), 0.0).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_means(aggregation: str) -> None:
    """Padded, packed, and with a sequence that has no token."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, VOCAB, generator=g).double().to(DEVICE)
    target = torch.randint(VOCAB, (3, 4), generator=g).to(DEVICE)
    target[0, 2:], target[2] = -100, -100
    nll = F.cross_entropy(x.flatten(0, 1), target.flatten(), reduction="none").view(3, 4)
    count = (target != -100).sum(1).clamp(min=1)
    expected = {
        "token-mean": nll.sum() / 6,
        "seq-mean-token-mean": (nll.sum(1) / count).mean(),
        "seq-mean-token-sum": nll.sum(1).mean(),
    }[aggregation]
    torch.testing.assert_close(fastloss.supervised_loss(x, target, aggregation=aggregation).loss, expected)
    offsets = torch.tensor([0, 4, 8, 12], device=DEVICE)
    packed = fastloss.supervised_loss(
        x.flatten(0, 1), target.flatten(), aggregation=aggregation, cu_seqlens=offsets
    )
    torch.testing.assert_close(packed.loss, expected)
    own = fastloss.supervised_loss(x, target, aggregation=aggregation, normalizer=5.0).loss
    torch.testing.assert_close(own, expected * (6 if aggregation == "token-mean" else 3) / 5)


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_gradcheck(name: str) -> None:
    """Weights that are constants in the gradient (sg) are no part of what finite differences see."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g).double().to(DEVICE).requires_grad_() for s in ((3, 3), (5, 3)))
    target = torch.tensor([2, -100, 4], device=DEVICE)

    def loss(x: Tensor, w: Tensor, backend: str = "auto") -> Tensor:
        return fastloss.linear_supervised_loss(x, w, target, loss_type=name, backend=backend).loss

    if name in ("nll", "focal", "power", "unlikelihood"):
        assert torch.autograd.gradcheck(loss, (x, w))
        assert torch.autograd.gradgradcheck(loss, (x, w))
    else:
        first = torch.autograd.grad(loss(x, w), (x, w), create_graph=True)
        right = torch.autograd.grad(loss(x, w, "reference"), (x, w), create_graph=True)
        torch.testing.assert_close(first, right)
        again = torch.autograd.grad(sum(v.square().sum() for v in first), (x, w))
        torch.testing.assert_close(again, torch.autograd.grad(sum(v.square().sum() for v in right), (x, w)))


def test_compiled() -> None:
    """One graph, and numbers that change compile once more at the most."""
    (x, w, _), target, unlikely, weight = batch(torch.float32)

    def run(x: Tensor, w: Tensor, power: float, threshold: float) -> Tensor:
        a = fastloss.linear_supervised_loss(
            x, w, target, loss_type="power", power=power, unlikely=unlikely, token_weight=weight
        )
        b = fastloss.linear_supervised_loss(
            x, w, target, loss_type="eaft", eaft_alpha=power, reduction="none"
        )
        c = fastloss.supervised_loss(x @ w.t(), target, loss_type="soft_trim", trim_threshold=threshold)
        means: dict[str, Any] = {"aggregation": "seq-mean-token-mean", "cu_seqlens": torch.tensor([0, 4, 10])}
        d = fastloss.linear_supervised_loss(x, w, target, **means)
        return a.loss + d.loss + b.loss.square().sum() + c.loss + b.metrics["entropy"] + c.metrics["nll"]

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for k in range(3):
        numbers = 0.3 + 0.1 * k, 2.0 + k
        right, got = run(x, w, *numbers), compiled(x, w, *numbers)
        torch.testing.assert_close(got, right)
        torch.testing.assert_close(torch.autograd.grad(got, (x, w)), torch.autograd.grad(right, (x, w)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ends(backend: str) -> None:
    """A token that is impossible, and one that is certain."""
    z = torch.tensor([[0.0, -math.inf, 1.0], [200.0, 0.0, 0.0]], device=DEVICE).requires_grad_()
    target = torch.tensor([1, 0], device=DEVICE)
    values = {"nll": math.inf, "dft": 0.0, "focal": math.inf, "soft_trim": 0.0, "unlikelihood": 0.0}
    for name, impossible in values.items():
        out = fastloss.supervised_loss(z, target, loss_type=name, reduction="none", backend=backend).loss
        assert out[0] == impossible
        (grad,) = torch.autograd.grad(out[1], z, retain_graph=True)
        assert grad.isfinite().all() and grad[1].abs().max() <= 1e-6
        if name != "nll":  # whose gradient is infinite in PyTorch too
            (grad,) = torch.autograd.grad(out[0], z)
            assert grad[0, [0, 2]].isfinite().all()
        certain = -math.log(1e-7) if name == "unlikelihood" else 0.0
        assert out[1].item() == pytest.approx(certain, abs=1e-6)


def test_nothing_counts() -> None:
    (x, w, _), target, unlikely, _ = batch(torch.float32)
    bad = torch.full((ROWS,), math.nan, device=DEVICE)
    for name in SUPERVISED_LOSSES:
        for n, ignored in ((0, target[:0]), (ROWS, torch.full_like(target, -100))):
            out = fastloss.linear_supervised_loss(
                x[:n], w, ignored, loss_type=name, unlikely=unlikely[:n], token_weight=bad[:n]
            )
            assert out.loss == 0 and out.metrics["nll"] == 0
            assert all(not g.any() for g in torch.autograd.grad(out.loss, (x, w)))
        z = torch.full((ROWS, VOCAB), math.nan, device=DEVICE).requires_grad_()
        loss = fastloss.supervised_loss(z, torch.full_like(target, -100), loss_type=name).loss
        assert loss == 0 and not torch.autograd.grad(loss, z)[0].any()


def test_errors() -> None:
    (x, w, _), target, unlikely, weight = batch(torch.float32)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "loss_type: expected one of 'nll', 'dft'", {"loss_type": "dpo"}),
        (ValueError, "focal_gamma: expected a finite number", {"focal_gamma": -1.0}),
        (ValueError, "power: expected a finite number", {"power": 0.0}),
        (TypeError, "eaft_scale: expected a number", {"eaft_scale": "3"}),
        (ValueError, "trim_width: expected a finite number", {"trim_width": 0.0}),
        (ValueError, "unlikely: expected shape", {"unlikely": unlikely[1:]}),
        (ValueError, "token_weight: expected shape", {"token_weight": weight[1:]}),
        (ValueError, "aggregation: expected one of", {"aggregation": "mean"}),
        (ValueError, "target: expected shape", {"aggregation": "seq-mean-token-mean"}),
        (ValueError, "aggregation: expected 'token-mean'", {"aggregation": "seq-mean-token-sum", "reduction": "sum"}),
        (ValueError, "normalizer: expected reduction", {"reduction": "none", "normalizer": 2.0}),
    ]  # fmt: skip
    for error, message, options in wrong:
        with pytest.raises(error, match=message):
            fastloss.linear_supervised_loss(x, w, target, **options)
        with pytest.raises(error, match=message):
            fastloss.supervised_loss(x @ w.t(), target, **options)
    with pytest.raises(ValueError, match="target: expected int64"):
        fastloss.linear_supervised_loss(x, w, target[1:])
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            fastloss.linear_supervised_loss(x, w, target.clone().fill_(VOCAB))
