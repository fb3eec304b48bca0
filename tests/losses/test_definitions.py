"""fastloss/reference is the definition and nothing else: production code is compared with it and shares nothing with it."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE
from torch import Tensor

import fastloss
from fastloss import reference
from fastloss.reference import preference as pair_definitions
from fastloss.tables import (
    AGGREGATIONS,
    KL_KINDS,
    PAIR_TERMS,
    SURROGATES,
    PairConstants,
    PairOptions,
    PolicyOptions,
    UnpairedConstants,
    UnpairedOptions,
)

B, T = 4, 6


def test_it_imports_nothing_of_fastloss_but_the_tables() -> None:
    folder = Path(reference.__file__).parent
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path.name
                found.add(node.module or "")
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    ours = {name for name in found if name.split(".")[0] == "fastloss"}
    assert {name for name in ours if not name.startswith("fastloss.reference")} == {"fastloss.tables"}


def test_nobody_computes_with_its_parts() -> None:
    """A public function may take the whole definition (no kernel can run the call), but not its sums, shares or terms."""
    package = Path(fastloss.__file__).parent
    whole = {
        "cross_entropy", "linear_cross_entropy", "token_stats", "linear_token_stats", "row_gradient", "segment_sum",
        "pair_loss", "unpaired_loss", "policy_loss", "gae", "discounted_returns", "lse_parts",
        "distillation_rows", "topk_distillation_rows", "selected_logprobs", "load_balancing", "supervised_rows", "value_terms", "kl_estimate",
        "supervised_terms",  # the loss of a token from its statistics: what torch.compile traces behind the kernels' operator
    }  # fmt: skip
    used = set()
    for path in (*package.glob("losses/*.py"), *package.glob("engine/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastloss.reference"):
                pytest.fail(f"{path.name} imports from {node.module}")
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "reference":
                    used.add(node.attr)
    assert used and used <= whole


def leaf(x: Tensor) -> Tensor:
    return x.to(DEVICE, torch.float64).requires_grad_()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("clip_range", [None, 0.2])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_value_loss(aggregation: str, clip_range: float | None, packed: bool) -> None:
    g = torch.Generator().manual_seed(3)
    shape = (B * T,) if packed else (B, T)
    values, old, returns = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(shape, generator=g) > 0.3
    mask.view(-1)[:T] = False
    values.view(-1)[0] = float("nan")  # masked: it touches nothing
    offsets = torch.tensor([0, T, T, 2 * T, B * T]) if packed else None
    for normalizer in (None, 7.0, torch.tensor(3.0)):
        mine, theirs = leaf(values), leaf(values)
        layout: dict[str, Any] = {} if offsets is None else {"cu_seqlens": offsets.to(DEVICE)}
        old_, returns_, mask_ = (x.to(DEVICE) for x in (old, returns, mask))
        out = fastloss.value_loss(
            mine, old_, returns_, mask_, clip_range=clip_range, aggregation=aggregation, max_length=9.0,
            normalizer=normalizer, **layout,
        )  # fmt: skip
        loss, metrics = reference.value_loss(
            theirs.reshape(-1), old_.reshape(-1), returns_.reshape(-1), mask_.reshape(-1), clip_range=clip_range,
            aggregation=AGGREGATIONS.index(aggregation), max_length=9.0, normalizer=normalizer,
            offsets=None if offsets is None else offsets.to(DEVICE), length=0 if packed else T, count=B,
        )  # fmt: skip
        torch.testing.assert_close(out.loss, loss)
        torch.testing.assert_close(torch.autograd.grad(out.loss, mine), torch.autograd.grad(loss, theirs))
        assert out.metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            torch.testing.assert_close(out.metrics[name].double(), value.double(), msg=name)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_estimate(kind: str) -> None:
    g = torch.Generator().manual_seed(5)
    logprobs = torch.cat([-3 * torch.rand(30, generator=g), torch.tensor([-1.0, -40.0, -0.5])]).double()
    ref = torch.cat([-3 * torch.rand(30, generator=g), torch.tensor([-1.0, -1.0, -60.0])]).double().to(DEVICE)
    mine, theirs = leaf(logprobs), leaf(logprobs)
    got, want = fastloss.kl_estimate(mine, ref, kind=kind), reference.kl_estimate(theirs, ref, kind)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), mine), torch.autograd.grad(want.sum(), theirs))
    with pytest.raises(ValueError, match="kind: expected"):
        reference.kl_estimate(theirs, ref, "k4")


def test_alpha_reward_and_log_odds() -> None:
    g = torch.Generator().manual_seed(7)
    c, r = (-4 * torch.rand(B, generator=g, dtype=torch.float64) - 0.1 for _ in range(2))
    lengths = torch.tensor([1, 3, 2, 5])
    options = {"chosen_lengths": lengths, "rejected_lengths": lengths.flip(0)}
    out = fastloss.simpo_loss(c, r, beta=2.0, simpo_gamma=0.4, simpo_alpha=0.3, **options)
    per_c, per_r = c / lengths, r / lengths.flip(0)
    u = 2.0 * (pair_definitions.alpha_reward(per_c, 0.3) - pair_definitions.alpha_reward(per_r, 0.3)) - 0.4
    torch.testing.assert_close(out.loss, -torch.nn.functional.logsigmoid(u).mean())
    metrics = fastloss.orpo_loss(c, r, **options).metrics
    odds = pair_definitions.log_odds(per_c, per_r)
    torch.testing.assert_close(metrics["log_odds_chosen"], odds.mean())
    torch.testing.assert_close(metrics["log_odds_ratio"], torch.nn.functional.logsigmoid(odds).mean())


# What has a gradient almost everywhere: not the kinks of a hinge, nor a weight that is a constant.
SMOOTH = [name for name in SURROGATES if name not in ("cispo", "vespo")]


@pytest.mark.parametrize("surrogate", SMOOTH)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_policy_loss_can_be_differentiated_twice(surrogate: str, packed: bool) -> None:
    g = torch.Generator().manual_seed(11)
    n = 2 * 3
    x = (-2 * torch.rand(n, generator=g, dtype=torch.float64)).requires_grad_()
    other = x.detach() + 0.05 * torch.randn(n, generator=g, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    advantages = torch.tensor([0.7, -1.1], dtype=torch.float64)
    options = PolicyOptions(surrogate=SURROGATES.index(surrogate), beta=0.1, aggregation=2)
    layout: dict[str, Any] = {"offsets": None, "length": 3, "count": 2}
    if packed:
        layout = {"offsets": torch.tensor([0, 2, 6]), "length": 0, "count": 2}

    def loss(x: Tensor) -> Tensor:
        return reference.policy_loss(
            x, old=other, advantages=advantages, mask=mask, ref=other, options=options, **layout
        )[0]

    assert torch.autograd.gradcheck(loss, x) and torch.autograd.gradgradcheck(loss, x)


@pytest.mark.parametrize("term", [name for name in PAIR_TERMS if name not in ("hinge",)])
def test_pair_terms_can_be_differentiated_twice(term: str) -> None:
    g = torch.Generator().manual_seed(13)
    c, r, rc, rr = (-3 * torch.rand(3, generator=g, dtype=torch.float64) - 0.2 for _ in range(4))
    lengths = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    constants = PairConstants(rc, rr, lengths, lengths.flip(0))
    options = PairOptions(terms=((PAIR_TERMS.index(term), 1.0),), smoothing=0.1, beta=0.4, tau=0.5)

    def loss(c: Tensor, r: Tensor) -> Tensor:
        return reference.pair_loss(c, r, None, constants, options)["loss"]

    leaves = (c.requires_grad_(), r.requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("term", [0, 1, 2])
def test_unpaired_terms_can_be_differentiated_twice(term: int) -> None:
    x = torch.tensor([-1.0, -2.5, -0.3], dtype=torch.float64, requires_grad=True)
    constants = UnpairedConstants(torch.tensor([1, 0, 1], dtype=torch.uint8), kl=torch.tensor([0.2]).double())

    def loss(x: Tensor) -> Tensor:
        return reference.unpaired_loss(x, constants, UnpairedOptions(term=term, beta=0.5))["loss"]

    assert torch.autograd.gradcheck(loss, x) and torch.autograd.gradgradcheck(loss, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_takes_any_dtype(dtype: torch.dtype) -> None:
    """In which it computes: it converts nothing but logits."""
    x = -torch.rand(6).to(DEVICE, dtype)
    mask = torch.ones(6, dtype=torch.bool, device=DEVICE)
    for surrogate, level in itertools.product(range(len(SURROGATES)), range(4)):
        loss, out = reference.policy_loss(
            x, old=x, advantages=x[:2], mask=mask, length=3, count=2,
            options=PolicyOptions(surrogate=surrogate, level=level),
        )  # fmt: skip
        assert loss.dtype == out.dtype == dtype and loss.isfinite()
