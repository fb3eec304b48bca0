"""A temperature for each token, in every function that takes logits or a head; token weights and a dtype of plain cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_under_test import ALL, DEVICE, need
from torch import Tensor

import fastloss
from fastloss.engine import head_blocks

ROWS, VOCAB, DIM = 8, 130, 16
Loss = Callable[..., Tensor]


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


TEMPERATURE = torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64)
TARGET = torch.arange(ROWS) * 13
TARGET[3] = -100


def target() -> Tensor:
    return TARGET.to(DEVICE)


def temperature(dtype: torch.dtype = torch.float64) -> Tensor:
    return TEMPERATURE.to(DEVICE, dtype)


def cross_entropy(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    return fastloss.linear_cross_entropy(hidden, weight, target(), z_loss=1e-3, temperature=t, **o)


def per_row(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    loss = fastloss.linear_cross_entropy(hidden, weight, target(), temperature=t, reduction="none", **o)
    return (loss * loss.detach()).sum()


def smoothed(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    return fastloss.linear_cross_entropy(
        hidden, weight, target(), label_smoothing=0.1, token_weight=temperature(torch.float32), temperature=t, **o
    )  # fmt: skip


def statistics(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    names = ("logprobs", "entropy", "logsumexp")
    out = fastloss.linear_token_stats(hidden, weight, target(), outputs=names, temperature=t, **o)
    return (out.logprobs * 2 + out.entropy - out.logsumexp).sum()


def frozen(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    return fastloss.linear_token_stats(hidden, weight.detach(), target(), temperature=t, **o).logprobs.sum()


def _grouped(x: Tensor) -> Tensor:
    return x.view(2, ROWS // 2, *x.shape[1:])


def dpo(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    t = _grouped(t) if isinstance(t, Tensor) else t
    return fastloss.linear_dpo_loss(
        _grouped(hidden), weight, _grouped(target()), reference_free=True, temperature=t, **o
    ).loss


def kto(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    t = _grouped(t) if isinstance(t, Tensor) else t
    good = torch.tensor([True, False], device=DEVICE)
    return fastloss.linear_kto_loss(
        _grouped(hidden), weight, _grouped(target()), good, kl=0.0, temperature=t, **o
    ).loss


def policy(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    t = _grouped(t) if isinstance(t, Tensor) else t
    mask, old = _grouped(target()) >= 0, torch.full((2, ROWS // 2), -4.8, device=DEVICE)
    return fastloss.linear_policy_loss(
        _grouped(hidden), weight, _grouped(target()).clamp(min=0), old, torch.tensor([1.0, -0.5], device=DEVICE), mask,
        entropy_coef=0.1, temperature=t, **o,
    ).loss  # fmt: skip


def supervised(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    return fastloss.linear_supervised_loss(
        hidden, weight, target(), loss_type="eaft", temperature=t, **o
    ).loss


def supervised_none(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    out = fastloss.linear_supervised_loss(
        hidden, weight, target(), loss_type="deft", reduction="none", temperature=t, **o
    )
    return (out.loss * out.loss.detach()).sum()


def _ids() -> Tensor:
    """A repeated class, and padding; the row without a class is left out."""
    ids = torch.arange(ROWS * 4, device=DEVICE).view(ROWS, 4) % VOCAB
    ids[:, 3], ids[1, 2:], ids[3] = ids[:, 0], -1, -1
    return ids


def selected(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    logp = fastloss.linear_selected_logprobs(hidden, weight, _ids(), temperature=t, **o)
    return (logp * logp.detach()).mean()


def _topk(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    logp = torch.linspace(-3, -1.5, ROWS * 4, device=DEVICE).view(ROWS, 4)
    out = fastloss.linear_topk_distillation_loss(hidden, weight, _ids(), logp, target(), temperature=t, **o)
    return (out.loss * out.loss.detach()).sum()


def topk(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    return _topk(hidden, weight, t, divergence="jsd", **o)


def topk_none(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    return _topk(hidden, weight, t, tail="renormalize", reduction="none", **o)


def _two_heads(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    """The teacher's logits are divided by the same temperature through its hidden states, or by the function."""
    theirs, head = made(ROWS, 6).to(hidden.dtype), made(VOCAB, 6).to(hidden.dtype)
    if not isinstance(t, Tensor):
        theirs = theirs / temperature(hidden.dtype)[:, None]
    out = fastloss.linear_distillation_loss(hidden, weight, theirs, head, target(), temperature=t, **o)
    return (out.loss * out.loss.detach()).sum()


