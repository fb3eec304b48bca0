"""``skip`` of linear_cross_entropy: what the gradients may leave out, where it is not used, and how much it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_under_test import need
from torch import Tensor

import fastloss
from fastloss.engine import head_blocks

BF16, F32 = torch.bfloat16, torch.float32
VOCAB = 600
Result = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu")
    monkeypatch.setattr(head_blocks, "why_not", lambda *_: "")  # not calibration's choice
    fastloss.skipped_share()


def logits(rows: int, dtype: torch.dtype = F32) -> Tensor:
    """A peak in each row, extreme in some; the weight is the identity, so that they are the hidden states, and d hidden their gradient."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, VOCAB, generator=generator) - torch.arange(VOCAB) / 60
    x[torch.arange(rows), torch.randint(0, VOCAB, (rows,), generator=generator)] += 6
    x[::5] *= 30
    return x.to(dtype)


def targets(rows: int) -> Tensor:
    return torch.randint(0, VOCAB, (rows,), generator=torch.Generator().manual_seed(9))


def gradients(x: Tensor, matrix: Tensor, target: Tensor, **options: Any) -> Result:
    """(loss, d hidden, d weight), and d bias where there is one."""
    leaves = [x.clone().requires_grad_(), matrix.clone().requires_grad_()]
    if "linear_bias" in options:
        leaves.append(options["linear_bias"].clone().requires_grad_())
        options["linear_bias"] = leaves[2]
    loss = fastloss.linear_cross_entropy(*leaves[:2], target, **options)
    loss.sum().backward()
    return (loss.detach(), *(leaf.grad for leaf in leaves))  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("skip", [1e-3, 0.05, 0.9])
def test_each_row_errs_by_less_than_the_bound(dtype: torch.dtype, skip: float) -> None:
    rows = 70
    x, target = logits(rows, dtype), targets(rows)
    loss, dz, d_weight = gradients(x, torch.eye(VOCAB, dtype=dtype), target, skip=skip, reduction="sum")
    z = x.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(z, target, reduction="sum")
    (want,) = torch.autograd.grad(exact, z)
    rounding = 2**-8 if dtype == BF16 else 1e-6
    error = (dz.double() - want).abs().sum(1)
    assert (error <= skip + 2 * rounding).all()
    assert (error > 2 * rounding).any() or skip == 1e-3
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=rounding, atol=0)
    # d weight is that of the same gradient, and a target's is never left out.
    torch.testing.assert_close(
        d_weight.double(), dz.double().t() @ x.double(), rtol=rounding, atol=rounding * 200
    )
    own = torch.arange(rows), target
    torch.testing.assert_close(dz[own].double(), want[own], rtol=rounding, atol=rounding)
    share = fastloss.skipped_share()
    assert share is not None and 0.01 < share < 1
    assert fastloss.skipped_share() is None


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"memory": "fast"}, {"memory": "low"}, {"chunk_size": 50}, {"linear_bias": "some"}, {"ignored": True},
        {"ignored": True, "chunk_size": 30, "linear_bias": "some"}, {"weight": "some", "z_loss": 1e-2, "softcap": 20.0},
        {"token_weight": "some", "temperature": 0.7},
    ],
)  # fmt: skip
def test_a_skip_of_nearly_nothing_is_exact(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """In every form of a pass: of all rows, in parts, with rows left out, with logits that are kept and made again."""
    options, rows, dim = dict(options), 130, 24
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, dim, generator=generator).to(dtype)
    target = targets(rows)
    sizes = {"linear_bias": VOCAB, "weight": VOCAB, "token_weight": rows}
    for name in sizes.keys() & options.keys():
        options[name] = torch.rand(sizes[name], generator=generator).to(dtype)
    if options.pop("ignored", False):
        target[::3] = -100
        x[::3] = torch.nan
    exact = gradients(x, weight, target, **options)
    got = gradients(x, weight, target, skip=1e-30, **options)
    assert fastloss.skipped_share() is not None
    rounding = 2**-7 if dtype == BF16 else 2e-6
    for one, other in zip(got, exact, strict=True):
        assert (one - other).abs().max() <= rounding * other.abs().max()


def test_no_skip_has_the_same_bits_as_before() -> None:
    x, target = logits(40), targets(40)
    for one, other in zip(
        gradients(x, torch.eye(VOCAB), target), gradients(x, torch.eye(VOCAB), target, skip=0), strict=True
    ):
        assert torch.equal(one, other)
    assert fastloss.skipped_share() is None


