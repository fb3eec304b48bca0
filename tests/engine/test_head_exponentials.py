"""Cross-entropy of a bfloat16 head from scaled exponentials: the row kernels, the products, the rows that are redone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import DEVICE, KERNELS, contract, need
from torch import Tensor

import fastloss
from fastloss.engine import devices, head_exponentials
from fastloss.engine.contract import ExponentialRows, Factor
from fastloss.engine.exponentials import plainly
from fastloss.tables import CrossEntropyOptions

IGNORE, BF16 = -100, torch.bfloat16
GPU_KERNELS = [name for name in KERNELS if name != "cpu"]
ROUNDED = 2**-8  # a half of bfloat16's last place, relative


# --- the row kernels ----------------------------------------------------------------------------------------------------


def made(
    backend: str, logits: Tensor, target: Tensor, options: CrossEntropyOptions, **given: Any
) -> ExponentialRows:
    return contract(backend).row_exponentials(logits, target, options, **given)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("vocab", "padding"), [(1, 0), (37, 3), (301, 19), (1031, 0), (2048, 0)])
@pytest.mark.parametrize("backend", [*GPU_KERNELS, "reference"])
def test_rows(backend: str, vocab: int, padding: int, full: bool) -> None:
    """Exponentials times the row's multiplier are the gradient, of the definition in float64; nothing lies between rows."""
    generator = torch.Generator().manual_seed(vocab)
    rows = 6
    memory = torch.full((rows, vocab + padding), float("nan"), dtype=BF16)
    memory[:, :vocab] = 3 * torch.randn(rows, vocab, generator=generator)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[2] = IGNORE
    given: dict[str, Any] = {}
    options = CrossEntropyOptions()
    if full:
        row_scale = 0.5 + torch.rand(rows, generator=generator)
        options = CrossEntropyOptions(scale=0.7, softcap=5.0, z_loss=1e-2, row_scale=row_scale.to(DEVICE))
        given = {
            "bias": torch.randn(vocab, generator=generator).to(DEVICE),
            "w": (0.5 + torch.rand(vocab, generator=generator)).to(DEVICE),
            "factor": Factor(0.5, torch.tensor(3.0, device=DEVICE)),
        }
    memory, target = memory.to(DEVICE), target.to(DEVICE)
    logits = memory[:, :vocab]
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    if full:
        wide["factor"] = Factor(1.5)
    grad = logits.double()
    exact = CrossEntropyOptions(
        options.ignore_index, options.scale, options.softcap, None, 0.0, options.z_loss
    )
    if options.row_scale is not None:
        exact = CrossEntropyOptions(-100, options.scale, options.softcap, options.row_scale.double(), 0.0, options.z_loss)  # fmt: skip
    right = contract("reference").row_cross_entropy(
        grad, target, exact, grad=grad, want=("logsumexp",), **wide
    )
    out = made(backend, logits, target, options, **given)
    assert not out.rough.any()
    multiplier = out.multiplier.double()[:, None]
    assert bool(((logits.double() * multiplier - grad).abs() <= 1.01 * ROUNDED * grad.abs() + 1e-7).all())
    there = target.clamp(min=0)[:, None]  # with what was rounded off, the target's entry is exact
    whole = (logits.double().gather(1, there) + out.residue.double()[:, None]) * multiplier
    torch.testing.assert_close(whole, grad.gather(1, there), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.loss.double(), right["loss"], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.lse_parts.double().sum(1), right["logsumexp"], rtol=2e-6, atol=2e-6)
    assert out.multiplier[2] == 0 and not logits[2].any()
    assert memory[:, vocab:].isnan().all()


@pytest.mark.parametrize("backend", [*GPU_KERNELS, "reference"])
def test_a_target_that_is_almost_certain_keeps_its_digits(backend: str) -> None:
    """1 - p of 1e-9: neither the loss nor the target's gradient is a difference of numbers near 1."""
    logits = torch.full((1, 40), -3.0, dtype=BF16)
    logits[0, 7] = 21.0
    others = 39 * math.exp(-24.0)
    logits = logits.to(DEVICE)
    out = made(backend, logits, torch.tensor([7], device=DEVICE), CrossEntropyOptions())
    assert float(out.loss) == pytest.approx(others, rel=1e-5)
    assert float(logits[0, 7]) * float(out.multiplier) == pytest.approx(-others, rel=2**-8)


