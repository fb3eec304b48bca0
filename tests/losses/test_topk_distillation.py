"""selected_logprobs and teachers of K classes against formulas written out here, on every backend, and their edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends_under_test import DEVICE, KERNELS, need
from instruction_sets import ISAS, forced, threads_of

import fastloss
from fastloss.tables import DISTILLATION_DIVERGENCES, TAILS

ROWS, DIM, VOCAB, K = 9, 6, 37, 5
Tensors = list[torch.Tensor]


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensors, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and bias; ids with padding, repeats, and a row of padding; the teacher's log-probs; targets."""
    g = torch.Generator().manual_seed(0)
    shapes = ((ROWS, DIM), (VOCAB, DIM), (VOCAB,))
    leaves = [torch.randn(s, generator=g).to(DEVICE, dtype).requires_grad_() for s in shapes]
    ids = torch.randint(VOCAB, (ROWS, K), generator=g)
    ids[0, 1], ids[1], ids[2, 1], ids[2, 4] = -1, -1, ids[2, 0], ids[2, 0]
    logprobs = torch.randn(ROWS, K, generator=g).log_softmax(-1) - 0.5
    target = torch.randint(VOCAB, (ROWS,), generator=g)
    target[4], target[5] = -100, ids[5, 3]
    return leaves, ids.to(DEVICE), logprobs.to(DEVICE, dtype), target.to(DEVICE)


def close(got: Tensors, right: Tensors, tolerance: float = 1e-5) -> None:
    for a, b in zip(got, right, strict=True):
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max().clamp(min=1e-3)


