"""linear_sequence_loss: a caller's own loss from the head against the same loss of whole logits in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_under_test import ALL, DEVICE, KERNELS, need
from torch import Tensor

import fastloss
from fastloss import SequencePart

B, T, D, V = 5, 7, 8, 37
LENGTHS = torch.tensor([3, 7, 0, 1, 5])
GOOD = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
OLD = torch.tensor([-12.0, -30.0, 0.0, -4.0, -20.0])

Own = Callable[[SequencePart], Tensor]


def contrast(part: SequencePart) -> Tensor:
    """Of the sums: a contrast with an older model, a mean over the batch."""
    good, old = (x.to(part.logps)[part.indices.cpu()].to(part.logps.device) for x in (GOOD, OLD))
    return -torch.nn.functional.logsigmoid(0.1 * good * (part.logps - old)).sum() / B


def of_tokens(part: SequencePart) -> Tensor:
    """Of tokens, by their place in the sequence, and of lengths; with a detached statistic as a weight."""
    assert part.stats.entropy is not None and not part.stats.entropy.requires_grad
    place = torch.arange(part.logprobs.numel(), device=part.logprobs.device) - torch.repeat_interleave(
        part.cu_seqlens[:-1], part.cu_seqlens.diff(), output_size=part.logprobs.numel()
    )
    weight = part.mask * (part.stats.entropy - 1.0) / (1.0 + place)
    return (weight * part.logprobs.exp()).sum() + (part.logps / part.lengths.clamp(min=1)).square().sum()


def ranked(part: SequencePart) -> Tensor:
    """Of all sequences together."""
    assert part.logps.numel() == B
    return -torch.log_softmax(part.logps, 0)[1] + part.logps.std()


LOSSES: dict[str, tuple[Own, dict[str, Any]]] = {
    "contrast": (contrast, {}),
    "of_tokens": (
        of_tokens,
        {"outputs": ("entropy",), "temperature": 0.7, "softcap": 4.0, "logit_scale": 1.3},
    ),
    "ranked": (ranked, {"coupled": True}),
}


def data(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    inside = torch.arange(T)[None, :] < LENGTHS[:, None]
    x = {
        "input": torch.randn(B, T, D, generator=g),
        "linear_weight": torch.randn(V, D, generator=g),
        "linear_bias": torch.randn(V, generator=g),
    }
    x = {k: v.to(dtype) for k, v in x.items()}
    x["target"] = torch.randint(0, V, (B, T), generator=g).masked_fill(~inside, -100)
    return {k: v.to(DEVICE) for k, v in x.items()}


def run(x: dict[str, Tensor], own: Own, frozen: bool = False, **options: Any) -> list[Tensor]:
    """Loss and gradients of 1.5 times it."""
    names = ("input",) if frozen else ("input", "linear_weight", "linear_bias")
    leaves = {n: x[n].clone().requires_grad_() for n in names}
    loss = fastloss.linear_sequence_loss(**{**x, **leaves}, loss_fn=own, **options)
    (1.5 * loss).backward()
    grads = [leaf.grad for leaf in leaves.values()]
    assert all(g is not None and g.dtype == leaves[n].dtype for n, g in zip(names, grads, strict=True))
    return [t.detach().double().cpu() for t in (loss, *grads) if t is not None]


def defined(x: dict[str, Tensor], own: Own, **options: Any) -> list[Tensor]:
    """The same in float64 from whole logits, one sequence after the other."""
    leaves = {
        n: x[n].detach().cpu().double().requires_grad_() for n in ("input", "linear_weight", "linear_bias")
    }
    z = torch.nn.functional.linear(*leaves.values())
    cap = options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    logp = (z * options.get("logit_scale", 1.0) / options.get("temperature", 1.0)).log_softmax(-1)
    target = x["target"].cpu()
    kept = target != -100
    chosen = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    lengths = kept.sum(1)
    part = SequencePart(
        logps=(chosen * kept).sum(1),
        logprobs=chosen[kept],
        mask=torch.ones(int(kept.sum()), dtype=torch.bool),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        lengths=lengths.double(),
        indices=torch.arange(B),
        stats=fastloss.TokenStats(entropy=-(logp.exp() * logp).sum(-1)[kept].detach()),
    )
    loss = own(part)
    (1.5 * loss).backward()
    return [t.detach() for t in (loss, *(leaf.grad for leaf in leaves.values())) if t is not None]


def check(got: list[Tensor], want: list[Tensor], eps: float) -> None:
    for a, b in zip(got, want, strict=False):
        assert (a - b).abs().max() <= eps * max(b.abs().max().item(), 1e-2)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("name", LOSSES)
def test_is_the_loss_of_whole_logits(name: str, chunk_size: int | None, backend: str) -> None:
    need(backend)
    own, options = LOSSES[name]
    x = data()
    want = defined(x, own, **options)
    for frozen in (False, True):
        got = run(x, own, frozen, backend=backend, chunk_size=chunk_size, **options)
        check(got, want[: len(got)], 3e-5)
    if backend in ("reference", "cpu"):
        exact = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
        check(run(exact, own, backend=backend, chunk_size=chunk_size, **options), want, 1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["contrast", "of_tokens"])
def test_low_precision(name: str, dtype: torch.dtype, backend: str) -> None:
    need(backend)
    own, options = LOSSES[name]
    x = data(dtype)
    check(run(x, own, backend=backend, **options), defined(x, own, **options), 64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ALL)
def test_packed_is_padded(backend: str) -> None:
    need(backend)
    x = data()
    inside = x["target"] != -100
    packed = {**x, "input": x["input"][inside], "target": x["target"][inside]}
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)]).to(DEVICE)
    for name, (own, options) in LOSSES.items():
        a, b = run(x, own, backend=backend, **options), run(packed, own, backend=backend, **options)
        a[1] = a[1][inside.cpu()]
        check(b, a, 1e-5), name


@pytest.mark.parametrize("backend", KERNELS)
def test_gemms_parts_and_statistics(backend: str) -> None:
    need(backend)
    x, seen = data(), []

    def own(part: SequencePart) -> Tensor:
        seen.append(part.indices.tolist())
        return -part.logps.sum()

    def plan(frozen: bool = False, **options: Any) -> dict[str, Any]:
        leaves = {"input": x["input"].clone().requires_grad_()}
        if not frozen:
            leaves["linear_weight"] = x["linear_weight"].clone().requires_grad_()
        return fastloss.explain(
            fastloss.linear_sequence_loss, **{**x, **leaves}, loss_fn=own, backend=backend, **options
        )

    assert plan(chunk_size=8)["gemms"] == 3 and plan(frozen=True)["gemms"] == 2
    assert plan(coupled=True, chunk_size=8)["gemms"] == 4
    assert plan(coupled=True, chunk_size=16)["gemms"] < 4.0
    run(x, own, backend=backend, chunk_size=8)
    assert seen == [[0], [1, 2, 3], [4]]
    run(x, own, backend=backend, chunk_size=8, coupled=True)
    assert seen[3:] == [list(range(B))]
    loss, stats = fastloss.linear_sequence_loss(
        **x, loss_fn=own, outputs=("entropy", "is_top1"), return_stats=True, backend=backend
    )
    whole = fastloss.linear_token_stats(
        x["input"], x["linear_weight"], x["target"], linear_bias=x["linear_bias"], backend=backend,
        outputs=("logprobs", "entropy", "is_top1"),
    )  # fmt: skip
    assert not loss.requires_grad and stats.logprobs.shape == (B, T)
    torch.testing.assert_close(stats.logprobs, whole.logprobs)
    torch.testing.assert_close(stats.entropy, whole.entropy)
    assert torch.equal(stats.is_top1, whole.is_top1 & (x["target"] != -100))


@pytest.mark.parametrize("backend", ALL)
def test_second_backward_second_derivative_and_nothing(backend: str) -> None:
    need(backend)
    x = data()
    own, _ = LOSSES["contrast"]
    hidden, weight = x["input"].clone().requires_grad_(), x["linear_weight"].clone().requires_grad_()
    loss = fastloss.linear_sequence_loss(hidden, weight, x["target"], own, backend=backend)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0, device=DEVICE), retain_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(2 * a, b)
    (d,) = torch.autograd.grad(loss, hidden, create_graph=True)
    (second,) = torch.autograd.grad(d.square().sum(), weight)
    h64, w64 = (t.detach().double().cpu().requires_grad_() for t in (hidden, weight))
    l64 = fastloss.linear_sequence_loss(h64, w64, x["target"].cpu(), own, backend="reference")
    (d64,) = torch.autograd.grad(l64, h64, create_graph=True)
    (want,) = torch.autograd.grad(d64.square().sum(), w64)
    torch.testing.assert_close(second.cpu().double(), want, rtol=1e-3, atol=1e-5)
    nothing = fastloss.linear_sequence_loss(
        hidden, weight, torch.full_like(x["target"], -100), lambda part: part.logps.sum(), backend=backend
    )
    nothing.backward()
    assert nothing == 0 and not hidden.grad.any() and not weight.grad.any()


def test_errors() -> None:
    x = {k: v.cpu() for k, v in data().items()}
    x["input"].requires_grad_()
    scale = torch.ones((), requires_grad=True)
    for own, options, error, message in (
        (None, {}, TypeError, "loss_fn: expected a function"),
        (lambda part: part.logps, {}, ValueError, r"loss_fn: expected a 0-d tensor.* got shape \[5\]"),
        (lambda part: 1.0, {}, ValueError, "loss_fn: expected a 0-d tensor.* got float"),
        (lambda part: part.logps.detach().sum(), {}, ValueError, "loss_fn: expected a loss that depends"),
        (lambda part: (scale * part.logps).sum(), {}, ValueError, "another tensor of shape .* detach it"),
        (contrast, {"outputs": ("median",)}, ValueError, "outputs"),
        (contrast, {"target": x["target"].clamp(min=V)}, IndexError, "out of bounds"),
        (contrast, {"chunk_size": 0}, ValueError, "chunk_size"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fastloss.linear_sequence_loss(**{**x, "loss_fn": own, **options})
    with torch.no_grad():
        assert fastloss.linear_sequence_loss(**x, loss_fn=lambda part: part.logps.detach().sum()) < 0


@pytest.mark.parametrize("name", ["contrast", "of_tokens"])
def test_under_compile(name: str) -> None:
    """Where it is traced, tokens without a target are not left out; ``mask`` names them."""
    x = data()
    own, options = LOSSES[name]
    hidden, weight = x["input"].clone().requires_grad_(), x["linear_weight"].clone().requires_grad_()

    def call(h: Tensor, w: Tensor) -> Tensor:
        return fastloss.linear_sequence_loss(h, w, x["target"], own, linear_bias=x["linear_bias"], **options)

    torch.compile(call, backend="aot_eager", fullgraph=True)(hidden, weight).backward()
    want = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    call(hidden, weight).backward()
    for a, b in zip(want, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