@pytest.mark.parametrize(
    "options, why",
    [
        ({"reduction": "none"}, "a loss per row"), ({"label_smoothing": 0.1}, "label smoothing"), ({"probabilities": True}, "probabilities"),
        ({"frozen": True}, "a frozen weight"), ({"no_grad": True}, "no gradient"), ({"few": True}, "at most 256 classes"),
        ({"dtype": torch.float16}, "chunks of rows"),
    ],
)  # fmt: skip
def test_what_is_exact_says_so(options: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, rows = dict(options), 12
    vocab, dtype = 200 if options.pop("few", False) else VOCAB, options.pop("dtype", F32)
    if dtype == torch.float16:
        monkeypatch.undo()
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(rows, 16, generator=generator).to(dtype).requires_grad_(not options.pop("no_grad", False))
    weight = torch.randn(vocab, 16, generator=generator).to(dtype)
    weight.requires_grad_(x.requires_grad and not options.pop("frozen", False))
    target = torch.randint(0, vocab, (rows,), generator=generator)
    if options.pop("probabilities", False):
        target = torch.rand(rows, vocab, generator=generator).to(dtype).softmax(-1)
    plan = fastloss.explain(fastloss.linear_cross_entropy, x, weight, target, skip=0.3, **options)
    assert plan["skip"].startswith("not used, exact: ") and why in plan["skip"]
    assert "skip" not in fastloss.explain(fastloss.linear_cross_entropy, x, weight, target, **options)
    outs = []
    for skip in (0.3, 0.0):
        x.grad = weight.grad = None
        loss = fastloss.linear_cross_entropy(x, weight, target, skip=skip, **options)
        if x.requires_grad:
            loss.sum().backward()
        outs.append([loss.detach(), *(leaf.grad for leaf in (x, weight) if leaf.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))
    assert fastloss.skipped_share() is None


def test_the_definition_and_places_say_so() -> None:
    x, weight, target = (
        torch.zeros(4, 16, requires_grad=True),
        torch.zeros(VOCAB, 16, requires_grad=True),
        targets(4),
    )
    plan = fastloss.explain(fastloss.linear_cross_entropy, x, weight, target, skip=0.3, backend="reference")
    assert plan["skip"] == "not used, exact: the definition"
    places = weight.detach().view(VOCAB // 2, 2, 16).requires_grad_()
    places_of = target[:, None].expand(4, 2) % 300
    plan = fastloss.explain(fastloss.linear_cross_entropy, x, places, places_of, skip=0.3)
    assert "skip" in plan and "skip" not in fastloss.explain(
        fastloss.linear_cross_entropy, x, places, places_of
    )


def test_explain_says_what_is_left_out() -> None:
    x, weight = torch.zeros(30, 16, requires_grad=True), torch.zeros(VOCAB, 16, requires_grad=True)
    plain = fastloss.explain(fastloss.linear_cross_entropy, x, weight, targets(30))
    plan = fastloss.explain(fastloss.linear_cross_entropy, x, weight, targets(30), skip=1e-3)
    assert plan["skip"] == "gradients err by up to 0.001 of each token's coefficient"
    assert plan["chunk_columns"] == 256 and plan["buffer_bytes"] > plain["buffer_bytes"]


@pytest.mark.parametrize("skip", [-0.1, 1.0, 2, float("nan"), float("inf")])
def test_a_skip_out_of_bounds(skip: float) -> None:
    with pytest.raises(ValueError, match="skip: expected a"):
        fastloss.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]), skip=skip)


@pytest.mark.parametrize("skip", [True, "0.1", None, torch.tensor(0.1)])
def test_a_skip_that_is_no_number(skip: Any) -> None:
    with pytest.raises(TypeError, match="skip: expected a number"):
        fastloss.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]), skip=skip)


def test_under_torch_compile() -> None:
    x, weight, target = logits(20), torch.eye(VOCAB), targets(20)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(hidden: Tensor, matrix: Tensor) -> Tensor:
        return fastloss.linear_cross_entropy(hidden, matrix, target, skip=0.6)  # type: ignore[no-any-return]

    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(*leaves)
    loss.backward()
    assert (fastloss.skipped_share() or 0) > 0.01
    eager = gradients(x, weight, target, skip=0.6)
    for one, other in zip((loss.detach(), *(leaf.grad for leaf in leaves)), eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