def test_selected_logprobs_by_hand() -> None:
    (x, w, b), ids, _, _ = batch()
    c = torch.linspace(-1, 2, ROWS * K, dtype=torch.float64, device=DEVICE).reshape(ROWS, K)
    z = torch.tanh((x @ w.t() + b) / 4) * 4 / 1.5
    expected = z.log_softmax(-1).gather(1, ids.clamp(min=0)) * (ids >= 0)
    out = fastloss.linear_selected_logprobs(x, w, ids, linear_bias=b, softcap=4.0, temperature=1.5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad((out * c).sum(), (x, w, b)), torch.autograd.grad((expected * c).sum(), (x, w, b))
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_selected_logprobs_on_every_backend(backend: str) -> None:
    need(backend)

    def run(dtype: torch.dtype, backend: str, **options: Any) -> Tensors:
        leaves, ids, _, _ = batch(dtype)
        out = fastloss.linear_selected_logprobs(
            leaves[0], leaves[1], ids, linear_bias=leaves[2], softcap=3.0, temperature=0.7, backend=backend, **options
        )  # fmt: skip
        logits = leaves[0].detach() @ leaves[1].detach().t()
        own = fastloss.selected_logprobs(logits.requires_grad_(), ids, backend=backend)
        return [
            out, *torch.autograd.grad(out.square().sum(), leaves), own, *torch.autograd.grad(own.square().sum(), logits)
        ]  # fmt: skip

    close(run(torch.float32, backend, chunk_size=4), run(torch.float64, "reference"), 2e-5)


OPTIONS: list[dict[str, Any]] = [
    {"reduction": "none"},
    {"temperature": 1.7, "hard_loss_coef": 0.3, "temperature_squared": True},
    {"hard_loss_coef": 0.3, "softcap": 4.0, "logit_scale": 1.3, "reduction": "sum"},
]
CASES = [
    (backend, tail, name, k)
    for backend in KERNELS
    for i, tail in enumerate(TAILS)
    for j, name in enumerate(DISTILLATION_DIVERGENCES)
    for k in range(len(OPTIONS))
    if (i + j + k) % 3 == 0 and (backend == "cpu" or j % 3 == 0)  # interpreted and emulated: in turn
]


@pytest.mark.parametrize(("backend", "tail", "name", "option"), CASES)
def test_kernels(backend: str, tail: str, name: str, option: int) -> None:
    need(backend)

    def run(dtype: torch.dtype, backend: str, **options: Any) -> Tensors:
        leaves, ids, logprobs, target = batch(dtype)
        given: dict[str, Any] = {"tail": tail, "divergence": name, "interpolation": 0.3, **OPTIONS[option]}
        target_or_none = target if "hard_loss_coef" in given else None
        out = fastloss.linear_topk_distillation_loss(
            leaves[0], leaves[1], ids, logprobs, target_or_none, linear_bias=leaves[2], backend=backend, **given, **options
        )  # fmt: skip
        logits = (leaves[0].detach() @ leaves[1].detach().t()).requires_grad_()
        own = fastloss.topk_distillation_loss(logits, ids, logprobs, target_or_none, backend=backend, **given)
        metrics = torch.stack([*out.metrics.values(), *own.metrics.values()])
        grads = torch.autograd.grad(out.loss.square().sum(), leaves)
        return [
            out.loss.detach(), *grads, own.loss.detach(), *torch.autograd.grad(own.loss.square().sum(), logits), metrics
        ]  # fmt: skip

    close(run(torch.float32, backend, chunk_size=4), run(torch.float64, "reference"), 3e-5)


BLOCKS: list[dict[str, Any]] = [
    {},
    {"memory": "low", "softcap": 6.0},
    {"memory": "fast", "reduction": "none"},
    {"chunk_size": 40, "bias": True, "ignored": True},
    {
        "memory": "low",
        "bias": True,
        "softcap": 6.0,
        "logit_scale": 1.3,
        "hard_loss_coef": 0.4,
        "ignored": True,
    },
    {"temperature": 0.8, "hard_loss_coef": 0.4, "reduction": "sum", "bias": True},
]
NEEDS = [("x", "w"), ("x",), ("w",), ("x", "w", "b"), ("x", "b"), ("b",)]


@pytest.mark.skipif(DEVICE != "cpu", reason="a schedule of the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_of_the_vocabulary(number: int, isa: str, dtype: torch.dtype) -> None:
    """Rows past D, several blocks; options, tails, divergences and frozen operands in turn, against the definition in float64."""
    rows, dim, vocab, k = 101, 24, 1100, 9
    g = torch.Generator().manual_seed(number)
    given = dict(BLOCKS[number])
    needs = NEEDS[(number + ISAS.index(isa)) % len(NEEDS)]
    bias = given.pop("bias", False) or "b" in needs
    shapes = {"x": (rows, dim), "w": (vocab, dim), "b": (vocab,)}
    leaves = {
        name: torch.randn(s, generator=g).to(dtype) for name, s in shapes.items() if name != "b" or bias
    }
    leaves["w"] *= 0.5
    ids = torch.randint(vocab, (rows, k), generator=g)
    ids[0], ids[1, 2:], ids[2, 3], ids[3] = -1, -1, ids[2, 0], torch.arange(250, 250 + k)
    logprobs = torch.randn(rows, k, generator=g).log_softmax(-1) - 0.2
    target = torch.randint(vocab, (rows,), generator=g)
    if given.pop("ignored", False):
        target[::5] = -100
    given |= {
        "tail": TAILS[number % 3],
        "divergence": DISTILLATION_DIVERGENCES[(number + 3 * ISAS.index(isa)) % 7],
    }

    def run(dtype: torch.dtype, backend: str) -> Tensors:
        own = {name: x.to(dtype, copy=True).requires_grad_(name in needs) for name, x in leaves.items()}
        head = {"linear_bias": own.get("b"), "backend": backend}
        out = fastloss.linear_topk_distillation_loss(
            own["x"], own["w"], ids, logprobs, target, **head, **given
        )
        made = torch.autograd.grad(out.loss.square().sum(), [own[name] for name in needs])
        form = {
            name: given[name] for name in ("softcap", "temperature", "chunk_size", "memory") if name in given
        }
        selected = fastloss.linear_selected_logprobs(own["x"], own["w"], ids, **head, **form)
        made += torch.autograd.grad(selected.square().mean(), [own[name] for name in needs])
        return [out.loss.detach(), torch.stack([*out.metrics.values()]), selected.detach(), *made]

    def plan(**head: Any) -> Any:
        return fastloss.explain(
            fastloss.linear_topk_distillation_loss, *args, ids, logprobs, target, **head, **given
        )

    with forced(isa):
        args = [leaves[name].clone().requires_grad_(name in needs) for name in "xw"]
        schedule = plan(linear_bias=leaves.get("b"))["schedule"]
        assert schedule == "blocks of the vocabulary" or dtype == torch.bfloat16
        close(run(dtype, "cpu"), run(torch.float64, "reference"), 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(DEVICE != "cpu", reason="a schedule of the CPU")
@pytest.mark.parametrize("tail", TAILS)
def test_a_row_has_the_same_bits_in_any_batch(tail: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(300, 40, generator=g), torch.randn(700, 40, generator=g)
    ids = torch.randint(700, (300, 6), generator=g)
    logprobs = torch.randn(300, 6, generator=g).log_softmax(-1)

    def rows(some: slice, w: torch.Tensor = w, **options: Any) -> torch.Tensor:
        return fastloss.linear_topk_distillation_loss(
            x[some], w, ids[some], logprobs[some], tail=tail, reduction="none", **options
        ).loss.detach()  # fmt: skip

    whole = rows(slice(None))
    for some in (slice(0, 1), slice(7, 140), slice(290, 300)):
        assert torch.equal(rows(some), whole[some])
    for options in (
        {"chunk_size": 9},
        {"memory": "low"},
        {"memory": "fast", "w": w.clone().requires_grad_()},
    ):
        assert torch.equal(rows(slice(None), **options), whole)
    for threads in (1, 3):
        with threads_of(threads):
            assert torch.equal(rows(slice(None)), whole)
    # Log-probabilities of given classes are those of every other function.
    own = fastloss.linear_token_stats(x, w, ids[:, 2]).logprobs
    assert torch.equal(fastloss.linear_selected_logprobs(x, w, ids)[:, 2], own)


def test_bin_by_hand() -> None:
    """The K classes and the rest, as a divergence of K + 1 outcomes written out."""
    (x, w, _), ids, logprobs, _ = batch()
    ids = torch.stack(
        [torch.randperm(VOCAB, generator=torch.Generator().manual_seed(i))[:K] for i in range(ROWS)]
    )
    p = torch.cat([logprobs.exp(), 1 - logprobs.exp().sum(1, keepdim=True)], 1)
    q = (x @ w.t()).softmax(-1).gather(1, ids.to(DEVICE))
    q = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1)
    loss = fastloss.linear_topk_distillation_loss(x, w, ids.to(DEVICE), logprobs).loss
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)))


