"""Ties, ranked lists, DPO on lists and regression with several heads against formulas written out here, and their edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import DEVICE
from torch import Tensor

import fastloss
from fastloss.losses.reward_lists import LIST_LOSSES

B, K = 4, 5


def lists(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[B, K]``, labels with ties, which answers are there."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(B, K, generator=g).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(0, 4, (B, K), generator=g)
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[1, 3:], mask[2, 0] = False, False
    return scores, labels.to(DEVICE), mask.to(DEVICE)


def close(got: Tensor, right: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(got, right)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves), torch.autograd.grad(right, leaves, retain_graph=True)
    )


@pytest.mark.parametrize("model", ["rao_kupper", "davidson"])
def test_ties(model: str) -> None:
    """The three probabilities as the models' authors write them, from strengths e^r."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(7, generator=g).double().to(DEVICE).requires_grad_() for _ in range(2))
    outcome = torch.tensor([1, -1, 0, 0, 1, -1, 0], device=DEVICE)
    x, y, strength = a.exp(), b.exp(), 0.7
    if model == "rao_kupper":
        theta = math.exp(strength)
        won, lost = x / (x + theta * y), y / (y + theta * x)
        tied = (theta**2 - 1) * x * y / ((x + theta * y) * (y + theta * x))
    else:
        total = x + y + strength * (x * y).sqrt()
        won, lost, tied = x / total, y / total, strength * (x * y).sqrt() / total
    torch.testing.assert_close(won + lost + tied, torch.ones_like(won))
    p = torch.where(outcome > 0, won, torch.where(outcome < 0, lost, tied))
    out = fastloss.tied_reward_loss(a[:, None], b[:, None], outcome, model=model, tie_strength=strength)
    torch.testing.assert_close(out.metrics["tie_probability"], tied.mean())
    assert out.metrics["ties"] == pytest.approx(3 / 7)
    right = ((a > b) == (outcome > 0))[outcome != 0].double().mean()
    torch.testing.assert_close(out.metrics["accuracy"], right)
    close(out.loss, -p.log().mean(), a, b)


def test_no_ties_is_bradley_terry() -> None:
    a, b = torch.tensor([1.0, 0.3, 1e4], device=DEVICE), torch.tensor([0.0, 2.0, -1e4], device=DEVICE)
    ours = fastloss.tied_reward_loss(a, b, torch.ones(3, device=DEVICE), tie_strength=1e-6, reduction="none")
    right = fastloss.reward_model_loss(a, b, reduction="none")
    torch.testing.assert_close(ours.loss, right.loss, rtol=1e-5, atol=1e-6)


def by_loop(name: str, s: list[Tensor], psi: list[float], top: int | None) -> Tensor:
    """One list, as its paper has it."""
    n = range(len(s))
    zero = s[0] * 0
    if name == "plackett_luce":
        order = sorted(n, key=lambda i: -psi[i])
        parts = [torch.stack([s[j] for j in order[k:]]).logsumexp(0) - s[order[k]] for k in n]
        return sum(parts[:top], zero)
    if name == "softmax":
        log_p = torch.stack(s).log_softmax(0)
        return -sum((psi[i] / sum(psi) * log_p[i] for i in n), zero)
    place = {i: 1 + k for k, i in enumerate(sorted(n, key=lambda i: -s[i].item()))}
    total = zero
    for i, j in itertools.permutations(n, 2):
        if psi[i] > psi[j]:
            pair = (1 - s[i] + s[j]).clamp(min=0) if name == "pair_hinge" else F.softplus(s[j] - s[i])
            if name == "lambda":
                gain = 2.0 ** psi[i] - 2.0 ** psi[j]
                pair = pair * gain * abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j]))
            total = total + pair
    return total


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_lists(name: str) -> None:
    scores, labels, mask = lists()
    weights = torch.linspace(0.5, 2.0, B, dtype=torch.float64, device=DEVICE)
    each = []
    for row in range(B):
        here = [i for i in range(K) if mask[row, i]]
        s, psi = [scores[row, i] for i in here], [float(labels[row, i]) for i in here]
        each.append(by_loop(name, s, psi, None))
    expected = torch.stack(each) * weights
    wild = torch.where(mask, scores, math.nan)  # what is not there may hold anything
    out = fastloss.listwise_reward_loss(
        wild, labels, mask=mask, loss_type=name, weights=weights, reduction="none"
    )
    close((out.loss * 3).sum(), (expected * 3).sum(), scores)
    out = fastloss.listwise_reward_loss(scores, labels, mask=mask, loss_type=name, weights=weights)
    torch.testing.assert_close(out.loss, expected.mean())
    pairs = [
        (scores[r, i] > scores[r, j]).item()
        for r in range(B)
        for i, j in itertools.permutations(range(K), 2)
        if mask[r, i] and mask[r, j] and labels[r, i] > labels[r, j]
    ]
    assert out.metrics["accuracy"].item() == pytest.approx(sum(pairs) / len(pairs))