def two_heads(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    return _two_heads(hidden, weight, t, divergence="skewed_reverse_kl", interpolation=0.3, **o)


def two_heads_none(hidden: Tensor, weight: Tensor, t: Any, **o: Any) -> Tensor:
    return _two_heads(hidden, weight, t, reduction="none", **o)


HEADS = (
    cross_entropy, per_row, smoothed, statistics, frozen, dpo, kto, policy, supervised, supervised_none, selected, topk, topk_none,
    two_heads, two_heads_none,
)  # fmt: skip


def _gradients(
    loss: Loss, t: Any, dtype: torch.dtype, divide: Tensor | None = None, **o: Any
) -> list[Tensor]:
    hidden, weight = (made(n, DIM, dtype=dtype).requires_grad_() for n in (ROWS, VOCAB))
    value = loss(hidden if divide is None else hidden / divide[:, None], weight, t, **o)
    grads = torch.autograd.grad(value, [hidden, weight], allow_unused=True)
    return [value.detach(), *(value.new_zeros(0) if g is None else g for g in grads)]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("loss", HEADS)
def test_a_head_divides_each_tokens_logits(loss: Loss, backend: str) -> None:
    """Without bias and soft-cap that is dividing its hidden state."""
    need(backend)
    expected = _gradients(loss, 1.0, torch.float64, temperature(), backend="reference")
    got = _gradients(loss, temperature(), torch.float32, backend=backend)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("memory", ["low", "fast"])
@pytest.mark.parametrize("loss", HEADS)
def test_every_schedule_of_the_cpu_has_it(loss: Loss, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu")
    blocks = _gradients(loss, temperature(), torch.float32, backend="cpu", memory=memory)
    monkeypatch.setattr(head_blocks, "ENABLED", False)
    chunks = _gradients(loss, temperature(), torch.float32, backend="cpu", memory=memory)
    for a, b in zip(blocks, chunks, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def _capped(logits: Tensor, bias: Tensor | None, t: Tensor) -> Tensor:
    z = logits.double() if bias is None else logits.double() + bias.double()
    return 1.5 * 3.0 * torch.tanh(z / 3.0) / t[:, None]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_bias_soft_cap_and_scale(dtype: torch.dtype, backend: str) -> None:
    need(backend)
    logits, bias = made(ROWS, VOCAB, dtype=dtype), made(VOCAB)
    options: dict[str, Any] = {
        "softcap": 3.0,
        "logit_scale": 1.5,
        "temperature": temperature(),
        "backend": backend,
    }
    x = logits.clone().requires_grad_()
    loss = fastloss.cross_entropy(x, target(), label_smoothing=0.1, loss_dtype=torch.float32, **options)
    y = logits.double().requires_grad_()
    expected = F.cross_entropy(_capped(y, None, temperature()), target(), label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    got, right = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, y)[0]
    torch.testing.assert_close(got.double(), right, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    stats = fastloss.token_stats(logits, target(), outputs=("logprobs", "entropy", "is_top1"), **options)
    z = _capped(logits, None, temperature())
    kept = target() >= 0
    logp = z.log_softmax(-1)
    torch.testing.assert_close(
        stats.logprobs.double(),
        logp.gather(1, target().clamp(min=0)[:, None])[:, 0] * kept,
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        stats.entropy.double(), -(logp.exp() * logp).sum(1) * kept, rtol=1e-5, atol=1e-5
    )
    if dtype == torch.float32:  # the head's logits are these
        eye = torch.eye(VOCAB, device=DEVICE)
        head = fastloss.linear_cross_entropy(logits, eye, target(), linear_bias=bias, **options)
        expected = F.cross_entropy(_capped(logits, bias, temperature()), target())
        torch.testing.assert_close(head.double(), expected, rtol=1e-5, atol=1e-6)


def test_shapes_of_tokens() -> None:
    """Tokens of any shape, one for each sequence, places of a K-dimensional loss, class probabilities, one token."""
    logits, t = made(2, 4, VOCAB).double(), _grouped(temperature())
    classes = _grouped(target())
    expected = F.cross_entropy((logits / t[..., None]).flatten(0, 1), classes.flatten())
    torch.testing.assert_close(fastloss.cross_entropy(logits.movedim(2, 1), classes, temperature=t), expected)
    per_sequence = t[:, :1]
    torch.testing.assert_close(
        fastloss.token_stats(logits, classes, temperature=per_sequence).logprobs,
        fastloss.token_stats(logits, classes, temperature=per_sequence.expand(2, 4)).logprobs,
    )
    probabilities = logits.flatten(0, 1).softmax(-1)
    flat, each = logits.flatten(0, 1), temperature()
    torch.testing.assert_close(
        fastloss.cross_entropy(flat, probabilities, temperature=each),
        F.cross_entropy(flat / each[:, None], probabilities),
    )
    torch.testing.assert_close(
        fastloss.cross_entropy(flat[0], classes[0, 0], temperature=each[1]),
        F.cross_entropy(flat[0] / each[1], classes[0, 0]),
    )
    weight, places = made(VOCAB, 3, DIM).double(), torch.arange(ROWS * 3, device=DEVICE).view(ROWS, 3)
    hidden, own = (
        made(ROWS, DIM).double(),
        torch.linspace(0.5, 2, ROWS * 3, dtype=torch.float64, device=DEVICE).view(ROWS, 3),
    )
    z = torch.einsum("nd,vkd->nvk", hidden, weight) / own[:, None]
    got = fastloss.linear_cross_entropy(hidden, weight, places, temperature=own, token_weight=own)
    torch.testing.assert_close(got, (F.cross_entropy(z, places, reduction="none") * own).mean())
    ids = torch.arange(ROWS * 4, device=DEVICE).view(2, 4, 4)
    torch.testing.assert_close(
        fastloss.selective_log_softmax(logits, ids, temperature=t),
        (logits / t[..., None]).log_softmax(-1).gather(-1, ids),
    )


def test_a_temperature_that_does_not_fit() -> None:
    logits = made(ROWS, VOCAB)
    for wrong, message in (
        (temperature()[:3], r"temperature: expected a number, or shape \[8\], got \[3\]"),
        (temperature() - 0.4, "temperature: expected finite numbers > 0"),
        (temperature().clone().requires_grad_(), "requires no gradient"),
        (0.0, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            fastloss.cross_entropy(logits, target(), temperature=wrong)
        with pytest.raises(ValueError, match=message):
            fastloss.token_stats(logits, target(), temperature=wrong)
    with pytest.raises(TypeError, match="temperature"):
        fastloss.cross_entropy(
            logits, target(), temperature=torch.ones(ROWS, dtype=torch.int64, device=DEVICE)
        )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weights_of_logits(reduction: str, backend: str) -> None:
    need(backend)
    x = made(ROWS, VOCAB).requires_grad_()
    w, classes = temperature(torch.float32).clone(), made(VOCAB).abs()
    w[3] = torch.nan  # its token is ignored
    loss = fastloss.cross_entropy(
        x, target(), classes, reduction=reduction, token_weight=w, z_loss=0.0, backend=backend
    )
    y = x.detach().double().requires_grad_()
    each = F.cross_entropy(y, target(), classes.double(), reduction="none") * torch.where(
        target() < 0, 0.0, w.double()
    )
    total = {
        "mean": each.sum() / classes.double()[target()[target() >= 0]].sum(),
        "sum": each.sum(),
        "none": each,
    }[reduction]
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-6)
    up = torch.ones_like(total)
    got, right = torch.autograd.grad(loss, x, up.float())[0], torch.autograd.grad(total, y, up)[0]
    torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)


def test_token_weights_with_other_options() -> None:
    x, w = made(ROWS, VOCAB).to(torch.bfloat16), temperature(torch.float32)
    given = x.clone().requires_grad_()
    loss, stats = fastloss.cross_entropy(
        given * 1,
        target(),
        token_weight=w,
        normalizer=5,
        inplace=True,
        return_stats=True,
        loss_dtype=torch.float32,
    )
    each = F.cross_entropy(x.float(), target(), reduction="none")
    assert loss.dtype == torch.float32 and stats.logprobs is not None
    torch.testing.assert_close(loss, (each * w).sum() / 5)
    loss.backward()
    y = x.float().requires_grad_()
    (F.cross_entropy(y, target(), reduction="none") * w / 5).sum().backward()
    assert given.grad is not None and y.grad is not None
    torch.testing.assert_close(given.grad.float(), y.grad, rtol=1e-2, atol=1e-5)
    learned = w.double().requires_grad_()
    torch.autograd.gradcheck(
        lambda a, b: fastloss.cross_entropy(a, target(), token_weight=b),
        (x.double().requires_grad_(), learned),
    )


@pytest.mark.parametrize("loss", (cross_entropy, per_row, statistics, frozen))
def test_compiled_once_for_every_temperature(loss: Loss) -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for factor in (1.0, 0.5, 2.0):
        t = temperature(torch.float32) * factor
        expected, got = _gradients(loss, t, torch.float32), _gradients(compiled, t, torch.float32)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_compiled_cross_entropy_of_logits() -> None:
    torch.compiler.reset()

    def loss(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return fastloss.cross_entropy(x, target(), temperature=t, token_weight=w)

    x, t, w = (
        made(ROWS, VOCAB).requires_grad_(),
        temperature(torch.float32),
        temperature(torch.float32).flip(0),
    )
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, w), loss(x, t, w))
    a, b = (torch.autograd.grad(f(x, t, w), x)[0] for f in (compiled, loss))
    torch.testing.assert_close(a, b)
    torch.compiler.reset()


def test_second_derivatives_and_transforms() -> None:
    t = temperature()
    x = made(ROWS, 5).double().requires_grad_()
    classes = target().clamp(max=4)

    def loss(a: Tensor) -> Tensor:
        return fastloss.cross_entropy(a, classes, temperature=t, token_weight=t)

    torch.autograd.gradgradcheck(loss, (x,))
    torch.autograd.gradgradcheck(lambda a: fastloss.token_stats(a, classes, temperature=t).logprobs, (x,))

    def of_one(row: Tensor, c: Tensor, own: Tensor) -> Tensor:
        return fastloss.cross_entropy(row[None], c[None], temperature=own[None])

    kept = classes >= 0
    rows, cs, ts = x.detach()[kept], classes[kept], t[kept]
    got = torch.vmap(torch.func.grad(of_one))(rows, cs, ts)
    expected = torch.stack([torch.func.grad(of_one)(*each) for each in zip(rows, cs, ts, strict=True)])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ALL)
def test_a_supervised_loss_of_logits(backend: str) -> None:
    need(backend)
    for loss_type, compiled in (("dft", False), ("focal", backend == "cpu")):
        x = made(ROWS, VOCAB).requires_grad_()

        def loss(x: Tensor, t: Tensor, loss_type: str = loss_type) -> Tensor:
            return fastloss.supervised_loss(
                x, target(), loss_type=loss_type, temperature=t, backend=backend
            ).loss

        step = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        y = x.detach().double().requires_grad_()
        divided = y / temperature()[:, None]
        right = fastloss.supervised_loss(divided, target(), loss_type=loss_type, backend="reference").loss
        got = step(x, temperature())
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(got, x)[0].double(), torch.autograd.grad(right, y)[0]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_a_supervised_loss_of_a_head_compiled() -> None:
    expected = _gradients(supervised, temperature(), torch.float32)
    step = torch.compile(supervised, fullgraph=True, backend="aot_eager")
    for a, b in zip(_gradients(step, temperature(), torch.float32), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


TEACHER = made(ROWS, VOCAB).flip(1).to(torch.bfloat16)


def _taught(x: Tensor, t: Any, name: str, **o: Any) -> Tensor:
    """Losses of logits, whose hard loss is at temperature 1 and whose divergence is multiplied by T²."""
    how: dict[str, Any] = {"temperature": t, **o}
    if name == "selected_logprobs":
        return (fastloss.selected_logprobs(x, _ids(), softcap=3.0, logit_scale=1.5, **how) ** 2).sum()
    how |= {"hard_loss_coef": 0.3, "temperature_squared": True, "token_weight": temperature(torch.float32)}
    if name == "distillation_loss":
        teacher = TEACHER.to(x.dtype)
        how["teacher_temperature"] = how["temperature"] * 2
        return fastloss.distillation_loss(x, teacher, target(), divergence="jsd", **how).loss
    logp = torch.linspace(-3, -1.5, ROWS * 4, device=DEVICE).view(ROWS, 4)
    return fastloss.topk_distillation_loss(
        x, _ids(), logp, target(), divergence="alpha", softcap=3.0, **how
    ).loss


TAUGHT = ("selected_logprobs", "distillation_loss", "topk_distillation_loss")


def _one_by_one(x: Tensor, name: str) -> Tensor:
    """Each token by a call of its own, with its temperature as a number."""

    def alone(n: int, t: float) -> Tensor:
        mine = torch.arange(ROWS, device=DEVICE) == n
        kept = target().where(mine, -100)
        if name == "selected_logprobs":
            logp = fastloss.selected_logprobs(
                x[n : n + 1],
                _ids()[n : n + 1],
                softcap=3.0,
                logit_scale=1.5,
                temperature=t,
                backend="reference",
            )
            return (logp**2).sum()
        how: dict[str, Any] = {
            "hard_loss_coef": 0.3, "temperature_squared": True, "token_weight": temperature(torch.float32), "temperature": t,
            "reduction": "sum", "backend": "reference",
        }  # fmt: skip
        if name == "distillation_loss":
            teacher = TEACHER.to(x.dtype)
            return fastloss.distillation_loss(
                x, teacher, kept, divergence="jsd", teacher_temperature=2 * t, **how
            ).loss
        logp = torch.linspace(-3, -1.5, ROWS * 4, device=DEVICE).view(ROWS, 4)
        return fastloss.topk_distillation_loss(
            x, _ids(), logp, kept, divergence="alpha", softcap=3.0, **how
        ).loss

    total = torch.stack([alone(n, t) for n, t in enumerate(temperature().tolist())]).sum()
    return total if name == "selected_logprobs" else total / (target() >= 0).sum()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", TAUGHT)
def test_losses_of_logits_that_learn_from_a_teacher(name: str, backend: str) -> None:
    need(backend)
    y = made(ROWS, VOCAB).double().requires_grad_()
    expected = _one_by_one(y, name)
    right = torch.autograd.grad(expected, y)[0]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = made(ROWS, VOCAB).to(dtype).requires_grad_()
        if dtype == torch.bfloat16:
            y = x.detach().double().requires_grad_()
            expected = _one_by_one(y, name)
            right = torch.autograd.grad(expected, y)[0]
        got = _taught(x, temperature(), name, backend=backend)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
        grad = torch.autograd.grad(got, x)[0]
        torch.testing.assert_close(grad.double(), right, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", TAUGHT)
def test_losses_of_logits_compiled_once_for_every_temperature(name: str) -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return _taught(x, t, name)

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for factor in (1.0, 2.0):
        x, t = made(ROWS, VOCAB).requires_grad_(), temperature(torch.float32) * factor
        expected, got = loss(x, t), compiled(x, t)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (got, expected)))
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("name", TAUGHT)
def test_a_teachers_temperature_that_does_not_fit(name: str) -> None:
    for wrong, message in (
        (temperature()[:3], r"temperature: expected a number, or shape \[8\], got \[3\]"),
        (temperature() - 0.4, "temperature: expected finite numbers > 0"),
        (temperature().clone().requires_grad_(), "requires no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            _taught(made(ROWS, VOCAB), wrong, name)
    if name == "distillation_loss":
        x = made(ROWS, VOCAB)
        with pytest.raises(ValueError, match="teacher_temperature: expected finite numbers > 0"):
            fastloss.distillation_loss(x, x, teacher_temperature=temperature() - 0.4)


def test_second_derivatives_of_losses_with_a_teacher() -> None:
    x = made(ROWS, VOCAB)[:2, :5].double().requires_grad_()
    t, ids = temperature()[:2], _ids()[:2] % 5
    torch.autograd.gradgradcheck(lambda a: fastloss.selected_logprobs(a, ids, temperature=t), (x,))
    teacher = TEACHER[:2, :5].double()
    torch.autograd.gradgradcheck(
        lambda a: fastloss.distillation_loss(a, teacher, temperature=t, temperature_squared=True).loss, (x,)
    )
