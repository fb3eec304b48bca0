"""A LoRA on the head (``lora=``): every loss from a head against the same loss of the merged matrix in float64."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from backends_under_test import ALL, DEVICE, need
from torch.utils.flop_counter import FlopCounterMode

import fastloss
from fastloss.engine import devices, head_exponentials, head_rows
from fastloss.engine.backend import get_backend
from fastloss.engine.head import make_head
from fastloss.engine.head_types import Needs

B, T, DIM, VOCAB, RANK, SCALE = 4, 9, 16, 77, 3, 0.5
NAMES = ("hidden", "weight", "bias", "a", "b")


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers():
    """Float64 that bfloat16 has too."""
    shapes = {
        "hidden": (B, T, DIM),
        "weight": (VOCAB, DIM),
        "bias": (VOCAB,),
        "a": (RANK, DIM),
        "b": (VOCAB, RANK),
    }
    factors = {"hidden": 1.0, "weight": 0.25, "bias": 0.5, "a": 0.3, "b": 0.5}
    x = {name: randn(*shape, seed=n) * factors[name] for n, (name, shape) in enumerate(shapes.items())}
    return {name: value.to(torch.bfloat16).double() for name, value in x.items()}


# torch.compile traces what reads them, and no generator.
TARGET = torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(9)).to(DEVICE)
TARGET[:, :2] = -100
IDS = torch.randint(0, VOCAB, (B, T, 4), generator=torch.Generator().manual_seed(5)).to(DEVICE)
CONSTANTS = {
    "old": -randn(B, T, seed=20).abs(), "advantages": randn(B, seed=21), "ref_hidden": randn(B, T, DIM, seed=30),
    "ref_weight": randn(VOCAB, DIM, seed=31) / 4, "token_weight": randn(B, T, seed=40).abs(), "temperature": 0.5 + randn(B, T, seed=41).abs(),
    "upstream": randn(B, T, seed=42), "teacher_hidden": randn(B, T, 8, seed=50), "teacher_weight": randn(VOCAB + 5, 8, seed=51) / 4,
    "teacher_logprobs": -2 - randn(B, T, 4, seed=60).abs(), "class_weight": torch.linspace(0.5, 2, VOCAB, dtype=torch.float64),
}  # fmt: skip


def constant(name, like):
    return CONSTANTS[name].to(like.device, like.dtype)


def with_entropy(out):
    return out.logprobs.sum() + 0.3 * out.entropy.sum() + 0.1 * out.logsumexp.sum()


def policy(h, w, **o):
    classes, mask = TARGET.clamp(min=0), TARGET >= 0
    return fastloss.linear_policy_loss(
        h, w, classes, constant("old", h), constant("advantages", h), mask, **o
    ).loss


def own_loss(part):
    return -(part.logps * part.logps.detach().sigmoid()).sum()


def reference_model(h):
    return {"ref_input": constant("ref_hidden", h), "ref_weight": constant("ref_weight", h)}


LOSSES = {
    "cross_entropy": lambda h, w, **o: fastloss.linear_cross_entropy(h, w, TARGET, **o),
    "cross_entropy, every option": lambda h, w, **o: fastloss.linear_cross_entropy(
        h, w, TARGET, label_smoothing=0.1, z_loss=1e-2, softcap=5.0, logit_scale=1.5, weight=constant("class_weight", h),
        token_weight=constant("token_weight", h), temperature=constant("temperature", h), **o,
    ),
    "cross_entropy, a loss a token": lambda h, w, **o: (
        fastloss.linear_cross_entropy(h, w, TARGET, reduction="none", **o) * constant("upstream", h)
    ).sum(),
    "token_stats": lambda h, w, **o: fastloss.linear_token_stats(h, w, TARGET, **o).logprobs.sum(),
    "token_stats, three": lambda h, w, **o: with_entropy(
        fastloss.linear_token_stats(h, w, TARGET, outputs=("logprobs", "entropy", "logsumexp"), temperature=0.7, **o)
    ),
    "supervised": lambda h, w, **o: fastloss.linear_supervised_loss(h, w, TARGET, loss_type="eaft", **o).loss,
    "dpo": lambda h, w, **o: fastloss.linear_preference_loss(h, w, TARGET, **reference_model(h), **o).loss,
    "dpo, aot": lambda h, w, **o: fastloss.linear_preference_loss(
        h, w, TARGET, loss_type="aot", reference_free=True, **o
    ).loss,
    "kto": lambda h, w, **o: fastloss.linear_kto_loss(
        h, w, TARGET, torch.tensor([True, False] * 2, device=DEVICE), kl=0.1, **reference_model(h), **o
    ).loss,
    "policy": policy,
    "policy, sequences": lambda h, w, **o: policy(h, w, loss_type="gspo", **o),
    "policy, entropy": lambda h, w, **o: policy(h, w, entropy_coef=0.1, **o),
    "sequence_loss": lambda h, w, **o: fastloss.linear_sequence_loss(h, w, TARGET, own_loss, **o),
    "distillation": lambda h, w, **o: fastloss.linear_distillation_loss(
        h, w, constant("teacher_hidden", h), constant("teacher_weight", h), TARGET, divergence="jsd", hard_loss_coef=0.5, **o
    ).loss,
    "topk_distillation": lambda h, w, **o: fastloss.linear_topk_distillation_loss(
        h, w, IDS, constant("teacher_logprobs", h), TARGET, hard_loss_coef=0.5, temperature=2.0, **o
    ).loss,
    "selected_logprobs": lambda h, w, **o: fastloss.linear_selected_logprobs(h, w, IDS, softcap=8.0, **o).sin().sum(),
}  # fmt: skip


def leaves(dtype, frozen=()):
    return {name: x.to(dtype).to(DEVICE).requires_grad_(name not in frozen) for name, x in numbers().items()}


def merged(loss, with_bias, frozen=()):
    """The value and the gradients in float64, from W + scale · B A."""
    x = leaves(torch.float64, frozen)
    options = {"linear_bias": x["bias"]} if with_bias else {}
    value = loss(x["hidden"], x["weight"] + SCALE * (x["b"] @ x["a"]), backend="reference", **options)
    value.backward()
    return value.detach(), {name: x[name].grad for name in NAMES}


def adapted(loss, dtype, with_bias, frozen=(), ready=False, **options):
    """The same from ``lora=``; ``ready``: u is made by the caller."""
    x = leaves(dtype, frozen)
    if with_bias:
        options["linear_bias"] = x["bias"]
    lora = (x["a"], x["b"], SCALE)
    if ready:
        lora = (x["hidden"] @ x["a"].T * SCALE, x["b"])
    value = loss(x["hidden"], x["weight"], lora=lora, **options)
    value.backward()
    return value.detach(), {name: x[name].grad for name in NAMES}


def assert_same(got, want, tolerance):
    (value, grads), (exact, exact_grads) = got, want
    torch.testing.assert_close(value.double(), exact, atol=tolerance, rtol=tolerance)
    for name in NAMES:
        if exact_grads[name] is None:
            assert grads[name] is None, name
            continue
        limit = tolerance * float(exact_grads[name].abs().max())
        torch.testing.assert_close(
            grads[name].double(), exact_grads[name], atol=limit, rtol=tolerance, msg=name
        )


WITH_KERNELS_OF_THEIR_OWN = (
    "cross_entropy, every option",
    "token_stats, three",
    "dpo",
    "distillation",
    "selected_logprobs",
)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", LOSSES)
def test_is_the_merged_head(name, backend):
    if (
        backend in ("cuda", "triton")
        and name not in WITH_KERNELS_OF_THEIR_OWN
        and not os.environ.get("FASTLOSS_TEST_SLOW")
    ):
        pytest.skip("the head is one: FASTLOSS_TEST_SLOW=1 runs every loss")
    need(backend)
    loss = LOSSES[name]
    runs = [(torch.float32, True, ("weight",), {})]
    if backend in ("reference", "cpu"):
        runs += [
            (torch.float64, False, (), {}),
            (torch.float64, True, ("weight", "bias"), {"ready": True}),
            (torch.float32, False, ("weight",), {"chunk_size": 7}),
        ]
    for dtype, with_bias, frozen, options in runs:
        want = merged(loss, with_bias, frozen)
        got = adapted(loss, dtype, with_bias, frozen, backend=backend, **options)
        assert_same(got, want, 1e-12 if dtype == torch.float64 else 3e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cross_entropy", "token_stats, three", "dpo", "policy", "distillation"])
def test_low_precision(name, dtype, backend):
    """As exact as the merged head, whose matrix is rounded once more."""
    want = merged(LOSSES[name], True)
    assert_same(adapted(LOSSES[name], dtype, True, backend=need(backend)), want, 3e-2)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_float_logits_and_memory(backend):
    loss = LOSSES["cross_entropy"]
    want = merged(loss, True)
    for memory in ("low", "fast"):
        got = adapted(
            loss, torch.bfloat16, True, backend=need(backend), memory=memory, logits_dtype=torch.float32
        )
        assert_same(got, want, 2e-2)


def test_adapters_of_another_dtype():
    """PEFT keeps its matrices in float32 beside a model in bfloat16: their gradients are float32."""
    x = numbers()
    want = merged(LOSSES["cross_entropy"], False, ("weight", "bias"))
    hidden, weight = (x[name].bfloat16().requires_grad_(name == "hidden") for name in ("hidden", "weight"))
    a, b = (x[name].float().requires_grad_() for name in ("a", "b"))
    loss = fastloss.linear_cross_entropy(hidden, weight, TARGET, lora=(a, b, SCALE))
    loss.backward()
    got = loss.detach(), {"hidden": hidden.grad, "weight": None, "bias": None, "a": a.grad, "b": b.grad}
    assert (hidden.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_same(got, want, 2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, weight, a, b = (
            x[name].float().requires_grad_(name != "weight") for name in ("hidden", "weight", "a", "b")
        )
        loss = fastloss.linear_cross_entropy(hidden, weight, TARGET, lora=(a, b, SCALE))
    loss.backward()
    got = loss.detach(), {"hidden": hidden.grad, "weight": None, "bias": None, "a": a.grad, "b": b.grad}
    assert_same(got, want, 2e-2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LOSSES)
def test_adapters_of_float32_in_every_loss(name, backend):
    """Beside a model in bfloat16, whose losses are as without an adapter."""
    want = merged(LOSSES[name], True, ("weight", "bias"))
    x = leaves(torch.bfloat16, ("weight", "bias"))
    x |= {n: numbers()[n].float().to(DEVICE).requires_grad_() for n in ("a", "b")}
    options = {"linear_bias": x["bias"], "backend": need(backend)}
    loss = LOSSES[name](x["hidden"], x["weight"], lora=(x["a"], x["b"], SCALE), **options)
    assert loss.dtype == LOSSES[name](x["hidden"], x["weight"], **options).dtype
    loss.backward()
    assert_same((loss.detach(), {n: x[n].grad for n in NAMES}), want, 4e-2)
    assert (x["hidden"].grad.dtype, x["a"].grad.dtype) == (torch.bfloat16, torch.float32)


def in_two_steps(hidden, weight, a, b):
    """PEFT's forward: what it computes in the adapter's dtype is rounded once."""
    z = torch.nn.functional.linear(hidden, weight)
    u = torch.nn.functional.linear(hidden.to(a.dtype), a)
    return (z + torch.nn.functional.linear(u, b) * SCALE).to(z.dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("of_adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("upcast", [False, True])
def test_is_as_exact_as_two_steps(of_adapter, backend, upcast, monkeypatch):
    """In bfloat16, of every gradient the error against float64 is that of PEFT's own steps or less, whether A and B have the model's
    dtype or, as PEFT leaves them, float32."""
    if upcast and backend != "cpu":
        pytest.skip("only the CPU's kernels convert to float32")
    need(backend)
    monkeypatch.setattr(head_rows, "upcasts", lambda device, dtype: upcast and dtype == torch.bfloat16)
    rows, dim, vocab, rank = 96, 64, 300, 8
    errors = {}
    for seed in range(2):
        x = {
            "hidden": randn(rows, dim, seed=seed).bfloat16(),
            "a": (randn(rank, dim, seed=seed + 10) / dim**0.5).to(of_adapter),
            "b": (randn(vocab, rank, seed=seed + 20) / 10).to(of_adapter),
        }
        weight = (randn(vocab, dim, seed=seed + 30) / dim**0.5).bfloat16().to(DEVICE)
        t = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)

        def gradients(dtype, loss, x=x, weight=weight):
            own = {n: v.to(DEVICE, dtype or v.dtype).clone().requires_grad_() for n, v in x.items()}
            loss(own["hidden"], weight.to(dtype or weight.dtype), own["a"], own["b"]).backward()
            return {n: v.grad.double() for n, v in own.items()}

        def eager(h, w, a, b, t=t):
            return torch.nn.functional.cross_entropy(in_two_steps(h, w, a, b), t)

        def ours(h, w, a, b, t=t):
            return fastloss.linear_cross_entropy(h, w, t, lora=(a, b, SCALE), chunk_size=40, backend=backend)

        exact = gradients(torch.float64, eager)
        for name, loss in (("eager", eager), ("ours", ours)):
            for n, grad in gradients(None, loss).items():
                errors[name, n] = errors.get((name, n), 0.0) + float((grad - exact[n]).square().sum())
    for n in ("hidden", "a", "b"):
        assert errors["ours", n] <= errors["eager", n], (n, errors)


def test_scaled_exponentials_leave_wide_adapters_alone(monkeypatch):
    """A GPU's cross-entropy from scaled exponentials multiplies B as the GEMMs' dtype has it."""
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    x, needs, backend = numbers(), Needs(True, False, True), get_backend(need("cpu"))
    hidden, weight = (x[name].flatten(0, -2).bfloat16() for name in ("hidden", "weight"))
    for dtype, refused in ((torch.bfloat16, False), (torch.float32, True)):
        both = torch.cat([hidden.to(dtype), torch.ones(B * T, RANK, dtype=dtype)], 1)
        head = make_head(backend, both, weight, x["b"].to(dtype), torch.bfloat16)
        with head_exponentials.enabled():
            says = head_exponentials.why_not(head, needs, False, False, ())
        assert says.startswith("a LoRA has more digits") if refused else not says


def test_two_gemms_with_a_frozen_weight():
    """Two of V · D and two thin ones; and explain says which."""
    x = leaves(torch.float32, ("weight", "bias"))
    t = TARGET.clamp(min=0)
    lora = (x["a"], x["b"], SCALE)
    told = fastloss.explain(fastloss.linear_cross_entropy, x["hidden"], x["weight"], t, lora=lora)
    assert (told["gemms"], told["lora_rank"], told["schedule"]) == (2, RANK, "chunks of rows")
    with FlopCounterMode(display=False) as counter:
        fastloss.linear_cross_entropy(x["hidden"], x["weight"], t, lora=lora).backward()
    of_u = 3 * 2 * B * T * DIM * RANK  # X Aᵀ forward, d A, and d u A
    assert counter.get_total_flops() == 2 * 2 * B * T * (DIM + RANK) * VOCAB + of_u


def test_nothing_of_the_vocabulary_times_d_is_made():
    """Neither W + scale · B A nor [W | B], nor a gradient of a frozen W."""
    rows, dim, vocab = 8, 256, 2000
    hidden, weight = torch.randn(rows, dim, requires_grad=True), torch.randn(vocab, dim)
    lora = (torch.randn(RANK, dim, requires_grad=True), torch.randn(vocab, RANK, requires_grad=True), SCALE)
    t = torch.randint(0, vocab, (rows,))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        fastloss.linear_cross_entropy(hidden, weight, t, lora=lora, backend=need("cpu")).backward()
    made = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    logits = rows * vocab * 4
    assert logits <= max(made) < 2 * logits < vocab * dim * 4


@pytest.mark.parametrize(
    "name", ["cross_entropy", "token_stats, three", "supervised", "distillation", "selected_logprobs"]
)
def test_compiled(name):
    loss = LOSSES[name]
    torch._dynamo.reset()
    for with_bias in (False, True):
        x = leaves(torch.float32, ("weight",))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(h, w, a, b, bias):
            return loss(h, w, lora=(a, b, SCALE), linear_bias=bias)

        value = step(x["hidden"], x["weight"], x["a"], x["b"], x["bias"] if with_bias else None)
        value.backward()
        got = value.detach(), {n: x[n].grad for n in NAMES}
        assert_same(got, merged(loss, with_bias, ("weight",)), 3e-5)


def test_gradients_of_gradients():
    x = leaves(torch.float64)

    def loss(h, w, a, b, bias):
        return fastloss.linear_cross_entropy(
            h[0, 2:5], w, TARGET[0, 2:5], lora=(a, b, SCALE), linear_bias=bias
        )

    torch.autograd.gradgradcheck(loss, [x[n] for n in ("hidden", "weight", "a", "b", "bias")], fast_mode=True)
    torch.autograd.gradcheck(loss, [x[n] for n in ("hidden", "weight", "a", "b", "bias")], fast_mode=True)


def test_torch_func():
    x = {name: value.to(DEVICE) for name, value in numbers().items()}

    def loss(a, b):
        return fastloss.linear_cross_entropy(x["hidden"], x["weight"], TARGET, lora=(a, b, SCALE))

    got = torch.func.grad(loss, argnums=(0, 1))(x["a"], x["b"])
    want = merged(LOSSES["cross_entropy"], False)[1]
    for grad, name in zip(got, ("a", "b"), strict=True):
        torch.testing.assert_close(grad, want[name])


def test_one_hidden_state_and_retained_graphs():
    x = leaves(torch.float64)
    one = fastloss.linear_cross_entropy(
        x["hidden"][0, 3], x["weight"], TARGET[0, 3], lora=(x["a"], x["b"], SCALE)
    )
    want = torch.nn.functional.cross_entropy(
        x["hidden"][0, 3] @ (x["weight"] + SCALE * x["b"] @ x["a"]).T, TARGET[0, 3]
    )
    torch.testing.assert_close(one, want)
    first = torch.autograd.grad(one, [x["a"], x["b"]], retain_graph=True)
    for got, expected in zip(torch.autograd.grad(one, [x["a"], x["b"]]), first, strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(torch.autograd.grad(want, [x["a"], x["b"]]), first, strict=True):
        torch.testing.assert_close(got, expected)


def test_nobody_computes_an_ignored_row():
    """NaN in the hidden state of an ignored token reaches no gradient of the adapter."""
    x = leaves(torch.float32, ("weight", "bias"))
    hidden = x["hidden"].detach().clone()
    hidden[:, :2] = float("nan")
    a = x["a"].detach()
    loss = fastloss.linear_cross_entropy(hidden, x["weight"], TARGET, lora=(hidden @ a.T, x["b"]))
    loss.backward()
    assert loss.isfinite() and x["b"].grad.isfinite().all()


def test_the_module_of_a_head():
    x = leaves(torch.float32)
    head = fastloss.nn.LinearHead(DIM, VOCAB).to(DEVICE)
    lora = (x["a"], x["b"], SCALE)
    weight = head.weight + SCALE * x["b"] @ x["a"]
    want = x["hidden"] @ weight.T
    torch.testing.assert_close(head(x["hidden"], lora=lora), want, atol=1e-5, rtol=1e-5)
    loss = head(x["hidden"], TARGET, lora=lora)
    exact = torch.nn.functional.cross_entropy(want.flatten(0, 1), TARGET.flatten())
    torch.testing.assert_close(loss, exact, atol=1e-5, rtol=1e-5)
    stats = head(x["hidden"], TARGET.clamp(min=0), stats=("logprobs",), lora=lora)
    exact = want.log_softmax(-1).gather(-1, TARGET.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(stats.logprobs, exact, atol=1e-5, rtol=1e-5)


def call(**changed):
    x = {**{name: value.float().to(DEVICE) for name, value in numbers().items()}, **changed}
    lora = x.get("lora", (x["a"], x["b"], SCALE))
    return fastloss.linear_cross_entropy(x["hidden"], x["weight"], TARGET, lora=lora)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"a": torch.zeros(RANK, DIM + 1)}, rf"lora's A: expected shape \[{RANK}, {DIM}\]"),
        ({"a": torch.zeros(RANK + 1, DIM)}, rf"lora's A: expected shape \[{RANK}, {DIM}\]"),
        ({"b": torch.zeros(VOCAB - 1, RANK)}, rf"lora's B: expected shape \[{VOCAB}, r\]"),
        ({"b": torch.zeros(VOCAB, 0), "a": torch.zeros(0, DIM)}, "lora's B: expected shape"),
        ({"a": torch.zeros(RANK, DIM, dtype=torch.int64)}, "lora's A: expected float32"),
        ({"lora": torch.zeros(3)}, r"lora: expected \(A, B, scale\) or \(u, B\), got Tensor"),
        ({"lora": (torch.zeros(RANK, DIM),)}, "lora: expected .* got 1 entries"),
        (
            {"lora": (torch.zeros(RANK, DIM), torch.zeros(VOCAB, RANK), "1")},
            "lora's scale: expected a number",
        ),
        ({"lora": (torch.zeros(B, T + 1, RANK), torch.zeros(VOCAB, RANK))}, "lora's u: expected shape"),
    ],
)
def test_what_does_not_fit_is_named(changed, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call(**changed)


def test_what_is_not_there_yet_says_so():
    hidden, weight = torch.zeros(3, 8), torch.zeros(5, 2, 8)
    lora = (torch.zeros(2, 8), torch.zeros(5, 2), 1.0)
    with pytest.raises(ValueError, match="lora: expected one matrix"):
        fastloss.linear_cross_entropy(hidden, weight, torch.zeros(3, 2, dtype=torch.int64), lora=lora)
    kept, t = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="lora: expected None beside support"):
        fastloss.linear_token_stats(hidden, weight[:, 0], t, lora=lora, support=kept)
    # What is one operand inside is none outside.
    with pytest.raises(ValueError, match="input: expected equal input"):
        fastloss.linear_cross_entropy(torch.zeros(3, 10), weight[:, 0], t, linear_bias=torch.zeros(5, 2))


def test_every_head_has_it():
    """A loss from a head takes a lora, and this file tries it."""
    from inspect import signature

    heads = {name for name in fastloss.__all__ if name.startswith("linear_")}
    without = {n for n in heads if "lora" not in signature(getattr(fastloss, n)).parameters}
    # These hand their options to linear_preference_loss.
    assert without == {"linear_dpo_loss", "linear_simpo_loss", "linear_cpo_loss", "linear_orpo_loss"}
    tried = {"dpo": "preference"}
    names = {tried.get(n, n) for n in (key.split(",")[0] for key in LOSSES)}
    assert {n.removeprefix("linear_").removesuffix("_loss") for n in heads - without} == {
        n.removesuffix("_loss") for n in names
    }


def test_the_page():
    """The examples of docs/lora.md: B begins at 0, so that the loss is the head's own and d A is 0."""
    page = Path(__file__).resolve().parents[2] / "docs" / "lora.md"
    names = {}
    with torch.random.fork_rng():
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        for block in blocks:
            exec(compile(block, page.name, "exec"), names)
    assert len(blocks) == 2
    exact = torch.nn.functional.cross_entropy(names["head"](names["hidden"]), names["target"])
    torch.testing.assert_close(names["loss"], exact)
    assert names["head"].weight.grad is None
    assert not names["A"].grad.any() and names["B"].grad.any()