def test_verl_forward_kl_topk() -> None:
    """verl's expression: exp(t) (t - s) over the teacher's top K, s the student's log-probs over the whole vocabulary."""
    (x, w, _), ids, logprobs, _ = batch()
    kept = ids.clamp(min=0)
    kept[2] = torch.arange(K)
    student = (x @ w.t()).log_softmax(-1).gather(1, kept)
    expected = torch.nn.functional.kl_div(student, logprobs, reduction="none", log_target=True).sum(1)
    keep = [i for i in range(ROWS) if len(set(kept[i].tolist())) == K]
    loss = fastloss.linear_topk_distillation_loss(x, w, kept, logprobs, tail="none", reduction="none").loss
    torch.testing.assert_close(loss[keep], expected[keep])
    assert len(keep) >= 5


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", DISTILLATION_DIVERGENCES)
def test_teacher_is_student(name: str, tail: str) -> None:
    """All V classes in any order: the loss is 0 to rounding, and so is its gradient."""
    z = 3 * torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    z = z.to(DEVICE).requires_grad_()
    ids = torch.stack([torch.randperm(11) for _ in range(6)]).to(DEVICE)
    teacher = z.detach().log_softmax(-1).gather(1, ids)
    loss = fastloss.topk_distillation_loss(
        z, ids, teacher, divergence=name, tail=tail, interpolation=0.4
    ).loss
    assert loss.abs() <= 1e-6
    if name != "tvd":  # whose slope jumps at p = q
        assert torch.autograd.grad(loss, z)[0].abs().max() <= 2e-6