def test_pairs_and_s_dpo() -> None:
    """K = 2 is DPO; one good answer among bad ones is S-DPO's -log σ(-log Σ e^(r_bad - r_good))."""
    g = torch.Generator().manual_seed(1)
    logps = (4 * torch.randn(3, 4, generator=g, dtype=torch.float64) - 20).to(DEVICE).requires_grad_()
    ref = 4 * torch.randn(3, 4, generator=g, dtype=torch.float64).to(DEVICE) - 20
    good = torch.tensor([[1, 0, 0, 0]] * 3, device=DEVICE)
    r = 0.3 * (logps - ref)
    expected = -F.logsigmoid(-(r[:, 1:] - r[:, :1]).logsumexp(-1)).mean()
    out = fastloss.listwise_preference_loss(logps, good, ref, beta=0.3, top=1)
    close(out.loss, expected, logps)
    torch.testing.assert_close(out.rewards, r.detach())
    softmax = fastloss.listwise_preference_loss(logps, good, ref, beta=0.3, loss_type="softmax").loss
    torch.testing.assert_close(softmax, expected)
    for name, pair in (("plackett_luce", "sigmoid"), ("pair_logistic", "sigmoid"), ("pair_hinge", "hinge")):
        two = fastloss.listwise_preference_loss(
            logps[:, :2], good[:, :2], ref[:, :2], beta=0.3, loss_type=name
        )
        right = fastloss.preference_loss(
            logps[:, 0], logps[:, 1], ref[:, 0], ref[:, 1], beta=0.3, loss_type=pair
        )
        close(two.loss, right.loss, logps)
        assert two.metrics["accuracy"] == right.metrics["rewards/accuracies"]


@pytest.mark.parametrize("name", ["mse", "huber", "bce"])
def test_regression(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 3, generator=g).double().to(DEVICE).requires_grad_()
    labels = torch.rand(6, 3, generator=g).double().to(DEVICE)
    mask = torch.rand(6, 3, generator=g).to(DEVICE) > 0.3
    labels[0, 0], mask[0, 0] = math.nan, True
    kept = mask & ~labels.isnan()
    heads = torch.tensor([1.0, 0.5, 2.0], device=DEVICE).double()
    answers = torch.rand(6, generator=g).double().to(DEVICE)
    functions: dict[str, Callable[..., Tensor]] = {
        "mse": F.mse_loss,
        "huber": lambda r, y, **o: F.huber_loss(r, y, delta=0.4, **o),
        "bce": F.binary_cross_entropy_with_logits,
    }
    each = functions[name](rewards[kept], labels[kept], reduction="none")
    factor = (heads[None] * answers[:, None])[kept]
    out = fastloss.reward_regression_loss(
        rewards, labels, mask=mask, loss_type=name, huber_delta=0.4, head_weights=heads, weights=answers
    )
    close(out.loss, (each * factor).sum() / kept.sum(), rewards)
    shown = rewards.sigmoid() if name == "bce" else rewards
    torch.testing.assert_close(out.metrics["mae"], (shown - labels)[kept].abs().mean().detach())
    alone = fastloss.reward_regression_loss(rewards[:, 0], labels[:, 0], loss_type=name, reduction="sum")
    same = fastloss.reward_regression_loss(rewards[:, :1], labels[:, :1], loss_type=name, reduction="none")
    torch.testing.assert_close(alone.loss, same.loss.sum())