@pytest.mark.parametrize("backend", [*GPU_KERNELS, "reference"])
def test_rows_whose_exponentials_do_not_fit_are_marked(backend: str) -> None:
    """A loss of more than 55, no finite target, NaN, a bad target, a z-loss that cancels b: all zero, and marked. 50 fits."""
    logits = torch.zeros(8, 24, dtype=BF16)
    target = torch.full((8,), 5)
    logits[0, 3] = 50.0
    logits[1, 3] = 60.0
    logits[2, 3] = math.inf
    logits[3, 5] = math.inf
    logits[4, 5] = -math.inf
    logits[5, 9] = math.nan
    target[6] = 24
    logits[7] = -50.0 - math.log(24)
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    out = made(backend, logits, target, CrossEntropyOptions(z_loss=1e-2))  # 2 · 1e-2 · -50 = -1
    assert out.rough.tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    for x in (logits, *out[:4]):
        assert not x[1:].any()
    assert float(out.loss[0]) == pytest.approx(50.0 + 1e-2 * 50.0**2, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.6, -0.7])
def test_kernels_agree_with_the_formula(scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(5, 130, generator=generator)).to(BF16)
    target = torch.tensor([0, 129, 64, IGNORE, 5])
    copy, options = logits.clone(), CrossEntropyOptions(z_loss=1e-3, scale=scale)
    right = plainly(copy, target, options, Factor(0.25), None, None)
    for backend in GPU_KERNELS if DEVICE == "cpu" else ():
        own = logits.clone()
        out = made(backend, own, target, options, factor=Factor(0.25))
        for name in ("loss", "lse_parts", "multiplier", "rough"):
            torch.testing.assert_close(getattr(out, name), getattr(right, name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own, copy, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_logits_that_a_mask_made_equal(backend: str) -> None:
    """E is 1 for each but the target, at any scale: no exponent is what two roundings of -1e30 · scale differ by."""
    scale = torch.tensor([1.0, 0.7, 1.3, 0.011, 5.9], device=DEVICE)
    logits = torch.full((5, 40), -1e30, dtype=BF16, device=DEVICE)
    target = torch.arange(5, device=DEVICE)
    out = made(backend, logits, target, CrossEntropyOptions(row_scale=scale))
    assert not out.rough.any()
    torch.testing.assert_close(out.loss.cpu(), torch.full((5,), 40.0).log())
    expected = torch.ones(5, 40).scatter(1, target.cpu()[:, None], -39.0)
    torch.testing.assert_close(logits.float().cpu(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_what_the_kernels_refuse(backend: str) -> None:
    kernels, target = contract(backend), torch.zeros(2, dtype=torch.long, device=DEVICE)
    with pytest.raises((TypeError, ValueError), match="bfloat16"):
        kernels.row_exponentials(torch.zeros(2, 8, device=DEVICE), target, CrossEntropyOptions())
    smooth = CrossEntropyOptions(label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing: expected 0"):
        kernels.row_exponentials(torch.zeros(2, 8, dtype=BF16, device=DEVICE), target, smooth)


# --- the head -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(head_exponentials, "ENABLED", True)


def operands(rows: int = 21, dim: int = 16, vocab: int = 301) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, dim, generator=generator).to(DEVICE, BF16)
    weight = (torch.randn(vocab, dim, generator=generator) * 2 / dim**0.5).to(DEVICE, BF16)
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator).to(DEVICE)


def gradients(leaves: dict[str, Tensor], target: Tensor, upstream: Any, **options: Any) -> dict[str, Tensor]:
    """The loss, and the gradients of what requires one."""
    own = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in leaves.items()}
    lora = (own["u"], own["B"]) if "u" in own else None
    bias = own.get("bias")
    loss = fastloss.linear_cross_entropy(
        own["hidden"], own["weight"], target, linear_bias=bias, lora=lora, **options
    )
    loss.backward(torch.full_like(loss, upstream) if loss.dim() == 0 else upstream.to(loss.dtype))
    return {"loss": loss.detach()} | {n: x.grad for n, x in own.items() if x.grad is not None}


def compare(
    backend: str, leaves: dict[str, Tensor], target: Tensor, upstream: Any = 1.0, **options: Any
) -> None:
    """Against float64: values, and gradients within what the present path is allowed."""
    ours = gradients(leaves, target, upstream, backend=need(backend), **options)
    exact = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in leaves.items()}
    options = {n: x.double() if isinstance(x, Tensor) else x for n, x in options.items() if n != "chunk_size"}
    right = gradients(exact, target, upstream, backend="reference", **options)
    assert ours.keys() == right.keys()
    for name, want in right.items():
        assert ours[name].dtype == (leaves[name] if name in leaves else leaves["hidden"]).dtype
        off = float((ours[name].double() - want).abs().max())
        assert off <= 2**-6 * float(want.abs().max()), f"{name}: off by {off}"


CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "upstream": 3.0},
    "z-loss, soft-cap, scale": {"z_loss": 1e-2, "softcap": 8.0, "logit_scale": 0.5, "temperature": 0.7},
    "class weights": {"weight": 0.5 + torch.arange(301) / 301},
    "token weights": {"token_weight": torch.arange(21) / 21, "upstream": 0.25},
    "normalizer": {"normalizer": 7.0},
    "chunks": {"chunk_size": 8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_against_float64(switched_on: None, backend: str, case: str) -> None:
    hidden, weight, target = operands()
    target[::5] = IGNORE
    options = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in CASES[case].items()}
    if case == "class weights":
        options["weight"] = options["weight"].to(BF16)
    compare(
        backend, {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}, target, **options
    )