def test_a_rest_of_little_mass() -> None:
    """Where the K classes have all but e^-40, the rest keeps its digits in float32."""
    z = torch.tensor([[0.0, 1.0, -40.0, -41.0]], device=DEVICE).requires_grad_()
    ids, t = torch.tensor([[0, 1]], device=DEVICE), torch.tensor([[0.2, 0.7]], device=DEVICE).log()
    loss = fastloss.topk_distillation_loss(z, ids, t).loss
    right = z.detach().double().requires_grad_()
    expected = fastloss.topk_distillation_loss(right, ids, t.double(), backend="reference").loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, z)[0].double(),
        torch.autograd.grad(expected, right)[0],
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(tail: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g).double().to(DEVICE).requires_grad_() for s in ((2, 3), (5, 3)))
    ids = torch.tensor([[1, 4, 1], [-1, 0, 3]], device=DEVICE)
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [0.0, -math.inf, -0.7]], device=DEVICE).double()
    target = torch.tensor([2, 3], device=DEVICE)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return fastloss.linear_topk_distillation_loss(
            x, w, ids, logprobs, target, tail=tail, divergence="jsd", hard_loss_coef=0.2
        ).loss

    assert torch.autograd.gradcheck(loss, (x, w))


def test_compiled() -> None:
    (x, w, _), ids, logprobs, target = batch(torch.float32)

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a = fastloss.linear_topk_distillation_loss(x, w, ids, logprobs, target, hard_loss_coef=0.1)
        b = fastloss.linear_topk_distillation_loss(x, w, ids, logprobs, tail="none", reduction="none")
        c = fastloss.topk_distillation_loss(x @ w.t(), ids, logprobs, divergence="reverse_kl")
        d = fastloss.linear_selected_logprobs(x, w, ids) + fastloss.selected_logprobs(x @ w.t(), ids)
        return (a.loss + 2 * b.loss + c.loss + a.metrics["mass"]).sum() + d.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    right = run(x, w)
    got = compiled(x, w)
    torch.testing.assert_close(got, right)
    torch.testing.assert_close(torch.autograd.grad(got, (x, w)), torch.autograd.grad(right, (x, w)))


def test_nothing_counts() -> None:
    (x, w, _), ids, logprobs, _ = batch(torch.float32)
    for n, masked in ((0, ids[:0]), (ROWS, torch.full_like(ids, -1))):
        loss = fastloss.linear_topk_distillation_loss(x[:n], w, masked, logprobs[:n]).loss
        assert loss == 0
        assert all(not g.any() for g in torch.autograd.grad(loss, (x, w)))
        assert not fastloss.linear_selected_logprobs(x[:n], w, masked).any()


def test_errors() -> None:
    (x, w, _), ids, logprobs, _ = batch(torch.float32)
    with pytest.raises(ValueError, match="teacher_ids: expected at most 3 ids"):
        fastloss.linear_topk_distillation_loss(x, w[:3], ids, logprobs)
    with pytest.raises(ValueError, match="tail: expected"):
        fastloss.linear_topk_distillation_loss(x, w, ids, logprobs, tail="cut")
    with pytest.raises(ValueError, match="hard_loss_coef: expected 0 where target is None"):
        fastloss.linear_topk_distillation_loss(x, w, ids, logprobs, hard_loss_coef=1.0)
    if DEVICE == "cpu":
        ids[3, 2] = VOCAB
        for call in (
            lambda: fastloss.linear_topk_distillation_loss(x, w, ids, logprobs),
            lambda: fastloss.selected_logprobs(x @ w.t(), ids),
        ):
            with pytest.raises(IndexError):
                call()