def test_huber_is_pytorchs_at_its_corners() -> None:
    """The bound itself, 0, what is infinite and what is NaN, which a label of NaN leaves out but a reward does not."""
    values = [1.0, -1.0, 0.0, 3.0, math.inf, -math.inf, math.nan]
    ours, theirs = (torch.tensor(values, device=DEVICE).requires_grad_() for _ in range(2))
    labels = torch.zeros(len(values), device=DEVICE)
    loss = fastloss.reward_regression_loss(ours, labels, loss_type="huber", reduction="none").loss
    want = F.huber_loss(theirs, labels, reduction="none")
    torch.testing.assert_close(loss, want, rtol=0, atol=0, equal_nan=True)
    loss.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, equal_nan=True)


def soft(p: Tensor) -> Tensor:
    return torch.stack([1 - p, p], -1)


def test_process_rewards_with_soft_labels() -> None:
    """The share of continuations that end well (Math-Shepherd's soft estimation) as the probability of class 1."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 2, generator=g).double().to(DEVICE).requires_grad_()
    p = torch.rand(2, 5, generator=g).double().to(DEVICE)
    p[0, :2], p[1, 4] = -100, -100
    kept = p != -100
    each = F.cross_entropy(logits[kept], soft(p[kept]), reduction="none")
    out = fastloss.process_reward_loss(logits, p)
    close(out.loss, each.mean(), logits)
    right = ((logits[kept][:, 1] > logits[kept][:, 0]) == (p[kept] > 0.5)).double().mean()
    assert out.metrics["accuracy"].item() == pytest.approx(right.item())
    wild = torch.where(kept[..., None], logits, math.nan)
    per_token = fastloss.process_reward_loss(wild, p, reduction="none").loss
    torch.testing.assert_close(per_token[kept], each)
    assert not per_token[~kept].any()
    close(fastloss.process_reward_loss(wild, p, reduction="sum").loss, each.sum(), logits)
    hard = fastloss.process_reward_loss(logits, (p > 0.5).double().masked_fill(~kept, -100))
    classes = fastloss.process_reward_loss(logits, (p > 0.5).long().masked_fill(~kept, -100))
    torch.testing.assert_close(hard.loss, classes.loss)
    with pytest.raises(ValueError, match=r"labels: expected int64, or probabilities of 2 classes"):
        fastloss.process_reward_loss(torch.zeros(4, 3), torch.zeros(4))


def test_generative_verifier() -> None:
    """The page's example: the answer's token among all, and between Yes and No alone, with a soft verdict."""
    g = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(*s, generator=g).double().to(DEVICE).requires_grad_() for s in ((6, 8), (30, 8))
    )
    yes, no = 7, 3
    verdict = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.9], dtype=torch.float64, device=DEVICE)
    ids = torch.tensor([no, yes], device=DEVICE).expand(6, 2)
    log_p = fastloss.linear_selected_logprobs(hidden, head, ids)
    out = fastloss.process_reward_loss(log_p, verdict)
    z = (hidden @ head.t())[:, [no, yes]]
    close(out.loss, F.cross_entropy(z, soft(verdict)), hidden, head)


def test_gradients() -> None:
    scores, labels, mask = lists()
    outcome = torch.tensor([1, 0, -1, 0], device=DEVICE)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: fastloss.listwise_reward_loss(x, labels, mask=mask).loss,
        lambda x: fastloss.listwise_reward_loss(x, labels, mask=mask, loss_type="softmax").loss,
        lambda x: fastloss.tied_reward_loss(x[:, 0], x[:, 1], outcome).loss,
        lambda x: fastloss.tied_reward_loss(x[:, 0], x[:, 1], outcome, model="davidson").loss,
        lambda x: fastloss.reward_regression_loss(x, labels, mask=mask, loss_type="bce").loss,
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, scores)
        assert torch.autograd.gradgradcheck(function, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    scores, labels, mask = lists(dtype)
    right = scores.detach().double().requires_grad_()
    for name in LIST_LOSSES:
        a, b = (fastloss.listwise_reward_loss(x, labels, mask=mask, loss_type=name) for x in (scores, right))
        assert a.loss.dtype == torch.float32
        torch.testing.assert_close(a.loss.double(), b.loss, rtol=1e-5, atol=1e-6)
        (ga,), (gb,) = torch.autograd.grad(a.loss, scores), torch.autograd.grad(b.loss, right)
        assert (ga.double() - gb).abs().max() <= 4 * max(torch.finfo(dtype).eps, 1e-6) * gb.abs().max()


def test_compiled() -> None:
    scores, labels, mask = lists(torch.float32)

    def run(x: Tensor, beta: float) -> Tensor:
        out = fastloss.listwise_preference_loss(x, labels, x.detach() * 0.5, beta=beta, mask=mask)
        tied = fastloss.tied_reward_loss(x[:, 0], x[:, 1], labels[:, 0] - 1, tie_strength=beta)
        mse = fastloss.reward_regression_loss(x, labels, mask=mask)
        return out.loss + out.metrics["top1"] + tied.loss + mse.loss

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for beta in (0.1, 0.2, 0.3):
        close(compiled(scores, beta), run(scores, beta), scores)


def test_nothing_counts() -> None:
    for rows in (0, 3):
        x = torch.full((rows, 2), math.nan, device=DEVICE).requires_grad_()
        none = torch.zeros(rows, 2, device=DEVICE)
        for name in LIST_LOSSES:
            out = fastloss.listwise_reward_loss(x, none, mask=none, loss_type=name)
            assert out.loss == 0 and not torch.autograd.grad(out.loss, x)[0].any()
            assert all(v == 0 for v in out.metrics.values())
        out = fastloss.reward_regression_loss(x, none, mask=none)
        assert out.loss == 0 and not torch.autograd.grad(out.loss, x)[0].any()
    empty = torch.zeros(0, device=DEVICE)
    out = fastloss.tied_reward_loss(empty, empty, empty)
    assert out.loss == 0 and all(v == 0 for v in out.metrics.values())


def test_errors() -> None:
    scores, labels, mask = lists(torch.float32)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "loss_type: expected one of", {"loss_type": "lipo"}),
        (ValueError, "reduction: expected one of", {"reduction": "avg"}),
        (ValueError, "labels: expected shape", {"labels": labels[:, 1:]}),
        (ValueError, "mask: expected shape", {"mask": mask[0]}),
        (ValueError, "weights: expected shape", {"weights": scores.detach()}),
        (ValueError, "top: expected a positive int", {"top": 0}),
        (ValueError, "top: expected None for loss_type='softmax'", {"top": 1, "loss_type": "softmax"}),
    ]
    for error, message, options in wrong:
        with pytest.raises(error, match=message):
            fastloss.listwise_reward_loss(**{"scores": scores, "labels": labels, **options})
        with pytest.raises(error, match=message):
            fastloss.listwise_preference_loss(scores, **{"labels": labels, "reference_free": True, **options})
    with pytest.raises(ValueError, match=r"scores: expected shape \[B, K\]"):
        fastloss.listwise_reward_loss(scores[0], labels[0])
    with pytest.raises(ValueError, match="ref_logps: expected a tensor"):
        fastloss.listwise_preference_loss(scores, labels)
    with pytest.raises(ValueError, match="beta: expected a finite number"):
        fastloss.listwise_preference_loss(scores, labels, reference_free=True, beta=0.0)
    for message, options in (
        ("model: expected one of", {"model": "elo"}),
        ("tie_strength: expected a finite number", {"tie_strength": 0.0}),
        ("outcome: expected shape", {"outcome": labels[:2, 0]}),
        (r"first_rewards: expected shape \[B\]", {"first_rewards": scores}),
    ):
        given = {"first_rewards": scores[:, 0], "second_rewards": scores[:, 1], "outcome": labels[:, 0]}
        with pytest.raises(ValueError, match=message):
            fastloss.tied_reward_loss(**{**given, **options})
    for message, options in (
        ("loss_type: expected one of", {"loss_type": "l1"}),
        ("huber_delta: expected a finite number", {"huber_delta": 0.0}),
        ("labels: expected shape", {"labels": labels[:2]}),
        ("head_weights: expected shape", {"head_weights": scores.detach()}),
    ):
        with pytest.raises(ValueError, match=message):
            fastloss.reward_regression_loss(**{"rewards": scores, "labels": labels, **options})