@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_bias_and_frozen_operands(switched_on: None, backend: str, frozen: str) -> None:
    hidden, weight, target = operands()
    leaves = {"hidden": hidden, "weight": weight, "bias": torch.randn(301, device=DEVICE).to(BF16)}
    for name, x in leaves.items():
        x.requires_grad_(name != frozen)
    compare(backend, leaves, target)


def test_a_loss_per_row_with_a_frozen_weight(switched_on: None) -> None:
    hidden, weight, target = operands()
    target[3] = IGNORE
    upstream = torch.linspace(-1, 2, 21, device=DEVICE)
    compare(
        "triton", {"hidden": hidden.requires_grad_(), "weight": weight}, target, upstream, reduction="none"
    )


def test_a_lora(switched_on: None) -> None:
    hidden, weight, target = operands()
    leaves = {"hidden": hidden, "u": torch.randn(21, 3).to(DEVICE, BF16), "B": torch.randn(301, 3).to(DEVICE, BF16)}  # fmt: skip
    compare("triton", {n: x.requires_grad_() for n, x in leaves.items()} | {"weight": weight}, target)


def test_autocast_and_a_second_backward(switched_on: None) -> None:
    hidden, weight, target = operands()
    leaves = [x.float().requires_grad_() for x in (hidden, weight)]
    with torch.autocast(DEVICE, BF16):
        loss = fastloss.linear_cross_entropy(*leaves, target, backend=need("triton"))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    F.cross_entropy(exact[0] @ exact[1].t(), target).backward()
    for one, two, leaf in zip(first, second, exact, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two)
        assert float((one - leaf.grad).abs().max()) <= 2**-6 * float(leaf.grad.abs().max())  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_rough_rows_are_redone(
    switched_on: None, monkeypatch: pytest.MonkeyPatch, backend: str, ignored: bool, chunk_size: int | None
) -> None:
    """Two rows with losses beyond 55 among others; with and without rows that are left out."""
    hidden, weight, target = operands()
    if ignored:
        target[:4] = IGNORE
    for row in (6, 19):
        target[row] = (hidden[row].float() @ weight.float().t()).argmin()
        hidden[row] *= 60 / (2 * hidden[row].float().abs().max()).item()
    redone: list[int] = []
    plain = head_exponentials.ExponentialChunk._redo

    def spy(self: Any, rough: Tensor, *given: Any) -> Any:
        redone.extend((rough + self.start).tolist())
        return plain(self, rough, *given)

    monkeypatch.setattr(head_exponentials.ExponentialChunk, "_redo", spy)
    leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    weights = torch.linspace(0.5, 2, 21, device=DEVICE)
    compare(backend, leaves, target, chunk_size=chunk_size, token_weight=weights, reduction="sum")
    assert redone == [6 - 4 * ignored, 19 - 4 * ignored]


def test_a_nan_reaches_what_it_reaches_in_chunks(switched_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = operands()
    hidden[4, 0] = math.nan
    leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    ours = gradients(leaves, target, 1.0, backend=need("triton"))
    monkeypatch.setattr(head_exponentials, "ENABLED", False)
    plain = gradients(leaves, target, 1.0, backend="triton")
    for name, x in plain.items():
        assert torch.equal(ours[name].isnan(), x.isnan()), name
    assert ours["hidden"][4].isnan().all() and not ours["hidden"][5].isnan().any()


@pytest.mark.parametrize("peaked", [False, True])
def test_error_beside_the_present_path(
    switched_on: None, monkeypatch: pytest.MonkeyPatch, peaked: bool
) -> None:
    """d hidden has no larger error; of d weight's operands both are rounded, and the result: at most twice the error."""
    hidden, weight, target = operands(32, 16, 128)
    if peaked:
        hidden = (hidden.float() + 12 * F.normalize(weight[target].float(), dim=1)).to(BF16)
    leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    right = gradients(exact, target, 1.0, backend="reference")

    def errors() -> dict[str, float]:
        ours = gradients(leaves, target, 1.0, backend=need("triton"))
        return {n: float((ours[n].double() - x).norm()) for n, x in right.items() if n != "loss"}

    ours = errors()
    monkeypatch.setattr(head_exponentials, "ENABLED", False)
    before = errors()
    assert ours["hidden"] <= 1.05 * before["hidden"] and ours["weight"] <= 2 * before["weight"]


# --- when it is taken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"z_loss": 1e-3}, {"softcap": 30.0}, {"chunk_size": 8}, {"reduction": "none", "frozen": True},
], ids=str)  # fmt: skip
def test_explain_names_it(switched_on: None, options: dict[str, Any]) -> None:
    hidden, weight, target = operands()
    frozen = options.pop("frozen", False)
    leaves = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    told = fastloss.explain(fastloss.linear_cross_entropy, *leaves, target, backend=need("triton"), **options)
    rows = min(21, options.get("chunk_size", 21))
    assert told["row_pass"] == "scaled exponentials" and told["schedule"] == "chunks of rows"
    assert told["scratch_bytes"] == 4 * rows * 16 and told["gemms"] == (2 if frozen else 3)


@pytest.mark.parametrize("options", [
    {"label_smoothing": 0.1}, {"return_stats": True}, {"logits_dtype": torch.float32}, {"memory": "low"}, {"reduction": "none"},
    {"dtype": torch.float16}, {"dtype": torch.float32}, {"nograd": True}, {"waits": False}, {"enabled": False},
], ids=str)  # fmt: skip
def test_who_takes_the_present_path(
    switched_on: None, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    given = dict(options)
    hidden, weight, target = operands()
    dtype = given.pop("dtype", BF16)
    if not given.pop("waits", True):
        monkeypatch.setattr(devices, "SKIP_IGNORED", False)
    if not given.pop("enabled", True):
        monkeypatch.setattr(head_exponentials, "ENABLED", False)
    grad = not given.pop("nograd", False)
    leaves = [x.to(dtype).requires_grad_(grad) for x in (hidden, weight)]
    told = fastloss.explain(fastloss.linear_cross_entropy, *leaves, target, backend=need("triton"), **given)
    assert "row_pass" not in told


@pytest.mark.slow
def test_a_compiled_operator_takes_the_present_path(
    switched_on: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not wait for the GPU."""

    def never(*given: Any) -> None:
        raise AssertionError("an operator of a compiled graph waits for the marks")

    monkeypatch.setattr(head_exponentials.ExponentialChunk, "cross_entropy", never)
    backend = need("triton")
    torch._dynamo.reset()
    hidden, weight, target = operands()
    function = torch.compile(
        lambda h, w: fastloss.linear_cross_entropy(h, w, target, backend=backend), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    function(*leaves).backward()
    assert leaves[1].grad is not None and leaves[1].grad.isfinite().all()
